"""The self-test of the gates: what it injects, what it credits, and that it cannot flatter itself."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.checkpoint import load_checkpoint
from models.spec import TaskName
from models.tasks import task_of
from pipeline.progress import QuietProgress
from stages.data.splits import Example
from stages.validate import Validate, ValidateConfig
from stages.validate.gates import Scene
from stages.validate.judge import Judge, rows_of, spread_over
from stages.validate.metrics import Outputs
from stages.validate.self_test import SelfTest, run_self_test, self_test_gates, self_test_notes
from stages.validate.self_test.defects import CONTROLS, DEFECTS
from stages.validate.self_test.graphs import copied
from stages.validate.self_test.inputs import keep_case, on_texts
from stages.validate.self_test.run import outputs_of, subject_of
from stages.validate.self_test.run import tested as row_of_mutant  # under another name than a test's
from stages.validate.self_test.subject import Mutant, Subject
from stages.validate.stage import ceilings_of
from tests.stages.chain import context_of, made, temporary_folder, test_split

SAMPLES = 24


def varied(examples: tuple[Example, ...]) -> tuple[Example, ...]:
    """Noise has the same mean in every image, and a random network gives it the same answer: each gets its colour, and
    a size that has to change."""
    random = np.random.default_rng(3)
    return tuple(
        replace(one, content=(one.content * random.uniform(0.1, 1, 3)).astype(np.uint8).repeat(2, 0).repeat(2, 1))
        if isinstance(one.content, np.ndarray)
        else one
        for one in examples
    )


@functools.cache
def setup_of(task: TaskName) -> tuple[SelfTest, np.ndarray]:
    """A tiny network as the self-test takes it, and the reference's outputs."""
    artifacts = made(task)
    checkpoint = load_checkpoint(artifacts["merge-lora"].folder / "checkpoint")
    path = artifacts["export"].file("onnx-fp32.onnx")
    examples = varied(test_split(task, SAMPLES))
    setup = SelfTest(path, checkpoint, examples, ("fp32", "fp16", "int8"), 8, 1, QuietProgress())
    outputs = outputs_of(Mutant(network=checkpoint.model), setup, "reference")
    assert outputs.values is not None
    return setup, outputs.values


def judge_of(setup: SelfTest, reference: np.ndarray, **gates: Any) -> Judge:
    spec = setup.checkpoint.spec
    task = task_of(spec.task)
    targets = task.targets([one.label for one in setup.examples], spec.io.width)
    # On two dozen samples nothing is proven.
    config = ValidateConfig.model_validate({"gates": {"metric_drop": "observed", **gates}})
    scene = Scene(len(setup.examples), task.metric, 0.5, tolerances=ceilings_of(config.gates))
    return Judge(config, scene, task, targets, Outputs(reference), setup.examples, spec)


@functools.cache
def found_on(task: TaskName) -> dict[str, Any]:
    """The self-test under the gates' defaults."""
    setup, reference = setup_of(task)
    return run_self_test(setup, judge_of(setup, reference))


TASKS: tuple[TaskName, ...] = ("image-classification", "text-classification", "audio-classification")


@pytest.mark.parametrize("task", TASKS)
def test_twelve_kinds_at_least_are_put_into_every_modality_and_no_control_is_red(task: TaskName) -> None:
    found = found_on(task)
    applied = [one for one in found["defects"] if one["status"] != "not applicable"]
    assert len(applied) >= 12
    assert [one["status"] for one in found["controls"]] == ["escaped"] * len(CONTROLS)
    assert found["false_alarms"] == 0
    effective = [one for one in found["defects"] if one["status"] in ("caught", "escaped")]
    outside = [one for one in effective if one["place"] in ("preprocessing", "samples")]
    assert found["counted"] == len(effective) - len(outside) > 0
    assert found["outside"] == [sum(one["status"] == "caught" for one in outside), len(outside)] and outside
    assert found["caught"] == sum(one["status"] == "caught" for one in effective if one not in outside)
    assert found["score"] == found["caught"] / found["counted"]
    assert 0 <= found["noise"] < 1e-4
    json.dumps(found, allow_nan=False)


