"""One label of several for each example: classification."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from models.errors import DataError
from models.spec import TensorSpec
from models.tasks import Answer, Label, Target

if TYPE_CHECKING:
    import numpy as np
    import torch

NEVER = -1e4
"""The bias of a class that the examples of a fit do not have."""


class SingleLabel:
    """See the module's docstring. Targets: int64 (examples,)."""

    metric: ClassVar[str] = "accuracy"
    further_metrics: ClassVar[Mapping[str, int]] = {"macro F1": 1, "balanced accuracy": 1}
    constant: ClassVar[str] = "majority class"
    fewest_labels: ClassVar[int] = 2
    reading: ClassVar[str] = (
        "Softmax gives the probabilities of these classes. It knows no others: an input that belongs to none of them "
        "gets one all the same."
    )
    embeds: ClassVar[int] = 0

    def read(self, value: Any) -> Label:
        """The name of a class. Raises `DataError` for nothing, and for several."""
        if value is None or value == "":
            raise DataError("is empty")
        if not isinstance(value, str | int | float):
            several = "; for several labels an example take a multilabel task" * isinstance(value, list)
            raise DataError(f"holds {type(value).__name__}; expected a name or a number{several}")
        return str(value)

    def labels(self, found: Iterable[Label]) -> tuple[str, ...]:
        """The classes by name."""
        return tuple(sorted({str(label) for label in found}))

    def target(self, label: Label, indices: Mapping[str, int]) -> Target:
        """The index of the class."""
        return indices[str(label)]

    def describe(self, target: Target, labels: tuple[str, ...]) -> str:
        """The name of the class."""
        assert isinstance(target, int)
        return labels[target]

    def outputs(self, labels: tuple[str, ...], width: int | None) -> tuple[TensorSpec, ...]:
        """Logits, one a class."""
        return (TensorSpec("logits", "float32", ("batch", len(labels))),)

    def targets(self, targets: Sequence[Target], outputs: int) -> np.ndarray:
        """int64 (examples,)."""
        import numpy as np

        return np.array(targets, dtype=np.int64)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy (nats)."""
        import torch

        return torch.nn.functional.cross_entropy(outputs, targets)

    def scores(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """1 for the right class, 0 for any other: their mean is the accuracy."""
        import numpy as np

        return np.asarray(outputs.argmax(1) == targets, np.float64)

    def more_metrics(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """The mean F1 and recall over the classes."""
        import numpy as np
        from sklearn.metrics import f1_score, recall_score

        chosen, some = outputs.argmax(1), {"average": "macro", "labels": np.unique(targets), "zero_division": 0.0}
        return {
            "macro F1": float(f1_score(targets, chosen, **some)),
            "balanced accuracy": float(recall_score(targets, chosen, **some)),
        }

    def more_scores(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
        """None: what an example scores does not depend on the others."""
        return {}

    def same(self, outputs: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Whether both have the same top class."""
        same: np.ndarray = outputs.argmax(1) == others.argmax(1)
        return same

    def best_constant(self, targets: np.ndarray, outputs: int) -> np.ndarray:
        """The largest class."""
        import numpy as np

        return np.bincount(targets, minlength=outputs).astype(np.float32)[None]

    def fit_head(
        self, features: np.ndarray, targets: np.ndarray, outputs: int, strength: float, tolerance: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Multinomial logistic regression. A class that is not in `targets` is never predicted."""
        import numpy as np
        from sklearn.linear_model import LogisticRegression

        regression = LogisticRegression(C=strength, max_iter=300, tol=tolerance).fit(features, targets)
        weight, bias = regression.coef_, regression.intercept_
        if len(regression.classes_) == 2:  # scikit-learn has one row then, the logit of the second class
            weight, bias = np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])
        all_weight, all_bias = np.zeros((outputs, features.shape[1])), np.full(outputs, NEVER)
        all_weight[regression.classes_], all_bias[regression.classes_] = weight, bias
        return all_weight, all_bias

    def folds(self, targets: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Stratified folds. A fold whose training part has one class only is left out, and of a fold the examples
        whose class its training part lacks."""
        import warnings

        import numpy as np
        from sklearn.model_selection import StratifiedKFold

        largest = int(np.bincount(targets).max(initial=0))
        if largest < 2:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a class with fewer examples than folds
            pairs = list(StratifiedKFold(min(count, largest)).split(targets, targets))
        kept = [(train, held_out[np.isin(targets[held_out], targets[train])]) for train, held_out in pairs]
        return [(train, held_out) for train, held_out in kept if len(np.unique(targets[train])) > 1 and len(held_out)]

    def vote(self, weights: np.ndarray, targets: np.ndarray, outputs: int) -> np.ndarray:
        """The share of each class in the weights."""
        import numpy as np

        shares = np.zeros((len(weights), outputs), np.float32)
        np.add.at(shares, (np.arange(len(weights))[:, None], targets), weights)
        return shares

    def answers(self, outputs: np.ndarray, labels: tuple[str, ...]) -> list[Answer]:
        """The most probable class, by softmax."""
        found = []
        for row in probabilities_from_logits(outputs):
            best = int(row.argmax())
            found.append(Answer(labels[best], float(row[best]), dict(zip(labels, map(float, row), strict=True))))
        return found


def probabilities_from_logits(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis in float64: float64 (batch, classes)."""
    import numpy as np

    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    powers = np.exp(shifted)
    shares: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
    return shares
