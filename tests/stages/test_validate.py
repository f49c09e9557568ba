"""validate as a stage: a good network passes, and every way of breaking one fails a gate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from pydantic import ValidationError

from models.errors import IntegrityError
from stages.artifact import sha256_of_file
from stages.base import StageResult
from stages.candidates import write_candidates
from stages.latency import OtherWork, is_disturbed, speedup_of
from stages.statistics import smallest_visible_drop
from stages.validate import Validate, ValidateConfig
from stages.validate.choice import choose, not_worth_it
from stages.validate.config import GatesConfig
from stages.validate.gates import Scene, check, choice_gates, over_limits
from tests.stages.chain import (
    LABELS,
    SAMPLES,
    artifact_of,
    context_of,
    edit_weight,
    made,
    test_split,
    validated,
    with_candidate,
)

QUICK = {"latency_calls": 20, "gates": {"min_samples": 24, "max_metric_drop": 0.2, "min_agreement_int8": 0.8}}
HEAD = "task_head.weight"


def run_changed(folder: Path, change: Callable[[onnx.ModelProto], None], precision: str = "int8") -> StageResult:
    """validate with a changed network as the only candidate of quantize."""
    inputs = made() | {"quantize": with_candidate(folder / "quantize", change, precision)}
    return Validate().run(context_of(folder / "validate", inputs), ValidateConfig.model_validate(QUICK))


def failed_gates(result: StageResult, subject: str = "onnx-changed") -> set[str]:
    return {gate.name for gate in result.gates if gate.subject == subject and not gate.passed}


def test_every_accepted_candidate_is_measured_and_the_evidence_names_its_bytes() -> None:
    artifacts = validated()
    evidence = json.loads(artifacts["validate"].file("evidence.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in evidence["candidates"]] == ["onnx-fp32", "onnx-fp16", "onnx-int8-dynamic"]
    assert evidence["samples"] == SAMPLES
    assert evidence["labels"] == list(LABELS)
    for one in evidence["candidates"]:
        path = artifacts[one["stage"]].file(one["file"])
        assert one["sha256"] == one["files"][one["file"]] == sha256_of_file(path)
        assert one["size_bytes"] == path.stat().st_size
        assert one["passed"] and one["latency_ms_p50"] > 0 and one["throughput_per_s"] > 0
        low, high = one["speedup_interval"]
        assert 0 < low <= one["speedup"] <= high
    assert {gate["subject"] for gate in evidence["gates"]} == {
        "onnx-fp32",
        "onnx-fp16",
        "onnx-int8-dynamic",
        "test split",
        "validate",
    }


def test_precision_shows_in_the_numbers() -> None:
    """fp32 has an error but almost none, fp16 more, int8 most: a comparison of a file with itself would not."""
    evidence = json.loads(validated()["validate"].file("evidence.json").read_text(encoding="utf-8"))
    fp32, fp16, int8 = (one["relative_error"] for one in evidence["candidates"])
    assert 0 < fp32 < 1e-4 < fp16 < int8


def test_the_confusion_matrix_is_that_of_the_chosen_candidate() -> None:
    evidence = json.loads(validated()["validate"].file("evidence.json").read_text(encoding="utf-8"))
    chosen = next(one for one in evidence["candidates"] if one["name"] == evidence["chosen"])
    confusion = np.array(evidence["confusion"])
    assert confusion.sum() == SAMPLES
    assert np.trace(confusion) / SAMPLES == pytest.approx(chosen["metric"])


def swap_classes(model: onnx.ModelProto) -> None:
    edit_weight(model, HEAD, lambda weight: np.roll(weight, 1, axis=weight.shape.index(len(LABELS))))


def halve(model: onnx.ModelProto) -> None:
    edit_weight(model, HEAD, lambda weight: weight / 2)


def inject_nan(model: onnx.ModelProto) -> None:
    def change(weight: np.ndarray) -> np.ndarray:
        weight.flat[0] = np.nan
        return weight

    edit_weight(model, HEAD, change)


def drop_half_of_the_features(model: onnx.ModelProto) -> None:
    def change(weight: np.ndarray) -> np.ndarray:
        axis = 1 - weight.shape.index(len(LABELS))
        np.moveaxis(weight, axis, 0)[: weight.shape[axis] // 2] = 0
        return weight

    edit_weight(model, HEAD, change)


def zero(model: onnx.ModelProto) -> None:
    edit_weight(model, HEAD, np.zeros_like)


def rename_output(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            node.output[index] = "scores" if name == "logits" else name
    model.graph.output[0].name = "scores"


def add_output(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["logits"], ["copy"]))
    model.graph.output.append(helper.make_tensor_value_info("copy", TensorProto.FLOAT, ["batch", len(LABELS)]))


def drop_a_class(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            node.output[index] = "all_logits" if name == "logits" else name
    ends = [
        helper.make_tensor(name, TensorProto.INT64, [1], [value])
        for name, value in (("zero", 0), ("two", 2), ("axis", 1))
    ]
    model.graph.initializer.extend(ends)
    model.graph.node.append(helper.make_node("Slice", ["all_logits", "zero", "two", "axis"], ["logits"]))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2


@pytest.mark.parametrize(
    ("change", "gates"),
    [
        (swap_classes, {"agreement", "SQNR"}),
        (halve, {"SQNR"}),
        (drop_half_of_the_features, {"SQNR"}),
        (zero, {"SQNR"}),
        (inject_nan, {"comparable outputs", "accuracy drop", "agreement", "SQNR"}),
        (rename_output, {"comparable outputs", "accuracy drop", "agreement", "SQNR"}),
        (add_output, {"comparable outputs", "accuracy drop", "agreement", "SQNR"}),
        (drop_a_class, {"comparable outputs", "accuracy drop", "agreement", "SQNR"}),
    ],
)
def test_a_broken_candidate_fails(tmp_path: Path, change: Callable[[onnx.ModelProto], None], gates: set[str]) -> None:
    result = run_changed(tmp_path, change)
    assert gates <= failed_gates(result)
    assert not failed_gates(result, "onnx-fp32")  # the others are judged on their own
    assert result.measurements["chosen"] != "onnx-changed"
    json.dumps(result.measurements, allow_nan=False)


def test_a_float_candidate_is_held_to_the_logits_not_only_to_the_classes(tmp_path: Path) -> None:
    result = run_changed(tmp_path, lambda model: edit_weight(model, HEAD, lambda weight: weight * 1.05), "fp16")
    assert failed_gates(result) == {"output error"}


def test_nan_in_the_reference_fails_every_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from models.runtimes.torch_eager import TorchEager

    def infer(self: TorchEager, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"logits": np.full((len(inputs["image"]), len(LABELS)), np.nan, np.float32)}

    monkeypatch.setattr(TorchEager, "infer", infer)
    result = Validate().run(context_of(tmp_path, made()), ValidateConfig.model_validate(QUICK))
    assert "comparable outputs" in failed_gates(result, "onnx-fp32")
    assert result.measurements["chosen"] is None
    assert result.measurements["confusion"] == []
    assert "the reference" in next(gate.message for gate in result.gates if gate.subject == "onnx-fp32")


def test_zero_samples_fail_every_gate(tmp_path: Path) -> None:
    result = Validate().run(context_of(tmp_path, made(), examples=()), ValidateConfig.model_validate(QUICK))
    assert not any(gate.passed for gate in result.gates)
    assert result.measurements["chosen"] is None
    assert result.notes == ("pytorch: no evidence on 0 samples",)


def test_no_candidate_is_no_pass(tmp_path: Path) -> None:
    inputs = dict(made())
    for stage in ("export", "quantize"):
        (tmp_path / stage).mkdir()
        write_candidates(tmp_path / stage, [])
        inputs[stage] = artifact_of(stage, tmp_path / stage)
    result = Validate().run(context_of(tmp_path / "validate", inputs), ValidateConfig.model_validate(QUICK))
    assert [(gate.name, gate.passed) for gate in result.gates] == [
        ("enough samples", True),
        ("test examples seen before", True),
        ("a candidate can ship", False),
    ]


def test_bytes_that_their_stage_did_not_write_are_not_measured(tmp_path: Path) -> None:
    artifact = with_candidate(tmp_path / "quantize", lambda model: None)
    path = artifact.file("onnx-changed.onnx")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(IntegrityError, match=r"onnx-changed\.onnx has changed since quantize wrote it"):
        Validate().run(context_of(tmp_path / "validate", made() | {"quantize": artifact}), ValidateConfig())


SCENE = Scene(1000, "accuracy", 0.9, tolerances={"fp32": (1e-3, ""), "fp16": (2e-2, "")})


def entry(name: str = "x", **numbers: object) -> dict[str, object]:
    """A candidate's evidence, good in everything."""
    good = {
        "name": name, "precision": "int8", "problem": "", "metric": 0.9, "metric_difference": -0.005,
        "metric_difference_one_sided": [-0.008, -0.002], "difference_variance": 0.003, "smallest_visible_drop": 0.03,
        "agreement": 0.98, "sqnr_db": 30.0, "relative_error": 1e-5, "latency_ms_p50": 1.0, "latency_ms_p95": 2.0,
        "speedup": 2.0, "speedup_interval": [1.8, 2.2], "size_bytes": 100, "peak_memory_bytes": 1000, "passed": True,
        "flip_rate": 0.003, "flip_rate_interval": [0.001, 0.008], "ece_increase": 0.01,
        "ece_increase_interval": [0.0, 0.02], "nll_increase": 0.01, "nll_increase_interval": [0.0, 0.02],
        "further_drops": {}, "slices": None, "digest": "d" * 64, "over_limits": [], "not_worth_it": {},
        "excused": [],
    }  # fmt: skip
    return good | numbers


