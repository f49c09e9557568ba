"""The gates of candidates, for outputs that are no candidate's: those of a mutant, of a step between two artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.validate.further import further_numbers
from stages.validate.gates import Scene, check
from stages.validate.metrics import Outputs, compare

if TYPE_CHECKING:
    import numpy as np

    from models.spec import ModelSpec
    from models.tasks import Task
    from stages.data.splits import Example
    from stages.gate import GateResult
    from stages.validate.config import ValidateConfig


@dataclass(frozen=True)
class Judge:
    """The configured gates over some of the test samples.

    `targets`, `reference` and `examples` are those of these samples: the task's array, the merged PyTorch network's
    outputs, the examples themselves, by whose labels and columns slices are made.
    """

    config: ValidateConfig
    scene: Scene
    task: Task
    targets: np.ndarray
    reference: Outputs
    examples: Sequence[Example]
    spec: ModelSpec
    seed: int = 0

    def numbers(self, outputs: Outputs, start: Outputs | None = None) -> dict[str, Any]:
        """What `compare` finds, against the reference or another `start`, and what the gates ask for beside it."""
        from stages.validate.slices import slices_of

        wanted = start or self.reference
        slices = slices_of(self.examples, self.spec.labels, self.spec.task) if self.examples else {}
        entry = compare(outputs, wanted, self.targets, self.task)
        found = None if entry["problem"] else outputs.values
        more = further_numbers(
            found, wanted.values, self.targets, self.task, self.config, slices, self.seed, gated_only=True
        )
        return entry | more

    def verdicts(self, name: str, precision: str, numbers: dict[str, Any]) -> list[GateResult]:
        """Every gate that a candidate of this precision with these numbers would have to pass, without waivers."""
        return check({"name": name, "precision": precision, **numbers}, self.config, self.scene)


def spread_over(total: int, most: int) -> list[int]:
    """At most `most` of `total` places, evenly spread: a split may be sorted."""
    count = min(total, most)
    return [index * total // count for index in range(count)]


def rows_of(outputs: Outputs, indices: Sequence[int]) -> Outputs:
    """The outputs of some samples; what is no evidence stays none."""
    return outputs if outputs.values is None else Outputs(outputs.values[list(indices)], outputs.problem)
