"""QDQ graphs: quantize-dequantize pairs around convolutions and matrix products, and nothing else.

Not ONNX Runtime's `quantize_static`, because the search for nodes to keep in floating point tries dozens of
variants of one graph: here each is an edit of some milliseconds, calibrated once. (`quantize_static` rebuilds and
re-reads the file for each, and its `CalibMaxIntermediateOutputs` drops calibration data in silence, 1.31.)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from models.errors import QuantizeError

if TYPE_CHECKING:
    import numpy as np
    import onnx

Layout = Literal["onnxruntime", "tensorrt"]
"""`onnxruntime`: activations UINT8 with a zero point, residual additions in INT8 too: the form its x86 kernels fuse.
`tensorrt`: activations symmetric INT8, every zero point 0: the only form its parser takes.
EfficientNet-Lite0 at 112 px, batch 1, 2 cores with VNNI, ONNX Runtime 1.31: FP32 1.2 ms, the first form 0.6 ms, the
second 7.6 ms (there is no fast kernel for it on this CPU)."""

COMPUTE_OPS = ("Conv", "MatMul", "Gemm")
"""Where nearly all multiply-accumulates are."""

RESIDUAL_INPUTS = ("Conv", "Clip", "Relu", "Add")
"""An addition is a residual one of a convolutional block where both of its inputs come from one of these."""


@dataclass(frozen=True)
class Form:
    """How numbers become 8-bit. `reduce_range` uses 7 bits of the weights: without VNNI, x86 adds up u8 × s8
    products in 16 bits that saturate."""

    layout: Layout = "onnxruntime"
    reduce_range: bool = False


def compute_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Convolutions and matrix products with constant weights, in graph order."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [node for node in model.graph.node if node.op_type in COMPUTE_OPS and node.input[1] in constants]


def quantizable_nodes(model: onnx.ModelProto, layout: Layout) -> list[onnx.NodeProto]:
    """What a layout quantizes, in graph order: the compute nodes and, for ONNX Runtime, residual additions."""
    names = {node.name for node in compute_nodes(model)}
    if layout == "onnxruntime":
        makers = {output: node.op_type for node in model.graph.node for output in node.output}
        names |= {
            node.name
            for node in model.graph.node
            if node.op_type == "Add" and all(makers.get(name) in RESIDUAL_INPUTS for name in node.input)
        }
    return [node for node in model.graph.node if node.name in names]


def activations_of(node: onnx.NodeProto) -> list[str]:
    """The inputs of a quantizable node that are no weights."""
    return list(node.input[:2]) if node.op_type == "Add" else [node.input[0]]


def with_ranges_as_outputs(model: onnx.ModelProto, layout: Layout) -> tuple[onnx.ModelProto, list[str]]:
    """A copy whose outputs are the extremes of all activations that are to be quantized, and their names.

    Outputs: `<name>/min` and `<name>/max`, float32 scalars.
    """
    from onnx import TensorProto, helper

    names = list(dict.fromkeys(name for node in quantizable_nodes(model, layout) for name in activations_of(node)))
    probe = copy.deepcopy(model)
    del probe.graph.output[:]
    for name in names:
        for kind, operator in (("min", "ReduceMin"), ("max", "ReduceMax")):
            probe.graph.node.append(helper.make_node(operator, [name], [f"{name}/{kind}"], keepdims=0))
            probe.graph.output.append(helper.make_tensor_value_info(f"{name}/{kind}", TensorProto.FLOAT, []))
    return probe, names


def merge_ranges(parts: Iterable[Mapping[str, np.ndarray]], names: Iterable[str]) -> dict[str, tuple[float, float]]:
    """Activation name → (smallest, largest) value over all calibration batches.

    Raises:
        QuantizeError: there is no batch, or an activation is NaN or infinite.
    """
    ranges = dict.fromkeys(names, (math.inf, -math.inf))
    for part in parts:
        for name, (low, high) in ranges.items():
            found = float(part[f"{name}/min"]), float(part[f"{name}/max"])
            if not all(map(math.isfinite, found)):
                raise QuantizeError(f"calibration met {found} in {name}: the network overflows on real data")
            ranges[name] = (min(low, found[0]), max(high, found[1]))
    if any(low > high for low, high in ranges.values()):
        raise QuantizeError("the calibration split is empty; raise data.calibration_fraction")
    return ranges


def quantize_graph(
    model: onnx.ModelProto, ranges: Mapping[str, tuple[float, float]], form: Form, floats: Collection[str] = ()
) -> onnx.ModelProto:
    """A copy with quantized inputs and weights at every quantizable node that is not named in `floats`.

    One pair an activation: a node in `floats` reads the activation from before it.
    """
    result = copy.deepcopy(model)
    weights = {tensor.name: tensor for tensor in result.graph.initializer}
    targets = {node.name for node in quantizable_nodes(result, form.layout)} - set(floats)
    nodes: list[onnx.NodeProto] = []
    done: set[str] = set()
    for node in result.graph.node:
        if node.name in targets:
            for index, name in enumerate(list(node.input[:2])):
                if name not in done and name in weights:
                    nodes.append(weight_dequantizer(result, weights[name], channel_axis(node), form))
                elif name not in done:
                    nodes += activation_pair(result, name, ranges[name], form)
                done.add(name)
                node.input[index] = f"{name}/dequantized"
        nodes.append(node)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in result.graph.initializer if tensor.name in used]
    del result.graph.initializer[:]
    result.graph.initializer.extend(kept)
    return result


def activation_pair(model: onnx.ModelProto, name: str, bounds: tuple[float, float], form: Form) -> list[onnx.NodeProto]:
    """Quantize and dequantize `name` with one scale. Zero is exact in both layouts (padding is zero)."""
    import numpy as np
    from onnx import helper, numpy_helper

    low, high = min(bounds[0], 0.0), max(bounds[1], 0.0)
    if form.layout == "tensorrt":
        scale, zero = max(-low, high) / 127 or 1.0, np.array(0, np.int8)
    else:
        scale = (high - low) / 255 or 1.0
        zero = np.array(round(-low / scale), np.uint8)
    parameters = [f"{name}/scale", f"{name}/zero"]
    for tensor, array in zip(parameters, (np.array(scale, np.float32), zero), strict=True):
        model.graph.initializer.append(numpy_helper.from_array(array, tensor))
    integer, back = f"{name}/quantized", f"{name}/dequantized"
    return [
        helper.make_node("QuantizeLinear", [name, *parameters], [integer], f"{name}/quantize"),
        helper.make_node("DequantizeLinear", [integer, *parameters], [back], f"{name}/dequantize"),
    ]


def weight_dequantizer(model: onnx.ModelProto, weight: onnx.TensorProto, axis: int, form: Form) -> onnx.NodeProto:
    """Symmetric INT8 weights with one scale a channel along `axis`, and the node that dequantizes them."""
    import numpy as np
    from onnx import helper, numpy_helper

    levels = 63 if form.reduce_range else 127
    values = numpy_helper.to_array(weight).astype(np.float32)
    others = tuple(index for index in range(values.ndim) if index != axis)
    largest = np.abs(values).max(axis=others, keepdims=True)
    scale = np.where(largest > 0, largest / levels, 1).astype(np.float32)
    integers = np.clip(np.rint(values / scale), -levels, levels).astype(np.int8)
    name = weight.name
    parts = {"int8": integers, "scale": scale.reshape(-1), "zero": np.zeros(scale.size, np.int8)}
    for suffix, array in parts.items():
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), f"{name}/{suffix}"))
    inputs = [f"{name}/{suffix}" for suffix in parts]
    return helper.make_node("DequantizeLinear", inputs, [f"{name}/dequantized"], f"{name}/dequantize", axis=axis)


def channel_axis(node: onnx.NodeProto) -> int:
    """The weight's axis of output channels: Conv (out, in, …); MatMul (in, out); Gemm as MatMul, or transposed."""
    if node.op_type == "Conv":
        return 0
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if transposed else 1


def macs_of(node: onnx.NodeProto, weight_dims: list[int], outputs: int) -> int:
    """Multiply-accumulates of a compute node that makes `outputs` numbers."""
    if node.op_type == "Conv":
        return outputs * math.prod(weight_dims[1:])
    return outputs * weight_dims[1 - channel_axis(node)]
