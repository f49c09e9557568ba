"""What was measured of a candidate, held against the configured thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stages.gate import Gate, GateResult
from stages.statistics import samples_for_bound, samples_needed
from stages.validate.config import GatesConfig, ValidateConfig
from stages.validate.robustness import robustness_gate
from stages.validate.slices import slice_gates
from stages.validate.waivers import waived


@dataclass(frozen=True)
class Scene:
    """What a candidate's numbers are judged by beside themselves. `tolerances`: precision → largest output error as a
    share of the reference's range, and what it comes from in words."""

    samples: int
    metric: str
    reference_metric: float | None
    embeds: bool = False
    tolerances: Mapping[str, tuple[float, str]] | None = None


def check(entry: dict[str, Any], config: ValidateConfig, scene: Scene) -> list[GateResult]:
    """The gates of one candidate."""
    name, problem, gates, samples = entry["name"], entry["problem"], config.gates, scene.samples
    agreement = gates.agreement_of(entry["precision"])
    results = [
        Gate("comparable outputs", "at most", 0.0, "problems").check(name, float(bool(problem)), samples, problem),
        drop_gate(entry, gates, scene),
        Gate("agreement", "at least", agreement).check(name, entry["agreement"], samples),
        Gate("SQNR", "at least", gates.min_sqnr_db, "dB").check(name, entry["sqnr_db"], samples),
    ]
    if scene.embeds:
        results.append(Gate("cosine", "at least", gates.min_cosine).check(name, entry["cosine"], samples))
    if entry["precision"] in (tolerances := scene.tolerances or {}):
        tolerance, source = tolerances[entry["precision"]]
        gate = Gate("output error", "at most", tolerance, "of the output range")
        results.append(gate.check(name, entry["relative_error"], samples, source))
    if "timed_difference" in entry:
        results.append(timed_gate(entry, gates))
    for metric, margin in gates.max_drops.items():
        found = (entry["further_drops"] or {}).get(metric, {"drop": None, "interval": None})
        results.append(judge(f"{metric} drop", margin, entry["name"], found["drop"], found["interval"], gates, samples))
    bounded = (
        ("flip rate", gates.max_flip_rate, "flip_rate", "of the samples"),
        ("ECE increase", gates.max_ece_increase, "ece_increase", ""),
        ("NLL increase", gates.max_nll_increase, "nll_increase", "nats"),
    )
    for title, limit, key, unit in bounded:
        if limit is not None:
            interval = interval_of(entry[f"{key}_interval"])
            results.append(Gate(title, "at most", limit, unit).check_interval(name, entry[key], interval, samples))
    if entry.get("robustness") is not None and gates.max_robustness_drop is not None:
        margin, rule = gates.max_robustness_drop, gates.metric_drop
        results.append(robustness_gate(name, entry["robustness"], margin, scene.metric, rule))
    if entry["slices"] is not None:
        asked = bool(config.slices or config.critical_slices)
        results += slice_gates(name, entry["slices"], gates.max_slice_drop, scene.metric, asked)
    return results


def timed_gate(entry: Mapping[str, Any], gates: GatesConfig) -> GateResult:
    """What a runtime answers under load is what it answered before: within what its precision may differ by from the
    reference. Equal calls of ONNX Runtime's CPU provider and of PyTorch differ by nothing at all here; a GPU may add
    in another order."""
    tolerance = gates.ceilings.get(entry["precision"], gates.max_relative_error_fp16)
    gate = Gate("same answers while timed", "at most", tolerance, "of the output range")
    return gate.check(entry["name"], entry["timed_difference"], entry["latency_calls"], entry["timed_problem"] or "")


def drop_gate(entry: Mapping[str, Any], gates: GatesConfig, scene: Scene, word: str = "drop") -> GateResult:
    """The metric against the margin, as `metric_drop` says. `word`: what the gate calls a loss."""
    difference = entry["metric_difference"]
    drop = None if difference is None else 0.0 - difference
    margin = gates.margin_of(scene.reference_metric)
    if margin is None:
        gate = Gate(f"{scene.metric} {word}", "at most", gates.max_metric_drop, scene.metric)
        return gate.check(entry["name"], None, detail=f"{scene.reference_metric} has no share that could be kept")
    detail = ""
    if drop is not None:
        detail = f"{scene.samples} samples can see drops of {entry['smallest_visible_drop']:.4f} or more"
        needed = samples_needed(entry["difference_variance"], margin)
        if gates.metric_drop == "proven" and needed is not None and needed > scene.samples:
            detail += f"; {margin:.6g} takes about {needed}, or a wider margin, or metric_drop: observed"
    bounds = entry["metric_difference_one_sided"]
    interval = None if bounds is None else [0.0 - bounds[1], 0.0 - bounds[0]]
    return judge(f"{scene.metric} {word}", margin, entry["name"], drop, interval, gates, scene.samples, detail)


def judge(
    title: str,
    margin: float,
    subject: str,
    drop: float | None,
    interval: Sequence[float] | None,
    gates: GatesConfig,
    samples: int,
    detail: str = "",
) -> GateResult:
    """A drop against its margin: what was seen, or what the samples leave possible."""
    gate = Gate(title, "at most", margin, title.rpartition(" ")[0])
    if gates.metric_drop == "observed":
        return gate.check(subject, drop, samples, detail)
    return gate.check_interval(subject, drop, interval_of(interval), samples, detail)


