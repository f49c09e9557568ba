"""`pipeline init`: a commented pipeline.yaml, generated from the configuration classes themselves."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from models.errors import ConfigError, Problem
from models.registry import resolve
from models.tasks import MODALITY_OF_TASK
from pipeline.config import PipelineConfig, fields_by_key, is_model, problems_from_validation, with_task
from stages.data.sources import check_source


def write_config(output: Path, task: str, backbone: str, data: str, force: bool) -> None:
    """Write the file; the three answers are checked first.

    Raises:
        ConfigError: an answer is wrong, or the file exists and `force` is not set.
    """
    problems = []
    if output.exists() and not force:
        problems.append(Problem(str(output), "exists", "give --force to overwrite it, or --output another file"))
    try:
        values = with_task({"task": task, "backbone": backbone, "data": {"source": data}})
        task = values["task"]
        PipelineConfig.model_validate(values)
    except ConfigError as error:
        problems += [Problem("--task", item.message, item.hint) for item in error.problems]
    except ValidationError as error:
        problems += problems_from_validation(error, {}, "--")
    for option, look in (
        ("--backbone", lambda: resolve(backbone)),
        ("--data", lambda: check_source(data, MODALITY_OF_TASK.get(task, "image"))),
    ):
        try:
            look()
        except ConfigError as error:
            problems += [Problem(option, item.message, item.hint) for item in error.problems]
    if problems:
        raise ConfigError(problems)
    text = "\n".join(config_lines(task, backbone, data)) + "\n"
    try:
        # Without --force the file must not appear between the look above and the write here.
        with output.open("w" if force else "x", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError([Problem(str(output), f"cannot be written: {reason}")]) from error


def config_lines(task: str, backbone: str, data: str) -> Iterator[str]:
    """The file's lines: the answers, then every other field with its default, commented out."""
    answers = {"task": task, "backbone": backbone}
    yield "# Every key that is commented out shows its default. `pipeline schema` gives the JSON Schema."
    for key, field in fields_by_key(PipelineConfig).items():
        yield ""
        yield from comment(field.description or "", "")
        if key in answers:
            yield f"{key}: {inline(answers[key])}"
        elif is_model(field.annotation):
            yield f"{key}:" if key == "data" else f"# {key}:"
            yield from section_lines(field.annotation, "  ", {"source": data} if key == "data" else {})
        else:
            yield f"# {key}: {inline(field.default)}"


def section_lines(model: type[BaseModel], indent: str, answers: dict[str, str]) -> Iterator[str]:
    """The lines of one section, nested sections included."""
    for key, field in fields_by_key(model).items():
        yield from comment(field.description or "", indent)
        nested = model_of(field)
        if key in answers:
            yield f"{indent}{key}: {inline(answers[key])}"
        elif nested:
            yield f"# {indent}{key}:"
            yield from section_lines(nested, indent + "  ", {})
        else:
            default = field.get_default(call_default_factory=True)
            yield f"# {indent}{key}: {inline(None if default is PydanticUndefined else default)}"


def model_of(field: Any) -> type[BaseModel] | None:
    """The configuration class of a field that is a section."""
    return field.annotation if is_model(field.annotation) else None


def comment(text: str, indent: str) -> list[str]:
    """A description as comment lines."""
    return [f"# {indent}# {line}" if indent else f"# {line}" for line in textwrap.wrap(text, 96 - len(indent))]


def inline(value: Any) -> str:
    """A value on one line, as YAML."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", by_alias=True)
    if isinstance(value, tuple | list | dict):
        return json.dumps(value)
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...").strip()
