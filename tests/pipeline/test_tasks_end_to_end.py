"""The recipes of the other tasks, cut down, run as a user runs them: real weights, real data, real runtimes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import RECIPES
from pipeline.report import validate_run
from pipeline.report.markup import markdown_text
from tests.pipeline.finished_run import ONE_THREAD, measured, record_of
from tests.pipeline.tiny_project import pipeline
from tests.prompts import needs_prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SHORT = (
    "data.max_train_samples=500", "data.max_validation_samples=300", "data.max_test_samples=300", "finetune.epochs=1",
    "validate.latency_calls=20", "quantize.schemes=[int8-static]", "quantize.max_metric_drop=0.05",
    "quantize.min_agreement=0.8", "validate.gates.max_metric_drop=0.05", "validate.gates.min_agreement_int8=0.7",
)  # fmt: skip
"""A third of the data: three hundred examples see drops of several points only, so the gates are as wide."""

LONGER = {
    "text-regression": ("data.max_train_samples=1200", "finetune.strategy=feature-extraction"),
    "text-multilabel": ("finetune.strategy=feature-extraction",),
    "text-features": (
        "data.max_train_samples=300",
        "data.max_validation_samples=150",
        "data.max_calibration_samples=64",
        "finetune.strategy=feature-extraction",
    ),
    "image-features": ("data.max_train_samples=null", "quantize.schemes=[]"),
    "audio-features": ("finetune.max_seconds=2", "data.max_train_samples=null", "quantize.schemes=[]"),
}
"""Recipe → what is set otherwise: few pairs say little of how near two definitions are; one text recipe is trained."""

METRICS = {
    "text-multilabel": "samples F1", "text-pairs": "accuracy", "text-regression": "R²",
    "image-multilabel": "samples F1", "text-features": "recall@1", "image-features": "recall@1",
    "audio-features": "recall@1",
}  # fmt: skip

WIDTHS = {"text-features": 384, "image-features": 1280, "audio-features": 384}
"""Recipe → values of its embedding."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=needs_prompts if name == "audio-features" else ()) for name in METRICS],
)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The name of a recipe and the folder of its finished run."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    options = [part for one in (*SHORT, *LONGER.get(request.param, ())) for part in ("--set", one)]
    done = pipeline(
        "all", "-c", str(RECIPES / f"{request.param}.yaml"), "--run-dir", str(folder), *ONE_THREAD, *options
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, folder


def test_every_gate_passed_and_transfer_pays(finished: tuple[str, Path]) -> None:
    name, folder = finished
    record = record_of(folder)
    assert validate_run(record) == []
    assert {gate["verdict"] for stage in record["stages"] for gate in stage["gates"]} == {"pass"}
    finetune, validate = measured(folder, "finetune"), measured(folder, "validate")
    assert finetune["metric"] == validate["metric_name"] == METRICS[name]
    assert validate["samples"] == (102 if name == "audio-features" else 300)
    assert finetune["validation_metric"] > finetune["constant_baseline"] + 0.02
    assert finetune["probe_validation_metric"] > finetune["against_raw"]["curve"][-1]["raw"]
    precisions = {"fp32", "fp16"} if name in ("image-features", "audio-features") else {"fp32", "fp16", "int8"}
    assert {one["precision"] for one in validate["candidates"]} == precisions
    assert markdown_text(METRICS[name]) in (folder / "report.md").read_text(encoding="utf-8")


def test_the_bundle_answers(finished: tuple[str, Path]) -> None:
    name, folder = finished
    bundle = folder / "package/bundle"
    assert pipeline("verify", str(bundle)).returncode == 0
    samples = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["golden"]["samples"]
    inputs = [argument_of(bundle / sample["file"]) for sample in samples]
    rows: list[dict[str, Any]] = json.loads(pipeline("predict", str(bundle), *inputs, "--json").stdout)
    assert [row["input"] for row in rows] == inputs
    if name in WIDTHS:
        vectors = np.array([row["embedding"] for row in rows])
        assert vectors.shape == (len(rows), WIDTHS[name])
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-3)
    elif name == "text-regression":
        assert all(abs(row["score"] - float(row["label"])) < 1e-3 and not row["probabilities"] for row in rows)
    else:
        given = [set(row["label"].split(", ")) for row in rows]
        true = [set(sample["label"].split(", ")) for sample in samples]
        assert sum(bool(one & other) for one, other in zip(given, true, strict=True)) >= len(rows) // 4


def argument_of(file: Path) -> str:
    """A golden sample as `pipeline predict` takes it."""
    if file.suffix == ".json":
        return "\t".join(json.loads(file.read_text(encoding="utf-8")))
    return file.read_text(encoding="utf-8") if file.suffix == ".txt" else str(file)
