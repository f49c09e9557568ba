"""Candidates: the files that export and quantize offer, and validate measures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.errors import StageError
from stages.artifact import write_json

if TYPE_CHECKING:
    from stages.artifact import Artifact

CANDIDATES_FILE = "candidates.json"
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4", "fp8"]
"""What a file is called. What its arithmetic is in is measured: `mac_shares`."""

FLOATS = ("fp32", "fp16", "bf16")
"""Precisions that lose next to nothing: what has fewer bits must be better than these at what is asked for."""


@dataclass(frozen=True)
class Candidate:
    """One file that could be shipped. `reason` says why it is not accepted; then there is no file, but where only this
    machine does not run it (`runs_here`): engines are built of it, and nothing else comes of it."""

    name: str
    file: str
    precision: Precision
    size_bytes: int
    runtime: Literal["onnxruntime"] = "onnxruntime"
    accepted: bool = True
    reason: str = ""
    runs_here: bool = True
    measurements: dict[str, Any] = field(default_factory=dict)

    def path(self, artifact: Artifact) -> Path:
        """The file; raises `IntegrityError` where the artifact's manifest does not list it."""
        return artifact.file(self.file)

    def summary(self) -> dict[str, Any]:
        """For the report: the fields and the measurements side by side."""
        values = asdict(self)
        measurements: dict[str, Any] = values.pop("measurements")
        return values | measurements


def check_label(name: str, precision: Precision, shares: Mapping[str, float]) -> None:
    """A candidate multiplies in the precision that it is labelled with, at least somewhere.

    `shares` are those of `models.graph.shares_of`; a network that multiplies nowhere has none, and no label is wrong.

    Raises:
        StageError: none of its arithmetic is in that precision.
    """
    if shares and not any(word.removesuffix("-weights") == precision and share for word, share in shares.items()):
        found = ", ".join(f"{share:.0%} {word}" for word, share in shares.items())
        raise StageError(f"{name} is labelled {precision}, but its arithmetic is {found}: nothing was converted")


def write_candidates(folder: Path, candidates: Sequence[Candidate]) -> None:
    """Write `candidates.json`."""
    write_json(folder / CANDIDATES_FILE, [asdict(candidate) for candidate in candidates])


def read_candidates(artifact: Artifact) -> tuple[Candidate, ...]:
    """The candidates of an artifact, also those that were not accepted."""
    items = json.loads(artifact.file(CANDIDATES_FILE).read_text(encoding="utf-8"))
    return tuple(Candidate(**item) for item in items)