@pytest.mark.parametrize(
    ("gates", "numbers", "failed"),
    [
        ({}, {}, set()),
        ({"metric_drop": "observed"}, {"metric_difference": -0.011}, {"accuracy drop"}),
        ({"metric_drop": "observed"}, {"metric_difference_one_sided": [-0.5, 0.0]}, set()),
        ({}, {"metric_difference_one_sided": [0.1, 0.2]}, set()),
        ({}, {"metric_difference_one_sided": [-0.011, 0.0]}, {"accuracy drop"}),
        ({"max_metric_drop": 0.03}, {"metric_difference_one_sided": [-0.011, 0.0]}, set()),
        ({}, {"agreement": 0.93}, {"agreement"}),
        ({}, {"precision": "fp16"}, {"agreement"}),
        ({"min_agreement": 0.99}, {}, {"agreement"}),
        ({"min_agreement": 0.99, "min_agreement_int8": 0.9}, {}, set()),
        ({}, {"precision": "fp32", "agreement": 1.0, "relative_error": 2e-3}, {"output error"}),
        ({}, {"precision": "fp16", "agreement": 1.0, "relative_error": 2e-3}, set()),
        ({}, {"precision": "fp16", "agreement": 1.0, "relative_error": float("nan")}, {"output error"}),
        ({}, {"sqnr_db": None}, {"SQNR"}),
    ],
)
def test_each_gate_fails_on_its_own_number(gates: dict, numbers: dict, failed: set[str]) -> None:
    results = check(entry(**numbers), ValidateConfig(gates=GatesConfig(**gates)), SCENE)
    assert {result.name for result in results if not result.passed} == failed


