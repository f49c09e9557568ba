"""`run.json`: what happened to each stage, and when two records say the same."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.errors import ConfigError, Problem
from stages.artifact import Artifact

RunStatus = Literal["passed", "failed", "gate-failed", "interrupted"]
StageStatus = Literal["ran", "fresh", "failed", "gate-failed", "interrupted", "not-run"]


@dataclass
class StageEntry:
    """What happened to one stage in this run: an entry of `run.json`."""

    name: str
    status: StageStatus = "not-run"
    reason: str = ""
    error: str | None = None
    artifact: Artifact | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers and gates come from the manifest."""
        manifest = self.artifact.manifest if self.artifact else {}
        return {
            "name": self.name,
            "status": self.status,
            "reason": self.reason,
            "error": self.error,
            "digest": self.artifact.digest if self.artifact else None,
            **{key: manifest.get(key) for key in ("duration_s", "peak_memory_bytes")},
            "inputs": manifest.get("inputs", {}),
            "gates": manifest.get("gates", []),
            "measurements": manifest.get("measurements", {}),
            "notes": manifest.get("notes", []),
        }


def read_json(file: Path) -> Any:
    """The value in a file, or None where there is none that can be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_run(path: Path) -> dict[str, Any]:
    """The record of the run in a folder (or of the `run.json` named itself).

    Raises:
        ConfigError: there is none, or it is none.
    """
    file = path / "run.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError([Problem(str(path), "holds no run", "expected the folder of a run, with its run.json")])
    record = read_json(file)
    if not isinstance(record, dict) or "stages" not in record:
        hint = "run the pipeline there again: it writes the record anew"
        raise ConfigError([Problem(str(file), "is not the record of a run", hint)])
    return record


def gist_of(record: Any) -> Any:
    """What a record says of the results, without when and whether they were made or found."""
    if not isinstance(record, dict):
        return None
    stages = [
        (stage["name"], "fresh" if stage["status"] == "ran" else stage["status"], stage["digest"], stage["error"])
        for stage in record["stages"]
    ]
    return record["status"], record["config"], record.get("data_notes"), record["bundle"], stages


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
