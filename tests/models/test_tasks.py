"""Each kind of task by hand-computed numbers and against scikit-learn; the table names them all."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, r2_score

from models.errors import DataError
from models.spec import TaskName
from models.tasks import TASKS, Task, classes_of, task_of
from models.tasks.multi_label import MultiLabel
from models.tasks.regression import Regression
from models.tasks.single_label import SingleLabel

ONE, MANY, NUMBER = SingleLabel(), MultiLabel(), Regression()
LABELS = ("a", "b", "c")
INDICES = {label: index for index, label in enumerate(LABELS)}


def test_the_table_has_a_row_for_every_name() -> None:
    assert set(TASKS) == set(get_args(TaskName))
    assert {type(task_of(name)).__name__ for name in TASKS} >= {"SingleLabel", "MultiLabel", "Regression"}


@pytest.mark.parametrize(
    ("task", "value", "label", "target"),
    [
        (ONE, "b", "b", 1), (ONE, " b", " b", None), (ONE, 3, "3", None),
        (MANY, "c; a;a", ("a", "c"), (0, 2)), (MANY, ["b", "a"], ("a", "b"), (0, 1)), (MANY, "", (), ()),
        (MANY, None, (), ()), (NUMBER, "2.5", 2.5, 2.5), (NUMBER, 3, 3.0, 3.0),
    ],
)  # fmt: skip
def test_labels_are_read_and_become_targets(task: Task, value: Any, label: Any, target: Any) -> None:
    found = task.read(value)
    assert found == label
    if target is not None:
        assert task.target(found, INDICES) == target and type(task.target(found, INDICES)) is type(target)


@pytest.mark.parametrize(
    ("task", "value", "said"),
    [
        (ONE, "", "is empty"), (ONE, None, "is empty"), (ONE, ["a", "b"], "take a multilabel task"),
        (MANY, [["a"]], "expected a list of labels"), (NUMBER, "much", "expected a number"),
        (NUMBER, None, "expected a number"), (NUMBER, "nan", "expected a finite number"),
        (NUMBER, float("inf"), "expected a finite number"),
    ],
)  # fmt: skip
def test_what_can_be_no_label_is_refused(task: Task, value: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        task.read(value)


def test_the_labels_that_a_split_holds_in_proportion() -> None:
    assert (classes_of(2), classes_of((0, 2)), classes_of(()), classes_of(2.0)) == ((2,), (0, 2), (), ())


def random_of(task: Task, examples: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Outputs and targets of three outputs, or one."""
    random = np.random.default_rng(3)
    if task is NUMBER:
        true = random.normal(size=(examples, 1)).astype(np.float32)
        return (true + random.normal(scale=0.5, size=true.shape)).astype(np.float32), true
    outputs = random.normal(size=(examples, 3)).astype(np.float32)
    if task is ONE:
        return outputs, random.integers(0, 3, examples)
    return outputs, (random.random((examples, 3)) < 0.4).astype(np.float32)


def test_the_mean_score_is_the_metric_that_scikit_learn_has() -> None:
    outputs, targets = random_of(ONE)
    assert ONE.scores(outputs, targets).mean() == pytest.approx(accuracy_score(targets, outputs.argmax(1)))
    outputs, targets = random_of(MANY)
    wanted = f1_score(targets, outputs > 0, average="samples", zero_division=1.0)
    assert MANY.scores(outputs, targets).mean() == pytest.approx(wanted)
    outputs, targets = random_of(NUMBER)
    assert NUMBER.scores(outputs, targets).mean() == pytest.approx(r2_score(targets, outputs), abs=1e-6)


@pytest.mark.parametrize("task", [ONE, MANY, NUMBER])
def test_a_perfect_answer_has_one_and_the_best_constant_less(task: Task) -> None:
    outputs, targets = random_of(task)
    perfect = {ONE: np.eye(3)[targets] if task is ONE else None, MANY: targets - 0.5, NUMBER: targets}[task]
    assert task.scores(np.asarray(perfect), targets) == pytest.approx(1.0)
    constant = task.best_constant(targets, outputs.shape[1]).repeat(len(targets), axis=0)
    assert -1e-6 < task.scores(constant, targets).mean() < 1
    assert task.scores(constant, targets).mean() >= max(
        task.scores(np.full_like(outputs, value), targets).mean() for value in (-1.0, 1.0)
    )