@pytest.mark.parametrize(("cosine", "passed"), [(0.96, True), (0.94, False), (None, False), (float("nan"), False)])
def test_an_embedding_must_not_turn_away(cosine: float | None, passed: bool) -> None:
    results = check(entry(cosine=cosine), ValidateConfig(), Scene(1000, "recall@1", 0.9, embeds=True))
    assert [result.passed for result in results if result.name == "cosine"] == [passed]


@pytest.mark.parametrize(
    ("gates", "numbers", "over"),
    [
        ({}, {}, 0),
        ({"max_latency_ms": 1.5}, {}, 1),
        ({"max_latency_ms": 2.5}, {}, 0),
        ({"max_latency_ms": 2.5}, {"latency_ms_p95": None}, 1),
        ({"max_size_bytes": 99}, {}, 1),
        ({"max_size_bytes": 99, "max_latency_ms": 1}, {}, 2),
    ],
)
def test_limits_leave_a_candidate_out_without_failing_it(gates: dict, numbers: dict, over: int) -> None:
    limits, measured = ValidateConfig(gates=GatesConfig(**gates)), entry(**numbers)
    assert all(gate.passed for gate in check(measured, limits, SCENE))
    measured["over_limits"] = over_limits(measured, limits)
    small = entry("small", size_bytes=1, latency_ms_p95=0.5, latency_ms_p50=5.0, over_limits=[])
    assert len(measured["over_limits"]) == over
    chosen = choose([measured, small], "latency")
    assert chosen == ("small" if over else "x")
    results = choice_gates([measured, small], chosen, limits)
    assert all(gate.passed for gate in results) and len(results) == 1 + len(gates)
    if over:
        (alone,) = choice_gates([measured], choose([measured], "latency"), limits)
        assert not alone.passed and str(measured["over_limits"][0]) in alone.message


@pytest.mark.parametrize("samples", [1, 2, 5, 47])
def test_too_few_samples_are_no_evidence(tmp_path: Path, samples: int) -> None:
    """Every number may look well: on a handful of samples nothing differs."""
    config = ValidateConfig.model_validate({"latency_calls": 20, "gates": {"min_samples": 48}})
    examples = test_split("image-classification", samples)
    result = Validate().run(context_of(tmp_path / "out", made(), examples=examples), config)
    (gate,) = [gate for gate in result.gates if gate.name == "enough samples"]
    assert not gate.passed and gate.measured == samples
    assert 0 < smallest_visible_drop(np.ones(samples), np.ones(samples)) <= 1


