"""How far a candidate's outputs are from the reference's on the same samples, and whether they are evidence at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.spec import side_by_side
from models.tasks.single_label import SingleLabel
from stages.inputs import batches
from stages.statistics import clopper_pearson, paired_interval, smallest_cosine, smallest_visible_drop

if TYPE_CHECKING:
    import numpy as np

    from models.modalities import Processing
    from models.runtimes.base import Runtime
    from models.spec import IOSpec
    from models.tasks import Task
    from stages.base import Progress
    from stages.data.splits import Example

HISTOGRAM_BINS = 30
SQNR_LIMIT_DB = 300.0
"""Reported where the logits are equal bit by bit: the ratio has no noise to divide by."""


@dataclass(frozen=True)
class Outputs:
    """Outputs, float32 (samples, outputs), or why there are none that could be evidence."""

    values: np.ndarray | None
    problem: str = ""


def collect_outputs(
    runtime: Runtime,
    processing: Processing,
    examples: Sequence[Example],
    io: IOSpec,
    batch_size: int,
    progress: Progress,
    description: str,
) -> Outputs:
    """Run all examples. A missing or added output, another shape or dtype, NaN and zero samples are problems.

    Raises:
        RuntimeInferenceError: the runtime failed.
    """
    with progress.task(description, len(examples)) as advance:

        def calls() -> Iterator[tuple[Mapping[str, np.ndarray], int]]:
            for inputs, count in batches(processing, examples, batch_size):
                yield runtime.infer(inputs), count
                advance(count)

        return outputs_of_calls(calls(), io)


def outputs_of_calls(calls: Iterable[tuple[Mapping[str, np.ndarray], int]], io: IOSpec) -> Outputs:
    """Of consecutive calls, each what it gave (output name → array) and for how many samples; see `collect_outputs`."""
    import numpy as np

    parts = []
    for found, count in calls:
        if problem := output_problem(found, io, count):
            return Outputs(None, problem)
        parts.append(side_by_side({output.name: found[output.name] for output in io.outputs}))
    if not parts:
        return Outputs(None, "there is not one sample to compare on")
    return Outputs(np.concatenate(parts))


def first_outputs(outputs: Mapping[str, Outputs], io: IOSpec, count: int) -> dict[str, dict[str, np.ndarray]]:
    """Runtime → output → array of the first `count` samples, of the runtimes whose outputs are evidence: what a timed
    batch of the same samples must give again."""
    import numpy as np

    ends = np.cumsum([int(output.dims[1]) for output in io.outputs])[:-1]
    return {
        name: {
            output.name: part
            for output, part in zip(io.outputs, np.split(one.values[:count], ends, axis=1), strict=True)
        }
        for name, one in outputs.items()
        if one.values is not None
    }


def output_problem(found: Mapping[str, np.ndarray], io: IOSpec, batch: int) -> str:
    """Why the outputs of one call are not those of the I/O contract, or are not numbers; empty where they are."""
    import numpy as np

    wanted = {tensor.name: tensor for tensor in io.outputs}
    if missing := sorted(wanted.keys() - found.keys()):
        return f"the output {missing[0]!r} is missing; found {sorted(found)}"
    if added := sorted(found.keys() - wanted.keys()):
        return f"the output {added[0]!r} is not in the I/O contract, which has {sorted(wanted)}"
    for name, tensor in wanted.items():
        array = found[name]
        # The first axis is the batch; the others are fixed, or named and then free.
        shape = (batch, *(size if isinstance(size, int) else None for size in tensor.dims[1:]))
        same = len(array.shape) == len(shape) and all(
            size is None or size == actual for actual, size in zip(array.shape, shape, strict=True)
        )
        if not same or str(array.dtype) != tensor.dtype:
            return f"{name} is {array.dtype} {array.shape}; the I/O contract says {tensor.dtype} {shape}"
        if bad := int(np.count_nonzero(~np.isfinite(array))):
            return f"{bad} of {array.size} values of {name} are NaN or infinite"
    return ""


def compare(found: Outputs, wanted: Outputs, targets: np.ndarray, task: Task) -> dict[str, Any]:
    """Differences of a candidate (`found`) from the reference (`wanted`).

    Where either is no evidence there is a `problem` and every number is None, which no gate passes.
    """
    import numpy as np

    problem = found.problem or (f"the reference: {wanted.problem}" if wanted.problem else "")
    if found.values is None or wanted.values is None:
        return {"problem": problem, **dict.fromkeys(NUMBERS)}
    if found.values.shape != wanted.values.shape:
        problem = f"outputs have shape {found.values.shape}, the reference's {wanted.values.shape}"
        return {"problem": problem, **dict.fromkeys(NUMBERS)}
    for values, whose in ((found.values, ""), (wanted.values, "the reference: ")):
        if not np.isfinite(values).all():
            problem = f"{whose}{int(np.count_nonzero(~np.isfinite(values)))} values are NaN or infinite"
            return {"problem": problem, **dict.fromkeys(NUMBERS)}
    numbers = {**decisions(found.values, wanted.values, targets, task), **errors(found.values, wanted.values, task)}
    return {"problem": problem, **numbers}


NUMBERS = (
    "metric", "more_metrics", "metric_difference", "metric_difference_interval", "metric_difference_one_sided",
    "difference_variance", "flips", "flip_rate", "flip_rate_interval", "smallest_visible_drop", "agreement",
    "logit_range", "max_abs_error", "mean_abs_error", "p999_abs_error", "relative_error", "cosine", "sqnr_db", "kl",
    "error_histogram",
)  # fmt: skip
"""The keys of `decisions` and `errors`."""


def decisions(found: np.ndarray, wanted: np.ndarray, targets: np.ndarray, task: Task) -> dict[str, Any]:
    """What differs in the answers. Differences are candidate minus reference.

    `metric_difference_interval` has 95 % confidence; `metric_difference_one_sided` are both bounds of one-sided tests
    at 5 %, as those of `flip_rate_interval` are. `difference_variance` is the mean squared difference of two scores of
    a sample. `flips` counts samples whose score differs (of right and wrong answers: Dutta et al. 2024, arXiv
    2407.09141), `flip_rate` is their share.
    """
    import numpy as np

    scores, before = task.scores(found, targets), task.scores(wanted, targets)
    flips = int((scores != before).sum())
    return {
        "metric": float(scores.mean()),
        "more_metrics": task.more_metrics(found, targets),
        "metric_difference": float((scores - before).mean()),
        "metric_difference_interval": list(paired_interval(scores, before)),
        "metric_difference_one_sided": list(paired_interval(scores, before, 0.90)),
        "difference_variance": float(np.square(scores - before).mean()),
        "flips": flips,
        "flip_rate": flips / len(scores),
        "flip_rate_interval": list(clopper_pearson(flips, len(scores))),
        "smallest_visible_drop": smallest_visible_drop(scores, before),
        "agreement": float(task.same(found, wanted).mean()),
    }


def errors(found: np.ndarray, wanted: np.ndarray, task: Task) -> dict[str, Any]:
    """What differs in the outputs.

    `relative_error` is the largest error as a share of the reference's output range, `cosine` the smallest over all
    samples (and embeddings), `sqnr_db` 10·log10(Σ reference² / Σ error²), `kl` the mean divergence of the candidate's
    probabilities from the reference's in nats (None where the outputs are not those of one choice). A reference that
    is zero throughout has neither range nor signal: those numbers are None.
    """
    import numpy as np

    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    error = np.abs(found - wanted)
    noise, signal = float(np.square(error).sum()), float(np.square(wanted).sum())
    scale = float(wanted.max() - wanted.min())
    counts, edges = np.histogram(error.max(1), bins=HISTOGRAM_BINS)
    sqnr_db = min(10 * float(np.log10(signal / noise)), SQNR_LIMIT_DB) if noise and signal else SQNR_LIMIT_DB
    return {
        "logit_range": scale,
        "max_abs_error": float(error.max()),
        "mean_abs_error": float(error.mean()),
        "p999_abs_error": float(np.quantile(error, 0.999)),
        "relative_error": float(error.max()) / scale if scale else None,
        "cosine": smallest_cosine(found, wanted, task.embeds or 1),
        "sqnr_db": sqnr_db if signal else None,
        "kl": mean_divergence(found, wanted) if isinstance(task, SingleLabel) else None,
        "error_histogram": {"edges": [float(edge) for edge in edges], "counts": [int(count) for count in counts]},
    }


def mean_divergence(found: np.ndarray, wanted: np.ndarray) -> float:
    """Of the probabilities of `found` from those of `wanted`, in nats."""
    import numpy as np

    before, after = log_probabilities(wanted), log_probabilities(found)
    # Rounding can leave a divergence of equal distributions just below zero.
    return max(float((np.exp(before) * (before - after)).sum(1).mean()), 0.0)


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Log-softmax over the classes: float64 (samples, classes)."""
    import numpy as np

    shifted = logits - logits.max(axis=1, keepdims=True)
    values: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return values


def confusion_of(logits: np.ndarray, labels: np.ndarray, classes: int) -> list[list[int]]:
    """Counts: row = true class, column = predicted class."""
    import numpy as np

    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (labels, logits.argmax(1)), 1)
    return [[int(value) for value in row] for row in matrix]
