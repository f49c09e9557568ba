"""Real artifacts of tiny random networks, made once: what export, quantize, validate and package consume."""

from __future__ import annotations

import atexit
import functools
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
from onnx import numpy_helper

from models.registry import resolve
from models.spec import TaskName
from models.tasks import MODALITY_OF_TASK
from pipeline.progress import QuietProgress
from stages.artifact import Artifact
from stages.base import StageContext
from stages.candidates import Candidate, write_candidates
from stages.data.splits import DataSplits, Example, digest_of_text, fingerprint_of
from tests.models.tiny import WORDS, audio_backbone, image_backbone, recording, saved_checkpoint, text_backbone
from tests.stages.small_run import artifact_of

Made = TypeVar("Made")
LABELS = ("a", "b", "c")
SAMPLES = 48


def test_split(task: TaskName, samples: int = SAMPLES) -> tuple[Example, ...]:
    """Made-up examples, the labels in turn."""
    random = np.random.default_rng(7)
    contents: list[Any] = [
        random.integers(0, 256, (32, 40, 3), dtype=np.uint8)
        if task == "image-classification"
        else recording(index % 3, random)
        if task == "audio-classification"
        else " ".join(random.choice(WORDS[4:], 2 + index % 9))
        for index in range(samples)
    ]
    return tuple(
        Example(one, index % len(LABELS), digest_of_text(f"{task} {index}"), f"made/{index}")
        for index, one in enumerate(contents)
    )


test_split.__test__ = False  # type: ignore[attr-defined]


def data_of(examples: tuple[Example, ...]) -> DataSplits:
    """The same examples in validation and test."""
    splits = {"train": (), "validation": examples, "calibration": (), "test": examples}
    fingerprints = {name: fingerprint_of(LABELS, part) for name, part in splits.items()}
    return DataSplits(LABELS, splits, fingerprints)  # type: ignore[arg-type]


def context_of(
    output: Path,
    inputs: Mapping[str, Artifact],
    task: TaskName = "image-classification",
    examples: tuple[Example, ...] | None = None,
) -> StageContext:
    """What the runner would hand to a stage."""
    output.mkdir(parents=True, exist_ok=True)
    data = data_of(test_split(task) if examples is None else examples)
    log, backbone = logging.getLogger("test"), resolve("timm:test_efficientnet")
    return StageContext(output, output, inputs, task, backbone, data, 0, "cpu", 2, log, QuietProgress())


def once_per_task(make: Callable[[TaskName], Made]) -> Callable[..., Made]:
    """Call `make` once for each task, images by default (to `functools.cache` a default is another key)."""
    cached = functools.cache(make)

    @functools.wraps(make)
    def made_once(task: TaskName = "image-classification") -> Made:
        return cached(task)

    return made_once


@once_per_task
def made(task: TaskName) -> dict[str, Artifact]:
    """merge-lora, export (fp32, fp16) and quantize (matrix products in INT8) of a tiny random network."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from stages.export import Export, ExportConfig

    root = temporary_folder()
    backbone = {"text": text_backbone, "audio": audio_backbone, "image": image_backbone}[MODALITY_OF_TASK[task]]()
    saved_checkpoint(root / "merge-lora/checkpoint", backbone)
    artifacts = {"merge-lora": artifact_of("merge-lora", root / "merge-lora")}
    result = Export().run(context_of(root / "export", artifacts, task), ExportConfig())
    assert all(gate.passed for gate in result.gates), [gate.message for gate in result.gates]
    artifacts["export"] = artifact_of("export", root / "export")
    path = root / "quantize/onnx-int8-dynamic.onnx"
    path.parent.mkdir()
    quantize_dynamic(root / "export/onnx-fp32.onnx", path, op_types_to_quantize=["MatMul", "Gemm"],
                     weight_type=QuantType.QInt8)  # fmt: skip
    left_out = Candidate("onnx-int8-static", "onnx-int8-static.onnx", "int8", 0, accepted=False, reason="over budget")
    write_candidates(path.parent, [Candidate(path.stem, path.name, "int8", path.stat().st_size), left_out])
    artifacts["quantize"] = artifact_of("quantize", path.parent)
    return artifacts


@once_per_task
def validated(task: TaskName) -> dict[str, Artifact]:
    """The same with validate's artifact."""
    from stages.validate import Validate, ValidateConfig

    folder = temporary_folder()
    # The labels are made up, so the accuracy may move by the flips that INT8 makes.
    config = ValidateConfig.model_validate(
        {"latency_calls": 20, "gates": {"min_samples": 24, "max_metric_drop": 0.2, "min_agreement_int8": 0.8}}
    )
    result = Validate().run(context_of(folder, made(task), task), config)
    assert all(gate.passed for gate in result.gates), [gate.message for gate in result.gates]
    return made(task) | {"validate": artifact_of("validate", folder)}


@once_per_task
def packed(task: TaskName) -> Path:
    """The folder of package's artifact: `bundle/` and `tiny.tar`. To be copied, not changed."""
    from stages.package import Package, PackageConfig

    folder = temporary_folder()
    result = Package().run(context_of(folder, validated(task), task), PackageConfig(name="tiny", include="all-passed"))
    assert all(gate.passed for gate in result.gates), [gate.message for gate in result.gates]
    return folder


def temporary_folder() -> Path:
    """A folder that lives as long as the tests."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-chain-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def with_candidate(folder: Path, change: Callable[[onnx.ModelProto], None], precision: str = "int8") -> Artifact:
    """A quantize artifact whose one candidate is the fp32 graph after `change`."""
    model = onnx.load(made()["export"].file("onnx-fp32.onnx"))
    change(model)
    folder.mkdir(parents=True)
    onnx.save(model, folder / "onnx-changed.onnx")
    size = (folder / "onnx-changed.onnx").stat().st_size
    write_candidates(folder, [Candidate("onnx-changed", "onnx-changed.onnx", precision, size)])  # type: ignore[arg-type]
    return artifact_of("quantize", folder)


def edit_weight(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace the one initializer whose name ends in `name`."""
    found = [tensor for tensor in model.graph.initializer if tensor.name.endswith(name)]
    assert len(found) == 1, [tensor.name for tensor in model.graph.initializer]
    found[0].CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(found[0]).copy()), found[0].name))
