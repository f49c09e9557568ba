"""Any number of labels for each example: multi-label classification."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from models.errors import DataError
from models.spec import TensorSpec
from models.tasks import Answer, Label, Target, classes_of

if TYPE_CHECKING:
    import numpy as np
    import torch

SEPARATOR = ";"
"""Between the labels of a cell of a CSV file."""


class MultiLabel:
    """See the module's docstring. Targets: float32 (examples, labels) of 0 and 1. A label is given at a logit above 0,
    a probability above one half.

    The metric is the F1 of an example's labels, averaged over the examples ("samples" in scikit-learn): a mean over
    examples, so that two networks can be compared pair by pair. An example without labels that is given none has 1.
    """

    metric: ClassVar[str] = "samples F1"
    further_metrics: ClassVar[Mapping[str, int]] = {"micro F1": 1, "macro F1": 1, "exact match": 1, "mAP": 1}
    constant: ClassVar[str] = "most frequent labels"
    fewest_labels: ClassVar[int] = 1
    reading: ClassVar[str] = (
        "The logistic function gives the probability of each of these labels; above one half it holds."
    )
    embeds: ClassVar[int] = 0

    def read(self, value: Any) -> Label:
        """The labels of a list, or of a text with ";" between them; none is a label set too. Raises `DataError`."""
        if value is None:
            return ()
        parts = value if isinstance(value, list | tuple) else str(value).split(SEPARATOR)
        if any(isinstance(one, list | tuple | dict) or one is None for one in parts):
            raise DataError(f"holds {str(value)[:60]!r}; expected a list of labels")
        return tuple(sorted({text for one in parts if (text := str(one).strip())}))

    def labels(self, found: Iterable[Label]) -> tuple[str, ...]:
        """All labels by name."""
        return tuple(sorted({one for label in found if isinstance(label, tuple) for one in label}))

    def target(self, label: Label, indices: Mapping[str, int]) -> Target:
        """The indices of the labels."""
        assert isinstance(label, tuple)
        return tuple(indices[one] for one in label)

    def describe(self, target: Target, labels: tuple[str, ...]) -> str:
        """The labels with commas between them."""
        return ", ".join(labels[index] for index in classes_of(target)) or "(none)"

    def outputs(self, labels: tuple[str, ...], width: int | None) -> tuple[TensorSpec, ...]:
        """Logits, one a label, each for itself."""
        return (TensorSpec("logits", "float32", ("batch", len(labels))),)

    def targets(self, targets: Sequence[Target], outputs: int) -> np.ndarray:
        """float32 (examples, labels): 1 for the labels of an example."""
        import numpy as np

        array = np.zeros((len(targets), outputs), np.float32)
        for row, target in zip(array, targets, strict=True):
            row[list(classes_of(target))] = 1.0
        return array

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy (nats), the mean over labels."""
        import torch

        return torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets)

    def scores(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """F1 of each example: 2 · common / (given + true), and 1 where both are none."""
        import numpy as np

        given, true = outputs > 0, targets > 0
        common, sizes = (given & true).sum(1), given.sum(1) + true.sum(1)
        return np.where(sizes > 0, 2 * common / np.maximum(sizes, 1), 1.0)

    def more_metrics(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """F1 over all labels at once and averaged over them, exact matches, and the mean average precision."""
        import numpy as np
        from sklearn.metrics import average_precision_score

        true, given = targets > 0, outputs > 0
        seen = true.any(axis=0)  # a label that no example has has no precision
        common, sizes = (true & given).sum(0), true.sum(0) + given.sum(0)
        found = {
            "micro F1": float(2 * common.sum() / max(sizes.sum(), 1)),
            "macro F1": float(np.mean(2 * common / np.maximum(sizes, 1))),
            "exact match": float(np.mean((true == given).all(1))),
        }
        if seen.any():
            found["mAP"] = float(average_precision_score(true[:, seen], outputs[:, seen], average="macro"))
        return found

    def more_scores(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
        """None: what an example scores does not depend on the others."""
        return {}

    def same(self, outputs: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Whether both give the same labels."""
        same: np.ndarray = ((outputs > 0) == (others > 0)).all(axis=1)
        return same

    def best_constant(self, targets: np.ndarray, outputs: int) -> np.ndarray:
        """The most frequent labels, as many as make the samples F1 on `targets` largest."""
        import numpy as np

        order = np.argsort(-targets.mean(axis=0), kind="stable")
        best, value = np.full((1, outputs), -1.0, np.float32), -1.0
        for count in range(outputs + 1):
            given = np.full((1, outputs), -1.0, np.float32)
            given[0, order[:count]] = 1.0
            found = float(self.scores(np.repeat(given, len(targets), axis=0), targets).mean())
            if found > value:
                best, value = given, found
        return best

    def fit_head(
        self, features: np.ndarray, targets: np.ndarray, outputs: int, strength: float, tolerance: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """A logistic regression a label; a label that all examples have, or none, is a constant."""
        import numpy as np
        from sklearn.linear_model import LogisticRegression

        weight, bias = np.zeros((outputs, features.shape[1])), np.zeros(outputs)
        for index in range(outputs):
            true = targets[:, index] > 0
            if true.all() or not true.any():
                bias[index] = np.log((true.sum() + 0.5) / (len(true) - true.sum() + 0.5))
                continue
            fitted = LogisticRegression(C=strength, max_iter=300, tol=tolerance).fit(features, true)
            weight[index], bias[index] = fitted.coef_[0], fitted.intercept_[0]
        return weight, bias

    def folds(self, targets: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Plain folds: the examples are shuffled already."""
        from models.tasks.folds import plain_folds

        return plain_folds(len(targets), count)

    def vote(self, weights: np.ndarray, targets: np.ndarray, outputs: int) -> np.ndarray:
        """The share of each label in the weights, less one half."""
        import numpy as np

        means = np.einsum("en,eno->eo", weights, targets) / weights.sum(axis=1, keepdims=True)
        return np.asarray(means - 0.5, np.float32)

    def answers(self, outputs: np.ndarray, labels: tuple[str, ...]) -> list[Answer]:
        """The labels with a probability above one half, by the logistic function."""
        import numpy as np

        # 1 / (1 + exp(−x)) in a form that no logit makes overflow.
        shares = 0.5 * (1 + np.tanh(0.5 * outputs.astype(np.float64)))
        found = []
        for logits, row in zip(outputs, shares, strict=True):
            given = [index for index in range(len(labels)) if logits[index] > 0]
            score = min((float(row[index]) for index in given), default=1 - float(row.max(initial=0.0)))
            label = self.describe(tuple(given), labels)
            found.append(Answer(label, score, dict(zip(labels, map(float, row), strict=True))))
        return found
