"""The gates of a record with what becomes of them: what CI is told, whatever the verdict is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from pipeline.report.facts import GATE_VERDICTS, Facts, GateFact

RAN = ("ran", "fresh", "gate-failed")


@dataclass(frozen=True)
class Tests:
    """Everything of a run that passes or fails: its gates, and that each stage came to its end."""

    facts: Facts

    @cached_property
    def gates(self) -> list[GateFact]:
        """Every gate: those that stop the run first, the worst of them first, then what is let through, then passes."""
        return sorted(self.facts.gates, key=lambda gate: gate.rank)

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
        counts = {verdict: sum(gate.verdict == verdict for gate in self.gates) for verdict in GATE_VERDICTS}
        return {"gates": len(self.gates), **counts, "stops": sum(gate.stops for gate in self.gates)}


def title_of(gate: GateFact) -> str:
    """`validate: agreement [onnx-fp16]`: what a gate is called in lists of tests."""
    about = f" [{gate.subject}]" if gate.subject else ""
    return f"{gate.stage}: {gate.name}{about}"
