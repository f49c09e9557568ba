"""Changes of a graph that make a target take it. Each keeps what the graph computes, to rounding; the caller measures
that before and after."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from models.engines.check import Finding, check_graph_for
from models.engines.targets import MendName, Target
from models.graph import module_of

if TYPE_CHECKING:
    import numpy as np
    import onnx

FP16_SCALES_FROM_OPSET = 19
"""From this opset on DequantizeLinear may give FP16, where its scale is FP16."""


SMALLEST_FP16 = 2.0**-14
"""The smallest number that FP16 holds with all of its digits (IEEE 754 binary16)."""


@dataclass(frozen=True)
class Mended:
    """What was done: the mend, the nodes, the modules of the network that they come from, and what would have made it
    unnecessary."""

    mend: MendName
    what: str
    fix: str
    nodes: tuple[str, ...]
    modules: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.what} ({len(self.nodes)} nodes)"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


WORDS: Mapping[MendName, str] = {
    "float-bias": "INT32 biases became floats",
    "symmetric": "zero points became 0",
    "resize-by-products": "antialiased resizes became two matrix products each",
    "products-in-fp16": "FP32 matrix products became FP16",
}


def mend_for(model: onnx.ModelProto, target: Target) -> tuple[onnx.ModelProto, list[Mended], list[Finding]]:
    """(a graph for the target, what was mended, what is left that it does not take); `model` itself is not changed."""
    findings = check_graph_for(model, target)
    nodes: dict[MendName, list[str]] = {}
    fixes = {one.mend: one.fix for one in findings}
    for one in findings:
        if one.mend is not None and one.node not in nodes.setdefault(one.mend, []):
            nodes[one.mend].append(one.node)
    if not nodes:
        return model, [], findings
    mended = copy.deepcopy(model)
    done = []
    modules = {node.name: module_of(node) for node in model.graph.node}
    for mend, names in nodes.items():
        changed = MENDS[mend](mended, names)
        if changed:
            touched = tuple(dict.fromkeys(modules[name] for name in changed if modules[name]))
            done.append(Mended(mend, WORDS[mend], fixes[mend], tuple(changed), touched))
    del mended.graph.value_info[:]
    return mended, done, check_graph_for(mended, target)


def constants_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Initializers by name."""
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def add_constant(model: onnx.ModelProto, name: str, value: np.ndarray) -> str:
    """Add an initializer, where there is none of this name; its name."""
    from onnx import numpy_helper

    if all(tensor.name != name for tensor in model.graph.initializer):
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def drop_unread_constants(model: onnx.ModelProto) -> None:
    """Initializers that no node reads any more."""
    read = {name for node in model.graph.node for name in node.input} | {one.name for one in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def along_axis(values: np.ndarray, like: np.ndarray, node: onnx.NodeProto) -> np.ndarray:
    """Scales or zero points a channel, shaped to go with the tensor that they belong to."""
    if values.ndim != 1 or like.ndim < 1:
        return values
    axis = next((one.i for one in node.attribute if one.name == "axis"), 1) % like.ndim
    return values.reshape([-1 if index == axis else 1 for index in range(like.ndim)])


def float_biases(model: onnx.ModelProto, names: Sequence[str]) -> list[str]:
    """Fold each INT32 constant and its scale into a float constant: exact to a rounding of FP32."""
    constants = constants_of(model)
    done = []
    for node in [one for one in model.graph.node if one.name in set(names)]:
        quantized, scale = constants.get(node.input[0]), constants.get(node.input[1])
        if quantized is None or scale is None:
            continue
        zero = constants.get(node.input[2]) if len(node.input) > 2 else None
        shifted = quantized.astype("float64")
        if zero is not None:
            shifted = shifted - along_axis(zero.astype("float64"), quantized, node)
        value = (shifted * along_axis(scale.astype("float64"), quantized, node)).astype(scale.dtype)
        add_constant(model, node.output[0], value)
        model.graph.node.remove(node)
        done.append(node.name)
    drop_unread_constants(model)
    return done


def symmetric(model: onnx.ModelProto, names: Sequence[str]) -> list[str]:
    """Zero points of 0, in INT8.

    A zero point in the middle (128 of UINT8) only shifts the numbers, exactly. Any other one moves the range to one
    around 0 that holds it, whose steps are up to twice as wide: what that costs is the caller's to measure.
    """
    constants = constants_of(model)
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    makers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    done: list[str] = []
    for node in model.graph.node:
        if node.name not in names or node.name in done:
            continue
        if node.op_type == "QuantizeLinear":
            done += symmetric_activation(model, node, readers[node.output[0]], constants)
        elif node.input[0] in constants:
            done += symmetric_weight(model, node, constants)
        elif node.input[0] in makers and makers[node.input[0]].op_type == "QuantizeLinear":
            maker = makers[node.input[0]]
            done += symmetric_activation(model, maker, readers[maker.output[0]], constants)
    drop_unread_constants(model)
    return [name for name in dict.fromkeys(done) if name in names]


def symmetric_activation(
    model: onnx.ModelProto,
    quantize: onnx.NodeProto,
    readers: Sequence[onnx.NodeProto],
    constants: Mapping[str, np.ndarray],
) -> list[str]:
    """One quantized tensor and all that read it; nothing where it is read by anything but DequantizeLinear."""
    import numpy as np

    same = [one for one in readers if one.op_type == "DequantizeLinear" and one.input[1:] == quantize.input[1:]]
    scale = constants.get(quantize.input[1])
    zero = constants.get(quantize.input[2]) if len(quantize.input) > 2 else None
    if len(same) != len(readers) or scale is None or zero is None:
        return []
    limits = np.iinfo(zero.dtype)
    low, high = (limits.min - zero.astype("f8")), (limits.max - zero.astype("f8"))
    exact = zero.dtype == np.uint8 and bool((zero == 128).all())
    new = scale if exact else (scale * np.maximum(-low, high) / 127).astype(scale.dtype)
    for node in (quantize, *same):
        node.input[1] = add_constant(model, f"{quantize.input[1]}_symmetric_{quantize.input[2]}", new)
        node.input[2] = add_constant(model, f"{quantize.input[2]}_symmetric", np.zeros(zero.shape, np.int8))
    return [quantize.name, *(one.name for one in same)]


def symmetric_weight(
    model: onnx.ModelProto, dequantize: onnx.NodeProto, constants: Mapping[str, np.ndarray]
) -> list[str]:
    """One quantized constant, quantized anew where the zero point is not the middle."""
    import numpy as np

    quantized, scale = constants[dequantize.input[0]], constants.get(dequantize.input[1])
    zero = constants.get(dequantize.input[2]) if len(dequantize.input) > 2 else None
    if scale is None or zero is None:
        return []
    shifted = quantized.astype("f8") - along_axis(zero.astype("f8"), quantized, dequantize)
    factor = np.ones_like(scale)
    if not (zero.dtype == np.uint8 and bool((zero == 128).all())):
        rest = tuple(axis for axis, size in enumerate(along_axis(scale, quantized, dequantize).shape) if size == 1)
        largest = np.abs(shifted).max(axis=rest if scale.ndim else None)
        factor = (np.maximum(largest, 1e-12) / 127).reshape(scale.shape)
    name = dequantize.input[0]
    wide = along_axis(factor, quantized, dequantize)
    rounded = np.clip(np.rint(shifted / wide), -128, 127).astype(np.int8)
    dequantize.input[0] = add_constant(model, f"{name}_symmetric", rounded)
    dequantize.input[1] = add_constant(model, f"{name}_symmetric_scale", (scale * factor).astype(scale.dtype))
    dequantize.input[2] = add_constant(model, f"{name}_symmetric_zero", np.zeros(zero.shape, np.int8))
    return [dequantize.name]


def resizes_by_products(model: onnx.ModelProto, names: Sequence[str]) -> list[str]:
    """Height and width by a constant matrix each: what an antialiased resize of a fixed size is.

    The matrices are what ONNX Runtime makes of the identity. Only where both sizes are known before a run.
    """
    import onnx

    dims = {
        value.name: [one.dim_value for one in value.type.tensor_type.shape.dim]
        for graph in (onnx.shape_inference.infer_shapes(model, data_prop=True).graph,)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    done = []
    for node in [one for one in model.graph.node if one.name in set(names)]:
        before, after = dims.get(node.input[0], []), dims.get(node.output[0], [])
        if len(before) != 4 or len(after) != 4 or not all((*before[2:], *after[2:])):
            continue
        rows = add_constant(model, f"{node.name}_rows", resize_matrix(model, node, before[2], after[2]))
        columns = add_constant(model, f"{node.name}_columns", resize_matrix(model, node, before[3], after[3]).T)
        index = list(model.graph.node).index(node)
        model.graph.node.remove(node)
        half = f"{node.name}_half"
        products = (([node.input[0], columns], half), ([rows, half], node.output[0]))
        for offset, (inputs, output) in enumerate(products):
            made = onnx.helper.make_node("MatMul", inputs, [output], f"{node.name}_product_{offset}")
            made.metadata_props.extend(node.metadata_props)
            model.graph.node.insert(index + offset, made)
        done.append(node.name)
    drop_unread_constants(model)
    return done


def resize_matrix(model: onnx.ModelProto, node: onnx.NodeProto, before: int, after: int) -> np.ndarray:
    """float32 (after, before): what a Resize does along one axis, from its own answer to the identity."""
    import numpy as np
    import onnx
    import onnxruntime

    probe = copy.deepcopy(node)
    del probe.input[:], probe.output[:]
    probe.input.extend(["identity", "", "", "sizes"])
    probe.output.append("resized")
    kept = [one for one in probe.attribute if one.name not in ("axes", "keep_aspect_ratio_policy")]
    del probe.attribute[:]
    probe.attribute.extend(kept)
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [probe],
        "resize",
        [onnx.helper.make_tensor_value_info("identity", float32, [1, 1, before, before])],
        [onnx.helper.make_tensor_value_info("resized", float32, [1, 1, after, before])],
        [onnx.numpy_helper.from_array(np.array([1, 1, after, before], np.int64), "sizes")],
    )
    alone = onnx.helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)
    session = onnxruntime.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
    resized = session.run(["resized"], {"identity": np.eye(before, dtype=np.float32)[None, None]})[0]
    return np.asarray(resized[0, 0], np.float32)


