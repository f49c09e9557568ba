"""The shipped recipes, run as a user runs them: real weights, real data, real runtimes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import RECIPES
from pipeline.report import validate_run
from stages import STAGES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def pipeline(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the console script of this environment, without a hub."""
    script = Path(sys.executable).with_name("pipeline")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([script, *arguments], capture_output=True, text=True, env=environment, timeout=1400)


@pytest.fixture(scope="module", params=["vision", "text"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The name of a recipe and the folder of its finished run."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    done = pipeline("all", "-c", str(RECIPES / f"{request.param}.yaml"), "--run-dir", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(folder / "report.html") in done.stdout
    return request.param, folder


def record_of(folder: Path) -> dict[str, Any]:
    """The content of run.json."""
    record: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return record


def measured(folder: Path, stage: str) -> dict[str, Any]:
    """The measurements of one stage."""
    found: dict[str, Any] = next(one for one in record_of(folder)["stages"] if one["name"] == stage)["measurements"]
    return found


def test_the_record_follows_its_schema_and_every_gate_passed(finished: tuple[str, Path]) -> None:
    record = record_of(finished[1])
    assert validate_run(record) == []
    gates = [gate for stage in record["stages"] for gate in stage["gates"]]
    assert len(gates) >= 15
    assert {gate["verdict"] for gate in gates} == {"pass"}


def test_the_second_run_does_nothing_and_says_why(finished: tuple[str, Path]) -> None:
    name, folder = finished
    before = (folder / "run.json").read_bytes()
    done = pipeline("all", "-c", str(RECIPES / f"{name}.yaml"), "--run-dir", str(folder))
    assert done.returncode == 0
    assert done.stderr.count(" fresh: configuration, inputs, data, versions and files are unchanged") == len(STAGES)
    assert (folder / "run.json").read_bytes() == before


def test_one_config_key_reruns_exactly_what_depends_on_it(finished: tuple[str, Path]) -> None:
    name, folder = finished
    options = ("all", "-c", str(RECIPES / f"{name}.yaml"), "--run-dir", str(folder), "--dry-run", "--json")
    plan = json.loads(pipeline(*options, "--set", "validate.objective=size").stdout)
    assert {item["stage"]: item["fresh"] for item in plan} == {
        "finetune": True, "merge-lora": True, "export": True, "quantize": True, "validate": False, "package": False,
    }  # fmt: skip
    assert "config.objective changed from 'latency' to 'size'" in plan[4]["reason"]


def test_adapting_beats_the_probe_within_its_allowance_and_int8_ships(finished: tuple[str, Path]) -> None:
    _, folder = finished
    finetune, validate = measured(folder, "finetune"), measured(folder, "validate")
    assert finetune["strategy"] == "lora"
    assert finetune["validation_accuracy"] >= finetune["probe_validation_accuracy"]
    assert validate["reference"]["accuracy"] > 0.8
    int8 = [one for one in validate["candidates"] if one["precision"] == "int8"]
    assert int8
    assert all(one["size_bytes"] < 0.75 * validate["reference"]["size_bytes"] for one in int8)


def test_the_bundle_verifies_and_predicts(finished: tuple[str, Path]) -> None:
    name, folder = finished
    for bundle in (folder / "package/bundle", *(folder / "package").glob("*.tar")):
        done = pipeline("verify", str(bundle))
        assert done.returncode == 0, done.stdout + done.stderr
    golden = folder / "package/bundle/golden"
    samples = json.loads((golden / "golden.json").read_text(encoding="utf-8"))["samples"]
    inputs = [item["text"] if name == "text" else str(golden / item["file"]) for item in samples]
    rows = json.loads(pipeline("predict", str(folder / "package/bundle"), *inputs, "--json").stdout)
    right = sum(row["label"] == item["label"] for row, item in zip(rows, samples, strict=True))
    assert right >= len(samples) * 0.5


def test_pretrained_beats_scratch(finished: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = finished
    if name != "vision":
        pytest.skip("the scratch baseline is stated for images")
    scratch = ("finetune.strategy=full", "finetune.from_scratch=true", "finetune.initial_head=random")
    settings = [part for setting in scratch for part in ("--set", setting)]
    done = pipeline("finetune", "-c", str(RECIPES / "vision.yaml"), "--run-dir", str(tmp_path / "scratch"), *settings)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    adapted = measured(folder, "finetune")["validation_accuracy"]
    assert adapted >= measured(tmp_path / "scratch", "finetune")["validation_accuracy"] + 0.1
