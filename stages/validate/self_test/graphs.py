"""Defects of the graph: each takes a copy of the FP32 graph and breaks one thing in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stages.validate.self_test.subject import Mutant, Subject

if TYPE_CHECKING:
    import numpy as np
    import onnx

DROPOUT = 0.1
"""The rate of BERT's own dropout (Devlin et al. 2018)."""

NARROW = 0.1
"""Of the true range: what calibration finds where the inputs of calibration were scaled by ten."""

STATIC_BATCH = 2
"""What export's example has."""

LARGEST_FP16 = 65504.0


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that may be changed."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def constant(model: onnx.ModelProto, name: str, values: np.ndarray | Sequence[float]) -> str:
    """Add a constant of `values` (a list becomes float32) and give its name."""
    import numpy as np
    import onnx

    array = values if isinstance(values, np.ndarray) else np.asarray(values, np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return name


def behind(model: onnx.ModelProto, tensor: str, steps: Sequence[tuple[str, Sequence[str], dict[str, Any]]]) -> None:
    """Put nodes behind a tensor, in place: each (operator, further inputs, attributes) reads what is before it, and the
    last takes the name."""
    import onnx

    maker = next(index for index, node in enumerate(model.graph.node) if tensor in node.output)
    node, before = model.graph.node[maker], f"{tensor}_unbroken"
    node.output[list(node.output).index(tensor)] = before
    made = []
    for index, (operator, others, attributes) in enumerate(steps):
        name = tensor if index == len(steps) - 1 else f"{tensor}_broken_{index}"
        given = [before, *(one.format(first=f"{tensor}_unbroken") for one in others)]
        made.append(onnx.helper.make_node(operator, given, [name], f"defect_{tensor}_{index}", **attributes))
        before = name
    for offset, one in enumerate(made):
        model.graph.node.insert(maker + 1 + offset, one)


def first_output(subject: Subject) -> tuple[str, int]:
    """Name and width."""
    output = subject.io.outputs[0]
    return output.name, int(output.dims[1])


def weight_axis(node: onnx.NodeProto) -> int:
    """The axis of a weight that its output channels are on."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    transposed = any(one.name == "transB" and one.i for one in node.attribute)
    return 0 if transposed else -1


def weight_of(model: onnx.ModelProto, node: onnx.NodeProto) -> np.ndarray:
    """The constant that a product multiplies with, of its own type and shape."""
    import onnx

    (tensor,) = [one for one in model.graph.initializer if one.name == node.input[1]]
    array: np.ndarray = onnx.numpy_helper.to_array(tensor)
    return array


def set_weight(model: onnx.ModelProto, name: str, values: np.ndarray) -> None:
    """Give the node of that name a weight of its own, in place: the old one may have other readers."""
    (node,) = [one for one in model.graph.node if one.name == name]
    node.input[1] = constant(model, f"{node.input[1]}_broken", values)


# --- outputs -----------------------------------------------------------------------------------------


def permute_labels(subject: Subject) -> Mutant | str:
    """Each output says what the one beside it should."""
    import numpy as np

    name, width = first_output(subject)
    if width < 2:
        return "there is one output"
    model = copied(subject.model)
    order = constant(model, "defect_order", np.roll(np.arange(width, dtype=np.int64), 1))
    behind(model, name, [("Gather", [order], {"axis": 1})])
    return Mutant(model)


def swap_outputs(subject: Subject) -> Mutant | str:
    """Two outputs have each other's names."""
    names = [one.name for one in subject.io.outputs]
    if len(names) < 2 or len({one.dims for one in subject.io.outputs}) > 1:
        return "there are no two outputs of one shape"
    model = copied(subject.model)
    swapped = {names[0]: names[1], names[1]: names[0]}
    for node in model.graph.node:
        for names_of in (node.input, node.output):
            for index, name in enumerate(names_of):
                names_of[index] = swapped.get(name, name)
    return Mutant(model)


def bias_one_output(subject: Subject) -> Mutant | str:
    """The first output is larger by one standard deviation of the outputs."""
    name, width = first_output(subject)
    model = copied(subject.model)
    behind(model, name, [("Add", [constant(model, "defect_bias", [subject.spread, *[0.0] * (width - 1)])], {})])
    return Mutant(model)


def halve_outputs(subject: Subject) -> Mutant | str:
    """Every output is half of what it was."""
    model = copied(subject.model)
    half = constant(model, "defect_half", [0.5])
    for output in subject.io.outputs:
        behind(model, output.name, [("Mul", [half], {})])
    return Mutant(model)


def give_nan(subject: Subject) -> Mutant | str:
    """One output is NaN."""
    name, width = first_output(subject)
    model = copied(subject.model)
    behind(model, name, [("Add", [constant(model, "defect_nan", [*[0.0] * (width - 1), float("nan")])], {})])
    return Mutant(model)


def lose_output(subject: Subject) -> Mutant | str:
    """The last output has another name."""
    model, name = copied(subject.model), subject.io.outputs[-1].name
    for node in model.graph.node:
        for names_of in (node.input, node.output):
            for index, one in enumerate(names_of):
                names_of[index] = "defect_output" if one == name else one
    for value in model.graph.output:
        value.name = "defect_output" if value.name == name else value.name
    return Mutant(model)


def freeze_batch(subject: Subject) -> Mutant | str:
    """The batch is `STATIC_BATCH`, behind an axis that is called dynamic."""
    import numpy as np

    name, width = first_output(subject)
    model = copied(subject.model)
    behind(model, name, [("Reshape", [constant(model, "defect_shape", np.array([STATIC_BATCH, width], np.int64))], {})])
    return Mutant(model)


def repeat_first(subject: Subject) -> Mutant | str:
    """The answer to the first sample of a batch is given to all: what a broadcast over a batch of one becomes."""
    import numpy as np
    import onnx

    name, _ = first_output(subject)
    model = copied(subject.model)
    zero = constant(model, "defect_first", np.zeros(1, np.int64))
    behind(model, name, [("Gather", [zero], {"axis": 0}), ("Expand", ["defect_batch"], {})])
    place = next(index for index, node in enumerate(model.graph.node) if f"{name}_unbroken" in node.output)
    shape = onnx.helper.make_node("Shape", [f"{name}_unbroken"], ["defect_batch"], "defect_batch")
    model.graph.node.insert(place + 1, shape)
    return Mutant(model)


# --- weights -----------------------------------------------------------------------------------------


def permute_channels(subject: Subject) -> Mutant | str:
    """The output channels of one weight, half-way through the network, move by one."""
    import numpy as np

    if not subject.products:
        return "no node multiplies with a weight"
    node, model = subject.products[len(subject.products) // 2], copied(subject.model)
    set_weight(model, node.name, np.roll(weight_of(model, node), 1, weight_axis(node)))
    return Mutant(model)


def kill_channel(subject: Subject) -> Mutant | str:
    """The weights of one channel, half-way through the network, are zero: of that which varies most.

    Not of that with the largest weights: a batch norm over a channel that is dead already divides by next to nothing,
    and is folded into them.
    """
    import numpy as np

    if not subject.products:
        return "no node multiplies with a weight"
    node, model = subject.products[len(subject.products) // 2], copied(subject.model)
    weight = np.moveaxis(weight_of(model, node).copy(), weight_axis(node), 0)
    given = subject.activations[node.output[0]]
    channels = np.moveaxis(given, 1 if node.op_type.startswith("Conv") else -1, 0)
    weight[channels.reshape(len(channels), -1).std(1)[: len(weight)].argmax()] = 0
    set_weight(model, node.name, np.ascontiguousarray(np.moveaxis(weight, 0, weight_axis(node))))
    return Mutant(model)


def round_to_four_bits(subject: Subject) -> Mutant | str:
    """Every weight has 4 bits and each tensor one scale, the largest magnitude."""
    import numpy as np

    if not subject.products:
        return "no node multiplies with a weight"
    model = copied(subject.model)
    for node in subject.products:
        weight = weight_of(model, node)
        scale = float(np.abs(weight).max()) / 7 or 1.0
        set_weight(model, node.name, (np.round(weight / scale) * scale).astype(weight.dtype))
    return Mutant(model)


# --- activations -------------------------------------------------------------------------------------


def narrow_ranges(subject: Subject) -> Mutant | str:
    """Products read 8-bit activations whose range is `NARROW` of what flows in."""
    import numpy as np

    model = copied(subject.model)
    done = set()
    for node in subject.products:
        values = subject.activations[node.input[0]]
        low, high = (NARROW * bound for bound in (min(float(values.min()), 0.0), max(float(values.max()), 0.0)))
        made = any(node.input[0] in one.output for one in model.graph.node)
        if values.dtype != np.float32 or high <= low or not made or node.input[0] in done:
            continue
        done.add(node.input[0])
        scale = (high - low) / 255
        given = [constant(model, f"defect_scale_{len(done)}", np.array(scale, np.float32)),
                 constant(model, f"defect_point_{len(done)}", np.array(round(-low / scale), np.uint8))]  # fmt: skip
        behind(model, node.input[0], [("QuantizeLinear", given, {}), ("DequantizeLinear", given, {})])
    return Mutant(model) if done else "no product reads a float activation"


def overflow_fp16(subject: Subject) -> Mutant | str:
    """What flows out of a product half-way through the network goes through FP16 at a scale at which its upper half is
    infinite."""
    import numpy as np

    sizes = {node.output[0]: np.abs(subject.activations[node.output[0]]).max() for node in subject.products}
    names = [name for name, size in sizes.items() if size > 0]
    if not names:
        return "no product gives anything but zeros"
    name, model = names[len(names) // 2], copied(subject.model)
    up = constant(model, "defect_up", [2 * LARGEST_FP16 / float(sizes[name])])
    behind(model, name, [("Mul", [up], {}), ("Cast", [], {"to": 10}), ("Cast", [], {"to": 1}), ("Div", [up], {})])
    return Mutant(model)


def leave_dropout_on(subject: Subject) -> Mutant | str:
    """What the last product reads has dropout: `DROPOUT` of it is zero, at random, and the rest scaled up."""
    made = {name for node in subject.model.graph.node for name in node.output}
    read = [node.input[0] for node in subject.products if node.input[0] in made]
    if not read:
        return "no product reads what another node makes"
    model = copied(subject.model)
    rate, kept = constant(model, "defect_rate", [DROPOUT]), constant(model, "defect_kept", [1 / (1 - DROPOUT)])
    chance: dict[str, Any] = {"dtype": 1, "seed": 0.0}
    steps = [("RandomUniformLike", [], chance), ("Greater", [rate], {}), ("Cast", [], {"to": 1}),
             ("Mul", ["{first}"], {}), ("Mul", [kept], {})]  # fmt: skip
    behind(model, read[-1], steps)
    return Mutant(model)


# --- controls ----------------------------------------------------------------------------------------


def write_anew(subject: Subject) -> Mutant | str:
    """Nodes that change nothing behind every output, and the file written anew."""
    model = copied(subject.model)
    for output in subject.io.outputs:
        behind(model, output.name, [("Identity", [], {})])
    return Mutant(model)
