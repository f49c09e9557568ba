"""Write docs/configuration.md from the configuration classes: `make docs`.

    python scripts/make_config_reference.py [--check]

`--check` writes nothing and ends with 1 when the page is not what the classes say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pipeline.config import PipelineConfig, fields_by_key, is_model

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
HEAD = """# `pipeline.yaml`

Made by `make docs` from the configuration classes; do not edit. `pipeline init` writes a file with all of this as
comments, and `pipeline schema` prints the JSON Schema for editors. `--set section.key=value` overrides any value.
Unknown keys are errors.
"""


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    page = render()
    if parser.parse_args().check:
        return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page)
    PAGE.write_text(page, encoding="utf-8")
    return 0


def render() -> str:
    """The whole page."""
    return "\n".join([HEAD, *section("", PipelineConfig, "")])


def section(title: str, model: type[BaseModel], description: str) -> Iterator[str]:
    """A table of the plain keys of one section, then the sections inside it."""
    fields = fields_by_key(model)
    if title:
        yield f"## `{title}`\n"
        yield f"{description}\n"
    plain = {key: field for key, field in fields.items() if not is_model(field.annotation)}
    if plain:
        yield "| key | values | default | |\n| --- | --- | --- | --- |"
        for key, field in plain.items():
            default = field.get_default(call_default_factory=True)
            cells = [f"`{key}`", cell(words(field.annotation)), shown(default), cell(field.description or "")]
            yield f"| {' | '.join(cells)} |"
        yield ""
    for key, field in fields.items():
        if is_model(field.annotation):
            yield from section(f"{title}.{key}".lstrip("."), field.annotation, field.description or "")


def words(annotation: Any) -> str:
    """What may stand there, in words."""
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, get_args(annotation)))
    parts = [part for part in get_args(annotation) if part not in (type(None), Ellipsis)]
    if get_origin(annotation) is tuple:
        return f"list of: {words(parts[0])}"
    if get_origin(annotation) is dict:
        return f"{words(parts[0])}: {words(parts[1])}, any number"
    if is_model(annotation):
        return "; ".join(f"{key}: {words(field.annotation)}" for key, field in fields_by_key(annotation).items())
    if parts:
        return " or ".join(words(part) for part in parts)
    return {str: "text", int: "integer", float: "number", bool: "true, false", date: "date"}.get(
        annotation, str(annotation)
    )


def shown(default: Any) -> str:
    """A default as it would stand in the file."""
    if default is PydanticUndefined:
        return "required"
    return "" if default is None else f"`{json.dumps(default)}`" if not isinstance(default, str) else f"`{default}`"


def cell(text: str) -> str:
    """Text that fits a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main())
