"""The gates of a record with what becomes of them: what CI is told, whatever the verdict is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.report.facts import Facts, GateFact, excess_of, gate_fact, records

VERDICTS = ("pass", "fail", "inconclusive", "error")
RAN = ("ran", "fresh", "gate-failed")


@dataclass(frozen=True)
class Checked:
    """One gate. `waived` says by whom and why it is let through, `tolerated` that the configuration does so."""

    fact: GateFact
    verdict: str
    waived: str
    tolerated: bool

    @property
    def stops(self) -> bool:
        """Whether the run ends here."""
        return self.verdict != "pass" and not self.waived and not self.tolerated

    @property
    def name(self) -> str:
        """`validate: agreement [onnx-fp16]`: what it is called in lists of tests."""
        about = f" [{self.fact.subject}]" if self.fact.subject else ""
        return f"{self.fact.stage}: {self.fact.name}{about}"

    @property
    def finding(self) -> str:
        """The message, and why it stops nothing where it did not pass."""
        if self.verdict == "pass" or self.stops:
            return self.fact.message
        return f"{self.fact.message}; {f'waived {self.waived}' if self.waived else 'inconclusive is let through'}"


@dataclass(frozen=True)
class Tests:
    """Everything of a run that passes or fails: its gates, and that each stage came to its end."""

    facts: Facts

    @cached_property
    def gates(self) -> list[Checked]:
        """Every gate: those that stop the run first, the worst of them first, then what is let through, then passes."""
        found = [
            checked(str(stage.get("name")), gate) for stage in self.facts.stages for gate in records(stage.get("gates"))
        ]
        return sorted(found, key=lambda one: (not one.stops, -excess_of(one.fact)))

    @property
    def broken(self) -> list[tuple[str, str]]:
        """(stage, why) of the stages that did not come to their end: failed or interrupted."""
        return [
            (str(stage.get("name")), str(stage.get("error") or f"the stage {stage['status']}"))
            for stage in self.facts.stages
            if stage.get("status") in ("failed", "interrupted")
        ]

    @property
    def ended(self) -> list[str]:
        """The stages that came to their end."""
        return [str(stage.get("name")) for stage in self.facts.stages if stage.get("status") in RAN]

    @property
    def counts(self) -> dict[str, int]:
        """How many gates have each verdict, and how many stop the run."""
        counts = {verdict: sum(gate.verdict == verdict for gate in self.gates) for verdict in VERDICTS}
        return {"gates": len(self.gates), **counts, "stops": sum(gate.stops for gate in self.gates)}


def checked(stage: str, gate: Mapping[str, Any]) -> Checked:
    """A gate of the record; a verdict that is none of those known is a failure."""
    verdict = gate["verdict"] if gate.get("verdict") in VERDICTS else "fail"
    return Checked(
        fact=gate_fact(stage, gate),
        verdict=verdict,
        waived=str(gate.get("waived") or ""),
        tolerated=verdict == "inconclusive" and gate.get("tolerated") is True,
    )
