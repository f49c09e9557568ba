"""An FP32 graph → the same graph in another float."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def fp16_from_fp32(model: onnx.ModelProto) -> onnx.ModelProto:
    """Half-precision weights and arithmetic; inputs and outputs keep their dtypes."""
    import copy
    import warnings

    from onnxruntime.transformers import float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of every value that half precision rounds to zero
        converted: onnx.ModelProto = float16.convert_float_to_float16(
            copy.deepcopy(model), keep_io_types=True, disable_shape_infer=False,
            op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, "LayerNormalization", "Cast"],
        )  # fmt: skip
    drop_repeated_casts(converted)
    OnnxModel(converted).topological_sort()  # the converter appends its casts at the end
    del converted.graph.value_info[:]
    return converted


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
