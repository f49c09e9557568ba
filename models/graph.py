"""What an ONNX graph says of itself: which module a node comes from, and in which precision it multiplies.

Read from the graph alone, never from what somebody asked for: a graph that is called INT8 and has no integer product
in it is found out here.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx

MODULE = "module"
"""Key of a node's metadata: the path of the PyTorch module that it computes, as in `state_dict`."""

EXPORTER_SCOPES = "pkg.torch.onnx.name_scopes"
"""Key under which torch.onnx keeps the modules around an operator: outermost first, the operator itself last."""

PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm", "ConvInteger", "MatMulInteger", "MatMulNBits", "Attention")
"""Operators whose multiply-accumulates are counted. torch.onnx writes einsum as MatMul; what multiplies element by
element is no product."""


@dataclass(frozen=True)
class Product:
    """One node that multiplies: its module, its precision in words, and its multiply-accumulates for one example."""

    node: str
    module: str
    precision: str
    macs: int


def name_modules(model: onnx.ModelProto) -> None:
    """Leave of every node's metadata only the module that it comes from, in place.

    A weight names its module best: batch norm that was folded into a convolution has left its own scope on the node.
    The rest of the metadata are source paths and stack traces of the machine that exported.
    """
    for node in model.graph.node:
        scopes = {entry.key: entry.value for entry in node.metadata_props}.get(EXPORTER_SCOPES, "[]")
        around = [str(scope) for scope in ast.literal_eval(scopes)][:-1]
        # What the exporter made itself has a name with an underscore.
        inner = [scope for scope in around[::-1] if not scope.startswith("_")]
        module = next(iter(owners_of(node) + inner), "")
        del node.metadata_props[:]
        if module:
            node.metadata_props.add(key=MODULE, value=module)


def carry_modules(source: onnx.ModelProto, target: onnx.ModelProto) -> None:
    """Name the modules of `target`, which somebody made of `source` and whose metadata they may have dropped, in place.

    Nodes are matched by what they put out: ONNX Runtime's fusions keep the names of tensors, and not always the rest.
    """
    modules = {name: module_of(node) for node in source.graph.node for name in node.output}
    for node in target.graph.node:
        module = module_of(node) or next((modules[name] for name in node.output if modules.get(name)), "")
        del node.metadata_props[:]
        if module:
            node.metadata_props.add(key=MODULE, value=module)


def at_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """A copy whose operators are those of at least this opset, by onnx's converter; modules are still named."""
    import copy

    import onnx

    found = next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
    if found >= opset:
        return copy.deepcopy(model)
    converted: onnx.ModelProto = onnx.version_converter.convert_version(model, opset)
    carry_modules(model, converted)
    return converted


def module_of(node: onnx.NodeProto) -> str:
    """The path of the module that a node comes from, empty where the graph does not say.

    It is the owner of the node's weights, which keep their names through optimizers whose new nodes have no note of
    export; else what export has noted.
    """
    noted = [str(entry.value) for entry in node.metadata_props if entry.key == MODULE]
    return next(iter(owners_of(node) + noted), "")


def owners_of(node: onnx.NodeProto) -> list[str]:
    """The modules whose weights a node reads, by the names of the weights."""
    parts = (name.rpartition(".") for name in node.input)
    return [owner for owner, _, kind in parts if owner and kind in ("weight", "bias")]


def products_of(path: Path, inputs: Mapping[str, np.ndarray], threads: int = 1) -> list[Product]:
    """Every node of an ONNX file that multiplies, in graph order, with shapes from a real run on `inputs`.

    `inputs` is one example as the file takes it. A file `<name>.probe` stands beside it meanwhile, so that weights in
    a second file are found and not read twice.

    Raises:
        RuntimeInferenceError: ONNX Runtime cannot run the file.
    """
    import onnx

    from models.runtimes.onnxruntime_session import OnnxRuntimeSession

    model = onnx.load(str(path), load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type in PRODUCTS]
    constants = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    asked = {name for node in nodes for name in (*node.input[:3], node.output[0]) if name} - set(constants)
    shown = sorted(asked - set(inputs))
    if not shown:
        return []
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in shown)
    probe = path.with_name(f"{path.name}.probe")
    try:
        onnx.save(model, probe)
        with OnnxRuntimeSession(probe, threads=threads, optimization="none") as session:
            values = dict(inputs) | session.infer(inputs)
    finally:
        probe.unlink(missing_ok=True)
    shapes = constants | {name: tuple(value.shape) for name, value in values.items()}
    precisions = Precisions(model)
    return [
        Product(
            node.name,
            module_of(node),
            precisions.of(node, str(values[node.output[0]].dtype)),
            macs_of(node, [shapes.get(name, ()) for name in node.input], shapes[node.output[0]]),
        )
        for node in nodes
    ]


