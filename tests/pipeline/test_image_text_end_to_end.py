"""The image–text recipe, run as a user runs it: real weights, the emoji and their names, real runtimes."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from pipeline.config import RECIPES
from pipeline.report import validate_run
from tests.pipeline.finished_run import ONE_THREAD, measured, record_of
from tests.pipeline.tiny_project import pipeline

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run. To be read, not changed."""
    folder = tmp_path_factory.mktemp("image-text") / "run"
    options = ("--run-dir", str(folder), *ONE_THREAD, "--set", "validate.latency_calls=20")
    done = pipeline("all", "-c", str(RECIPES / "image-text.yaml"), *options)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_pairs_that_were_never_seen_find_each_other(finished: Path) -> None:
    record = record_of(finished)
    assert validate_run(record) == []
    assert {gate["verdict"] for stage in record["stages"] for gate in stage["gates"]} == {"pass"}
    validate = measured(finished, "validate")
    assert (validate["metric_name"], validate["samples"]) == ("recall@1", 240)
    assert validate["reference"]["metric"] > 10 / 240  # ten times chance
    assert {one["precision"] for one in validate["candidates"]} == {"fp32", "fp16"}


def test_a_picture_is_given_the_nearest_of_several_texts(finished: Path, tmp_path: Path) -> None:
    bundle = finished / "package/bundle"
    assert pipeline("verify", str(bundle)).returncode == 0
    samples = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["golden"]["samples"]
    images, texts = [], []
    for index, sample in enumerate(samples):
        pair = json.loads((bundle / sample["file"]).read_text(encoding="utf-8"))
        images.append(tmp_path / f"{index}.png")
        images[-1].write_bytes(base64.b64decode(pair["image"]))
        texts.append(pair["text"])
    options = [part for text in texts for part in ("--text", text)]
    rows = json.loads(pipeline("predict", str(bundle), *map(str, images), *options, "--json").stdout)
    assert all(row["score"] == max(row["similarities"].values()) for row in rows)
    right = sum(row["label"] == text for row, text in zip(rows, texts, strict=True))
    assert right >= 2  # chance gives one of the eight
