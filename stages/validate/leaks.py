"""A test on what the network was fitted to proves nothing: no test example may be among those by content."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.data.splits import SplitName
from stages.gate import Gate, GateResult

if TYPE_CHECKING:
    from stages.data.splits import DataSplits

FITTED: tuple[SplitName, ...] = ("train", "calibration")
"""The splits that weights and ranges are fitted on."""

NAMED = 3
"""Examples in the message."""


def leak_gate(data: DataSplits) -> GateResult:
    """How many test examples are in a split that something was fitted on. Loading removes them; this looks again at
    what the stages were really given."""
    seen = {one.digest: (name, one.origin) for name in FITTED for one in data.splits.get(name, ())}
    found = [one for one in data["test"] if one.digest in seen]
    named = [f"{one.origin} is {seen[one.digest][1]} of {seen[one.digest][0]}" for one in found[:NAMED]]
    more = f", and {len(found) - NAMED} more" if len(found) > NAMED else ""
    gate = Gate("test examples seen before", "at most", 0.0, "examples")
    return gate.check("test split", float(len(found)), len(data["test"]), ", ".join(named) + more)
