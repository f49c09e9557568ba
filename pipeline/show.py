"""`pipeline show`: a run, a stage's artifact or a bundle, as plain values and for a person."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models.errors import ConfigError, Problem
from stages.artifact import read_artifact, verify_files


def describe(path: Path) -> dict[str, Any]:
    """What stands at `path`: `{"kind": "run" | "artifact" | "bundle", …}`.

    Raises:
        ConfigError: there is nothing there that this project wrote.
        IntegrityError: a bundle does not verify.
    """
    if (path / "run.json").is_file():
        return {"kind": "run", "path": str(path), **json.loads((path / "run.json").read_text(encoding="utf-8"))}
    artifact = read_artifact(path.name, path)
    if artifact:
        manifest = {key: value for key, value in artifact.manifest.items() if key != "key_parts"}
        return {
            "kind": "artifact",
            "path": str(path),
            "digest": artifact.digest,
            "files_intact": verify_files(artifact) or "yes",
            **manifest,
        }
    if (path / "bundle.json").is_file() or path.suffix == ".tar":
        from models.bundle import open_bundle

        with open_bundle(path) as bundle:
            return {"kind": "bundle", "path": str(path), **bundle.manifest}
    raise ConfigError(
        [Problem(str(path), "is no run, artifact or bundle", "expected run.json, manifest.json, bundle.json or a .tar")]
    )


def print_description(description: dict[str, Any]) -> None:
    """Print a description for a person."""
    from rich.console import Console

    console = Console()
    kind = description["kind"]
    if kind == "run":
        from pipeline.report.terminal import print_summary

        print_summary(description, console)
        return
    console.print(f"[bold]{kind}[/bold]", description["path"], highlight=False)
    print_values(console, {key: value for key, value in description.items() if key not in ("kind", "path")}, 1)


def print_values(console: Any, values: dict[str, Any], depth: int) -> None:
    """Nested values, indented; long lists are counted."""
    from rich.markup import escape

    for key, value in values.items():
        indent = "  " * depth
        if isinstance(value, dict) and value:
            console.print(f"{indent}{escape(str(key))}:", highlight=False)
            print_values(console, value, depth + 1)
        elif key == "gates":
            for gate in value:
                line = f"{gate['verdict']}  {gate['name']} ({gate['subject']}): {gate['message']}"
                console.print(f"{indent}{escape(line)}", highlight=False)
        elif isinstance(value, list) and len(value) > 12:
            console.print(f"{indent}{escape(str(key))}: {len(value)} items", highlight=False)
        else:
            console.print(f"{indent}{escape(str(key))}: {escape(str(value))}", highlight=False)
