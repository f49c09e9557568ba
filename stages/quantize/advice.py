"""What to try where INT8 costs too much: repairs first, which need no training, then training with its rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stages.quantize.repairs import REPAIRED

if TYPE_CHECKING:
    from stages.candidates import Candidate

MANY = 0.1
"""Share of the nodes in floating point above which advice is given: the demo needs 2 of 60, and ships with 96 % of its
arithmetic in INT8 (see docs/decisions/0006)."""

STATIC = tuple(f"onnx-{scheme}" for scheme in REPAIRED)
"""Candidates that repairs, and training with their rounding, are for."""

TRAINING = "finetune.quantization_aware.epochs: 1 trains for INT8 (the metric gains more than the agreement)"


def advice_of(candidates: Sequence[Candidate], repairs: bool) -> tuple[str, ...]:
    """A sentence, or nothing where static INT8 is well: it was tried, and is outside its budget or largely floating
    point. `repairs`: whether they can be made here."""
    for one in candidates:
        if one.name not in STATIC or not one.measurements.get("tried"):
            continue
        if not one.accepted:
            found = f"{one.name} is outside its budget"
        elif (share := share_in_float(one.measurements)) > MANY:
            found = f"{one.name} keeps {share:.0%} of its nodes in floating point"
        else:
            continue
        untried = repairs and not one.measurements.get("repairs")
        quick = "quantize.repairs: [smooth, bias-correction] is quick; " if untried else ""
        return (f"{found}: {quick}{TRAINING}",)
    return ()


def share_in_float(measured: dict[str, Any]) -> float:
    """Of the nodes that could be INT8; they are only counted where they were ranked."""
    ranked = len(measured["sensitivity"])
    return len(measured["float_modules"]) / ranked if ranked else 0.0
