"""Metrics on made-up logits: known values, and outputs that are no evidence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType

import numpy as np
import pytest

from models.modalities.vision import ImageProcessing
from models.spec import IOSpec, TensorSpec
from models.tasks.regression import Regression
from models.tasks.retrieval import Retrieval
from models.tasks.single_label import SingleLabel
from pipeline.progress import QuietProgress
from stages.latency import measure_latency
from stages.validate.metrics import NUMBERS, Outputs, collect_outputs, compare, confusion_of, errors, output_problem
from tests.stages.chain import test_split as examples_of

TASK = SingleLabel()

IO = IOSpec((TensorSpec("image", "uint8", ("batch", 8, 8, 3)),), (TensorSpec("logits", "float32", ("batch", 3)),))
GOOD = np.array([[2, 0, -1], [0, 3, 1], [1, 0, 2], [4, 1, 0]], np.float32)
LABELS = np.array([0, 1, 2, 1])


class FakeRuntime:
    """Answers each call with what `answer` makes of the number of samples; remembers the sizes."""

    def __init__(self, answer) -> None:
        self.answer = answer
        self.sizes: list[int] = []

    def __enter__(self) -> FakeRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.sizes.append(len(inputs["image"]))
        return self.answer(self.sizes[-1])


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def test_equal_logits_have_no_error() -> None:
    found = compare(Outputs(GOOD), Outputs(GOOD.copy()), LABELS, TASK)
    assert set(found) == {"problem", *NUMBERS}
    assert (found["metric"], found["metric_difference"], found["agreement"], found["flips"]) == (0.75, 0.0, 1.0, 0)
    assert (found["max_abs_error"], found["relative_error"], found["kl"]) == (0.0, 0.0, 0.0)
    assert found["cosine"] == pytest.approx(1.0)
    assert found["sqnr_db"] == 300.0
    assert sum(found["error_histogram"]["counts"]) == 4


def test_known_errors_give_known_numbers() -> None:
    shifted = GOOD.copy()
    shifted[0, 0] += 0.5
    found = compare(Outputs(shifted), Outputs(GOOD), LABELS, TASK)
    assert found["max_abs_error"] == 0.5
    assert found["mean_abs_error"] == pytest.approx(0.5 / 12)
    assert found["relative_error"] == pytest.approx(0.5 / 5)
    assert found["sqnr_db"] == pytest.approx(10 * math.log10(float((GOOD**2).sum()) / 0.25))
    assert found["kl"] > 0


def test_halved_logits_keep_the_classes_and_are_seen_all_the_same() -> None:
    found = compare(Outputs(GOOD / 2), Outputs(GOOD), LABELS, TASK)
    assert found["agreement"] == 1.0
    assert found["cosine"] == pytest.approx(1.0)
    assert found["sqnr_db"] == pytest.approx(6.02, abs=0.01)


def test_gains_and_losses_are_counted_apart() -> None:
    other = GOOD[[0, 2, 1, 3]].copy()
    other[3] = [0, 5, 0]  # right where the reference is wrong; samples 1 and 2 are now wrong
    found = compare(Outputs(other), Outputs(GOOD), LABELS, TASK)
    assert found["flips"] == 3
    assert found["metric_difference"] == pytest.approx(-0.25)
    low, high = found["metric_difference_interval"]
    narrow, wide = found["metric_difference_one_sided"]
    assert low < narrow < -0.25 < wide < high
    assert (found["difference_variance"], found["flip_rate"]) == (0.75, 0.75)


@pytest.mark.parametrize(
    ("found", "wanted", "message"),
    [
        (Outputs(None, "2 values are NaN"), Outputs(GOOD), "2 values are NaN"),
        (Outputs(GOOD), Outputs(None, "1 value is NaN"), "the reference: 1 value is NaN"),
        (Outputs(None, "no sample"), Outputs(None, "no sample"), "no sample"),
        (Outputs(GOOD), Outputs(GOOD[:2]), "shape"),
    ],
)
def test_no_evidence_gives_no_number(found: Outputs, wanted: Outputs, message: str) -> None:
    result = compare(found, wanted, LABELS, TASK)
    assert message in result["problem"]
    assert all(result[name] is None for name in NUMBERS)


def test_a_reference_of_zeros_has_neither_range_nor_signal() -> None:
    result = compare(Outputs(zeros(4, 3)), Outputs(zeros(4, 3)), LABELS, TASK)
    assert result["relative_error"] is None
    assert result["sqnr_db"] is None
    assert result["cosine"] is None


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({}, "'logits' is missing"),
        ({"scores": zeros(2, 3)}, "'logits' is missing"),
        ({"logits": zeros(2, 3), "extra": zeros(2)}, "'extra' is not in the I/O contract"),
        ({"logits": zeros(2, 4)}, "(2, 4)"),
        ({"logits": zeros(1, 3)}, "(1, 3)"),
        ({"logits": zeros(6)}, "(6,)"),
        ({"logits": np.zeros((2, 3))}, "float64"),
        ({"logits": np.array([[0, np.nan, 1], [0, 0, 0]], np.float32)}, "1 of 6 values"),
        ({"logits": np.array([[0, np.inf, 1], [0, -np.inf, 0]], np.float32)}, "2 of 6 values"),
    ],
)
def test_outputs_that_break_the_contract_are_named(outputs: dict[str, np.ndarray], message: str) -> None:
    assert message in output_problem(outputs, IO, 2)


def test_outputs_that_keep_it_are_evidence() -> None:
    assert output_problem({"logits": zeros(2, 3)}, IO, 2) == ""


def test_all_samples_are_run_once_in_batches() -> None:
    runtime = FakeRuntime(lambda size: {"logits": zeros(size, 3)})
    outputs = collect_outputs(
        runtime, ImageProcessing(8, 8), examples_of("image-classification", 10), IO, 4, QuietProgress(), "fake"
    )
    assert outputs.values is not None and outputs.values.shape == (10, 3)
    assert runtime.sizes == [4, 4, 2]


def test_zero_samples_are_no_evidence() -> None:
    runtime = FakeRuntime(lambda size: {"logits": zeros(size, 3)})
    outputs = collect_outputs(runtime, ImageProcessing(8, 8), (), IO, 4, QuietProgress(), "fake")
    assert outputs == Outputs(None, "there is not one sample to compare on")


def test_the_confusion_matrix_has_true_classes_in_rows() -> None:
    assert confusion_of(GOOD, LABELS, 3) == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_latency_times_every_runtime_on_the_same_samples() -> None:
    runtimes = {name: FakeRuntime(lambda size: {"logits": zeros(size, 3)}) for name in ("slow", "fast")}
    singles = [{"image": np.zeros((1, 8, 8, 3), np.uint8)}]
    found = measure_latency(runtimes, singles, {"image": np.zeros((4, 8, 8, 3), np.uint8)}, 25, QuietProgress())
    for name, times in found.items():
        assert runtimes[name].sizes.count(1) == times["warmup_calls"] + 10 * 2 + 25  # settling, timed
        assert 0 < times["latency_ms_p50"] <= times["latency_ms_p95"]
        assert times["throughput_per_s"] > 0


def test_one_of_two_embeddings_cannot_hide_behind_the_other() -> None:
    random = np.random.default_rng(0)
    image, text = (parts / np.linalg.norm(parts, axis=1, keepdims=True) for parts in random.normal(size=(2, 5, 8)))
    turned = text + 0.5 * random.normal(size=text.shape) / np.sqrt(8)
    turned /= np.linalg.norm(turned, axis=1, keepdims=True)
    wanted, found = (np.concatenate([image, one], axis=1).astype(np.float32) for one in (text, turned))
    numbers = errors(found, wanted, Retrieval())
    assert numbers["cosine"] == pytest.approx(float((text * turned).sum(1).min()), abs=1e-6)
    assert numbers["cosine"] < errors(found, wanted, TASK)["cosine"]
    assert numbers["kl"] is None and errors(found, wanted, Regression())["kl"] is None
