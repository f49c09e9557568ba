"""The cases that fooled other comparators, each named after it, and what holds for every comparison.

Zero samples, a missing or added output and NaN on one side: test_validate.py and test_validate_metrics.py. Permuted
weights, swapped labels, shuffled samples, preprocessing that differs, dropout, a static batch: test_self_test.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.modalities.vision import ImageProcessing
from models.spec import IOSpec, TensorSpec
from models.tasks.retrieval import Retrieval
from models.tasks.single_label import SingleLabel
from pipeline.progress import QuietProgress
from stages.data.splits import DataSplits
from stages.validate import Validate, ValidateConfig
from stages.validate.drift.first_layer import share_of
from stages.validate.drift.script import errors as script_errors
from stages.validate.gates import Scene
from stages.validate.judge import Judge
from stages.validate.leaks import leak_gate
from stages.validate.metrics import SQNR_LIMIT_DB, Outputs, collect_outputs, compare, errors, output_problem
from tests.stages.chain import context_of, data_of, made
from tests.stages.chain import test_split as examples_of
from tests.stages.test_validate_metrics import IO, FakeRuntime

TASK = SingleLabel()
TOLERANCES = {"fp32": (1e-3, "the ceiling"), "fp16": (2e-2, "the ceiling")}


def stopped(found: Outputs, wanted: Outputs, targets: np.ndarray, task=TASK, precision: str = "fp32") -> set[str]:
    """The gates that stop a candidate with these outputs."""
    config = ValidateConfig.model_validate({"gates": {"metric_drop": "observed"}})
    scene = Scene(len(targets), task.metric, 0.9, bool(task.embeds), TOLERANCES)
    judge = Judge(config, scene, task, targets, wanted, (), None)  # type: ignore[arg-type]
    judge = replace(judge, config=config.model_copy(update={"gates": config.gates.model_copy(
        update={"max_slice_drop": None})}))  # fmt: skip
    return {one.name for one in judge.verdicts("x", precision, judge.numbers(found)) if one.stops}


def test_polygraphy_passes_on_empty_tensors() -> None:
    """Nothing differs between two arrays of nothing."""
    for shape in ((2, 0), (0, 3), (0, 0)):
        assert output_problem({"logits": np.zeros(shape, np.float32)}, IO, 2)
    runtime = FakeRuntime(lambda size: {"logits": np.zeros((size, 0), np.float32)})
    found = collect_outputs(
        runtime, ImageProcessing(8, 8), examples_of("image-classification", 4), IO, 4, QuietProgress(), "empty"
    )
    assert found.values is None
    assert "comparable outputs" in stopped(found, found, np.zeros(4, np.int64))


def test_polygraphy_passes_on_zero_iterations() -> None:
    runtime = FakeRuntime(lambda size: {"logits": np.zeros((size, 3), np.float32)})
    found = collect_outputs(runtime, ImageProcessing(8, 8), (), IO, 4, QuietProgress(), "none")
    assert {"comparable outputs", "accuracy drop", "agreement", "SQNR"} <= stopped(found, found, np.zeros(0, np.int64))


def test_polygraphy_passes_on_an_output_missing_from_one_side() -> None:
    io = IOSpec(IO.inputs, (*IO.outputs, TensorSpec("boxes", "float32", ("batch", 4))))
    whole = {"logits": np.zeros((2, 3), np.float32), "boxes": np.zeros((2, 4), np.float32)}
    assert output_problem(whole, io, 2) == ""
    assert "'boxes' is missing" in output_problem({"logits": whole["logits"]}, io, 2)


def test_torch_onnx_verify_passes_when_both_sides_are_nan() -> None:
    runtime = FakeRuntime(lambda size: {"logits": np.full((size, 3), np.nan, np.float32)})
    found = collect_outputs(
        runtime, ImageProcessing(8, 8), examples_of("image-classification", 4), IO, 4, QuietProgress(), "nan"
    )
    both = Outputs(np.full((4, 3), np.nan, np.float32))
    for one in (found, both):
        assert stopped(one, one, np.zeros(4, np.int64)) >= {"comparable outputs", "SQNR", "output error"}


def test_torch_onnx_verify_warns_only_above_five_thousandths() -> None:
    """An error of 0.004 is four times what an FP32 file may have, and here it turns an answer."""
    wanted = np.array([[0.501, 0.5, 0.0], [0.0, 1.0, 0.5]], np.float32)
    found = wanted.copy()
    found[0, 1] += 0.004
    assert stopped(Outputs(found), Outputs(wanted), np.array([0, 1])) >= {"output error", "agreement", "accuracy drop"}


def test_optimum_compares_dummy_inputs_and_warns(rows: int = 64) -> None:
    """Half of the samples are another class, and no single value is far off."""
    random = np.random.default_rng(0)
    wanted = random.normal(0, 4e-5, (rows, 3)).astype(np.float32)
    found = np.roll(wanted, 1, 1)
    assert np.allclose(found, wanted, atol=1e-3)
    assert stopped(Outputs(found), Outputs(wanted), wanted.argmax(1)) >= {"agreement", "SQNR", "accuracy drop"}


def test_olive_compares_the_first_output_only() -> None:
    """Of two embeddings the second is another one."""
    random = np.random.default_rng(0)
    image, text, other = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in random.normal(size=(3, 32, 8)))
    wanted = np.concatenate([image, text], 1).astype(np.float32)
    found = np.concatenate([image, other], 1).astype(np.float32)
    targets = Retrieval().targets([f"text {index}" for index in range(32)], 16)
    assert stopped(Outputs(found), Outputs(wanted), targets, Retrieval()) >= {"cosine", "SQNR"}


def test_mlperf_99_passes_a_channel_swap() -> None:
    """A metric that keeps 99 % says nothing of the outputs: two classes that are never the answer change places."""
    random = np.random.default_rng(0)
    wanted = random.normal(size=(1000, 10)).astype(np.float32)
    wanted[:, 0] += 8
    found = wanted[:, [0, 2, 1, *range(3, 10)]]
    targets = np.zeros(1000, np.int64)
    assert (found.argmax(1) == targets).mean() >= 0.99 * (wanted.argmax(1) == targets).mean()
    assert stopped(Outputs(found), Outputs(wanted), targets) >= {"output error"}


def test_halved_logits_keep_cosine_accuracy_and_argmax() -> None:
    wanted = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32)
    for precision in ("fp32", "fp16", "int8"):
        gates = stopped(Outputs(wanted / 2), Outputs(wanted), wanted.argmax(1), precision=precision)
        assert "SQNR" in gates and not gates & {"agreement", "accuracy drop"}


def leaked(split: str) -> DataSplits:
    data = data_of(examples_of("image-classification"))
    return replace(data, splits={**data.splits, "validation": (), split: data["test"][3:8]})


@pytest.mark.parametrize("split", ["calibration", "train"])
def test_leaked_data_turns_a_gate_red(split: str, tmp_path: Path) -> None:
    gate = leak_gate(leaked(split))
    assert gate.stops and gate.measured == 5
    assert f"made/3 is made/3 of {split}" in gate.message and "and 2 more" in gate.message
    assert leak_gate(data_of(examples_of("image-classification"))).passed


def test_leaked_calibration_data_stops_the_run(tmp_path: Path) -> None:
    config = ValidateConfig.model_validate({"latency_calls": 20, "drift_samples": 0, "gates": {"min_samples": 24}})
    context = replace(context_of(tmp_path / "out", made()), data=leaked("calibration"))
    failed = [gate.name for gate in Validate().run(context, config).gates if gate.stops]
    assert "test examples seen before" in failed


# --- what holds for every comparison ------------------------------------------------------------------

NUMBERS = st.floats(-100, 100, width=32)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reference, candidate and targets of one shape."""
    shape = draw(st.tuples(st.integers(1, 12), st.integers(2, 5)))
    wanted, found = (draw(arrays(np.float32, shape, elements=NUMBERS)) for _ in range(2))
    return wanted, found, draw(arrays(np.int64, shape[0], elements=st.integers(0, shape[1] - 1)))