def test_none_given_where_there_is_none_is_right() -> None:
    outputs = np.array([[-1, -1], [-1, 2], [3, 3]], np.float32)
    targets = np.array([[0, 0], [0, 0], [1, 0]], np.float32)
    assert MANY.scores(outputs, targets).tolist() == pytest.approx([1.0, 0.0, 2 / 3])
    assert [one.label for one in MANY.answers(outputs, ("a", "b"))] == ["(none)", "b", "a, b"]
    assert MANY.answers(outputs, ("a", "b"))[2].probabilities["a"] == pytest.approx(1 / (1 + np.exp(-3.0)))
    assert MANY.answers(np.array([[-900.0, 900.0]], np.float32), ("a", "b"))[0].probabilities == {"a": 0.0, "b": 1.0}


@pytest.mark.parametrize("task", [ONE, MANY, NUMBER])
def test_the_loss_falls_towards_the_right_answer(task: Task) -> None:
    outputs, targets = random_of(task)
    free = torch.from_numpy(outputs.copy()).requires_grad_()
    before = task.loss(free, torch.from_numpy(targets))
    before.backward()  # type: ignore[no-untyped-call]
    assert free.grad is not None
    after = task.loss(free.detach() - 10 * free.grad, torch.from_numpy(targets))
    assert float(after) < float(before.detach())


@pytest.mark.parametrize("task", [ONE, MANY, NUMBER])
def test_a_linear_head_finds_a_linear_rule(task: Task) -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(300, 5))
    rule = features @ random.normal(size=(5, 3))
    targets: dict[Task, np.ndarray] = {
        ONE: rule.argmax(1), MANY: (rule > 0).astype(np.float32), NUMBER: rule[:, :1].astype(np.float32)
    }  # fmt: skip
    outputs = 1 if task is NUMBER else 3
    weight, bias = task.fit_head(features[:200], targets[task][:200], outputs, 10.0, 1e-4)
    assert (weight.shape, bias.shape) == ((outputs, 5), (outputs,))
    found = (features[200:] @ weight.T + bias).astype(np.float32)
    assert task.scores(found, targets[task][200:]).mean() > 0.9
    folds = task.folds(targets[task], 5)
    assert len(folds) == 5 and sorted(np.concatenate([held for _, held in folds])) == list(range(300))


@pytest.mark.parametrize("task", [ONE, MANY, NUMBER])
def test_neighbours_vote_by_their_weight(task: Task) -> None:
    targets = {
        ONE: np.array([[0, 1, 1]]), MANY: np.array([[[1, 0, 0], [1, 1, 0], [0, 0, 0]]], np.float32),
        NUMBER: np.array([[[1.0], [2.0], [9.0]]], np.float32),
    }[task]  # fmt: skip
    voted = task.vote(np.array([[3.0, 1.0, 1.0]]), targets, 1 if task is NUMBER else 3)
    wanted = {ONE: [3, 2, 0], MANY: [0.3, -0.3, -0.5], NUMBER: [14 / 5]}[task]
    assert voted[0].tolist() == pytest.approx(wanted)


def test_a_label_that_no_example_has_is_a_constant_of_the_head() -> None:
    targets = np.array([[1, 0], [1, 0], [1, 0]], np.float32)
    weight, bias = MANY.fit_head(np.eye(3), targets, 2, 1.0, 1e-4)
    assert not weight.any() and bias[0] > 0 > bias[1]


def test_the_same_answer() -> None:
    found, other = np.array([[1, 2], [1, 2]], np.float32), np.array([[2, 3], [2, -3]], np.float32)
    assert ONE.same(found, other).tolist() == [True, False]
    assert MANY.same(found, other).tolist() == [True, False]
    numbers = np.array([[0.0], [1.0], [2.0]], np.float32)  # of spread .816
    assert NUMBER.same(numbers + np.array([[0.08], [0.09], [-0.08]], np.float32), numbers).tolist() == [
        True,
        False,
        True,
    ]


def test_more_metrics_are_those_of_the_field() -> None:
    assert set(ONE.more_metrics(*random_of(ONE))) == {"macro F1", "balanced accuracy"}
    assert set(MANY.more_metrics(*random_of(MANY))) == {"micro F1", "macro F1", "exact match", "mAP"}
    outputs, targets = random_of(MANY)
    for count in (3, 1):
        some = MANY.more_metrics(outputs[:, :count], targets[:, :count])
        true, given = targets[:, :count].ravel(), outputs[:, :count].ravel() > 0
        assert some["micro F1"] == pytest.approx(f1_score(true, given))
        if count > 1:
            assert some["macro F1"] == pytest.approx(f1_score(targets, outputs > 0, average="macro"))
    found = NUMBER.more_metrics(*random_of(NUMBER))
    assert found["RMSE"] > found["MAE"] > 0 and 0.8 < found["Spearman"] < found["Pearson"] < 1
    assert "Pearson" not in NUMBER.more_metrics(np.ones((3, 1), np.float32), np.ones((3, 1), np.float32))
