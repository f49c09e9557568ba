"""What a run says, read from its record with nothing taken for granted.

A run that failed half-way has no measurements for the stages behind: every number may be missing.
All renderers (HTML, Markdown, JUnit, terminal) read these facts, so they cannot disagree.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pipeline.report.formats import format_bytes, format_interval, format_percent, format_points, format_ratio
from stages.gate import outcome_of

Verdict = Literal["pass", "fail", "partial"]

GATE_VERDICTS = ("pass", "fail", "inconclusive", "error")


def number(value: object) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def mapping(value: object) -> dict[str, Any]:
    """The dict, or an empty one for anything else."""
    return dict(value) if isinstance(value, Mapping) else {}


def sequence(value: object) -> list[Any]:
    """The list, or an empty one for anything else."""
    return list(value) if isinstance(value, list | tuple) else []


def records(value: object) -> list[dict[str, Any]]:
    """The dicts of a list."""
    return [mapping(item) for item in sequence(value) if isinstance(item, Mapping)]


@dataclass(frozen=True)
class GateFact:
    """One gate of one stage."""

    stage: str
    name: str
    subject: str
    verdict: str
    measured: float | None
    direction: str
    threshold: float | None
    unit: str
    message: str
    outcome: str
    """Why a gate that did not pass stops nothing; empty where it stops the run, and where it passed."""

    @property
    def passed(self) -> bool:
        """Whether the gate passed."""
        return self.verdict == "pass"

    @property
    def stops(self) -> bool:
        """Whether the run ends here."""
        return not self.passed and not self.outcome

    @property
    def rank(self) -> int:
        """What stops the run first, then what is let through, then what passed."""
        return 0 if self.stops else 1 if not self.passed else 2

    @property
    def word(self) -> str:
        """What becomes of a gate that did not pass and stops nothing, in a word; else nothing."""
        return "" if not self.outcome else "waived" if self.outcome.startswith("waived") else "let through"

    @property
    def finding(self) -> str:
        """The message, and what becomes of it."""
        return f"{self.message}; {self.outcome}" if self.outcome else self.message


@dataclass(frozen=True)
class Candidate:
    """One candidate that validate measured. Latency in ms, size in bytes, differences as fractions."""

    name: str
    precision: str
    metric: float | None
    difference: float | None
    interval: tuple[float, float] | None
    agreement: float | None
    p50_ms: float | None
    p95_ms: float | None
    throughput_per_s: float | None
    speedup: float | None
    size_bytes: float | None
    passed: bool
    chosen: bool
    numbers: dict[str, Any]

    @property
    def excused(self) -> str:
        """What of its gates did not pass and is waived or let through, to stand behind a "pass"; or nothing."""
        names = sequence(self.numbers.get("excused"))
        return f", {len(names)} excused" if names else ""

    @property
    def arithmetic(self) -> str:
        """`int8 96%, fp32 4%`: the share of each precision in the multiply-accumulates of the file."""
        shares = mapping(self.numbers.get("mac_shares")).items()
        return ", ".join(f"{name} {value:.0%}" for name, share in shares if (value := number(share)) is not None)


@dataclass(frozen=True)
class Engine:
    """One engine that is shipped, with the targets it is shipped for. Size in bytes."""

    name: str
    targets: str
    library: str
    size_bytes: float | None
    proven: bool
    mends: str

    @property
    def status(self) -> str:
        """PROVEN by the receipt of a device or a run here, or UNPROVEN."""
        return "PROVEN" if self.proven else "UNPROVEN"


@dataclass(frozen=True)
class Facts:
    """The record of a run (`run.json`) and what follows from it."""

    run: dict[str, Any]

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.run.get("run") or "unnamed run")

    @property
    def status(self) -> str:
        """`passed`, `failed`, `gate-failed` or `interrupted`."""
        return str(self.run.get("status") or "failed")

    @cached_property
    def stages(self) -> list[dict[str, Any]]:
        """The stages in order."""
        return records(self.run.get("stages"))

    def stage(self, name: str) -> dict[str, Any]:
        """The entry of one stage, empty where there is none."""
        return next((stage for stage in self.stages if stage.get("name") == name), {})

    def measured(self, stage: str) -> dict[str, Any]:
        """The measurements of one stage."""
        return mapping(self.stage(stage).get("measurements"))

    @cached_property
    def gates(self) -> list[GateFact]:
        """All gates in the order of the stages, but those that did not pass first, and of them the worst first."""
        found = [
            gate_fact(str(stage.get("name")), gate) for stage in self.stages for gate in records(stage.get("gates"))
        ]
        return sorted(found, key=excess_of, reverse=True)

    @cached_property
    def failed_gates(self) -> list[GateFact]:
        """The gates that stop the run."""
        return [gate for gate in self.gates if gate.stops]

    @cached_property
    def excused_gates(self) -> list[GateFact]:
        """The gates that did not pass and stop nothing: waived, or inconclusive and let through."""
        return [gate for gate in self.gates if not gate.passed and not gate.stops]

    @property
    def excused_sentence(self) -> str:
        """How many gates did not pass and are waived or let through, or nothing."""
        return counts_of("gate", [gate.word for gate in self.excused_gates])

    @cached_property
    def broken_stage(self) -> dict[str, Any]:
        """The stage that failed with an error or was interrupted, empty where there is none."""
        return next((stage for stage in self.stages if stage.get("status") in ("failed", "interrupted")), {})

    @property
    def metric(self) -> str:
        """What the metric is called."""
        return str(self.measured("validate").get("metric_name") or self.measured("finetune").get("metric") or "metric")

    @property
    def reference(self) -> dict[str, Any]:
        """What validate measured of the PyTorch reference."""
        return mapping(self.measured("validate").get("reference"))

    @cached_property
    def candidates(self) -> list[Candidate]:
        """What validate measured of every candidate."""
        validated = self.measured("validate")
        return [
            candidate_from(item, self.reference, validated.get("chosen"))
            for item in records(validated.get("candidates"))
        ]

    @cached_property
    def chosen(self) -> Candidate | None:
        """The candidate that validate chose."""
        return next((candidate for candidate in self.candidates if candidate.chosen), None)

    @cached_property
    def left_out(self) -> list[tuple[str, str, str]]:
        """(stage, candidate, reason): does not run here, is outside quantize's budget, or above a limit."""
        none = "no reason recorded"
        found = [
            (stage, str(item.get("name") or ""), str(item.get("reason") or none))
            for stage in ("export", "quantize")
            for item in records(self.measured(stage).get("candidates"))
            if item.get("accepted") is False
        ]
        for item in records(self.measured("validate").get("candidates")):
            found += [("validate", str(item.get("name") or ""), str(why)) for why in sequence(item.get("over_limits"))]
        return found

    @cached_property
    def other_runs(self) -> list[Candidate]:
        """The candidates on the providers that do not decide, and the engines that ran on the GPU here."""
        validated = self.measured("validate")
        items = [*records(validated.get("other_runs")), *records(validated.get("engine_runs"))]
        return [candidate_from(item, {}, None) for item in items]

    @property
    def provider(self) -> str:
        """The execution provider that the candidates' numbers are of, where it is not the CPU's."""
        provider = str(self.measured("validate").get("provider") or "cpu")
        return "" if provider == "cpu" else provider

    @cached_property
    def engines(self) -> list[Engine]:
        """The engines that are shipped, as validate listed them."""
        return [
            Engine(
                name=str(item.get("name") or "unnamed"),
                targets=", ".join(map(str, sequence(item.get("ships_for")))),
                library=f"{item.get('runtime', '')} {item.get('library_version') or ''}".strip(),
                size_bytes=number(item.get("size_bytes")),
                proven=item.get("status") == "PROVEN",
                mends=", ".join(map(str, sequence(item.get("mends")))),
            )
            for item in records(self.measured("validate").get("engines"))
            if sequence(item.get("ships_for"))
        ]

    @property
    def unproven_sentence(self) -> str:
        """Which engines nothing has proven on their devices, or nothing."""
        left = [engine.targets for engine in self.engines if not engine.proven]
        return f"engines for {', '.join(left)} UNPROVEN on their devices" if left else ""

    @property
    def unearned(self) -> list[tuple[str, str]]:
        """(candidate, reason): of fewer bits, and no better for it than one in floating point."""
        reasons = [(item.name, mapping(item.numbers.get("not_worth_it"))) for item in self.candidates]
        return [(name, str(reason)) for name, found in reasons for reason in found.values()]

    @property
    def disturbed(self) -> bool:
        """Whether other processes used the cores while times were measured."""
        return self.measured("validate").get("disturbed") is True

    @cached_property
    def notes(self) -> list[tuple[str, str]]:
        """(where it comes from, text): what was left out of the data, then what each stage says."""
        notes = [("data", str(note)) for note in sequence(self.run.get("data_notes"))]
        for stage in self.stages:
            notes += [(str(stage.get("name")), str(note)) for note in sequence(stage.get("notes"))]
        return notes

    @property
    def packed(self) -> bool:
        """Whether a bundle was made."""
        return self.stage("package").get("status") in ("ran", "fresh")

    @cached_property
    def verdict(self) -> Verdict:
        """`pass` only for a packed candidate with gates that were checked and all passed."""
        if self.status != "passed" or self.failed_gates or self.broken_stage:
            return "fail"
        return "pass" if self.packed and self.chosen and self.gates else "partial"

    @cached_property
    def headline(self) -> str:
        """The answer in a few words."""
        if self.broken_stage.get("status") == "interrupted" or self.status == "interrupted":
            return f"Not finished: interrupted in {self.broken_stage.get('name', 'a stage')}"
        if self.broken_stage:
            return f"Not shipped: {self.broken_stage['name']} failed"
        if self.failed_gates:
            words = {"fail": "failed", "inconclusive": "inconclusive", "error": "without evidence"}
            return f"Not shipped: {counts_of('gate', [words[gate.verdict] for gate in self.failed_gates])}"
        if self.status != "passed":
            return "Not shipped: the run failed before a stage could run"
        if self.verdict == "pass" and self.chosen:
            more = [part for part in (self.excused_sentence, self.unproven_sentence) if part]
            return "; ".join([f"Ready to ship: {self.chosen.name}", *more])
        if self.packed:
            return "Packed without evidence: no candidate was measured or no gate was checked"
        done = [str(stage.get("name")) for stage in self.stages if stage.get("status") in ("ran", "fresh")]
        return f"Passed up to {done[-1]}; nothing is packed yet" if done else "Nothing has run yet"

    @cached_property
    def explanation(self) -> str:
        """One or two sentences under the headline."""
        if self.headline.startswith("Not finished"):
            return "The same command resumes where it stopped. Nothing unfinished is taken for a result."
        if self.broken_stage:
            return str(self.broken_stage.get("error") or "No error message was recorded; see the log of the run.")
        if self.failed_gates:
            gate = self.failed_gates[0]
            more = f" (and {len(self.failed_gates) - 1} more)" if len(self.failed_gates) > 1 else ""
            return f"{gate.name} for {gate.subject}: {gate.message}{more}"
        return self.chosen_sentence

    @property
    def chosen_sentence(self) -> str:
        """What the chosen candidate measured, in words."""
        chosen = self.chosen
        if chosen is None:
            return ""
        samples = number(self.measured("validate").get("samples"))
        parts = [f"{self.metric} {format_percent(chosen.metric)}"]
        if chosen.difference is not None:
            parts[0] += f" ({format_points(chosen.difference)} against PyTorch"
            parts[0] += f", interval {format_interval(chosen.interval)})" if chosen.interval else ")"
        if chosen.speedup is not None:
            unreliable = " (unreliable: the machine was busy)" if self.disturbed else ""
            parts.append(f"{format_ratio(chosen.speedup)} the speed of PyTorch{unreliable}")
        if (share := self.size_share) is not None:
            parts.append(f"{share:.0%} of its size ({format_bytes(chosen.size_bytes)})")
        over = f" on {samples:,.0f} held-out examples" if samples else ""
        return f"{self.run.get('backbone', 'The network')}{over}: {', '.join(parts)}."

    @property
    def size_share(self) -> float | None:
        """Size of the chosen candidate as a share of the reference's."""
        size = number(self.reference.get("size_bytes"))
        if self.chosen is None or self.chosen.size_bytes is None or not size:
            return None
        return self.chosen.size_bytes / size