@given(pairs())
@settings(max_examples=60, deadline=None)
def test_errors_of_any_two_arrays_are_in_their_ranges(pair: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    wanted, found, _ = pair
    numbers = errors(found, wanted, TASK)
    assert 0 <= numbers["mean_abs_error"] <= numbers["max_abs_error"] * (1 + 1e-9)
    assert numbers["p999_abs_error"] <= numbers["max_abs_error"] * (1 + 1e-9)
    assert sum(numbers["error_histogram"]["counts"]) == len(wanted)
    assert numbers["kl"] >= 0
    if numbers["sqnr_db"] is not None:
        assert numbers["sqnr_db"] <= SQNR_LIMIT_DB
        assert (numbers["sqnr_db"] == SQNR_LIMIT_DB) or numbers["max_abs_error"] > 0
    for value in (numbers["relative_error"], numbers["cosine"], numbers["sqnr_db"]):
        assert value is None or math.isfinite(value)


@given(pairs())
@settings(max_examples=60, deadline=None)
def test_an_array_is_itself_whatever_it_holds(pair: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    wanted, _, targets = pair
    found = compare(Outputs(wanted.copy()), Outputs(wanted), targets, TASK)
    assert (found["max_abs_error"], found["agreement"], found["flips"], found["metric_difference"]) == (0, 1, 0, 0)


@given(pairs(), st.sampled_from([np.nan, np.inf, -np.inf]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_one_value_that_is_no_number_stops_every_candidate(
    pair: tuple[np.ndarray, np.ndarray, np.ndarray], value: float, both: bool
) -> None:
    wanted, found, targets = (array.copy() for array in pair)
    found[0, 0] = value
    if both:
        wanted[0, 0] = value
    for precision in ("fp32", "fp16", "int8"):
        assert stopped(Outputs(found), Outputs(wanted), targets, precision=precision)


@given(pairs())
@settings(max_examples=60, deadline=None)
def test_the_script_measures_what_the_gates_do(pair: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    wanted, found, _ = pair
    numbers, said = errors(found, wanted, TASK), script_errors(found, wanted)
    assert said["max_abs_error"] == numbers["max_abs_error"]
    assert said["relative_error"] == numbers["relative_error"]
    if said["sqnr_db"] is not None:
        assert said["sqnr_db"] == pytest.approx(numbers["sqnr_db"])


@given(pairs(), st.floats(0.01, 100))
@settings(max_examples=60, deadline=None)
def test_a_share_does_not_know_the_scale(pair: tuple[np.ndarray, np.ndarray, np.ndarray], scale: float) -> None:
    wanted, found, _ = pair
    share = share_of(found, wanted)
    assert share >= 0
    scaled = share_of(found.astype(np.float64) * scale, wanted.astype(np.float64) * scale)
    assert scaled == pytest.approx(share, rel=1e-6)