def products_in_fp16(model: onnx.ModelProto, names: Sequence[str]) -> list[str]:
    """Each of the products between casts to FP16 and back; constants and dequantized inputs are FP16 at once, so that
    an INT8 product stays one."""
    import numpy as np
    import onnx

    float16, float32 = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    opset = next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
    constants = constants_of(model)
    makers = {output: node for node in model.graph.node for output in node.output}
    wanted: Collection[str] = set(names)
    nodes: list[onnx.NodeProto] = []
    known: dict[str, str] = {}

    def in_fp16(name: str) -> str:
        """The name of the same tensor in FP16, made once."""
        if name in known:
            return known[name]
        maker, new = makers.get(name), f"{name}_fp16"
        if name in constants:
            largest = float(np.finfo(np.float16).max)
            add_constant(model, new, np.clip(constants[name], -largest, largest).astype(np.float16))
        elif maker is not None and opset >= FP16_SCALES_FROM_OPSET and has_fp16_scale(maker, constants):
            twin = copy.deepcopy(maker)
            twin.name, twin.output[0] = f"{maker.name}_fp16", new
            scale = constants[maker.input[1]].astype(np.float16)
            twin.input[1] = add_constant(model, f"{maker.input[1]}_fp16", scale)
            nodes.append(twin)
        else:
            nodes.append(onnx.helper.make_node("Cast", [name], [new], f"{new}_cast", to=float16))
        known[name] = new
        return new

    for node in model.graph.node:
        if node.name not in wanted:
            nodes.append(node)
            continue
        product = copy.deepcopy(node)
        for index, name in enumerate(node.input):
            product.input[index] = in_fp16(name) if name else name
        product.output[0] = f"{node.output[0]}_in_fp16"
        back = onnx.helper.make_node("Cast", [product.output[0]], [node.output[0]], f"{node.name}_cast", to=float32)
        nodes += [product, back]
    kept = read_only([*nodes], {one.name for one in model.graph.output})
    del model.graph.node[:]
    model.graph.node.extend(kept)
    drop_unread_constants(model)
    return list(names)


def has_fp16_scale(maker: onnx.NodeProto, constants: Mapping[str, np.ndarray]) -> bool:
    """Whether a node dequantizes by a constant scale that FP16 holds with all of its digits."""
    scale = constants.get(maker.input[1]) if maker.op_type == "DequantizeLinear" else None
    return scale is not None and bool((scale >= SMALLEST_FP16).all())


def read_only(nodes: Sequence[onnx.NodeProto], outputs: Collection[str]) -> list[onnx.NodeProto]:
    """The nodes whose results are read: a pair whose only reader moved to its twin goes."""
    read = set(outputs)
    kept: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if any(name in read for name in node.output):
            kept.append(node)
            read.update(node.input)
    return kept[::-1]


MENDS: Mapping[MendName, Callable[[onnx.ModelProto, Sequence[str]], list[str]]] = {
    "float-bias": float_biases,
    "symmetric": symmetric,
    "resize-by-products": resizes_by_products,
    "products-in-fp16": products_in_fp16,
}
