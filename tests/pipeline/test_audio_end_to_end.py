"""The audio recipe, cut down, run as a user runs it: Whisper's weights, Debian's recordings, real runtimes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import soundfile
import soxr

from pipeline.config import RECIPES
from pipeline.report import validate_run
from tests.pipeline.finished_run import ONE_THREAD, measured, record_of
from tests.pipeline.tiny_project import pipeline
from tests.prompts import needs_prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500), needs_prompts]

RECIPE = str(RECIPES / "audio.yaml")
SHORT = ("finetune.max_seconds=2", "finetune.epochs=2", "validate.latency_calls=20", "quantize.schemes=[int8-static]")
SCRATCH = ("finetune.max_seconds=2", "finetune.epochs=3", "finetune.strategy=full", "finetune.from_scratch=true",
           "finetune.initial_head=random")  # fmt: skip


def set_to(settings: Sequence[str]) -> list[str]:
    """The options of the command line."""
    return [part for one in settings for part in ("--set", one)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run. To be read, not changed."""
    folder = tmp_path_factory.mktemp("audio") / "run"
    done = pipeline("all", "-c", RECIPE, "--run-dir", str(folder), *ONE_THREAD, *set_to(SHORT))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_gate_passed_on_enough_samples(finished: Path) -> None:
    record = record_of(finished)
    assert validate_run(record) == []
    assert {gate["verdict"] for stage in record["stages"] for gate in stage["gates"]} == {"pass"}
    validate = measured(finished, "validate")
    assert validate["samples"] >= 100  # the default of validate.gates.min_samples, which the recipe leaves as it is
    assert {one["precision"] for one in validate["candidates"]} == {"fp32", "fp16", "int8"}


def test_transfer_pays(finished: Path, tmp_path: Path) -> None:
    """Far above the majority class, the same network from scratch, and a linear model on mel statistics."""
    done = pipeline("finetune", "-c", RECIPE, "--run-dir", str(tmp_path / "scratch"), *set_to(SCRATCH))
    assert done.returncode in (0, 1), done.stderr[-2000:]
    adapted, scratch = measured(finished, "finetune"), measured(tmp_path / "scratch", "finetune")
    assert adapted["strategy"] == "lora" and adapted["samples"] == scratch["samples"]
    assert adapted["validation_metric"] >= adapted["constant_baseline"] + 0.3
    assert adapted["validation_metric"] >= scratch["validation_metric"] + 0.1
    assert adapted["validation_metric"] >= adapted["against_raw"]["curve"][-1]["raw"] + 0.05
    assert measured(finished, "validate")["reference"]["metric"] >= adapted["constant_baseline"] + 0.3


def test_the_bundle_verifies_and_hears_the_same_at_another_rate(finished: Path, tmp_path: Path) -> None:
    bundle = finished / "package/bundle"
    for form in (bundle, *(finished / "package").glob("*.tar")):
        done = pipeline("verify", str(form))
        assert done.returncode == 0, done.stdout + done.stderr
    samples = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["golden"]["samples"]
    files = [bundle / item["file"] for item in samples]
    rows = json.loads(pipeline("predict", str(bundle), *map(str, files), "--json").stdout)
    assert sum(row["label"] == item["label"] for row, item in zip(rows, samples, strict=True)) >= 4  # of 8
    others = []
    for file in files:
        sound, rate = soundfile.read(file, dtype="float32")
        others.append(tmp_path / f"{file.stem}.flac")
        soundfile.write(others[-1], soxr.resample(sound, rate, 44_100), 44_100, subtype="PCM_24")
    again = json.loads(pipeline("predict", str(bundle), *map(str, others), "--json").stdout)
    # Resampled twice, not once: the band above the old one is not empty in the same way.
    assert [row["label"] for row in again] == [row["label"] for row in rows]
