"""Parts of the test split on their own: a class, or a value of a column, may break where the whole hardly moves.

That one of many slices looks bad proves nothing: of 100 classes of 50 samples one drops ten points in a third of the
runs by chance alone. So harm must be shown, after Holm's correction for their number. A critical slice must be proven
to keep its margin.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from models.tasks import classes_of, has_classes
from stages.gate import Gate, GateResult
from stages.statistics import drop_p_value, holm, paired_interval

if TYPE_CHECKING:
    import numpy as np

    from models.spec import TaskName
    from stages.data.splits import Example

ALPHA = 0.05
LISTED = 50
"""Slices in the evidence of a candidate, the worst first; the number of those that were judged stands beside."""


def slices_of(examples: Sequence[Example], labels: Sequence[str], task: TaskName) -> dict[str, list[int]]:
    """Name → the indices of its examples: `label=<class>` where labels are classes, `<column>=<value>` of the columns
    that the examples carry."""
    found: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        names = [f"label={labels[one]}" for one in classes_of(example.label)] if has_classes(task) else []
        for name in [*names, *(f"{column}={value}" for column, value in example.metadata)]:
            found[name].append(index)
    return dict(found)


def slice_table(
    scores: np.ndarray,
    before: np.ndarray,
    slices: Mapping[str, Sequence[int]],
    margin: float,
    minimum: int,
    critical: Mapping[str, float],
) -> dict[str, Any]:
    """What a candidate loses in each slice of at least `minimum` samples and in each critical one, the worst first.

    `scores` and `before`: float64 (samples,), of candidate and reference. `adjusted_p` is Holm's, of the hypothesis
    that the slice loses `margin` at most; critical slices have margins of their own and are not among them. `judged`
    counts the slices that are, `too_small` those that are not.
    """
    import numpy as np

    entries: list[dict[str, Any]] = []
    for name in sorted({*slices, *critical}):
        rows = np.asarray(slices.get(name, ()), np.int64)
        if name not in critical and len(rows) < minimum:
            continue
        entries.append({"name": name, "samples": len(rows), "margin": critical.get(name, margin),
                        "critical": name in critical, **slice_numbers(scores[rows], before[rows])})  # fmt: skip
    others = [entry for entry in entries if not entry["critical"]]
    indices = [np.asarray(slices[entry["name"]], np.int64) for entry in others]
    adjusted = holm([drop_p_value(scores[rows], before[rows], margin) for rows in indices])
    for entry, value in zip(others, adjusted, strict=True):
        entry["adjusted_p"] = value
    entries.sort(key=lambda entry: (entry.get("adjusted_p", 0.0), -(entry["drop"] or 0.0)))
    listed = [entry for entry in entries if entry["critical"]] + [entry for entry in entries if not entry["critical"]]
    small = sum(len(rows) < minimum and name not in critical for name, rows in slices.items())
    return {"judged": len(others), "too_small": small, "slices": listed[: LISTED + len(critical)]}


def slice_numbers(scores: np.ndarray, before: np.ndarray) -> dict[str, Any]:
    """Metric of the reference, drop, and the interval between both one-sided 95 % bounds of the drop; None where there
    is no sample."""
    if not len(scores):
        return {"reference": None, "drop": None, "interval": None}
    low, high = paired_interval(before, scores, 0.90)
    return {"reference": float(before.mean()), "drop": float((before - scores).mean()), "interval": [low, high]}


def slice_gates(
    name: str, table: Mapping[str, Any], margin: float | None, metric: str, asked: bool
) -> list[GateResult]:
    """One gate for the worst of all slices, where there is a margin for all, and one for each critical slice. `asked`:
    the configuration names slices, so that none of enough samples leaves it open, and none at all is no evidence."""
    unit = "" if margin is None else f"adjusted p that no slice loses more than {margin:.6g}"
    gate = Gate("slice drop", "at least", ALPHA, unit)
    worst = next((one for one in table["slices"] if not one["critical"]), None)
    small = f"{table['too_small']} have too few samples" if table["too_small"] else ""
    results = []
    if margin is not None and worst:
        found = f"the worst of {table['judged']} slices, {worst['name']}, loses {worst['drop']:.4f} {metric}"
        detail = "; ".join(part for part in (found, small) if part)
        results.append(gate.check(name, worst["adjusted_p"], worst["samples"], detail))
    elif margin is not None and asked and small:
        results.append(gate.result(name, "inconclusive", None, "no slice has enough samples", small))
    elif margin is not None and asked and not table["slices"]:
        results.append(gate.check(name, None))
    for one in (one for one in table["slices"] if one["critical"]):
        interval = tuple(one["interval"]) if one["interval"] else None
        own = Gate("slice drop", "at most", one["margin"], metric)
        results.append(own.check_interval(f"{name}, {one['name']}", one["drop"], interval, one["samples"]))
    return results


def slice_notes(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """That no slice was judged, where the split has some and all are too small: the same of every candidate."""
    table = next((entry["slices"] for entry in entries if entry["slices"]), None)
    if table is None or table["judged"] or not table["too_small"]:
        return []
    return [f"no slice was judged: {table['too_small']} have fewer samples than validate.gates.min_slice_samples"]
