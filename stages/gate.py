"""A gate: a metric, a direction, a threshold and a unit. No evidence is never a pass."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["pass", "fail"]
Direction = Literal["at most", "at least"]


@dataclass(frozen=True)
class GateResult:
    """What one gate found. `subject` is what was measured (a candidate, the network, …)."""

    name: str
    subject: str
    verdict: Verdict
    measured: float | None
    direction: Direction
    threshold: float
    unit: str
    message: str

    @property
    def passed(self) -> bool:
        """Whether the gate passed."""
        return self.verdict == "pass"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Gate:
    """`check` compares a measured value with the threshold; NaN, inf, None and zero samples fail."""

    name: str
    direction: Direction
    threshold: float
    unit: str = ""

    def check(self, subject: str, measured: float | None, samples: int | None = None, detail: str = "") -> GateResult:
        """Judge `measured` (taken over `samples` samples; None where samples make no sense)."""
        problem = ""
        if not math.isfinite(self.threshold):
            problem = f"the threshold is {self.threshold}, which nothing can be held to"
        elif measured is None:
            problem = "nothing was measured"
        elif not math.isfinite(measured):
            problem = f"measured {measured}, which is no evidence"
        elif samples is not None and samples <= 0:
            problem = "measured on zero samples, which is no evidence"
        elif self.direction == "at most" and measured > self.threshold:
            problem = f"{measured:.6g} is above {self.threshold:.6g}"
        elif self.direction == "at least" and measured < self.threshold:
            problem = f"{measured:.6g} is below {self.threshold:.6g}"
        value = measured if measured is not None and math.isfinite(measured) else None
        good = f"{value:.6g} is {self.direction} {self.threshold:.6g}" if value is not None else ""
        message = " ".join(part for part in (problem or good, self.unit, f"({detail})" if detail else "") if part)
        return GateResult(
            self.name, subject, "fail" if problem else "pass", value, self.direction, self.threshold, self.unit, message
        )
