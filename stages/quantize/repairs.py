"""Repairs of a graph that INT8 harms, without training: SmoothQuant before quantization, bias correction after it.

Cross-layer equalization (Nagel et al. 2019, arXiv 1906.04721, section 4.1) is none of them: it is for weights whose
outputs share one scale, and here every output has its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from stages.quantize.qdq import compute_nodes
from stages.quantize.schemes import Scheme, Variant
from stages.quantize.search import Run, outputs_of

if TYPE_CHECKING:
    import numpy as np
    import onnx

Repair = Literal["smooth", "bias-correction"]

REPAIRED: tuple[Scheme, ...] = ("int8-static", "int8-symmetric")
"""Schemes that repairs are for."""

MIGRATION = 0.5
"""SmoothQuant's α: how much of the difficulty goes from activations to weights (its paper's choice, section 4)."""

SAME = 1e-4
"""Of the range of the outputs: how far a smoothed graph may be from the one before. Measured: 1e-6 on MiniLM."""


@dataclass(frozen=True)
class Outcome:
    """What one repair did: how many `places` it changed, and the mean squared change of the outputs by plain INT8 over
    the calibration examples before and after it. One that lowers nothing is not `kept`; `reason` says why one was not
    measured, or gave no number: then there is no `error_after`."""

    repair: Repair
    places: int
    error_before: float
    error_after: float | None
    kept: bool
    reason: str = ""


def repaired(
    model: onnx.ModelProto, repairs: Sequence[Repair], quantized: Callable[[onnx.ModelProto], Variant], run: Run
) -> tuple[Variant, list[dict[str, Any]]]:
    """The variants of a floating-point graph with those repairs that lower the error, and every `Outcome` as a dict.

    `quantized` calibrates a graph and gives its variants; `run` gives a graph's outputs over the calibration examples,
    one at a time, so that no padding counts. SmoothQuant goes first: bias correction mends what is left. Where it
    changed what the graph computes, which FP32 can by its rounding, it is not kept.
    """
    variant, outcomes = quantized(model), list[Outcome]()
    if not repairs:
        return variant, []
    wanted = outputs_of(run(model))

    def error_of(graph: onnx.ModelProto) -> float:
        import numpy as np

        return float(np.square(outputs_of(run(graph)) - wanted).mean())

    before = error_of(variant(()))
    for repair in sorted(repairs, key=ORDER.index):
        if repair == "smooth":
            graph, places = smoothed(model, run)
            problem = difference_in_words(wanted, outputs_of(run(graph)))
            if problem:
                outcomes.append(Outcome(repair, places, before, None, kept=False, reason=problem))
                continue
            tried = quantized(graph) if places else variant
        else:
            shifts = mean_errors(model, variant(()), run)
            tried, places = with_corrected_biases(variant, shifts), len(shifts)
        after = error_of(tried(())) if places else before
        if not math.isfinite(after):
            outcomes.append(Outcome(repair, places, before, None, kept=False, reason="it gives NaN or infinity"))
            continue
        kept = after < before
        outcomes.append(Outcome(repair, places, before, after, kept))
        if kept:
            variant, before = tried, after
            model = graph if repair == "smooth" else model
    return variant, [asdict(one) for one in outcomes]


ORDER: tuple[Repair, ...] = ("smooth", "bias-correction")


def outcome_in_words(outcome: Mapping[str, Any]) -> str:
    """For a person."""
    if not outcome["places"]:
        return f"{outcome['repair']} finds nothing to repair"
    if outcome["reason"]:
        return f"{outcome['repair']} is left out: {outcome['reason']}"
    change = f"the error of plain INT8 from {outcome['error_before']:.3g} to {outcome['error_after']:.3g}"
    return f"{outcome['repair']} changes {change}" + ("" if outcome["kept"] else ", and is left out")


def difference_in_words(before: np.ndarray, after: np.ndarray) -> str:
    """By how much the outputs of the smoothed graph are others, or nothing where they are the same."""
    import numpy as np

    difference, span = float(np.abs(after - before).max()), float(before.max() - before.min())
    if not difference <= SAME * span:
        return f"it changed the outputs in floating point by {difference:.3g}, of a range of {span:.3g}"
    return ""


def smoothed(model: onnx.ModelProto, run: Run) -> tuple[onnx.ModelProto, int]:
    """SmoothQuant (Xiao et al. 2022, arXiv 2211.10438, equation 4): a copy that computes the same, in which outlying
    channels of what a layer norm hands to matrix products lie in the weights instead; and how many norms that are.

    A channel is divided by s = max|X|^α / max|W|^(1−α), in the norm's scale and offset, and its rows of all weights are
    multiplied by it. Who else reads the norm (the residual stream of BERT) gets it back through a multiplication.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    found = norms_with_products(model)
    largest = largest_by_channel(model, [norm for norm, _, _ in found], run)
    result = copy.deepcopy(model)
    nodes = {node.name: node for node in result.graph.node}
    weights = {tensor.name: tensor for tensor in result.graph.initializer}
    for norm, products, others in found:
        output = norm.output[0]
        rows = [axis_of_inputs(node, numpy_helper.to_array(weights[node.input[1]])) for node in products]
        reach = np.max([np.abs(one).max(1) for one in rows], axis=0)
        active = (largest[norm.name] > 0) & (reach > 0)
        scale = np.ones_like(reach)
        scale[active] = largest[norm.name][active] ** MIGRATION / reach[active] ** (1 - MIGRATION)
        for index in range(1, len(norm.input)):
            values = numpy_helper.to_array(weights[norm.input[index]]) / scale
            nodes[norm.name].input[index] = added(result, f"{norm.name}_smoothed_{index}", values)
        for node in products:
            values = numpy_helper.to_array(weights[node.input[1]])
            values = values * (scale[None, :] if is_transposed(node) else scale[:, None])
            weights[node.input[1]].CopyFrom(numpy_helper.from_array(values.astype(np.float32), node.input[1]))
        if others:
            back, restored = added(result, f"{norm.name}_scale", scale), f"{output}_restored"
            position = list(result.graph.node).index(nodes[norm.name]) + 1
            name = f"{norm.name}_restored"
            result.graph.node.insert(position, helper.make_node("Mul", [output, back], [restored], name))
            for other in others:
                for index, read in enumerate(nodes[other.name].input):
                    if read == output:
                        nodes[other.name].input[index] = restored
    read_now = {name for node in result.graph.node for name in node.input}
    for tensor in [one for one in result.graph.initializer if one.name not in read_now]:
        result.graph.initializer.remove(tensor)
    return result, len(found)