CERTAIN = (
    "label permutation", "outputs halved", "NaN in an output", "missing output", "static batch",
    "first answer for all", "samples shuffled",
)  # fmt: skip
"""What no gate may let pass of an FP32 candidate, whatever the network."""


@pytest.mark.parametrize("task", TASKS)
def test_what_fooled_the_peers_is_caught(task: TaskName) -> None:
    red = {one["name"]: bool(one["judged"].get("fp32")) for one in found_on(task)["defects"]}
    assert {name: red[name] for name in CERTAIN} == dict.fromkeys(CERTAIN, True)


BREAKS: tuple[tuple[TaskName, str], ...] = (
    ("image-classification", "weight channels permuted"),
    ("image-classification", "dropout left on"),
    ("image-classification", "wrong mean and deviation"),
    ("image-classification", "scaled twice"),
    ("image-classification", "stale batch norm"),
    ("image-classification", "BGR"),
    ("image-classification", "nearest resize"),
    ("image-classification", "another resize filter"),
    ("image-classification", "squashed, not cropped"),
    ("text-classification", "padding on the left"),
    ("text-classification", "mask ignored"),
    ("text-classification", "texts cut short"),
    ("text-classification", "marks left out"),
    ("audio-classification", "wrong sample rate"),
    ("audio-classification", "quiet"),
)


@pytest.mark.parametrize(("task", "name"), BREAKS)
def test_each_break_turns_a_gate_red(task: TaskName, name: str) -> None:
    """Of an FP32 candidate, whose outputs are held to a thousandth of their range."""
    (found,) = [one for one in found_on(task)["defects"] if one["name"] == name]
    assert found["judged"]["fp32"]


def test_the_loosest_gates_decide() -> None:
    """A defect is caught where it is seen in every precision that could ship."""
    found = found_on("image-classification")
    for one in found["defects"]:
        if one["status"] in ("caught", "escaped"):
            assert (one["status"] == "caught") is all(one["judged"].values())
    caught, counted = found["by_precision"]["fp32"]
    assert found["caught"] < caught <= counted < found["counted"]


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("image-classification", ("BGR", "nearest resize", "wrong mean and deviation", "scaled twice")),
        ("text-classification", ("padding on the left", "mask ignored", "texts cut short", "marks left out")),
        ("audio-classification", ("wrong sample rate", "quiet")),
    ],
)
def test_every_defect_of_the_preprocessing_moves_the_outputs(task: TaskName, names: tuple[str, ...]) -> None:
    found = {one["name"]: one for one in found_on(task)["defects"]}
    assert {name: found[name]["status"] in ("caught", "escaped") for name in names} == dict.fromkeys(names, True)
    assert all(found[name]["moved"] > 10 * found_on(task)["noise"] for name in names)


def test_what_a_model_does_not_have_is_said_and_not_counted() -> None:
    found = {one["name"]: one for one in found_on("text-classification")["defects"]}
    for name in ("BGR", "wrong sample rate", "stale batch norm", "outputs swapped"):
        assert found[name]["status"] == "not applicable" and found[name]["reason"]


def test_gates_that_see_nothing_catch_only_what_cannot_be_compared() -> None:
    """The score is that of the configured gates, not of the defects."""
    setup, reference = setup_of("image-classification")
    blind = {"max_metric_drop": 1, "min_agreement": 0, "min_agreement_int8": 0, "min_sqnr_db": -300}
    blind |= {"max_relative_error_fp32": 1e9, "max_relative_error_fp16": 1e9}
    found = run_self_test(setup, judge_of(setup, reference, **blind))
    caught = {one["name"] for one in found["defects"] if one["status"] == "caught"}
    assert caught <= {"NaN in an output", "missing output", "static batch", "FP16 overflow"}
    assert found["score"] < found_on("image-classification")["score"]
    (score, alarms) = self_test_gates(found, 0.9)
    assert not score.passed and alarms.passed
    assert "dead channel" in score.message and "BGR" not in score.message  # no candidate is BGR
    assert any("not caught" in line and "dead channel" in line for line in self_test_notes(found))
    assert any("would not be seen" in line and "BGR" in line for line in self_test_notes(found))


