"""An FP32 graph → the same graph in another float."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from models.onnx_files import load_weights

if TYPE_CHECKING:
    import onnx


def fp16_from_fp32(model: onnx.ModelProto, folder: Path = Path()) -> onnx.ModelProto:
    """Half-precision weights and arithmetic; inputs and outputs keep their dtypes.

    `folder` is where the weights of a light graph lie. Shapes are inferred without them: in memory that takes no graph
    above 2 GB.
    """
    import warnings

    import onnx
    from onnxruntime.transformers import float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    whole = onnx.shape_inference.infer_shapes(model)  # a copy
    load_weights(whole, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of every value that half precision rounds to zero
        converted: onnx.ModelProto = float16.convert_float_to_float16(
            whole, keep_io_types=True, disable_shape_infer=True,
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
