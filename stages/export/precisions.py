"""An FP32 graph → the same graph in another float, and what stands in for one that does not run here."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from models.errors import ExportError
from models.graph import at_opset
from models.onnx_files import is_light, load_weights

if TYPE_CHECKING:
    import onnx

FloatPrecision = Literal["fp32", "fp16", "bf16"]

KEPT_IN_FP16 = ("LayerNormalization", "Cast")
"""Operators that stay in FP32 beside those of the converter's own list."""

KEPT_IN_BF16 = (*KEPT_IN_FP16, "Softmax", "BatchNormalization", "InstanceNormalization", "GroupNormalization",
                "ReduceMean", "ReduceSum")  # fmt: skip
"""The same for BF16, whose sums lose twenty times as much: 8 bits of significand against 11."""

OPSET_OF_BF16 = 22
"""The first opset whose convolutions, poolings and activations take BF16."""


def fp32_from_fp32(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The graph as it is."""
    return model


def fp16_from_fp32(
    model: onnx.ModelProto, folder: Path = Path(), kept: Collection[str] = KEPT_IN_FP16
) -> onnx.ModelProto:
    """Half-precision weights and arithmetic; inputs and outputs keep their dtypes, operators in `kept` stay in FP32.

    `folder` is where the weights of a light graph lie. Shapes are inferred without them: in memory that takes no graph
    above 2 GB.
    """
    import onnx
    from onnxruntime.transformers import float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    whole = onnx.shape_inference.infer_shapes(model)  # a copy
    load_weights(whole, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of every value that half precision rounds to zero
        converted: onnx.ModelProto = float16.convert_float_to_float16(
            whole, keep_io_types=True, disable_shape_infer=True,
            op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, *kept],
        )  # fmt: skip
    drop_repeated_casts(converted)
    OnnxModel(converted).topological_sort()  # the converter appends its casts at the end
    del converted.graph.value_info[:]
    return converted


def bf16_from_fp32(model: onnx.ModelProto, folder: Path = Path()) -> onnx.ModelProto:
    """BF16 weights and arithmetic; norms, sums, softmax, and operators that have no BF16 form stay in FP32.

    The converter to FP16 decides what is converted and where casts go; then every FP16 becomes BF16, with the weights
    rounded from FP32 and never from FP16, whose range is smaller.

    Raises:
        ExportError: the graph is above 2 GB, which onnx's conversion to a later opset does not take, or has an operator
            that it does not take.
    """
    from onnx import TensorProto

    if is_light(model):
        raise ExportError("BF16 is not made of a graph above 2 GB; take bf16 out of export.precisions")
    with refusals_of_bf16():
        wide = at_opset(model, OPSET_OF_BF16)
        converted = fp16_from_fp32(wide, folder, [*KEPT_IN_BF16, *without_bf16(wide)])
    originals = {tensor.name: tensor for tensor in tensors_of(wide).values()}
    for name, tensor in tensors_of(converted).items():
        if tensor.data_type == TensorProto.FLOAT16:
            retype(tensor, originals.get(name, tensor), TensorProto.BFLOAT16)
    for node in converted.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.BFLOAT16
    return converted


@contextmanager
def refusals_of_bf16() -> Iterator[None]:
    """Raises `ExportError` for what onnx raises inside, on the way to BF16."""
    import onnx

    try:
        yield
    except (
        onnx.version_converter.ConvertError,
        onnx.shape_inference.InferenceError,
        onnx.checker.ValidationError,
        onnx.defs.SchemaError,
        RuntimeError,  # its converter's assertions
    ) as error:
        said = " ".join(str(error).split())
        raise ExportError(
            f"this network is not converted to BF16: {said}; take bf16 out of export.precisions"
        ) from error


CONVERTERS: Mapping[FloatPrecision, Callable[[onnx.ModelProto, Path], onnx.ModelProto]] = {
    "fp32": fp32_from_fp32,
    "fp16": fp16_from_fp32,
    "bf16": bf16_from_fp32,
}


def without_bf16(model: onnx.ModelProto) -> list[str]:
    """The graph's operators that take FP32 at its opset, and no BF16."""
    import onnx

    opset = next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
    found = []
    for name in sorted({node.op_type for node in model.graph.node if node.domain in ("", "ai.onnx")}):
        kinds = [set(one.allowed_type_strs) for one in onnx.defs.get_schema(name, opset).type_constraints]
        if any("tensor(float)" in kind and "tensor(bfloat16)" not in kind for kind in kinds):
            found.append(name)
    return found


def drop_repeated_casts(model: onnx.ModelProto) -> None:
    """One cast a tensor: the converter adds one for each kept node that reads it, all under one name.

    Layer norms share a weight where the exporter found theirs to be equal (zero biases).
    """
    seen: set[str] = set()
    nodes = []
    for node in model.graph.node:
        if node.op_type != "Cast" or node.output[0] not in seen:
            nodes.append(node)
        seen.update(node.output)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def tensors_of(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Every constant: initializers by their names, those in attributes by their node's result and the attribute."""
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                found[f"{node.output[0]}.{attribute.name}"] = attribute.t
    return found


def retype(tensor: onnx.TensorProto, source: onnx.TensorProto, data_type: int) -> None:
    """Give `tensor` the values of `source` in another float type, in place."""
    import onnx

    dtype = onnx.helper.tensor_dtype_to_np_dtype(data_type)
    values = onnx.numpy_helper.to_array(source).astype(dtype)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


# --- where BF16 does not run --------------------------------------------------------------------------


def rounded_in_fp32(model: onnx.ModelProto) -> onnx.ModelProto:
    """A BF16 graph as an FP32 graph that rounds every result to BF16: the same numbers but for the order of sums, on a
    runtime that has no BF16 arithmetic but can cast.

    Products are summed in FP32 and rounded once, as tensor cores do. Names of tensors and nodes stay.

    Raises:
        ExportError: the type of a result is not known, or the graph is not valid.
    """
    import onnx
    from onnx import TensorProto

    types = types_of(model)
    result = copy.deepcopy(model)
    for tensor in tensors_of(result).values():
        if tensor.data_type == TensorProto.BFLOAT16:
            retype(tensor, tensor, TensorProto.FLOAT)
    nodes = []
    for node in result.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name and types[name] == TensorProto.BFLOAT16:
                node.output[index] = f"{name}_wide"
                nodes += list(rounding(f"{name}_wide", name))
    made = [copy.deepcopy(node) for node in nodes]
    del result.graph.node[:], result.graph.value_info[:]
    result.graph.node.extend(made)
    with refusals_of_bf16():
        onnx.checker.check_model(result)
    return result


def rounding(before: str, after: str) -> Iterator[onnx.NodeProto]:
    """FP32 → BF16 → FP32."""
    from onnx import TensorProto, helper

    yield helper.make_node("Cast", [before], [f"{after}_narrow"], f"{after}_to_bf16", to=TensorProto.BFLOAT16)
    yield helper.make_node("Cast", [f"{after}_narrow"], [after], f"{after}_to_fp32", to=TensorProto.FLOAT)


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """Result → its ONNX type, by onnx's own inference. Raises `ExportError` where one is not known."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    unknown = [name for node in model.graph.node for name in node.output if name and not types.get(name)]
    if unknown:
        raise ExportError(
            f"the type of {unknown[0]} is unknown: BF16 is not compared; take bf16 out of export.precisions"
        )
    return types