def gate_fact(stage: str, gate: Mapping[str, Any]) -> GateFact:
    """A gate of the record; a verdict that is none of those known is a failure."""
    return GateFact(
        stage=stage,
        name=str(gate.get("name") or "unnamed"),
        subject=str(gate.get("subject") or ""),
        verdict=gate["verdict"] if gate.get("verdict") in GATE_VERDICTS else "fail",
        measured=number(gate.get("measured")),
        direction=str(gate.get("direction") or ""),
        threshold=number(gate.get("threshold")),
        unit=str(gate.get("unit") or ""),
        message=str(gate.get("message") or ""),
        outcome=outcome_of(gate),
    )


def counts_of(thing: str, words: Sequence[str]) -> str:
    """`2 gates failed, 1 inconclusive`; empty for none."""
    counts = list(Counter(words).items())
    parts = [f"{count} {word}" for word, count in counts[1:]]
    return ", ".join([f"{counts[0][1]} {thing}{'s' * (counts[0][1] > 1)} {counts[0][0]}", *parts]) if counts else ""


def candidate_from(item: Mapping[str, Any], reference: Mapping[str, Any], chosen: object) -> Candidate:
    """A candidate of validate's measurements; the speed-up follows from the latencies where it is missing."""
    p50, reference_p50 = number(item.get("latency_ms_p50")), number(reference.get("latency_ms_p50"))
    bounds = [number(bound) for bound in sequence(item.get("metric_difference_interval"))]
    low, high = bounds if len(bounds) == 2 else (None, None)
    speedup = number(item.get("speedup"))
    if speedup is None and p50 and reference_p50:
        speedup = reference_p50 / p50
    return Candidate(
        name=str(item.get("name") or "unnamed"),
        precision=str(item.get("precision") or ""),
        metric=number(item.get("metric")),
        difference=number(item.get("metric_difference")),
        interval=(low, high) if low is not None and high is not None else None,
        agreement=number(item.get("agreement")),
        p50_ms=p50,
        p95_ms=number(item.get("latency_ms_p95")),
        throughput_per_s=number(item.get("throughput_per_s")),
        speedup=speedup,
        size_bytes=number(item.get("size_bytes")),
        passed=item.get("passed") is True,
        chosen=chosen is not None and item.get("name") == chosen,
        numbers=dict(item),
    )


def excess_of(gate: GateFact) -> float:
    """How far a gate that did not pass lies beyond its threshold, as a share of the threshold.

    Infinite where nothing was measured and where the threshold is zero; 0 for what lies within it and did not pass all
    the same (inconclusive); −1 for what passed.
    """
    if gate.passed:
        return -1.0
    if gate.measured is None or gate.threshold is None:
        return math.inf
    beyond = gate.measured - gate.threshold if gate.direction == "at most" else gate.threshold - gate.measured
    if beyond <= 0:
        return 0.0
    return beyond / abs(gate.threshold) if gate.threshold else math.inf