def norms_with_products(
    model: onnx.ModelProto,
) -> list[tuple[onnx.NodeProto, list[onnx.NodeProto], list[onnx.NodeProto]]]:
    """Each layer norm over the last axis with constant scale and offset, the products that read it and whose weights
    nobody else reads, and its other readers."""
    constants = {tensor.name for tensor in model.graph.initializer}
    readers = readers_of(model)
    products = {node.name for node in compute_nodes(model) if node.op_type != "Conv"}
    shown = {output.name for output in model.graph.output}
    found = []
    for node in model.graph.node:
        axis = next((one.i for one in node.attribute if one.name == "axis"), -1)
        if node.op_type != "LayerNormalization" or axis != -1 or node.output[0] in shown:
            continue
        behind = readers.get(node.output[0], [])
        taken = [
            one
            for one in behind
            if one.name in products and one.input[0] == node.output[0] and len(readers[one.input[1]]) == 1
            and not (one.op_type == "Gemm" and attribute(one, "transA", 0))
        ]  # fmt: skip
        if taken and all(name in constants for name in node.input[1:]):
            names = {one.name for one in taken}
            found.append((node, taken, [one for one in behind if one.name not in names]))
    return found


def readers_of(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    """Tensor → the nodes that read it, each once."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(node)
    return readers


def attribute(node: onnx.NodeProto, name: str, default: float) -> float:
    """A number among a node's attributes."""
    from onnx import helper

    found = next((one for one in node.attribute if one.name == name), None)
    return default if found is None else float(helper.get_attribute_value(found))


def is_transposed(node: onnx.NodeProto) -> bool:
    """Whether the weight of a product is (outputs, inputs)."""
    return node.op_type == "Gemm" and bool(attribute(node, "transB", 0))


def axis_of_inputs(node: onnx.NodeProto, weight: np.ndarray) -> np.ndarray:
    """The weight of a product as (inputs, outputs)."""
    return weight.T if is_transposed(node) else weight


def added(model: onnx.ModelProto, name: str, values: np.ndarray) -> str:
    """Put a float32 constant into the graph; its name."""
    import numpy as np
    from onnx import numpy_helper

    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values, dtype=np.float32), name))
    return name


def largest_by_channel(model: onnx.ModelProto, norms: Sequence[onnx.NodeProto], run: Run) -> dict[str, np.ndarray]:
    """Name of a layer norm → float32 (channels,), the largest magnitude of each channel that it gives."""
    import numpy as np
    from onnx import helper

    measured = copy.deepcopy(model)
    sizes = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if len(tensor.dims) == 1}
    for norm in norms:
        measured.graph.node.append(helper.make_node("Abs", [norm.output[0]], [f"{norm.name}_magnitude"]))
        reduce_to_channels(measured, "ReduceMax", f"{norm.name}_magnitude", norm.name, [-1, sizes[norm.input[1]]])
    rows = list(run(measured)) if norms else []
    return {norm.name: np.max([row[f"{norm.name}_channels"] for row in rows], axis=0) for norm in norms}


