"""A number for each example: regression, and the similarity of two texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from models.errors import DataError
from models.spec import TensorSpec
from models.tasks import Answer, Label, Target

if TYPE_CHECKING:
    import numpy as np
    import torch

SAME = 0.1
"""Two predictions are the same answer when they differ by less than this share of the predictions' spread (standard
deviation): a tenth of it moves R² by about a percent at most."""


class Regression:
    """See the module's docstring. Targets: float32 (examples, 1).

    The metric is R², the share of the variance explained, as the mean over examples of 1 − (y − ŷ)² / Var(y): 0 for
    their mean as the answer to all, and negative for worse.
    """

    metric: ClassVar[str] = "R²"
    further_metrics: ClassVar[Mapping[str, int]] = {"MAE": -1, "RMSE": -1, "Pearson": 1, "Spearman": 1}
    constant: ClassVar[str] = "mean of the training numbers"
    fewest_labels: ClassVar[int] = 1
    reading: ClassVar[str] = "The number itself, in the unit of the training data."
    embeds: ClassVar[int] = 0

    def read(self, value: Any) -> Label:
        """A finite number. Raises `DataError`."""
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise DataError(f"holds {str(value)[:60]!r}; expected a number") from error
        if not math.isfinite(number):
            raise DataError(f"holds {value}; expected a finite number")
        return number

    def labels(self, found: Iterable[Label]) -> tuple[str, ...]:
        """The one output."""
        return ("value",)

    def target(self, label: Label, indices: Mapping[str, int]) -> Target:
        """The number."""
        assert isinstance(label, float)
        return label

    def describe(self, target: Target, labels: tuple[str, ...]) -> str:
        """The number in words."""
        return f"{target:g}"

    def outputs(self, labels: tuple[str, ...], width: int | None) -> tuple[TensorSpec, ...]:
        """The number."""
        return (TensorSpec("value", "float32", ("batch", len(labels))),)

    def targets(self, targets: Sequence[Target], outputs: int) -> np.ndarray:
        """float32 (examples, 1)."""
        import numpy as np

        return np.array(targets, np.float32).reshape(-1, 1)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean squared error."""
        import torch

        return torch.nn.functional.mse_loss(outputs, targets)

    def scores(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """1 − squared error / variance of `targets`."""
        import numpy as np

        error = np.square(outputs[:, 0].astype(np.float64) - targets[:, 0])
        return np.asarray(1.0 - error / max(float(np.var(targets[:, 0].astype(np.float64))), 1e-12))

    def more_metrics(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Mean absolute error and root of the mean squared one in the unit of the numbers; the two correlations."""
        import numpy as np
        from scipy.stats import pearsonr, spearmanr

        found, true = outputs[:, 0].astype(np.float64), targets[:, 0].astype(np.float64)
        metrics = {"MAE": float(np.abs(found - true).mean()), "RMSE": float(np.sqrt(np.square(found - true).mean()))}
        if len(true) > 2 and np.ptp(found) and np.ptp(true):
            metrics["Pearson"] = float(pearsonr(found, true).statistic)
            metrics["Spearman"] = float(spearmanr(found, true).statistic)
        return metrics

    def more_scores(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
        """None: what an example scores does not depend on the others."""
        return {}

    def same(self, outputs: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Whether both numbers differ by less than `SAME` of the spread of `others`."""
        import numpy as np

        near: np.ndarray = np.abs(outputs[:, 0] - others[:, 0]) <= SAME * float(np.std(others[:, 0]))
        return near

    def best_constant(self, targets: np.ndarray, outputs: int) -> np.ndarray:
        """The mean."""
        import numpy as np

        return np.asarray(targets.mean(axis=0, dtype=np.float64)[None], np.float32)

    def fit_head(
        self, features: np.ndarray, targets: np.ndarray, outputs: int, strength: float, tolerance: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ridge regression. The penalty is 1 / `strength` for every example, as the losses of logistic regression."""
        import numpy as np
        from sklearn.linear_model import Ridge

        fitted = Ridge(alpha=1.0 / strength).fit(features, targets[:, 0])
        return fitted.coef_[None].astype(np.float64), np.array([fitted.intercept_], np.float64)

    def folds(self, targets: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Plain folds: the examples are shuffled already."""
        from models.tasks.folds import plain_folds

        return plain_folds(len(targets), count)

    def vote(self, weights: np.ndarray, targets: np.ndarray, outputs: int) -> np.ndarray:
        """The weighted mean."""
        import numpy as np

        means = np.einsum("en,eno->eo", weights, targets) / weights.sum(axis=1, keepdims=True)
        return np.asarray(means, np.float32)

    def answers(self, outputs: np.ndarray, labels: tuple[str, ...]) -> list[Answer]:
        """The number."""
        return [Answer(f"{float(row[0]):.4f}", float(row[0]), {}) for row in outputs]