def macs_of(node: onnx.NodeProto, inputs: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    """Multiply-accumulates of a node, given the shapes of its inputs and its output.

    Conv weights are (out, in / groups, …), those of ConvTranspose (in, out / groups, …); MatMul sums over the last
    axis of its first input, and so does Gemm, unless transA; MatMulNBits has the width of that axis as attribute K.
    """
    if node.op_type in ("Conv", "ConvInteger"):
        return math.prod(output) * math.prod(inputs[1][1:])
    if node.op_type == "ConvTranspose":
        return math.prod(inputs[0]) * math.prod(inputs[1][1:])
    if node.op_type == "Attention":  # query, key, value: (batch, heads, length, width); Q·Kᵀ, then the sum over V
        query, key, value = inputs[:3]
        return math.prod(query) * key[-2] + math.prod(query[:-1]) * key[-2] * value[-1]
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return math.prod(output) * inputs[0][0 if transposed else -1]


class Precisions:
    """In which precision the products of a graph are, by the operators and types around them."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.makers = {name: node for node in model.graph.node for name in node.output}
        self.types: dict[str, int] = {tensor.name: tensor.data_type for tensor in model.graph.initializer}

    def of(self, node: onnx.NodeProto, output_dtype: str) -> str:
        """`int8`, `fp8`, `int4` …: both factors are; `int4-weights`: the second only; else the float type of its
        output."""
        if node.op_type.endswith("Integer"):
            return "int8"
        if node.op_type == "MatMulNBits":
            return f"int{next(attribute.i for attribute in node.attribute if attribute.name == 'bits')}-weights"
        factors = [self.dequantized(name) for name in node.input[:2]]
        if all(factors):
            return max(factors, key=lambda word: ("int4", "fp8", "int8", "int16").index(word))
        if factors[1]:
            return f"{factors[1]}-weights"
        return {"float32": "fp32", "float16": "fp16", "float64": "fp64", "bfloat16": "bf16"}[output_dtype]

    def dequantized(self, name: str) -> str:
        """The narrow type that a tensor was stored in, in words; empty where it was none."""
        maker = self.makers.get(name)
        if maker is None or maker.op_type != "DequantizeLinear":
            return ""
        return narrow_types().get(self.stored(maker.input[0], maker), "")

    def stored(self, name: str, dequantizer: onnx.NodeProto) -> int:
        """The ONNX type of what a DequantizeLinear reads: that of a constant, or of its zero point (UINT8 without)."""
        if name in self.types:
            return int(self.types[name])
        points: list[Any] = [one.input[2] for one in (dequantizer, self.makers.get(name)) if one and len(one.input) > 2]
        return next((int(self.types[point]) for point in points if point in self.types), 2)  # 2: TensorProto.UINT8


def narrow_types() -> dict[int, str]:
    """ONNX tensor type → word."""
    from onnx import TensorProto

    return {
        TensorProto.INT8: "int8", TensorProto.UINT8: "int8", TensorProto.INT16: "int16", TensorProto.UINT16: "int16",
        TensorProto.INT4: "int4", TensorProto.UINT4: "int4",
        TensorProto.FLOAT8E4M3FN: "fp8", TensorProto.FLOAT8E5M2: "fp8",
    }  # fmt: skip


def shares_of(products: list[Product]) -> dict[str, float]:
    """Precision → share of all multiply-accumulates, largest first; empty where nothing multiplies."""
    total = sum(product.macs for product in products)
    sums: dict[str, int] = {}
    for product in products:
        sums[product.precision] = sums.get(product.precision, 0) + product.macs
    return {name: sums[name] / total for name in sorted(sums, key=lambda name: (-sums[name], name))} if total else {}