def test_a_gate_that_is_red_for_everything_gets_no_credit() -> None:
    """Agreement with noise fails every mutant, and every control too."""
    setup, reference = setup_of("image-classification")
    noise = np.random.default_rng(0).normal(size=reference.shape).astype(np.float32)
    found = run_self_test(setup, judge_of(setup, noise))
    assert found["false_alarms"] == len(CONTROLS)
    caught = {one["name"] for one in found["defects"] if one["status"] == "caught"}
    assert caught <= {"NaN in an output", "missing output", "static batch", "FP16 overflow"}
    assert not self_test_gates(found, 0.0)[1].passed


def test_what_too_few_samples_leave_open_is_no_false_alarm_and_no_credit() -> None:
    """A margin that two dozen samples cannot prove is inconclusive for every control."""
    setup, reference = setup_of("image-classification")
    blind = {"min_agreement": 0, "min_agreement_int8": 0, "min_sqnr_db": -300, "max_slice_drop": None}
    blind |= {"max_relative_error_fp32": 1e9, "max_relative_error_fp16": 1e9, "metric_drop": "proven"}
    found = run_self_test(setup, judge_of(setup, reference, **blind))
    assert found["false_alarms"] == 0
    assert all(one["judged"]["fp32"] == ["accuracy drop"] for one in found["controls"])
    (halved,) = [one for one in found["defects"] if one["name"] == "outputs halved"]  # flips nothing
    assert halved["status"] == "escaped" and halved["judged"]["fp32"] == []


def row_of(name: str, judge: Judge, make: Callable[[Subject], Mutant | str] | None = None) -> dict[str, Any]:
    """The row of one defect as an FP32 candidate, with another mutant where one is given."""
    setup, _ = setup_of("image-classification")
    (defect,) = [one for one in DEFECTS if one.name == name]
    defect = replace(defect, make=make or defect.make)
    setup = replace(setup, precisions=("fp32",))
    whole = outputs_of(Mutant(), setup, "unchanged")
    subject = subject_of(setup, judge)
    return row_of_mutant(defect, subject, setup, judge, outputs_of, whole, 0.0, {"fp32": set()}, name)


@pytest.mark.parametrize(("lenient", "status"), [("fail", "caught"), ("pass", "escaped")])
def test_what_the_configuration_lets_through_is_not_caught(lenient: Any, status: str) -> None:
    """Halved logits flip nothing: two dozen samples leave the drop open, which stops a run or does not."""
    blind = {"min_agreement": 0, "min_sqnr_db": -300, "max_slice_drop": None, "max_relative_error_fp32": 1e9}
    judge = judge_of(*setup_of("image-classification"), metric_drop="proven", **blind)
    judge = replace(judge, config=judge.config.model_copy(update={"on_inconclusive": lenient}))
    row = row_of("outputs halved", judge)
    assert (row["status"], row["judged"]["fp32"]) == (status, ["accuracy drop"] if status == "caught" else [])


@pytest.mark.parametrize(("name", "status"), [("dead channel", "not applicable"), ("static batch", "caught")])
def test_a_mutant_that_does_not_load_is_caught_only_where_that_is_the_defect(name: str, status: str) -> None:
    def unknown_operator(subject: Subject) -> Mutant:
        model = copied(subject.model)
        model.graph.node[-1].op_type = "NoSuchOperator"
        return Mutant(model)

    row = row_of(name, judge_of(*setup_of("image-classification")), unknown_operator)
    assert row["status"] == status and "NoSuchOperator" in row["reason"]