def reduce_to_channels(model: onnx.ModelProto, operator: str, tensor: str, name: str, shape: Sequence[int]) -> None:
    """Append an output `<name>_channels`, float32 (channels,), to the graph: a tensor in the form (others, channels) or
    (0, channels, others), where 0 stands for the batch, reduced over all but the channels."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    flat, axes, result = f"{name}_flat", f"{name}_axes", f"{name}_channels"
    constants = {f"{name}_shape": list(shape), axes: [0] if len(shape) == 2 else [0, 2]}
    for constant, values in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), constant))
    model.graph.node.append(helper.make_node("Reshape", [tensor, f"{name}_shape"], [flat]))
    model.graph.node.append(helper.make_node(operator, [flat, axes], [result], keepdims=0))
    model.graph.output.append(helper.make_tensor_value_info(result, TensorProto.FLOAT, [None]))


def mean_errors(model: onnx.ModelProto, quantized: onnx.ModelProto, run: Run) -> dict[str, np.ndarray]:
    """Quantized node → float32 (channels,), by how much its outputs are too small on average.

    Bias correction by data (Nagel et al. 2019, arXiv 1906.04721, section 4.2): rounding a node's weights and inputs
    shifts the mean of what it gives. Every quantized node runs as a twin of the float one, on the float network's own
    inputs, so that one pass measures all of them, and no error of a node below counts twice.
    """
    import numpy as np
    from onnx import helper

    both = copy.deepcopy(model)
    known = {node.name for node in model.graph.node}
    constants = {tensor.name for tensor in both.graph.initializer}
    sizes = {tensor.name: tuple(tensor.dims) for tensor in both.graph.initializer}
    products = {node.name: node for node in compute_nodes(model)}
    twins = [node for node in quantized.graph.node if node.name in products and node.input != products[node.name].input]
    both.graph.initializer.extend(one for one in quantized.graph.initializer if one.name not in constants)
    both.graph.node.extend(node for node in quantized.graph.node if node.name not in known)
    for twin in twins:
        original = products[twin.name]
        node = copy.deepcopy(twin)
        node.name, node.output[0] = f"{twin.name}_twin", f"{twin.output[0]}_twin"
        difference = helper.make_node("Sub", [original.output[0], node.output[0]], [f"{twin.name}_difference"])
        both.graph.node.extend([node, difference])
        channels = channels_of(original, sizes[original.input[1]])
        shape = [0, channels, -1] if original.op_type == "Conv" else [-1, channels]
        reduce_to_channels(both, "ReduceMean", difference.output[0], twin.name, shape)
    rows = list(run(both)) if twins else []
    return {twin.name: np.mean([row[f"{twin.name}_channels"] for row in rows], axis=0) for twin in twins}


def channels_of(node: onnx.NodeProto, shape: Sequence[int]) -> int:
    """How many outputs a weight of this shape has for each position."""
    return shape[0] if node.op_type == "Conv" or is_transposed(node) else shape[1]


def with_corrected_biases(variant: Variant, shifts: Mapping[str, np.ndarray]) -> Variant:
    """Variants whose quantized nodes give what they give and `shifts` more, by node."""

    def corrected(floats: Collection[str]) -> onnx.ModelProto:
        model = variant(floats)
        biases = Biases(model)
        for node in [one for one in model.graph.node if one.name in shifts and one.name not in floats]:
            biases.raise_by(node, shifts[node.name])
        return model

    return corrected


class Biases:
    """Adds to the outputs of nodes of a graph, in the bias that is there where there is one."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.readers = readers_of(model)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def raise_by(self, node: onnx.NodeProto, shift: np.ndarray) -> None:
        """In place. `shift`: float32 (channels,)."""
        from onnx import numpy_helper

        holder, index = self.bias_of(node)
        if holder is not None:
            values = numpy_helper.to_array(self.constants[holder.input[index]]) + shift
            holder.input[index] = added(self.model, f"{node.name}_bias", values)
        elif node.op_type != "MatMul" and len(node.input) == 2:
            node.input.append(added(self.model, f"{node.name}_bias", shift))
        else:
            self.add_behind(node, shift)

    def bias_of(self, node: onnx.NodeProto) -> tuple[onnx.NodeProto | None, int]:
        """The node that adds a float constant a channel, and the index of that input."""
        if node.op_type == "MatMul":
            behind = self.readers.get(node.output[0], [])
            if len(behind) != 1 or behind[0].op_type != "Add":
                return None, 0
            holder, index = behind[0], int(behind[0].input[0] == node.output[0])
        else:
            holder, index = node, 2
        constant = self.constants.get(holder.input[index]) if len(holder.input) > index else None
        is_plain = constant is not None and len(constant.dims) == 1 and attribute(node, "beta", 1.0) == 1.0
        return (holder, index) if is_plain else (None, 0)

    def add_behind(self, node: onnx.NodeProto, shift: np.ndarray) -> None:
        """A node of its own, where there is no such bias."""
        from onnx import helper

        name, output = f"{node.name}_corrected", node.output[0]
        if node.op_type == "Conv":
            shift = shift.reshape(
                -1, *[1] * len(next(one.ints for one in node.attribute if one.name == "kernel_shape"))
            )
        constant = added(self.model, f"{node.name}_shift", shift)
        node.output[0] = f"{output}_uncorrected"
        position = list(self.model.graph.node).index(node) + 1
        self.model.graph.node.insert(position, helper.make_node("Add", [node.output[0], constant], [output], name))
