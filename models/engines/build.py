"""Engines from ONNX files, each built in a process of its own with a limit on time and memory."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from models.engines.targets import EngineRuntime
from models.errors import EngineError, MissingCapabilityError

REQUEST = "request.json"
OUTCOME = "outcome.json"
OUTPUT = "output.txt"

HardwareLevel = Literal["none", "ampere-plus", "same-compute-capability"]


@dataclass(frozen=True)
class Options:
    """Of standard TensorRT: whether the engine also loads on later versions, and on other GPUs."""

    version_compatible: bool = False
    hardware_compatibility: HardwareLevel = "none"


@dataclass(frozen=True)
class Refusal:
    """What the library's own parser or builder said of one node (or of the graph, where `node` is empty)."""

    node: str
    operator: str
    reason: str


@dataclass(frozen=True)
class Outcome:
    """A build that ended: with an engine where nothing was refused. `seconds` and `peak_bytes` are of its process."""

    library_version: str
    refusals: tuple[Refusal, ...]
    seconds: float
    peak_bytes: int

    @property
    def built(self) -> bool:
        """Whether there is an engine."""
        return not self.refusals


def require_library(runtime: EngineRuntime) -> None:
    """Raises `MissingCapabilityError` where the library that builds engines is not installed."""
    if find_spec(runtime.library) is None:
        raise MissingCapabilityError(f"engines are built with {runtime.library}, which is not here: {runtime.install}")


def build_engine(
    model: Path,
    engine: Path,
    runtime: EngineRuntime,
    compute_capabilities: Sequence[str],
    profile: Mapping[str, Sequence[Sequence[int]]],
    scratch: Path,
    max_seconds: float,
    max_memory_bytes: int,
    options: Options | None = None,
) -> Outcome:
    """Build `engine` from `model`, strongly typed: precisions are those of the graph.

    `compute_capabilities` are `SM86` and the like (none: that of the GPU here). `profile` maps each input with dynamic
    axes to its smallest, usual and largest shape. `scratch` is an empty folder for what the process says.

    Raises:
        MissingCapabilityError: the library is not installed.
        EngineError: the process ran over a limit, which the message names, or died.
    """
    require_library(runtime)
    request = {
        "library": runtime.library,
        "model": str(model.resolve()),
        "engine": str(engine.resolve()),
        "compute_capabilities": list(compute_capabilities),
        "profile": {name: [list(shape) for shape in shapes] for name, shapes in profile.items()},
        "max_memory_bytes": max_memory_bytes,
        "options": asdict(options or Options()),
    }
    (scratch / REQUEST).write_text(json.dumps(request), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "models.engines.worker", str(scratch.resolve())]
    what = f"the engine of {model.name} for {', '.join(compute_capabilities) or 'this GPU'}"
    with (scratch / OUTPUT).open("w", encoding="utf-8") as output:
        try:
            ended = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=max_seconds
            )
        except subprocess.TimeoutExpired as error:
            raise EngineError(
                f"{what} was not built in {max_seconds:g} s, the limit on time; raise export.engine_build.max_seconds"
            ) from error
    found = read_outcome(scratch)
    if found is None or found.get("out_of_memory"):
        last = (scratch / OUTPUT).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        said = f"; the last it said: {last[0][:300]}" if last else ""
        if found or "bad_alloc" in said or "memory" in said.lower():
            raise EngineError(
                f"{what} takes more than {max_memory_bytes:,} bytes, the limit on memory; "
                f"raise export.engine_build.max_memory_bytes{said}"
            )
        how = signal.Signals(-ended.returncode).name if ended.returncode < 0 else f"exit code {ended.returncode}"
        under = f"under the limit of {max_memory_bytes:,} bytes of memory (export.engine_build.max_memory_bytes)"
        raise EngineError(f"the process that built {what} died ({how}) {under}{said}")
    refusals = tuple(Refusal(**one) for one in found["refusals"])
    return Outcome(found["library_version"], refusals, found["seconds"], found["peak_bytes"])


def read_outcome(scratch: Path) -> dict[str, Any] | None:
    """What the process wrote last, or None where it died before."""
    try:
        value: dict[str, Any] = json.loads((scratch / OUTCOME).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return value