def test_a_defect_without_effect_is_equivalent() -> None:
    """Squashing an image whose sides are equal is no defect."""
    setup, reference = setup_of("image-classification")
    square = [replace(one, content=one.content[::2, ::2][:32, :32]) for one in setup.examples]  # type: ignore[index]
    setup = SelfTest(setup.model, setup.checkpoint, square, ("fp32",), 8, 1, QuietProgress())
    found = run_self_test(setup, judge_of(setup, reference))
    statuses = {one["name"]: one["status"] for one in found["defects"]}
    assert {statuses[name] for name in ("squashed, not cropped", "nearest resize")} == {"equivalent"}
    assert statuses["INT8 ranges too narrow"] == "not applicable"


def test_a_reference_without_evidence_gives_no_score(tmp_path: Path) -> None:
    setup, reference = setup_of("image-classification")
    empty = SelfTest(setup.model, setup.checkpoint, (), ("fp32",), 8, 1, QuietProgress())
    found = run_self_test(empty, judge_of(empty, reference[:0]))
    assert "not one sample" in found["problem"]
    assert not any(gate.passed for gate in self_test_gates(found, 0.0))


@functools.cache
def validated_with_self_test() -> tuple[Any, dict[str, Any]]:
    folder = temporary_folder()
    gates = {"min_samples": 24, "max_metric_drop": 0.2, "min_agreement_int8": 0.8, "min_mutation_score": 0.6}
    gates["metric_drop"] = "observed"
    config = ValidateConfig.model_validate({"latency_calls": 20, "self_test_samples": 20, "gates": gates})
    result = Validate().run(context_of(folder, made()), config)
    return result, json.loads((folder / "evidence.json").read_text(encoding="utf-8"))


def test_the_stage_asks_for_it_where_a_score_is_asked_for() -> None:
    result, evidence = validated_with_self_test()
    assert evidence["self_test"]["samples"] == 20
    assert {one.name for one in result.gates} >= {"mutation score", "false alarms of the gates"}
    assert any(note.startswith("self-test: ") for note in result.notes)
    assert [one["name"] for one in evidence["self_test"]["defects"]] == [one.name for one in DEFECTS]


def test_every_row_says_what_it_is_and_where_it_was_met() -> None:
    assert len({one.name for one in DEFECTS}) == len(DEFECTS) >= 12
    assert all(one.what and one.seen for one in DEFECTS)


def test_padding_moves_to_the_left_and_the_text_stays() -> None:
    setup, _ = setup_of("text-classification")
    subject: Subject = subject_of(setup, judge_of(setup, setup_of("text-classification")[1]))
    (defect,) = [one for one in DEFECTS if one.name == "padding on the left"]
    mutant = defect.make(subject)
    assert isinstance(mutant, Mutant) and mutant.inputs is not None
    arrays = setup.checkpoint.processing.arrays(["a good bird", "a"])
    moved = mutant.inputs(arrays)
    assert moved["attention_mask"][1].tolist() == [0, 0, 1, 1, 1]
    assert moved["input_ids"][1].tolist() == [0, 0, *arrays["input_ids"][1][:3].tolist()]
    assert moved["input_ids"][0].tolist() == arrays["input_ids"][0].tolist()


def test_case_is_taken_out_wherever_it_stands() -> None:
    nested = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    assert keep_case(nested) and nested["normalizers"] == [{"type": "NFC"}]
    bert = {"type": "BertNormalizer", "lowercase": True}
    assert keep_case(bert) and bert["lowercase"] is False
    assert not keep_case(None) and not keep_case({"type": "NFC"})
    assert on_texts(str.lower)(("A", "B")) == ("a", "b")


@pytest.mark.parametrize(("total", "most"), [(0, 5), (3, 5), (10, 3), (1000, 256)])
def test_samples_are_spread_over_the_split(total: int, most: int) -> None:
    places = spread_over(total, most)
    assert len(places) == len(set(places)) == min(total, most)
    assert places == sorted(places) and all(0 <= place < total for place in places)
    if total > most:
        assert total - places[-1] < 2 * total / most


def test_rows_without_evidence_stay_without() -> None:
    assert rows_of(Outputs(None, "why"), [0]) == Outputs(None, "why")
