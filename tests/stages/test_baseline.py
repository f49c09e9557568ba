"""validate.baseline: the network of the last release on the same samples, and never a pass without one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from models.checkpoint import load_checkpoint
from models.errors import ConfigError, IntegrityError
from models.tasks import task_of
from stages.validate import Validate, ValidateConfig
from stages.validate.baseline import (
    NUMBERS,
    Baseline,
    baseline_gates,
    baseline_notes,
    baseline_outputs,
    digest_of_baseline,
    incomparable,
    open_baseline,
)
from stages.validate.gates import Scene
from stages.validate.metrics import decisions
from tests.stages.chain import context_of, made, packed, validated, with_candidate
from tests.stages.small_run import artifact_of

SCENE = Scene(1000, "accuracy", 0.9)
SINGLE = task_of("image-classification")


def run_folder(folder: Path) -> Path:
    """A run that went through validate, as the runner leaves it."""
    for stage, artifact in validated().items():
        shutil.copytree(artifact.folder, folder / stage)
        manifest = artifact_of(stage, folder / stage).manifest | {"gates": []}
        (folder / stage / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def entry(**numbers: Any) -> dict[str, Any]:
    """The evidence against a baseline, without numbers but those given."""
    found = {"name": "v1", "candidate": "onnx-fp16", "chosen": "onnx-fp32", "problem": "", "disturbed": False}
    return found | {"same_test_split": True} | dict.fromkeys(NUMBERS) | numbers


def compared(gained: int, lost: int, samples: int = 1000) -> dict[str, Any]:
    """The same for a candidate that is right on `gained` samples more than the baseline and wrong on `lost`."""
    targets = np.zeros(samples, np.int64)
    before, after = np.tile(np.array([[1.0, 0.0]], np.float32), (samples, 1)), np.zeros((samples, 2), np.float32)
    before[:gained] = (0, 1)
    after[:, 0] = 1
    after[samples - lost :] = (0, 1)
    return entry(**decisions(after, before, targets, SINGLE), baseline_metric=1 - gained / samples)


@pytest.mark.parametrize(
    ("gained", "lost", "verdict"), [(0, 0, "pass"), (40, 0, "pass"), (5, 10, "inconclusive"), (0, 60, "fail")]
)
def test_the_chosen_candidate_must_be_shown_to_lose_no_more_than_the_margin(
    gained: int, lost: int, verdict: str
) -> None:
    config = ValidateConfig.model_validate({"gates": {"max_metric_drop": 0.012}})
    (gate,) = baseline_gates(compared(gained, lost), config, SCENE, "d" * 64)
    assert (gate.name, gate.subject, gate.verdict) == ("accuracy regression", "onnx-fp32, against v1", verdict)
    assert gate.measured == pytest.approx((lost - gained) / 1000) and gate.unit == "accuracy"


def test_the_margin_may_be_a_share_of_the_baseline_and_the_rule_the_observed_drop() -> None:
    """Of a baseline at 0.5 the hundredth part is half a point, whatever the reference has."""
    ratio = ValidateConfig.model_validate({"gates": {"min_metric_ratio": 0.99, "metric_drop": "observed"}})
    found = compared(500, 508)
    (gate,) = baseline_gates(found, ratio, SCENE, None)
    assert gate.threshold == pytest.approx(0.005) and gate.verdict == "fail"
    (gate,) = baseline_gates(found, ValidateConfig.model_validate({"gates": {"metric_drop": "observed"}}), SCENE, None)
    assert gate.verdict == "pass"


def test_what_cannot_be_compared_is_no_pass_and_says_why() -> None:
    assert baseline_gates(None, ValidateConfig(), SCENE, None) == []
    (gate,) = baseline_gates(entry(problem="v1 has other labels"), ValidateConfig(), SCENE, None)
    assert gate.verdict == "error" and "v1 has other labels" in gate.message
    (gate,) = baseline_gates(entry(), ValidateConfig(on_inconclusive="pass"), SCENE, None)
    assert gate.verdict == "error" and gate.stops
    assert baseline_notes(entry(problem="why"), "accuracy") == ["baseline v1 (onnx-fp16): why"]


@pytest.mark.parametrize(
    ("numbers", "verdict"),
    [
        ({"latency_ratio": 1.0, "latency_ratio_interval": (0.98, 1.05)}, "pass"),
        ({"latency_ratio": 1.0, "latency_ratio_interval": (0.98, 1.15)}, "inconclusive"),
        ({"latency_ratio": 1.3, "latency_ratio_interval": (1.2, 1.4)}, "fail"),
        ({"latency_ratio": 1.0, "latency_ratio_interval": (0.98, 1.05), "disturbed": True}, "inconclusive"),
        ({}, "error"),
    ],
)
def test_latency_is_a_limit_only_where_it_is_asked_for(tmp_path: Path, numbers: dict, verdict: str) -> None:
    found, config = compared(0, 0) | numbers, {"baseline": str(run_folder(tmp_path / "v1"))}
    limited = ValidateConfig.model_validate(config | {"gates": {"max_latency_regression": 1.1}})
    assert [one.name for one in baseline_gates(found, ValidateConfig.model_validate(config), SCENE, None)] == [
        "accuracy regression"
    ]
    _, latency = baseline_gates(found, limited, SCENE, None)
    assert (latency.name, latency.verdict) == ("latency regression", verdict)


def test_another_contract_or_other_labels_are_named() -> None:
    spec = load_checkpoint(made()["merge-lora"].folder / "checkpoint").spec
    baseline = Baseline("v1", "run", "x", Path(), "", spec.task, spec.labels, spec.io, None, None, None)  # type: ignore[arg-type]
    assert incomparable(baseline, spec) == ""
    assert "task text-classification" in incomparable(replace(baseline, task="text-classification"), spec)
    more = incomparable(replace(baseline, labels=("a", "b", "d")), spec)
    assert "other labels: there only 'd'; here only 'c'" in more
    assert "the same in another order" in incomparable(replace(baseline, labels=("b", "a", "c")), spec)
    image = replace(spec.io.inputs[0], dims=("batch", 64, 64, 3))
    other = incomparable(replace(baseline, io=replace(spec.io, inputs=(image,))), spec)
    assert "another I/O contract" in other and "64" in other


@pytest.mark.parametrize("kind", ["run", "bundle", "tar"])
def test_what_a_run_a_bundle_and_a_tar_ship_is_run_on_the_same_samples(tmp_path: Path, kind: str) -> None:
    path = {"run": lambda: run_folder(tmp_path / "v1"), "bundle": lambda: packed() / "bundle",
            "tar": lambda: packed() / "tiny.tar"}[kind]()  # fmt: skip
    config = ValidateConfig(baseline=str(path))
    checkpoint = load_checkpoint(made()["merge-lora"].folder / "checkpoint")
    released = baseline_outputs(context_of(tmp_path / "out", made()), config, checkpoint)
    assert released is not None and released.outputs.values is not None
    evidence = json.loads(validated()["validate"].file("evidence.json").read_text(encoding="utf-8"))
    shipped = next(one for one in evidence["candidates"] if one["name"] == evidence["chosen"])
    assert released.entry["sha256"] == shipped["sha256"]
    assert released.entry["same_test_split"] and released.entry["same_preprocessing"]
    targets = np.array([index % 3 for index in range(len(released.outputs.values))])
    assert float(SINGLE.scores(released.outputs.values, targets).mean()) == pytest.approx(shipped["metric"])
    assert released.entry["recorded_metric"] == pytest.approx(shipped["metric"])
    assert config.outside()["baseline"] == digest_of_baseline(path)


def test_bytes_that_were_not_shipped_are_not_run_and_other_content_is_another_key(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "v1")
    with open_baseline(run) as baseline:
        file = baseline.file
    before = digest_of_baseline(run)
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(IntegrityError, match="has changed"), open_baseline(run):
        pass
    evidence = json.loads((run / "validate/evidence.json").read_text(encoding="utf-8"))
    entry_ = next(one for one in evidence["candidates"] if one["name"] == evidence["chosen"])
    entry_["files"][entry_["file"]] = "0" * 64
    (run / "validate/evidence.json").write_text(json.dumps(evidence), encoding="utf-8")
    assert digest_of_baseline(run) != before
    with pytest.raises(IntegrityError, match=r"evidence\.json has changed"), open_baseline(run):
        pass
    bundle = tmp_path / "bundle"
    shutil.copytree(packed() / "bundle", bundle)
    (bundle / "model/model.onnx").write_bytes(b"other")
    with pytest.raises(IntegrityError), open_baseline(bundle):
        pass


def test_what_released_nothing_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="is no bundle, and no run with a result of"):
        ValidateConfig(baseline=str(tmp_path / "nowhere"))
    run = run_folder(tmp_path / "v1")
    manifest = json.loads((run / "validate/manifest.json").read_text(encoding="utf-8"))
    manifest["gates"] = [{"name": "agreement", "verdict": "fail"}]
    (run / "validate/manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ValidationError, match=r"did not pass \(agreement\)"):
        ValidateConfig(baseline=str(run))
    with pytest.raises(ValidationError, match="max_latency_regression compares with baseline"):
        ValidateConfig.model_validate({"gates": {"max_latency_regression": 1.1}})


def test_a_run_is_not_its_own_baseline(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "v1")
    inputs = {name: replace(artifact, folder=run / name) for name, artifact in made().items()}
    checkpoint = load_checkpoint(run / "merge-lora/checkpoint")
    with pytest.raises(ConfigError, match="the folder of this very run"):
        baseline_outputs(context_of(tmp_path / "out", inputs), ValidateConfig(baseline=str(run)), checkpoint)


def test_a_run_of_the_stage_is_held_against_its_baseline(tmp_path: Path) -> None:
    config = ValidateConfig.model_validate(
        {
            "baseline": str(packed() / "tiny.tar"),
            "latency_calls": 20,
            "drift_samples": 0,
            "gates": {
                "min_samples": 24,
                "max_metric_drop": 0.2,
                "min_agreement_int8": 0.8,
                "max_latency_regression": 1000,
            },
        }
    )
    inputs = made() | {"quantize": with_candidate(tmp_path / "quantize", lambda model: None)}
    result = Validate().run(context_of(tmp_path / "out", inputs), config)
    gates = {one.name: one for one in result.gates if ", against " in one.subject}
    assert gates["accuracy regression"].verdict == "pass"
    assert gates["latency regression"].verdict in ("pass", "inconclusive")  # inconclusive: others kept the cores busy
    found = result.measurements["baseline"]
    json.dumps(found, allow_nan=False)
    assert found["kind"] == "bundle" and found["chosen"] == result.measurements["chosen"]
    assert found["latency_ratio"] > 0 and found["problem"] == ""
    assert any(note.startswith("baseline ") for note in result.notes)
