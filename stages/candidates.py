"""Candidates: the files that export and quantize offer, and validate measures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stages.artifact import write_json

if TYPE_CHECKING:
    from stages.artifact import Artifact

CANDIDATES_FILE = "candidates.json"
Precision = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True)
class Candidate:
    """One file that could be shipped. `reason` says why it is not accepted; then there is no file."""

    name: str
    file: str
    precision: Precision
    size_bytes: int
    runtime: Literal["onnxruntime"] = "onnxruntime"
    accepted: bool = True
    reason: str = ""
    measurements: dict[str, Any] = field(default_factory=dict)

    def path(self, artifact: Artifact) -> Path:
        """The file; raises `IntegrityError` where the artifact's manifest does not list it."""
        return artifact.file(self.file)

    def summary(self) -> dict[str, Any]:
        """For the report: the fields and the measurements side by side."""
        values = asdict(self)
        measurements: dict[str, Any] = values.pop("measurements")
        return values | measurements


def write_candidates(folder: Path, candidates: Sequence[Candidate]) -> None:
    """Write `candidates.json`."""
    write_json(folder / CANDIDATES_FILE, [asdict(candidate) for candidate in candidates])


def read_candidates(artifact: Artifact) -> tuple[Candidate, ...]:
    """The candidates of an artifact, also those that were not accepted."""
    items = json.loads(artifact.file(CANDIDATES_FILE).read_text(encoding="utf-8"))
    return tuple(Candidate(**item) for item in items)