def test_speed_is_compared_turn_by_turn() -> None:
    """A drift that hits both alike cancels out; the spread of the turns is the interval."""
    drift = np.linspace(1, 3, 10)
    assert speedup_of(4 * drift, 2 * drift) == (pytest.approx(2), (pytest.approx(2), pytest.approx(2)))
    noisy = np.array([1, 9, 2, 3, 2, 2, 2, 3, 1, 2.0])
    middle, (low, high) = speedup_of(noisy, np.ones(10))
    assert (middle, low, high) == (2, 1, 3)


def test_the_work_of_others_is_seen(tmp_path: Path) -> None:
    with OtherWork() as quiet:
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:  # this process's own work does not count
            pass
    busy = "import time\nend = time.monotonic() + 3\nwhile time.monotonic() < end: pass"
    other = subprocess.Popen([sys.executable, "-c", busy])
    time.sleep(0.3)
    with OtherWork() as loud:
        time.sleep(1.0)
    other.wait()
    assert quiet.cores is not None and loud.cores is not None
    assert loud.cores > 0.5
    assert is_disturbed(loud.cores, os.cpu_count() or 1)
    assert not is_disturbed(0.1, 1) and not is_disturbed(None, 1000)


def test_the_gate_says_what_the_samples_can_see() -> None:
    (drop,) = [one for one in check(entry(), ValidateConfig(), SCENE) if one.name == "accuracy drop"]
    assert "1000 samples can see drops of 0.0300 or more" in drop.message


def test_the_objective_chooses_among_those_that_passed() -> None:
    entries = [
        entry("small", size_bytes=10, latency_ms_p50=3.0, metric=0.90),
        entry("fast", size_bytes=50, latency_ms_p50=1.0, metric=0.89),
        entry("accurate", size_bytes=90, latency_ms_p50=2.0, metric=0.91),
        entry("broken", size_bytes=1, latency_ms_p50=0.1, metric=0.99, passed=False),
    ]
    assert [choose(entries, objective) for objective in ("size", "latency", "accuracy")] == [
        "small",
        "fast",
        "accurate",
    ]
    assert choose(entries[3:], "size") is None


def test_of_equally_accurate_ones_the_faster_is_chosen() -> None:
    assert choose([entry("slow", latency_ms_p50=2.0), entry("fast")], "accuracy") == "fast"


def test_what_is_proven_ships_before_what_is_excused() -> None:
    fast = entry("fast", precision="fp16", latency_ms_p50=0.5, turns_ms=[0.5] * 10, excused=["agreement"])
    proven = entry("proven", latency_ms_p50=0.9, turns_ms=[0.9] * 10, size_bytes=120)
    assert not_worth_it(proven, [fast, proven]) == {} != not_worth_it(proven | {"excused": ["SQNR"]}, [fast, proven])
    assert choose([fast, proven], "latency") == "proven" and choose([fast], "latency") == "fast"


def test_fewer_bits_must_earn_their_place() -> None:
    """Turn by turn: a median that happens to be lower is not faster, and a larger file is not smaller."""
    plain = entry("fp32", precision="fp32", latency_ms_p50=1.0, size_bytes=100, turns_ms=[1.0, 1.1] * 5, metric=0.90)
    fast = entry("fast", latency_ms_p50=0.5, size_bytes=120, turns_ms=[0.5] * 10)
    tie = entry("tie", latency_ms_p50=0.99, size_bytes=30, turns_ms=[1.2, 0.9] * 5)
    entries = [plain, fast, tie]
    for one in entries:
        one["not_worth_it"] = not_worth_it(one, entries)
    assert plain["not_worth_it"] == {}
    assert fast["not_worth_it"] == {"size": "not smaller than fp32: 0.0 MB against 0.0 MB"}
    assert tie["not_worth_it"] == {"latency": "not faster than fp32: 1.03× its speed, 0.83× at least"}
    assert [choose(entries, objective) for objective in ("latency", "size")] == ["fast", "tie"]
    assert choose([plain, tie], "latency") == "fp32"
    assert not_worth_it(tie, [entry("fp32", precision="fp32", passed=False), tie]) == {}


def test_an_unknown_gate_and_a_nonsense_threshold_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_metrik_drop"):
        ValidateConfig.model_validate({"gates": {"max_metrik_drop": 0.1}})
    with pytest.raises(ValidationError, match="min_agreement"):
        ValidateConfig.model_validate({"gates": {"min_agreement": 1.5}})
