"""What was measured of a candidate, held against the configured thresholds."""

from __future__ import annotations

from typing import Any

from stages.gate import Gate, GateResult
from stages.validate.config import GatesConfig


def check(
    entry: dict[str, Any], gates: GatesConfig, samples: int, metric: str, embeds: bool = False
) -> list[GateResult]:
    """The gates of one candidate. `embeds`: its outputs are embeddings."""
    name, precision, problem = entry["name"], entry["precision"], entry["problem"]
    agreement = gates.agreement_of(precision)
    key = "metric_difference" if gates.metric_drop == "observed" else "metric_difference_bound"
    drop = None if entry[key] is None else 0.0 - entry[key]
    visible = "" if drop is None else f"{samples} samples can see drops of {entry['smallest_visible_drop']:.4f} or more"
    results = [
        Gate("comparable outputs", "at most", 0.0, "problems").check(name, float(bool(problem)), samples, problem),
        Gate(f"{metric} drop", "at most", gates.max_metric_drop, metric).check(name, drop, samples, visible),
        Gate("agreement", "at least", agreement).check(name, entry["agreement"], samples),
        Gate("SQNR", "at least", gates.min_sqnr_db, "dB").check(name, entry["sqnr_db"], samples),
    ]
    if embeds:
        results.append(Gate("cosine", "at least", gates.min_cosine).check(name, entry["cosine"], samples))
    limits = {"fp32": gates.max_relative_error_fp32, "fp16": gates.max_relative_error_fp16}
    if precision in limits:
        gate = Gate("output error", "at most", limits[precision], "of the output range")
        results.append(gate.check(name, entry["relative_error"], samples))
    return results


def limits_of(gates: GatesConfig) -> list[tuple[str, Gate]]:
    """(what is measured, its limit) for the limits that are set."""
    limits = []
    if gates.max_latency_ms is not None:
        limits.append(("latency_ms_p95", Gate("p95 latency", "at most", gates.max_latency_ms, "ms")))
    if gates.max_size_bytes is not None:
        limits.append(("size_bytes", Gate("size", "at most", gates.max_size_bytes, "bytes")))
    return limits


def over_limits(entry: dict[str, Any], gates: GatesConfig) -> list[str]:
    """The limits that a candidate does not keep, in words: it may be a good network and still not the one to ship."""
    found = [gate.check(entry["name"], entry[key]) for key, gate in limits_of(gates)]
    return [f"{result.name}: {result.message}" for result in found if not result.passed]


def choice_gates(entries: list[dict[str, Any]], chosen: str | None, gates: GatesConfig) -> list[GateResult]:
    """A candidate is left to ship, and it keeps the limits."""
    reasons = [f"{entry['name']}: {'; '.join(entry['over_limits'])}" for entry in entries if entry["over_limits"]]
    gate = Gate("a candidate can ship", "at least", 1.0, "candidates")
    results = [gate.check("validate", float(bool(chosen)), detail="" if chosen else ". ".join(reasons))]
    for entry in entries:
        if entry["name"] == chosen:
            results += [limit.check(entry["name"], entry[key]) for key, limit in limits_of(gates)]
    return results
