"""What is asked of a network: what its labels are, what it learns from them, and how well it does.

One module a kind, one row a task: adding a task is writing a module and its row. Imports numpy only (torch and
scikit-learn inside functions that train): the device reads an answer out of the outputs without them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

    from models.spec import TaskName, TensorSpec

Target = int | float | tuple[int, ...] | str
"""What an example should give: the index of its label, a number, the indices of its labels, or the text that belongs to
it."""

Label = str | float | tuple[str, ...]
"""The same as a person writes it."""


@dataclass(frozen=True)
class Answer:
    """What a network says of one content. `probabilities` (0 to 1) by label, where the task has them.

    `label` is the best label, the labels joined with a comma, a number in words, or empty for an embedding; `score` is
    its probability, the lowest of those chosen, the number itself, or the embedding's length. `embedding`: float32
    values.
    """

    label: str
    score: float
    probabilities: dict[str, float]
    embedding: tuple[float, ...] = ()


class Task(Protocol):
    """The kind of a task. Every number it gives of an example is larger for better; their mean is the metric.

    Outputs are float32 (examples, outputs), in the order of the labels.
    """

    metric: ClassVar[str]
    """The name of the metric: the mean of `scores`, 1 at best."""
    further_metrics: ClassVar[Mapping[str, int]]
    """The other metrics of the field by name: 1 where more is better, −1 where less is."""
    constant: ClassVar[str]
    """What the best answer that ignores its input is called."""
    fewest_labels: ClassVar[int]
    """With fewer labels there is nothing to learn."""
    reading: ClassVar[str]
    """How to read the outputs, for the card of a bundle; the labels follow in a list."""
    embeds: ClassVar[int]
    """How many embeddings the outputs are, side by side: directions, which mean nothing alone and have no neighbours to
    vote. 0 where they are something else."""

    def read(self, value: Any) -> Label:
        """The label in a cell of a table or the name of a folder.

        Raises:
            DataError: it is none; the message goes on after the name of the column.
        """
        ...

    def labels(self, found: Iterable[Label]) -> tuple[str, ...]:
        """The labels of a data set: the names of the outputs."""
        ...

    def target(self, label: Label, indices: Mapping[str, int]) -> Target:
        """A label as the network's target. `indices`: label → index of its output."""
        ...

    def describe(self, target: Target, labels: tuple[str, ...]) -> str:
        """A target as a person writes it."""
        ...

    def outputs(self, labels: tuple[str, ...], width: int | None) -> tuple[TensorSpec, ...]:
        """The network's outputs. `width`: of the backbone's features; of a dual encoder that of the embeddings that it
        brings projections for, if it does."""
        ...

    def targets(self, targets: Sequence[Target], outputs: int) -> np.ndarray:
        """The array that `loss`, `scores` and `fit_head` take, one row an example."""
        ...

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """What training makes small: a scalar."""
        ...

    def scores(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """float64 (examples,): how good each answer is. Given a whole split."""
        ...

    def more_metrics(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Other metrics of the field, by name; for the report."""
        ...

    def more_scores(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
        """Those other metrics whose examples are each other's neighbours, of each example: float64 (examples,). Drawn
        twice an example would find itself, so that nothing but these can be resampled."""
        ...

    def same(self, outputs: np.ndarray, others: np.ndarray) -> np.ndarray:
        """bool (examples,): whether two networks give the same answer."""
        ...

    def best_constant(self, targets: np.ndarray, outputs: int) -> np.ndarray:
        """float32 (1, outputs): the outputs of the best answer that ignores its input, learnt on `targets`."""
        ...

    def fit_head(
        self, features: np.ndarray, targets: np.ndarray, outputs: int, strength: float, tolerance: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """A linear model: float64 (outputs, features) and (outputs,). `strength`: inverse of the regularisation."""
        ...

    def folds(self, targets: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(training, held-out) indices of up to `count` folds; none where there are too few examples."""
        ...

    def vote(self, weights: np.ndarray, targets: np.ndarray, outputs: int) -> np.ndarray:
        """float32 (examples, outputs): what the neighbours of each example say. `weights`: float64 (examples,
        neighbours); `targets`: those of the neighbours, (examples, neighbours, …)."""
        ...

    def answers(self, outputs: np.ndarray, labels: tuple[str, ...]) -> list[Answer]:
        """What the outputs say."""
        ...


def of_length_one(rows: np.ndarray) -> np.ndarray:
    """Each row divided by its length: their products are cosines. Of the type of `rows`."""
    import numpy as np

    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12))


def classes_of(target: Target) -> tuple[int, ...]:
    """The labels of a target by index, which every split must hold in proportion; a number and a text have none."""
    if isinstance(target, tuple):
        return target
    return (target,) if isinstance(target, int) else ()


@dataclass(frozen=True)
class Row:
    """What a task looks at, and its kind as "module:Class"."""

    modality: str
    kind: str


SINGLE_LABEL = "models.tasks.single_label:SingleLabel"
MULTI_LABEL = "models.tasks.multi_label:MultiLabel"
REGRESSION = "models.tasks.regression:Regression"
RETRIEVAL = "models.tasks.retrieval:Retrieval"
EMBEDDING = "models.tasks.embedding:Embedding"

TASKS: dict[TaskName, Row] = {
    "image-classification": Row("image", SINGLE_LABEL),
    "image-multilabel": Row("image", MULTI_LABEL),
    "image-regression": Row("image", REGRESSION),
    "text-classification": Row("text", SINGLE_LABEL),
    "text-multilabel": Row("text", MULTI_LABEL),
    "text-regression": Row("text", REGRESSION),
    "audio-classification": Row("audio", SINGLE_LABEL),
    "audio-multilabel": Row("audio", MULTI_LABEL),
    "audio-regression": Row("audio", REGRESSION),
    "image-text": Row("image-text", RETRIEVAL),
    "image-features": Row("image", EMBEDDING),
    "text-features": Row("text", EMBEDDING),
    "audio-features": Row("audio", EMBEDDING),
}

FEATURES: dict[str, TaskName] = {row.modality: name for name, row in TASKS.items() if row.kind == EMBEDDING}
"""Modality → the task that embeds it: what `feature-extraction` in a configuration stands for."""

MODALITY_OF_TASK: dict[str, str] = {name: row.modality for name, row in TASKS.items()}


def has_classes(name: TaskName) -> bool:
    """Whether the labels of a task are names, one or several an example; those of others are numbers and texts."""
    return TASKS[name].kind in (SINGLE_LABEL, MULTI_LABEL, EMBEDDING)


@cache
def task_of(name: TaskName) -> Task:
    """The kind of a task."""
    module, _, kind = TASKS[name].kind.partition(":")
    task: Task = getattr(import_module(module), kind)()
    return task
