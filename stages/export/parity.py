"""Whether a written file is the network: its contract, and its outputs at every tried shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import DataError, ExportError
from stages.gate import Gate, GateResult

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from models.checkpoint import Checkpoint
    from models.modalities import Content
    from models.spec import IOSpec, TensorSpec
    from stages.base import StageContext

BATCHES = (1, 3, 8)
"""Batch sizes tried; the exported example has 2 (torch.export specialises 0 and 1)."""


def tried_inputs(checkpoint: Checkpoint, context: StageContext) -> list[dict[str, np.ndarray]]:
    """Real validation inputs at every batch size, and the limits of the modality (a text of one token, silence)."""
    examples = contents_of(context, max(BATCHES))
    shapes = [checkpoint.processing.arrays(examples[:batch]) for batch in BATCHES]
    return shapes + [checkpoint.processing.arrays(batch) for batch in checkpoint.processing.extremes(examples)]


def example_inputs(checkpoint: Checkpoint, context: StageContext) -> dict[str, np.ndarray]:
    """Two real examples."""
    return checkpoint.processing.arrays(contents_of(context, 2))


def contents_of(context: StageContext, count: int) -> list[Content]:
    """`count` validation examples; a smaller split is repeated, so that every batch size is tried.

    Raises:
        DataError: the split is empty.
    """
    examples = context.data["validation"]
    if not examples:
        raise DataError("the validation split is empty, so nothing proves the export; raise data.validation_fraction")
    return [examples[index % len(examples)].content for index in range(count)]


def reference_logits(
    checkpoint: Checkpoint, shapes: Sequence[dict[str, np.ndarray]]
) -> tuple[list[np.ndarray], float | None]:
    """fp32 logits of the unpatched network, and how much of them is rounding (see `rounding_error`)."""
    import torch

    from models.rounding import rounding_error

    model, inputs = checkpoint.model, checkpoint.spec.io.inputs
    batches = [[torch.from_numpy(arrays[tensor.name]) for tensor in inputs] for arrays in shapes]
    with torch.inference_mode():
        singles = [model(*batch) for batch in batches]
    return [single.numpy().copy() for single in singles], rounding_error(model, batches, singles)


def check_graph(path: Path, io: IOSpec) -> None:
    """The graph is valid, and its inputs and outputs are those of the I/O spec, dynamic where it says so.

    Raises:
        ExportError: it is not; a frozen axis is named.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} is no valid ONNX graph: {error}") from error
    graph = onnx.load(str(path), load_external_data=False).graph
    for values, specs in ((graph.input, io.inputs), (graph.output, io.outputs)):
        names = [value.name for value in values]
        if names != [spec.name for spec in specs]:
            raise ExportError(f"{path.name} has {names}; expected {[spec.name for spec in specs]}")
        for value, spec in zip(values, specs, strict=True):
            check_dims(path, value, spec)


def check_dims(path: Path, value: onnx.ValueInfoProto, spec: TensorSpec) -> None:
    """Dynamic axes are dynamic, fixed ones have their size. Raises `ExportError`."""
    dims = value.type.tensor_type.shape.dim
    if len(dims) != len(spec.dims):
        raise ExportError(f"{path.name}: {spec.name} has {len(dims)} axes; expected {len(spec.dims)}, {spec.dims}")
    for index, (dim, wanted) in enumerate(zip(dims, spec.dims, strict=True)):
        if isinstance(wanted, str) and dim.HasField("dim_value"):
            raise ExportError(
                f"{path.name}: the axis {wanted!r} of {spec.name} was frozen at {dim.dim_value}; "
                "the network's code fixes it, so take another backbone"
            )
        if isinstance(wanted, int) and dim.dim_value != wanted:
            found = dim.dim_value or dim.dim_param or "unknown"
            raise ExportError(f"{path.name}: axis {index} of {spec.name} is {found}; expected {wanted}")


def shape_errors(
    path: Path, shapes: Sequence[dict[str, np.ndarray]], reference: Sequence[np.ndarray], threads: int
) -> list[tuple[str, float]]:
    """(shape in words, largest absolute error) per tried shape; NaN where shapes differ."""
    import numpy as np

    from models.runtimes.onnxruntime_session import OnnxRuntimeSession
    from models.spec import side_by_side

    errors = []
    with OnnxRuntimeSession(path, threads=threads) as session:
        for arrays, wanted in zip(shapes, reference, strict=True):
            found = session.infer(arrays)
            logits = side_by_side(found)
            name = ", ".join("×".join(map(str, array.shape)) for array in list(arrays.values())[:1])
            same = logits.shape == wanted.shape
            errors.append((name, float(np.abs(logits - wanted).max()) if same else float("nan")))
    return errors


def parity_gates(
    subject: str, errors: Sequence[tuple[str, float]], tolerance: float, scale: float, floor: float | None = None
) -> list[GateResult]:
    """One gate a tried shape. `floor` is the rounding error of the network itself in fp32: where that alone is above
    the tolerance, the network is to blame and not its export."""
    gate = Gate("export parity", "at most", tolerance, "of the logit range")
    hint = "" if subject == "onnx-fp32" else "to go without it, take its precision out of export.precisions"
    if floor is not None and floor / scale > tolerance:
        hint = (
            f"in PyTorch fp32 itself is {floor / scale:.2g} of the range away from fp64: this network amplifies "
            "rounding, whatever runs it"
        )

    def check(shape: str, error: float) -> GateResult:
        good = error / scale <= tolerance
        return gate.check(f"{subject} at {shape}", error / scale, 1, "" if good else hint)

    return [check(shape, error) for shape, error in errors]
