"""Percentiles with their bounds, warm-up until times settle, and the answers of what is timed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.progress import QuietProgress
from stages import latency
from stages.latency import TIMES, measure_latency, percentiles_of, warm_up
from stages.statistics import bound_rank, samples_for_bound
from stages.validate import Validate, ValidateConfig
from stages.validate.gates import check, limit_results
from stages.validate.metrics import Outputs, first_outputs
from tests.stages.chain import context_of, made
from tests.stages.test_validate import SCENE, entry

SINGLES = [{"x": np.full((1, 2), index, np.float32)} for index in range(3)]
BATCH = {"x": np.concatenate([one["x"] for one in SINGLES])}


class Scripted:
    """A runtime that doubles its input; `change` is added to the answers of the calls from `begins` on."""

    def __init__(self, change: float = 0.0, begins: int = 40, batch_only: bool = False) -> None:
        self.calls, self.change, self.begins, self.batch_only = 0, change, begins, batch_only

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls += 1
        hit = self.calls >= self.begins and (not self.batch_only or len(inputs["x"]) > 1)
        return {"y": inputs["x"] * 2 + (self.change if hit else 0)}


def measured(runtime: Any, earlier: Any = None, calls: int = 20) -> dict[str, Any]:
    """The timings of one runtime."""
    return measure_latency({"r": runtime}, SINGLES, BATCH, calls, QuietProgress(), earlier)["r"]


# --- bounds ---------------------------------------------------------------------------------------


def test_the_fewest_calls_for_a_bound_are_those_of_mlperf() -> None:
    """LoadGen's early stopping: 64 queries for the 90th percentile, 662 for the 99th, at 99 % confidence."""
    assert [samples_for_bound(share) for share in (0.9, 0.95, 0.99)] == [64, 130, 662]
    for share in (0.5, 0.9, 0.95, 0.99):
        fewest = samples_for_bound(share)
        assert bound_rank(fewest - 1, share) is None and bound_rank(fewest, share) == fewest - 1
    assert bound_rank(0, 0.9) is None and bound_rank(1, 0.5) is None


def test_the_bound_is_above_the_true_percentile_as_often_as_it_says() -> None:
    """Of 2,000 draws of 200 exponential times 99 % must hold: below 98.3 % (three standard errors) it would not."""
    draws = np.sort(np.random.default_rng(0).exponential(size=(2000, 200)), axis=1)
    rank = bound_rank(200, 0.9)
    assert rank is not None
    held = (draws[:, rank - 1] >= -np.log(0.1)).mean()
    assert 0.983 < held < 0.999  # the next lower rank has 97.9 %
    assert (draws[:, rank - 3] >= -np.log(0.1)).mean() < 0.98


def test_a_hundred_calls_bound_p90_and_not_p99() -> None:
    found = percentiles_of([float(one) for one in range(1, 101)])
    assert found["latency_calls"] == 100
    assert found["latency_bounds_ms"] == {"p50": 63.0, "p90": 97.0, "p95": None, "p99": None}
    assert found["latency_ms_p99"] == pytest.approx(99.01)


@pytest.mark.parametrize(
    ("gates", "numbers", "verdict", "says"),
    [
        ({}, {"latency_ms_p95": 9.0}, "pass", ""),
        ({"latency_percentile": 99}, {"latency_ms_p99": 11.0}, "fail", "above 10"),
        ({"latency_rule": "proven"}, {"latency_ms_p95": 9.0}, "inconclusive", "100 calls give no bound"),
        ({"latency_rule": "proven", "latency_percentile": 99}, {"latency_ms_p99": 9.0}, "inconclusive", "662 do"),
        ({"latency_rule": "proven", "latency_percentile": 90}, {"latency_ms_p90": 9.0}, "pass", "at most 9.5"),
        ({"latency_rule": "proven", "latency_percentile": 50}, {"latency_ms_p50": 9.0}, "inconclusive", "at most 11"),
        ({"latency_rule": "proven"}, {"latency_ms_p95": 11.0}, "fail", "above 10"),
        ({"latency_rule": "proven"}, {"latency_ms_p95": None}, "error", "nothing was measured"),
    ],
)
def test_a_latency_is_held_to_its_percentile_or_to_the_bound(
    gates: dict, numbers: dict, verdict: str, says: str
) -> None:
    config = ValidateConfig.model_validate({"gates": {"max_latency_ms": 10, **gates}})
    bounds = {"p50": 11.0, "p90": 9.5, "p95": None, "p99": None}
    (gate,) = limit_results(entry(latency_bounds_ms=bounds, latency_calls=100, **numbers), config, False)
    assert gate.verdict == verdict and says in gate.message
    assert gate.name == f"p{gates.get('latency_percentile', 95)} latency"