def interval_of(bounds: Sequence[float] | None) -> tuple[float, float] | None:
    """Two bounds as the gate takes them."""
    return None if bounds is None else (bounds[0], bounds[1])


def settled(results: Sequence[GateResult], config: ValidateConfig, digest: str | None) -> list[GateResult]:
    """The results with what becomes of those that did not pass: let through, or waived for the bytes with `digest`."""
    lenient = config.on_inconclusive == "pass"
    return [
        replace(one, tolerated=True)
        if lenient and one.verdict == "inconclusive"
        else waived(one, config.waivers, digest)
        for one in results
    ]


# --- limits ---------------------------------------------------------------------------------------


def limit_results(entry: dict[str, Any], config: ValidateConfig, disturbed: bool) -> list[GateResult]:
    """The limits that are set, held against a candidate."""
    gates, name = config.gates, entry["name"]
    results = []
    if gates.max_latency_ms is not None:
        results.append(latency_result(entry, gates, gates.max_latency_ms))
    if gates.min_speedup is not None:
        limit = Gate("speed-up", "at least", gates.min_speedup, "times PyTorch")
        results.append(limit.check_interval(name, entry["speedup"], interval_of(entry["speedup_interval"])))
    if gates.max_size_bytes is not None:
        results.append(Gate("size", "at most", gates.max_size_bytes, "bytes").check(name, entry["size_bytes"]))
    if gates.max_memory_bytes is not None:
        limit = Gate("peak memory", "at most", gates.max_memory_bytes, "bytes")
        results.append(limit.check(name, entry["peak_memory_bytes"]))
    certain = settled(results, config, entry["digest"])
    if not disturbed:
        return certain
    return [waived(doubted(one, entry), config.waivers, entry["digest"]) for one in certain]


def latency_result(entry: Mapping[str, Any], gates: GatesConfig, limit: float) -> GateResult:
    """The percentile that was seen, and with `latency_rule: proven` its upper bound too: where there is none, or it is
    above the limit, a percentile inside it is inconclusive."""
    name, percentile = entry["name"], gates.latency_percentile
    gate = Gate(f"p{percentile} latency", "at most", limit, "ms")
    found = gate.check(name, entry[f"latency_ms_p{percentile}"])
    if gates.latency_rule == "observed" or not found.passed:
        return found
    bound = (entry["latency_bounds_ms"] or {}).get(f"p{percentile}")
    if bound is None:
        needed = samples_for_bound(percentile / 100)
        why = f"{entry['latency_calls']} calls give no bound at 99 % confidence, {needed} do: raise latency_calls"
        return replace(found, verdict="inconclusive", message=f"{found.message}, but {why}")
    text = f"{found.message}; at 99 % confidence it is at most {bound:.6g}"
    return replace(found, verdict="pass" if gate.keeps(bound) else "inconclusive", message=text)


def is_latency(result: GateResult) -> bool:
    """Whether it is a limit on a percentile of the latency."""
    return result.name.endswith(" latency")


RATIOS = ("speed-up", "latency regression")
"""Gates on how two runtimes compare, whose times others may have disturbed unequally."""


def doubted(result: GateResult, entry: Mapping[str, Any]) -> GateResult:
    """A time of a busy machine is inconclusive where that may have changed the verdict.

    Others only make a runtime slower: a latency inside the limit stays inside, and one stays above it whose best turn
    is above. Which of two runtimes they slowed more is not known. `on_inconclusive` lets nothing of this through: to
    measure on a busy machine would be a way around the limits.
    """
    if result.verdict == "error" or not (is_latency(result) or result.name in RATIOS):
        return result
    turns = entry.get("turns_ms") or []
    if is_latency(result) and (result.passed or (turns and min(turns) > result.threshold)):
        return result
    message = f"{result.message}, on a machine that others kept busy"
    return replace(result, verdict="inconclusive", message=message, tolerated=False)


def over_limits(entry: dict[str, Any], config: ValidateConfig, disturbed: bool = False) -> list[str]:
    """The limits that a candidate does not keep, in words: it may be a good network and still not the one to ship."""
    found = limit_results(entry, config, disturbed)
    return [f"{result.name}: {result.message}" for result in found if result.stops]


def choice_gates(
    entries: list[dict[str, Any]], chosen: str | None, config: ValidateConfig, disturbed: bool = False
) -> list[GateResult]:
    """A candidate is left to ship, and it keeps the limits. Where none is, and one would be if it were known to keep
    them, that is inconclusive."""
    reasons = [f"{entry['name']}: {'; '.join(entry['over_limits'])}" for entry in entries if entry["over_limits"]]
    gate = Gate("a candidate can ship", "at least", 1.0, "candidates")
    found = gate.check("validate", float(bool(chosen)), detail="" if chosen else ". ".join(reasons))
    if not chosen and any(only_inconclusive(entry, config, disturbed) for entry in entries if entry["passed"]):
        found = replace(found, verdict="inconclusive")
    results = [found]
    for entry in entries:
        if entry["name"] == chosen:
            results += limit_results(entry, config, disturbed)
    return results


def only_inconclusive(entry: dict[str, Any], config: ValidateConfig, disturbed: bool) -> bool:
    """Whether the limits that leave a candidate out are all inconclusive."""
    stopping = [one.verdict for one in limit_results(entry, config, disturbed) if one.stops]
    return bool(stopping) and set(stopping) == {"inconclusive"}
