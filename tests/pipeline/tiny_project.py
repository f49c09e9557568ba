"""A project as a user has it, but tiny: a configuration, a backbone in a folder, images by split and label."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tests.models.tiny import image_backbone, saved_checkpoint

LABELS = ("blue", "green", "red")
COUNTS = {"train": 24, "validation": 12, "calibration": 12, "test": 24}

CONFIG: dict[str, Any] = {
    "task": "image-classification",
    "backbone": "backbone",
    "data": {"source": "photos"},
    "threads": 1,
    "finetune": {"strategy": "lora", "epochs": 2, "batch_size": 12},
    # The network is random: its logits lie close together, so that sixteen bits flip some of them and eight many.
    "quantize": {"calibration_samples": 12, "sensitivity_samples": 8, "min_agreement": 0.5, "max_metric_drop": 0.5,
                 "keep_float": "none"},
    "validate": {"latency_calls": 20,
                 "gates": {"min_samples": 20, "max_metric_drop": 0.5, "min_agreement": 0.5, "min_sqnr_db": 3}},
}  # fmt: skip


def make_project(folder: Path) -> Path:
    """Write it into `folder`; the folder."""
    saved_checkpoint(folder / "backbone", image_backbone())
    random = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for index in range(count):
            label = index % len(LABELS)
            pixels = random.integers(0, 160, (32, 32, 3))
            pixels[:, :, 2 - label] += 80
            path = folder / "photos" / split / LABELS[label] / f"{index:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    return folder


def command(*arguments: str) -> list[str]:
    """The console script of this environment."""
    return [str(Path(sys.executable).with_name("pipeline")), *arguments]


def environment() -> dict[str, str]:
    """This process's, without a hub."""
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


def pipeline(*arguments: str, cwd: Path | None = None, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the console script to its end."""
    return subprocess.run(
        command(*arguments), cwd=cwd, input=stdin, capture_output=True, text=True, env=environment(), timeout=1400
    )