# --- warm-up --------------------------------------------------------------------------------------


def test_the_warm_up_ends_when_the_times_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(series: Any) -> None:
        monkeypatch.setattr(latency, "timed_call", lambda runtime, inputs: (next(series), runtime.infer(inputs)))

    times(itertools.repeat(2.0))
    assert warm_up(Scripted(), SINGLES)[0] == {"warmup_calls": 10, "warm": True}
    times(iter([9.0] * 5 + [5.0] * 5 + [3.0] * 5 + [2.8] * 5))
    found, outputs = warm_up(Scripted(), SINGLES)
    assert found == {"warmup_calls": 20, "warm": True}
    assert [float(one["y"][0, 0]) for one in outputs] == [0, 2, 4]
    times(itertools.cycle([1.0] * 5 + [2.0] * 5))
    assert warm_up(Scripted(), SINGLES)[0] == {"warmup_calls": 30, "warm": False}


# --- answers --------------------------------------------------------------------------------------


def test_equal_answers_differ_by_nothing_and_every_key_is_there() -> None:
    found = measured(Scripted())
    assert found.keys() == set(TIMES)
    assert found["timed_difference"] == 0 and found["timed_problem"] == "" and found["latency_calls"] == 20


def test_other_answers_under_load_are_seen_whether_alone_or_in_a_batch() -> None:
    assert measured(Scripted(0.4, begins=60))["timed_difference"] == pytest.approx(0.1)  # outputs go from 0 to 4
    assert measured(Scripted(0.4, begins=60, batch_only=True))["timed_difference"] == pytest.approx(0.1)
    broken = measured(Scripted(float("nan"), begins=60))
    assert broken["timed_difference"] is None and "NaN" in broken["timed_problem"]


def test_the_batch_must_give_what_it_gave_in_the_run_over_the_data() -> None:
    """A runtime that is wrong from its first call on is consistent with itself."""
    values = np.concatenate([one["x"] for one in SINGLES]) * 2
    io: Any = type("Io", (), {"outputs": (type("Tensor", (), {"name": "y", "dims": ("batch", 2)})(),)})()
    earlier = first_outputs({"r": Outputs(values), "none": Outputs(None, "broken")}, io, 3)
    assert earlier.keys() == {"r"}
    assert measured(Scripted(), earlier)["timed_difference"] == 0
    assert measured(Scripted(0.4, begins=0))["timed_difference"] == 0
    assert measured(Scripted(0.4, begins=0), earlier)["timed_difference"] == pytest.approx(0.1)
    longer = {"r": {"y": np.zeros((4, 2), np.float32)}}
    assert "shape" in measured(Scripted(), longer)["timed_problem"]


@pytest.mark.parametrize(
    ("numbers", "verdict"),
    [
        ({"timed_difference": 0.0}, "pass"),
        ({"timed_difference": 0.3}, "fail"),
        ({"timed_difference": None, "timed_problem": "y has values that are NaN"}, "error"),
        ({"timed_difference": None, "latency_calls": None}, "error"),
    ],
)
def test_other_answers_are_a_failed_gate(numbers: dict, verdict: str) -> None:
    found = entry(**{"latency_calls": 100, "timed_problem": "", **numbers})
    (gate,) = [one for one in check(found, ValidateConfig(), SCENE) if one.name == "same answers while timed"]
    assert gate.verdict == verdict and (numbers.get("timed_problem") or "") in gate.message
    assert "same answers while timed" not in {one.name for one in check(entry(), ValidateConfig(), SCENE)}


def test_a_runtime_that_answers_otherwise_when_it_is_timed_does_not_ship(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.runtimes.onnxruntime_session import OnnxRuntimeSession

    real, calls = OnnxRuntimeSession.infer, {"count": 0}

    def infer(self: OnnxRuntimeSession, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = real(self, inputs)
        if self.model.name == "onnx-fp16.onnx" and len(next(iter(inputs.values()))) == 1:
            calls["count"] += 1
            found = {name: value + np.float32(calls["count"] > 30) for name, value in found.items()}
        return found

    monkeypatch.setattr(OnnxRuntimeSession, "infer", infer)
    config = ValidateConfig.model_validate(
        {"latency_calls": 20, "drift_samples": 0, "gates": {"min_samples": 24, "max_metric_drop": 0.2,
                                                            "min_agreement_int8": 0.8}}
    )  # fmt: skip
    result = Validate().run(context_of(tmp_path, made()), config)
    failed = [(one.name, one.subject) for one in result.gates if not one.passed]
    assert failed == [("same answers while timed", "onnx-fp16")]
    assert result.measurements["chosen"] != "onnx-fp16"
    assert result.measurements["candidates"][0]["timed_difference"] == 0
    assert result.measurements["reference"]["timed_difference"] == 0
