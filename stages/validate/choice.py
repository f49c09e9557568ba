"""Which of the candidates that may be shipped is."""

from __future__ import annotations

from typing import Any

from stages.candidates import FLOATS
from stages.latency import speedup_of

OBJECTIVES = {"latency": "latency_ms_p50", "size": "size_bytes", "accuracy": "metric"}


def not_worth_it(entry: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, str]:
    """Objective → why a candidate of fewer bits is no better at it than one in floating point that may ship too.

    Faster is what the paired turns show, not what two medians happen to say: a tie goes to floating point, which is
    nearer to the reference. Empty for floating point itself, and where none of it may ship. What is excused takes no
    place from what is proven.
    """
    floats = [one for one in entries if one["precision"] in FLOATS and one["passed"] and not one["over_limits"]]
    floats = [one for one in floats if entry["excused"] or not one["excused"]]
    if entry["precision"] in FLOATS or not floats or not entry["turns_ms"]:
        return {}
    found = {}
    fastest = min(floats, key=lambda one: float(one["latency_ms_p50"]))
    ratio, (low, _) = speedup_of(fastest["turns_ms"], entry["turns_ms"])
    if low <= 1:
        found["latency"] = f"not faster than {fastest['name']}: {ratio:.2f}× its speed, {low:.2f}× at least"
    smallest = min(floats, key=lambda one: int(one["size_bytes"]))
    if entry["size_bytes"] >= smallest["size_bytes"]:
        sizes = (f"{one['size_bytes'] / 1e6:.1f} MB" for one in (entry, smallest))
        found["size"] = f"not smaller than {smallest['name']}: {' against '.join(sizes)}"
    return found


def choose(entries: list[dict[str, Any]], objective: str) -> str | None:
    """The best of those that may be shipped and are worth their lower precision, or None where there is none."""
    worth = {entry["name"] for entry in entries if objective not in entry["not_worth_it"]}
    return next((name for name in ranked(entries, objective) if name in worth), None)


def ranked(entries: list[dict[str, Any]], objective: str) -> list[str]:
    """The names of those that passed and keep the limits, the best first; of equals the faster, then the smaller.

    What is proven comes before what somebody excuses (a gate that is waived or let through), however good that is.
    """
    sign = -1 if objective == "accuracy" else 1
    eligible = [entry for entry in entries if entry["passed"] and not entry["over_limits"]]

    def rank(entry: dict[str, Any]) -> tuple[bool, float, float, float]:
        return bool(entry["excused"]), sign * entry[OBJECTIVES[objective]], entry["latency_ms_p50"], entry["size_bytes"]

    return [str(entry["name"]) for entry in sorted(eligible, key=rank)]
