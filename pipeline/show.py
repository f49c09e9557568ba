"""`pipeline show`: a run, a stage's artifact or a bundle, as plain values and for a person."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.errors import ConfigError, Problem
from pipeline.record import read_run
from pipeline.report.markup import field_text
from stages.artifact import Artifact, read_artifact, verify_files
from stages.gate import outcome_of


def describe(path: Path) -> dict[str, Any]:
    """What stands at `path`: `{"kind": "run" | "artifact" | "bundle", …}`.

    Raises:
        ConfigError: there is nothing there that this project wrote.
        IntegrityError: a bundle does not verify.
    """
    if (path / "run.json").is_file():
        return {"kind": "run", "path": str(path), **read_run(path)}
    artifact = read_artifact(path.name, path)
    if artifact:
        manifest = {key: value for key, value in artifact.manifest.items() if key != "key_parts"}
        return {
            "kind": "artifact",
            "path": str(path),
            "digest": artifact.digest,
            "files_intact": verify_files(artifact) or "yes",
            "inputs_current": stale_inputs(artifact) or "yes",
            **manifest,
        }
    if (path / "bundle.json").is_file() or path.suffix == ".tar":
        from models.bundle import open_bundle

        with open_bundle(path) as bundle:
            return {"kind": "bundle", "path": str(path), **bundle.manifest}
    raise ConfigError(
        [Problem(str(path), "is no run, artifact or bundle", "expected run.json, manifest.json, bundle.json or a .tar")]
    )


def stale_inputs(artifact: Artifact) -> str:
    """Which inputs of an artifact are no longer those that lie beside it; empty where all are."""
    changed = []
    for name, digest in artifact.manifest["inputs"].items():
        beside = read_artifact(name, artifact.folder.parent / name)
        if beside is not None and beside.digest != digest:
            changed.append(name)
    return f"no: {', '.join(changed)} changed since" if changed else ""


def print_description(description: dict[str, Any]) -> None:
    """Print a description for a person."""
    from rich.console import Console

    description = made_safe(description)
    console = Console()
    kind = description["kind"]
    if kind == "run":
        from pipeline.report.terminal import print_summary

        print_summary(description, console)
        print_lineage(description, console)
        return
    console.print(f"[bold]{kind}[/bold]", description["path"], highlight=False)
    print_values(console, {key: value for key, value in description.items() if key not in ("kind", "path")}, 1)


def made_safe(value: Any) -> Any:
    """The same values with every text on one line, giving no orders to a terminal or to a CI log."""
    if isinstance(value, dict):
        return {made_safe(key): made_safe(item) for key, item in value.items()}
    if isinstance(value, list):
        return [made_safe(item) for item in value]
    return field_text(value) if isinstance(value, str) else value


def print_lineage(run: dict[str, Any], console: Any) -> None:
    """What each stage was made from, by digest, and every gate."""
    from rich.markup import escape

    for stage in run["stages"]:
        if stage["digest"]:
            inputs = ", ".join(f"{name} {digest[:12]}" for name, digest in stage["inputs"].items()) or "backbone, data"
            console.print(f"\n[bold]{stage['name']}[/bold] {stage['digest'][:12]} from {inputs}", highlight=False)
            print_gates(console, stage["gates"], "  ")
    for note in run.get("data_notes", []):
        console.print(f"data: {escape(note)}", highlight=False)


def print_gates(console: Any, gates: list[dict[str, Any]], indent: str) -> None:
    """A line a gate."""
    from rich.markup import escape

    for gate in gates:
        outcome = f"; {found}" if (found := outcome_of(gate)) else ""
        line = f"{gate['verdict']}  {gate['name']} ({gate['subject']}): {gate['message']}{outcome}"
        console.print(f"{indent}{escape(line)}", highlight=False, soft_wrap=True)


def print_values(console: Any, values: dict[str, Any], depth: int) -> None:
    """Nested values, indented; long lists are counted."""
    from rich.markup import escape

    for key, value in values.items():
        indent = "  " * depth
        if isinstance(value, dict) and value:
            console.print(f"{indent}{escape(str(key))}:", highlight=False)
            print_values(console, value, depth + 1)
        elif key == "gates":
            print_gates(console, value, indent)
        elif isinstance(value, list) and len(value) > 12:
            console.print(f"{indent}{escape(str(key))}: {len(value)} items", highlight=False)
        else:
            console.print(f"{indent}{escape(str(key))}: {escape(str(value))}", highlight=False)
