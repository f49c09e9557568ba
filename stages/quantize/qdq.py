"""Which nodes become INT8 and in what form; ONNX Runtime's quantizer inserts the quantize-dequantize pairs.

Its classes behind `quantize_static` are called one by one, because the search for nodes to keep in floating point
tries dozens of variants of one graph: the graph is calibrated once, and each variant takes some milliseconds.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from models.onnx_files import is_light, load_weights, outside

if TYPE_CHECKING:
    import onnx
    from onnxruntime.quantization.calibrate import TensorsData

Layout = Literal["onnxruntime", "tensorrt"]
"""`onnxruntime`: activations UINT8 with a zero point, residual additions and embeddings in INT8 too: the form its
x86 kernels fuse. `tensorrt`: activations symmetric INT8, every zero point 0, one pair a reader: the only form its
parser takes. EfficientNet-Lite0 at 112 px, batch 1, 2 cores with VNNI, ONNX Runtime 1.31: FP32 1.2 ms, the first
form 0.6 ms, the second 7.6 ms (there is no fast kernel for it on this CPU)."""

COMPUTE_OPS = ("Conv", "MatMul", "Gemm")
"""Where nearly all multiply-accumulates are."""

QUANTIZED_OPS = (*COMPUTE_OPS, "Add", "Gather")

RESIDUAL_INPUTS = ("Conv", "Clip", "Relu", "Add")
"""An addition is a residual one of a convolutional block where both of its inputs come from one of these."""


@dataclass(frozen=True)
class Form:
    """How numbers become 8-bit. `reduce_range` uses 7 bits of the weights: without VNNI, x86 adds up u8 × s8
    products in 16 bits that saturate."""

    layout: Layout = "onnxruntime"
    reduce_range: bool = False


def compute_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Convolutions and products with a constant matrix, in graph order.

    Not products with a constant that has a batch axis (the positions of wav2vec2-conformer): ONNX Runtime has no kernel
    for scales a channel of those.
    """
    axes = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in COMPUTE_OPS and node.input[1] in axes]
    return [node for node in nodes if node.op_type != "MatMul" or axes[node.input[1]] == 2]


def quantizable_nodes(model: onnx.ModelProto, layout: Layout) -> list[onnx.NodeProto]:
    """What a layout quantizes, in graph order: the compute nodes and, for ONNX Runtime, residual additions and
    embedding tables."""
    from onnx import TensorProto

    names = {node.name for node in compute_nodes(model)}
    if layout == "onnxruntime":
        makers = {output: node.op_type for node in model.graph.node for output in node.output}
        tables = {one.name for one in model.graph.initializer if one.data_type == TensorProto.FLOAT}
        for node in model.graph.node:
            residual = node.op_type == "Add" and all(makers.get(name) in RESIDUAL_INPUTS for name in node.input)
            if residual or (node.op_type == "Gather" and node.input[0] in tables):
                names.add(node.name)
    return [node for node in model.graph.node if node.name in names]


def quantize_graph(
    model: onnx.ModelProto, ranges: TensorsData, form: Form, floats: Collection[str] = (), folder: Path = Path()
) -> onnx.ModelProto:
    """A copy in which every quantizable node that is not named in `floats` reads INT8 inputs and weights.

    `folder` is where the weights of a light graph lie: only those that become INT8 are read from there.

    Weights are symmetric with a scale a channel. Biases stay in floating point (TensorRT parses no INT32
    dequantization), and so do the outputs of products: with them in INT8 the agreement fell from .936 to .906
    (EfficientNet-Lite0) and from .968 to .942 (MiniLM).
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    tensorrt = form.layout == "tensorrt"
    targets = [node for node in quantizable_nodes(model, form.layout) if node.name not in floats]
    whole = copy.deepcopy(model)
    load_weights(whole, folder, {name for node in targets for name in node.input})
    quantizer = QDQQuantizer(
        whole,
        per_channel=True,
        reduce_range=form.reduce_range,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8 if tensorrt else QuantType.QUInt8,
        tensors_range=ranges,
        nodes_to_quantize=[node.name for node in targets],
        nodes_to_exclude=[],
        op_types_to_quantize=list(QUANTIZED_OPS),
        extra_options={
            "WeightSymmetric": True,
            "ActivationSymmetric": tensorrt,
            "DedicatedQDQPair": tensorrt,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": [name for name in QUANTIZED_OPS if name != "Gather"],
        },
    )
    quantizer.quantize_model()
    result: onnx.ModelProto = quantizer.model.model
    restore_float_inputs(model, result, targets)
    quantizer.model.topological_sort()  # the quantizer appends its pairs at the end
    del result.graph.value_info[:]
    return copy.deepcopy(result) if is_light(model) else result  # a protobuf keeps what was deleted from it


def quantize_weights(
    model: onnx.ModelProto, floats: Collection[str], reduce_range: bool, folder: Path = Path()
) -> onnx.ModelProto:
    """A copy in which matrix products with constant weights, but for the nodes named in `floats`, and embeddings have
    INT8 weights, symmetric with a scale a channel; activations get their scale at run time.

    It is ONNX Runtime's `quantize_dynamic`, whose class writes the graph and reads it back before it starts: three
    models in memory. Of a light graph (its weights lie in `folder`) the weights are therefore put in afterwards.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
    from onnxruntime.quantization.quant_utils import QuantizationMode

    whole = copy.deepcopy(model)
    read_first = {name for node in model.graph.node if node.op_type == "Gemm" for name in node.input}  # it turns these
    load_weights(whole, folder, read_first)
    places = {tensor.name: copy.deepcopy(tensor) for tensor in whole.graph.initializer if outside(tensor)}
    for tensor in whole.graph.initializer:
        if tensor.name in places:
            del tensor.external_data[:]
            tensor.ClearField("data_location")
    quantizer = ONNXQuantizer(
        whole,
        per_channel=True,
        reduce_range=reduce_range,
        mode=QuantizationMode.IntegerOps,
        static=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=None,
        nodes_to_quantize=[],
        nodes_to_exclude=list(floats),
        op_types_to_quantize=["MatMul", "Gather"],
        extra_options={"MatMulConstBOnly": True},
    )
    for tensor in quantizer.model.model.graph.initializer:
        if tensor.name in places:
            tensor.CopyFrom(places[tensor.name])
    load_weights(quantizer.model.model, folder)
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    result: onnx.ModelProto = quantizer.model.model
    return copy.deepcopy(result) if places else result  # a protobuf keeps the memory of what was deleted from it


def restore_float_inputs(
    model: onnx.ModelProto, quantized: onnx.ModelProto, targets: Collection[onnx.NodeProto]
) -> None:
    """Nodes that are no targets read what they read in `model`: the quantizer hands its pairs to every reader.

    Without this the residual stream of a transformer is rounded to 8 bits before every addition (MiniLM's agreement
    falls from .974 to .964). The pair behind an embedding stays, since only with it the look-up itself is in INT8.
    """
    names = {node.name for node in targets}
    embedded = {output for node in targets if node.op_type == "Gather" for output in node.output}
    originals = {node.name: node for node in model.graph.node if node.name not in names}
    for node in quantized.graph.node:
        original = originals.get(node.name)
        for index, name in enumerate(original.input if original else ()):
            if name not in embedded:
                node.input[index] = name
    left = {tensor.name for tensor in quantized.graph.initializer}
    read = {name for node in quantized.graph.node for name in node.input}
    quantized.graph.initializer.extend(
        tensor for tensor in model.graph.initializer if tensor.name in read and tensor.name not in left
    )
