"""INT4 weights in blocks with a scale each; activations stay in floating point. ONNX Runtime's quantizer rounds."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal

from models.graph import at_opset, carry_modules
from stages.quantize.qdq import compute_nodes

if TYPE_CHECKING:
    import onnx

BlockForm = Literal["operators", "pairs"]
"""`operators`: MatMulNBits and GatherBlockQuantized, ONNX Runtime's own, with a zero point a block, multiplied in INT8
where the processor is faster so (accuracy level 4). `pairs`: DequantizeLinear with symmetric INT4 before a plain
MatMul, which is standard ONNX and what TensorRT takes; embeddings stay as they are, since no operator looks up in
INT4. MiniLM, blocks of 32, batch 1, one thread: FP32 5.7 ms and 90 MB, the first form 4.1 ms and 15 MB, the second
4.0 ms and 55 MB."""

OPSET_OF_INT4 = 21
"""The first opset whose DequantizeLinear knows INT4 and blocks."""

INT8_ARITHMETIC = 4
"""MatMulNBits' accuracy_level: activations are rounded to INT8 a block inside the kernel. MiniLM: 4.1 ms against 5.0
at the level of FP32, with the outputs .095 and .092 of their range from FP32's."""


def blockwise_nodes(model: onnx.ModelProto, form: BlockForm) -> list[onnx.NodeProto]:
    """What is quantized, in graph order: products with a constant matrix and, as operators, embedding tables."""
    from onnx import TensorProto

    names = {node.name for node in compute_nodes(model) if node.op_type == "MatMul"}
    if form == "operators":
        tables = {
            one.name for one in model.graph.initializer if one.data_type == TensorProto.FLOAT and len(one.dims) == 2
        }
        names |= {node.name for node in model.graph.node if node.op_type == "Gather" and node.input[0] in tables}
    return [node for node in model.graph.node if node.name in names]


def quantize_blocks(
    model: onnx.ModelProto, form: BlockForm, block_size: int, floats: Collection[str] = ()
) -> onnx.ModelProto:
    """A copy in which every blockwise node that is not named in `floats` has INT4 weights, rounded to nearest."""
    from onnxruntime.quantization.quant_utils import QuantFormat

    quantizer_of = import_quietly()
    wanted = {node.name for node in blockwise_nodes(model, form)} - set(floats)
    quantizer = quantizer_of(
        at_opset(model, OPSET_OF_INT4),
        block_size=block_size,
        is_symmetric=form == "pairs",
        accuracy_level=INT8_ARITHMETIC if form == "operators" else None,
        quant_format=QuantFormat.QOperator if form == "operators" else QuantFormat.QDQ,
        op_types_to_quantize=("MatMul", "Gather") if form == "operators" else ("MatMul",),
        nodes_to_exclude=[node.name for node in model.graph.node if node.name not in wanted],
    )
    quantizer.process()
    result: onnx.ModelProto = quantizer.model.model
    drop_repeats(result)
    carry_modules(model, result)
    return result


def import_quietly() -> Any:
    """ONNX Runtime's quantizer, without the handler and the level that its module gives to the root logger, and
    without what it says of every node."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from onnxruntime.quantization import matmul_nbits_quantizer

    root.handlers[:] = handlers
    root.setLevel(level)
    matmul_nbits_quantizer.logger.setLevel(logging.ERROR)
    return matmul_nbits_quantizer.MatMulNBitsQuantizer


def drop_repeats(model: onnx.ModelProto) -> None:
    """One initializer a name and one node a result, in place: a matrix that two nodes read is quantized for each."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = {node.output[0]: node for node in reversed(model.graph.node)}
    kept = list(tensors.values()), list(nodes.values())[::-1]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(kept[0])
    model.graph.node.extend(kept[1])
