"""Quantization-aware training as a user runs it, on real weights: EfficientNet-Lite0, whose plain INT8 fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import RECIPES
from tests.pipeline.finished_run import ONE_THREAD, measured
from tests.pipeline.tiny_project import pipeline

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = {
    "data.max_train_samples": 640,
    "finetune.strategy": "full",
    "finetune.backbone_learning_rate": "null",
    "finetune.head_learning_rate": "null",
    "finetune.image_size": 64,
    "finetune.epochs": 2,
    "finetune.max_drop_from_probe": 1.0,  # so little data: what INT8 costs is the question here
    "finetune.quantization_aware.epochs": 1,
    "export.precisions": "[fp32]",
    "quantize.schemes": "[int8-static]",
    "quantize.keep_float": "none",
    "quantize.min_agreement": 0.8,
    "quantize.max_metric_drop": 0.03,
}


def test_a_network_trained_for_int8_ships_with_every_layer_in_int8(tmp_path: Path) -> None:
    options = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    recipe = str(RECIPES / "vision.yaml")
    done = pipeline(
        "all", "--until", "quantize", "-c", recipe, "--run-dir", str(tmp_path / "run"), *options, *ONE_THREAD
    )
    assert done.returncode == 0, done.stderr[-3000:]
    aware = measured(tmp_path / "run", "finetune")["quantization_aware"]
    print(aware)
    assert aware["kept"]
    assert measured(tmp_path / "run", "merge-lora")["passed_through"]
    (static,) = measured(tmp_path / "run", "quantize")["candidates"]
    print(static)
