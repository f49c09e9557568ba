"""What a stage is: one artifact in, one artifact out, nothing kept in between."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from stages.data.splits import DataSplits, SplitName

if TYPE_CHECKING:
    from models.spec import BackboneSpec, TaskName
    from stages.artifact import Artifact
    from stages.gate import GateResult

MachinePart = Literal["device", "processor", "threads", "gpu"]

NETWORK_PACKAGES = ("torch", "timm", "transformers", "safetensors", "numpy")
"""What builds a network from a checkpoint and runs it: every stage does."""

PROCESSING_PACKAGES = ("pillow", "tokenizers", "soundfile", "soxr")
"""What makes arrays of examples: every stage does."""

RUNTIME_PACKAGES = ("onnx", "onnxruntime", "onnxruntime-gpu")
"""What writes and runs ONNX files."""

PROVIDER_PACKAGES = ("onnxruntime-ep-nv-tensorrt-rtx-cu13",)
"""Execution providers that come in packages of their own."""


class StageConfig(BaseModel):
    """Base of every configuration section: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    def outside(self) -> dict[str, str]:
        """Field → digest of what it names outside of the run, which counts for freshness in place of its path."""
        return {}


class Progress(Protocol):
    """Reports work done. `task` opens one bar of `total` steps; the yielded function advances it."""

    def task(self, description: str, total: int) -> AbstractContextManager[Advance]: ...


class Advance(Protocol):
    """Move the bar by `steps`."""

    def __call__(self, steps: int = 1) -> None: ...


@dataclass(frozen=True)
class StageContext:
    """What a stage may touch.

    `output` is an empty folder: everything written there becomes the artifact. `resume` is a folder
    that survives an interruption as long as the freshness key stays the same (training checkpoints).
    `inputs` maps the names of the consumed stages to their committed artifacts. `threads` is the
    number of CPU threads every runtime must use.
    """

    output: Path
    resume: Path
    inputs: Mapping[str, Artifact]
    task: TaskName
    backbone: BackboneSpec
    data: DataSplits
    seed: int
    device: str
    threads: int
    log: logging.Logger
    progress: Progress


@dataclass(frozen=True)
class StageResult:
    """Gate results, measurements (plain JSON values) and notes for a person."""

    gates: tuple[GateResult, ...] = ()
    measurements: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Stage(Protocol):
    """One step of the chain. Instances hold nothing between runs.

    `splits` are the data splits whose content the result depends on, `packages` the installed distributions
    whose versions can change it, and `machine` what of the machine does (where training runs, the processor
    that times are measured on, the threads of every runtime, the GPU): all are part of the freshness key.
    """

    name: str
    config_type: type[StageConfig]
    consumes: tuple[str, ...]
    splits: tuple[SplitName, ...]
    packages: tuple[str, ...]
    machine: tuple[MachinePart, ...]

    def run(self, context: StageContext, config: Any) -> StageResult:
        """Do the work in `context.output`. Raises `StageError` where it cannot be done."""
        ...
