"""FP8 (E4M3) in the place of INT8: the same quantize-dequantize pairs, with other scales and a floating zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

LARGEST_INT8 = 127.0
"""What a symmetric INT8 scale spreads the largest magnitude over."""

LARGEST_FP8 = 448.0
"""The largest finite E4M3 number (Micikevicius et al. 2022, arXiv:2209.05433)."""


def fp8_from_int8(quantized: onnx.ModelProto, model: onnx.ModelProto) -> onnx.ModelProto:
    """`quantized` with every symmetric INT8 tensor in FP8, in place; `model` is the graph that it was made of.

    A scale spreads the largest magnitude over 448 in the place of 127; weights are rounded anew from `model`'s, so that
    no number is rounded twice. Which tensors have pairs, and scales a channel or a tensor, stay as they are: ModelOpt
    goes the same way (its `int8_to_fp8`).
    """
    import ml_dtypes
    import numpy as np
    from onnx import TensorProto, numpy_helper

    from models.engines.mends import along_axis

    floats = {tensor.name: tensor for tensor in model.graph.initializer}
    tensors = {tensor.name: tensor for tensor in quantized.graph.initializer}
    pairs = [node for node in quantized.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for name in sorted({name for node in pairs for name in node.input[1:2]}):
        scale = numpy_helper.to_array(tensors[name])
        tensors[name].CopyFrom(numpy_helper.from_array(scale * scale.dtype.type(LARGEST_INT8 / LARGEST_FP8), name))
    for name in sorted({name for node in pairs for name in node.input[2:3]}):
        zeros = np.zeros(tuple(tensors[name].dims), ml_dtypes.float8_e4m3fn)
        tensors[name].CopyFrom(numpy_helper.from_array(zeros, name))
    for node in pairs:
        tensor = tensors.get(node.input[0])
        if node.op_type == "DequantizeLinear" and tensor is not None and tensor.data_type == TensorProto.INT8:
            name = tensor.name
            wide = numpy_helper.to_array(floats[name.removesuffix("_quantized")])
            scale = along_axis(numpy_helper.to_array(tensors[node.input[1]]), wide, node)
            narrow = np.clip(wide / scale, -LARGEST_FP8, LARGEST_FP8).astype(ml_dtypes.float8_e4m3fn)
            tensor.CopyFrom(numpy_helper.from_array(narrow, name))
    keep_relus(quantized)
    return quantized


def keep_relus(model: onnx.ModelProto) -> None:
    """Relu before an FP8 tensor becomes a Clip from 0, in place: ONNX Runtime (1.31) drops a Relu before any
    QuantizeLinear that it does not know, and gives wrong numbers without a word."""
    import numpy as np

    from models.engines.mends import add_constant

    read = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for node in model.graph.node:
        if node.op_type == "Relu" and node.output[0] in read:
            node.op_type = "Clip"
            node.input.append(add_constant(model, "relu_from", np.zeros((), np.float32)))
