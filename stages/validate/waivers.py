"""Gates that somebody takes on himself: a waiver names who, until when, why, and the very bytes it holds for.

The verdict of a waived gate stays what it is, and every report says that it is waived. A waiver that has expired, or
holds for other bytes, does nothing, and is said to.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pydantic import Field, field_validator

from models.tasks import TASKS, task_of
from stages.base import StageConfig
from stages.gate import GateResult

WAIVABLE = (
    *sorted({f"{metric} drop" for name in TASKS for metric in (task_of(name).metric, *task_of(name).further_metrics)}),
    *sorted({f"{task_of(name).metric} regression" for name in TASKS}), "latency regression",
    "agreement", "SQNR", "cosine", "output error", "flip rate", "ECE increase", "NLL increase",
    "slice drop", "robustness drop", "p50 latency", "p90 latency", "p95 latency", "p99 latency",
    "size", "speed-up", "peak memory",
)  # fmt: skip
"""What says how good a candidate is. That there is evidence at all cannot be waived."""


class WaiverConfig(StageConfig):
    """One gate of one candidate that may fail."""

    gate: str = Field(description="Name of the gate as the report shows it, e.g. agreement.")
    subject: str = Field(min_length=1, description="What the gate is about: the name of a candidate.")
    owner: str = Field(min_length=1, description="Who takes it on himself.")
    reason: str = Field(min_length=1, description="Why.")
    expires: datetime.date = Field(description="Last day on which it holds, in UTC (YYYY-MM-DD).")
    digest: str = Field(
        pattern="^[0-9a-f]{64}$",
        description="Digest of what it holds for, as `digest` in report.json and the lineage in report.html show it: "
        "the SHA-256 of the candidate's file, of several that of the list of theirs.",
    )

    @field_validator("gate")
    @classmethod
    def refuse_unknown_gates(cls, value: str) -> str:
        """A waiver of a gate that does not exist would be believed to do something."""
        if value in WAIVABLE:
            return value
        raise ValueError(f"there is no gate {value!r} to be waived; expected one of {', '.join(WAIVABLE)}")

    @property
    def title(self) -> str:
        """Which gate of what."""
        return f"{self.gate} of {self.subject}"

    @property
    def words(self) -> str:
        """Who, until when and why, as a waived gate says it."""
        return f"by {self.owner} until {self.expires}: {self.reason}"

    @property
    def expired(self) -> bool:
        """Whether its last day is over."""
        return today() > self.expires


def today() -> datetime.date:
    """The date in UTC."""
    return datetime.datetime.now(datetime.UTC).date()


def waived(result: GateResult, waivers: Sequence[WaiverConfig], digest: str | None) -> GateResult:
    """The result with the waiver that holds for it, if there is one. `digest`: of the bytes that were measured. A
    gate without evidence (ERROR) is not waived."""
    if result.verdict not in ("fail", "inconclusive"):
        return result
    for waiver in waivers:
        same = (waiver.gate, waiver.subject, waiver.digest) == (result.name, result.subject, digest)
        if same and not waiver.expired:
            return replace(result, waived=waiver.words)
    return result


def waiver_notes(
    waivers: Sequence[WaiverConfig], results: Sequence[GateResult], digests: Mapping[str, str | None]
) -> list[str]:
    """What became of each waiver. `results` are all gates and limits that were checked, those of candidates that are
    not chosen too; `digests`: each that was measured, as its gates name it → digest."""
    notes = []
    for waiver in waivers:
        about = [one for one in results if (one.name, one.subject) == (waiver.gate, waiver.subject)]
        gate = next((one for one in about if one.waived), about[0] if about else None)
        measured = digests.get(waiver.subject.partition(", ")[0])
        if waiver.expired:
            found = f"expired on {waiver.expires} and does nothing"
        elif gate is None:
            found = "is about nothing that was checked, and does nothing"
        elif gate.waived == waiver.words and measured in (None, waiver.digest):
            found = f"lets it through ({waiver.owner}, until {waiver.expires}): {waiver.reason}"
        elif waiver.digest != measured:
            found = f"is for other bytes ({waiver.digest[:12]}…) than were measured ({measured}), and does nothing"
        elif gate.verdict == "pass":
            found = "is not needed: the gate passed"
        elif gate.waived:
            found = "is not needed: another one lets it through"
        else:
            found = "does nothing: there is no evidence, and that cannot be waived"
        notes.append(f"waiver for {waiver.title} {found}")
    return notes
