"""What the end-to-end tests read of a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ONE_THREAD = ("--set", "threads=1")
"""Of the runtimes: two threads on busy cores wait for each other and are many times slower than one."""


def record_of(folder: Path) -> dict[str, Any]:
    """The content of run.json."""
    record: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return record


def measured(folder: Path, stage: str) -> dict[str, Any]:
    """The measurements of one stage."""
    found: dict[str, Any] = next(one for one in record_of(folder)["stages"] if one["name"] == stage)["measurements"]
    return found
