"""A gate: a metric, a direction, a threshold and a unit. No evidence is never a pass.

PASS and FAIL are shown by what was measured. INCONCLUSIVE: there is evidence, and it fits both (an interval with the
threshold inside it, times of a busy machine). ERROR: there is no number that could be compared (nothing measured, NaN,
infinity, zero samples, a threshold that is none).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["pass", "fail", "inconclusive", "error"]
Direction = Literal["at most", "at least"]

VERDICT_WORDS: dict[str, str] = {
    "pass": "passed",
    "fail": "failed",
    "inconclusive": "is inconclusive",
    "error": "has no evidence",
}


@dataclass(frozen=True)
class GateResult:
    """What one gate found. `subject` is what was measured (a candidate, the network, …).

    `waived` says who takes a gate that did not pass on himself, until when and why; `tolerated`: it is inconclusive,
    and the configuration lets that through. The verdict stays what it is.
    """

    name: str
    subject: str
    verdict: Verdict
    measured: float | None
    direction: Direction
    threshold: float
    unit: str
    message: str
    waived: str = ""
    tolerated: bool = False

    @property
    def passed(self) -> bool:
        """Whether the gate passed."""
        return self.verdict == "pass"

    @property
    def stops(self) -> bool:
        """Whether the run ends here."""
        return stops(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def stops(gate: Mapping[str, Any]) -> bool:
    """Whether a gate of a manifest or a record ends the run: it did not pass, and nobody lets it through."""
    if gate.get("verdict") == "pass":
        return False
    return not gate.get("waived") and not (gate.get("verdict") == "inconclusive" and gate.get("tolerated") is True)


def outcome_of(gate: Mapping[str, Any]) -> str:
    """Why a gate that did not pass does not stop the run; empty where it does, and where it passed."""
    if gate.get("verdict") == "pass" or stops(gate):
        return ""
    return f"waived {gate['waived']}" if gate.get("waived") else "let through by on_inconclusive: pass"


@dataclass(frozen=True)
class Gate:
    """`check` compares a measured value with the threshold, `check_interval` what the evidence leaves possible."""

    name: str
    direction: Direction
    threshold: float
    unit: str = ""

    def check(self, subject: str, measured: float | None, samples: int | None = None, detail: str = "") -> GateResult:
        """Judge `measured` (taken over `samples` samples; None where samples make no sense): it keeps the threshold or
        not. NaN, infinity, None and zero samples are errors."""
        if problem := self.no_evidence(measured, samples):
            return self.result(subject, "error", measured, problem, detail)
        assert measured is not None
        good = self.keeps(measured)
        word = self.direction if good else "above" if self.direction == "at most" else "below"
        return self.result(
            subject, "pass" if good else "fail", measured, f"{measured:.6g} is {word} {self.threshold:.6g}", detail
        )

    def check_interval(
        self,
        subject: str,
        measured: float | None,
        interval: tuple[float, float] | None,
        samples: int | None = None,
        detail: str = "",
    ) -> GateResult:
        """Judge `measured` by what its confidence interval leaves possible: PASS where all of it keeps the threshold,
        FAIL where nothing of it does, INCONCLUSIVE where the threshold lies inside. An interval with NaN is an error.
        """
        problem = self.no_evidence(measured, samples)
        if not problem and (interval is None or not all(math.isfinite(bound) for bound in interval)):
            problem = f"the interval is {interval}, which is no evidence"
        if problem or interval is None:
            return self.result(subject, "error", measured, problem, detail)
        kept = [self.keeps(bound) for bound in interval]
        verdict: Verdict = "pass" if all(kept) else "inconclusive" if any(kept) else "fail"
        words = {
            "pass": f"is {self.direction} {self.threshold:.6g}",
            "fail": f"is {'above' if self.direction == 'at most' else 'below'} {self.threshold:.6g}",
            "inconclusive": f"leaves open whether it is {self.direction} {self.threshold:.6g}",
        }
        found = f"{measured:.6g} ({interval[0]:.6g} to {interval[1]:.6g}) {words[verdict]}"
        return self.result(subject, verdict, measured, found, detail)

    def keeps(self, value: float) -> bool:
        """Whether a value keeps the threshold."""
        return value <= self.threshold if self.direction == "at most" else value >= self.threshold

    def no_evidence(self, measured: float | None, samples: int | None) -> str:
        """Why there is nothing to compare, or nothing."""
        if not math.isfinite(self.threshold):
            return f"the threshold is {self.threshold}, which nothing can be held to"
        if measured is None:
            return "nothing was measured"
        if not math.isfinite(measured):
            return f"measured {measured}, which is no evidence"
        if samples is not None and samples <= 0:
            return "measured on zero samples, which is no evidence"
        return ""

    def result(self, subject: str, verdict: Verdict, measured: float | None, found: str, detail: str) -> GateResult:
        """The result in words; a number that is none is left out."""
        value = measured if measured is not None and math.isfinite(measured) else None
        message = " ".join(part for part in (found, self.unit, f"({detail})" if detail else "") if part)
        return GateResult(self.name, subject, verdict, value, self.direction, self.threshold, self.unit, message)
