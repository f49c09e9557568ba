"""One run → the reports beside `run.json` and the terminal's summary, all from `run.json`'s dict."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from models.errors import MissingCapabilityError

Format = Literal["markdown", "github", "json", "junit", "html", "in-toto"]
FORMATS: tuple[Format, ...] = get_args(Format)
FILES: dict[Format, str] = {
    "html": "report.html",
    "markdown": "report.md",
    "json": "report.json",
    "junit": "junit.xml",
    "in-toto": "test-result.intoto.json",
}
"""What lies beside `run.json`; annotations are for a log."""


def render(run: dict[str, Any], form: Format) -> str:
    """One report of `run` (the content of `run.json`); empty where the run has nothing that it could be about."""
    from pipeline.report.github import render_annotations
    from pipeline.report.html import render_html
    from pipeline.report.intoto import render_statement
    from pipeline.report.junit import render_junit
    from pipeline.report.markdown import render_markdown
    from pipeline.report.plain import render_plain

    renderers = {
        "markdown": render_markdown,
        "github": render_annotations,
        "json": render_plain,
        "junit": render_junit,
        "html": render_html,
        "in-toto": render_statement,
    }
    return renderers[form](run)


def write_reports(run: dict[str, Any], folder: Path) -> None:
    """Write the reports of `run` (the content of `run.json`) into `folder`.

    A run that failed half-way is reported as well: what was not measured is shown as missing. The
    same `run` gives the same bytes.

    Raises:
        OSError: `folder` cannot be written; the earlier reports are then as they were.
    """
    for form, name in FILES.items():
        if text := render(run, form):
            write_text(folder / name, text)
        else:
            (folder / name).unlink(missing_ok=True)  # an earlier run's, about what this one has not


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
    return read_schema("run.schema.json")


def report_schema() -> dict[str, Any]:
    """The JSON Schema of `report.json` (draft 2020-12)."""
    return read_schema("report.schema.json")


def read_schema(name: str) -> dict[str, Any]:
    """A schema of this package."""
    schema: dict[str, Any] = json.loads(resources.files("pipeline.report").joinpath(name).read_text(encoding="utf-8"))
    return schema


def validate_run(run: object) -> list[str]:
    """What in `run` contradicts the schema of `run.json`; see `contradictions`."""
    return contradictions(run, run_schema())


def contradictions(value: object, schema: dict[str, Any]) -> list[str]:
    """What in `value` contradicts a JSON Schema, as `place: message`; empty when nothing does.

    Raises:
        MissingCapabilityError: the package jsonschema is not installed.
    """
    try:
        from jsonschema import Draft202012Validator
    except ImportError as error:
        raise MissingCapabilityError(
            "checking a record needs jsonschema; install it with: pip install jsonschema"
        ) from error
    problems = sorted(Draft202012Validator(schema).iter_errors(value), key=lambda problem: problem.json_path)
    return [f"{problem.json_path}: {problem.message}" for problem in problems]
