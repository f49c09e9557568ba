"""One run → `report.html`, `report.md`, `junit.xml` and the terminal's summary, all from `run.json`'s dict."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

from models.errors import MissingCapabilityError


def write_reports(run: dict[str, Any], folder: Path) -> None:
    """Write the three reports of `run` (the content of `run.json`) into `folder`.

    A run that failed half-way is reported as well: what was not measured is shown as missing. The
    same `run` gives the same bytes.

    Raises:
        OSError: `folder` cannot be written; the earlier reports are then as they were.
    """
    from pipeline.report.html import render_html
    from pipeline.report.junit import render_junit
    from pipeline.report.markdown import render_markdown

    write_text(folder / "report.html", render_html(run))
    write_text(folder / "report.md", render_markdown(run))
    write_text(folder / "junit.xml", render_junit(run))


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a torn one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def run_schema() -> dict[str, Any]:
    """The JSON Schema of `run.json` (draft 2020-12)."""
    text = resources.files("pipeline.report").joinpath("run.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def validate_run(run: object) -> list[str]:
    """What in `run` contradicts the schema of `run.json`, as `place: message`; empty when nothing does.

    Raises:
        MissingCapabilityError: the package jsonschema is not installed.
    """
    try:
        from jsonschema import Draft202012Validator
    except ImportError as error:
        raise MissingCapabilityError(
            "checking run.json needs jsonschema; install it with: pip install jsonschema"
        ) from error
    problems = sorted(Draft202012Validator(run_schema()).iter_errors(run), key=lambda problem: problem.json_path)
    return [f"{problem.json_path}: {problem.message}" for problem in problems]
