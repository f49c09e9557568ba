"""One embedding an example: points of one space in which what has the same label lies near."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from models.spec import TensorSpec
from models.tasks import Answer, Label, Target, of_length_one
from models.tasks.single_label import SingleLabel

if TYPE_CHECKING:
    import numpy as np
    import torch

CLASSES = SingleLabel()
"""Labels are read, and examples split, as in classification."""

TEMPERATURE = 0.1
"""Of the contrastive loss (Khosla et al. 2020, arXiv 2004.11362, train with it)."""

KEPT = 0.1
"""What every direction weighs, beside how well it tells the labels apart. On WordNet's topics and Fashion-MNIST leaving
all others out ruins labels that the fit has not seen (recall at 1 .36 and .71, of the backbone's features .79 and .94);
with .1 they have .79 and .90, and labels that it has seen gain (.70 → .78, .79 → .81). See docs/decisions/0012."""

CV_FOLDS = 3
"""Each fit inverts a matrix of all features. Five choose another strength on WordNet's topics (10, not 1), which has
the same recall there (.78)."""

SAME = 0.1
"""Two examples are equally near when their cosines differ by less than this share of the spread (standard deviation) of
the cosines with all others."""

TIE = 1e-9
"""Cosines of equal points differ by less: rounding in float64."""

BLOCK = 1024
"""Examples that are compared with all others at once: with 50,000 of them 400 MB."""


class Embedding:
    """See the module's docstring. Targets: int64 (examples,), the label of each example.

    The labels say what belongs together; the embeddings serve others too, because the closed form keeps every direction
    of the backbone's features. The metric is recall at 1 among the examples of a split: whether the nearest other one
    by cosine has the same label (Musgrave et al. 2020, arXiv 2003.08505). One that is alone with its label in a split
    is never right.
    """

    metric: ClassVar[str] = "recall@1"
    further_metrics: ClassVar[Mapping[str, int]] = {"recall@5": 1, "MAP@R": 1}
    constant: ClassVar[str] = "one point for all"
    fewest_labels: ClassVar[int] = 2
    reading: ClassVar[str] = (
        "It has length 1: the dot product of two embeddings is their cosine, near 1 where the inputs are alike. Inputs "
        "of these labels are told apart best; others are compared as well."
    )
    embeds: ClassVar[int] = 1

    def read(self, value: Any) -> Label:
        """The name of a class. Raises `DataError` for nothing, and for several."""
        return CLASSES.read(value)

    def labels(self, found: Iterable[Label]) -> tuple[str, ...]:
        """The classes by name."""
        return CLASSES.labels(found)

    def target(self, label: Label, indices: Mapping[str, int]) -> Target:
        """The index of the class."""
        return CLASSES.target(label, indices)

    def describe(self, target: Target, labels: tuple[str, ...]) -> str:
        """The name of the class."""
        return CLASSES.describe(target, labels)

    def outputs(self, labels: tuple[str, ...], width: int | None) -> tuple[TensorSpec, ...]:
        """The embedding, as wide as the backbone's features."""
        assert width is not None
        return (TensorSpec("embedding", "float32", ("batch", width)),)

    def targets(self, targets: Sequence[Target], outputs: int) -> np.ndarray:
        """int64 (examples,)."""
        return CLASSES.targets(targets, outputs)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362, equation 2) at `TEMPERATURE`, the mean
        over the examples that share their label with another one; 0 where none does."""
        import torch

        points = torch.nn.functional.normalize(outputs, dim=1)
        everyone = torch.arange(len(points), device=points.device)
        total, anchors = points.new_zeros(()), points.new_zeros(())
        for rows in torch.split(everyone, BLOCK):
            itself = rows[:, None] == everyone[None]
            # The lowest number, not −∞: an example that is alone in its batch would have the gradient NaN.
            logits = (points[rows] @ points.T / TEMPERATURE).masked_fill(itself, torch.finfo(points.dtype).min)
            right = (targets[rows, None] == targets[None]) & ~itself
            count = right.sum(dim=1)
            total = total - (logits.log_softmax(1).masked_fill(~right, 0).sum(1) / count.clamp(min=1)).sum()
            anchors = anchors + (count > 0).sum()
        return total / anchors.clamp(min=1)

    def scores(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """1 where the nearest other example has the same label, else 0; of several that are equally near their mean."""
        import numpy as np

        found = np.zeros(len(outputs))
        for rows, cosines in cosines_with_others(outputs):
            nearest = (cosines >= cosines.max(axis=1, keepdims=True) - TIE) & np.isfinite(cosines)
            right = nearest & (targets[rows, None] == targets[None])
            found[rows] = right.sum(axis=1) / nearest.sum(axis=1).clip(1)
        return found

    def more_metrics(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Recall at 5; MAP@R, the mean average precision at R, the number of other examples with the same label
        (Musgrave et al. 2020)."""
        return {name: float(found.mean()) for name, found in self.more_scores(outputs, targets).items()}

    def more_scores(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
        """Both of each example."""
        import numpy as np

        others = np.unique(targets, return_inverse=True, return_counts=True)
        wanted = others[2][others[1]] - 1  # R of each example
        top = min(max(int(wanted.max()), 5), len(targets))
        recall, precision = np.zeros(len(targets)), np.zeros(len(targets))
        places = np.arange(1, top + 1)
        for rows, cosines in cosines_with_others(outputs):
            order = np.argpartition(-cosines, top - 1, axis=1)[:, :top]
            ranked = np.argsort(-np.take_along_axis(cosines, order, axis=1), axis=1, kind="stable")
            order = np.take_along_axis(order, ranked, axis=1)
            right = (targets[order] == targets[rows, None]) & np.isfinite(np.take_along_axis(cosines, order, axis=1))
            recall[rows] = right[:, :5].any(axis=1)
            hits = right & (places <= wanted[rows, None])
            precision[rows] = (hits * right.cumsum(axis=1) / places).sum(axis=1) / wanted[rows].clip(1)
        return {"recall@5": recall, "MAP@R": precision}

    def same(self, outputs: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Whether what is nearest in `outputs` is so in `others` too, or as good as (`SAME`): of several neighbours
        that are equally near any noise picks another."""
        import numpy as np

        same = np.ones(len(outputs), bool)
        if len(outputs) < 2:
            return same
        for (rows, found), (_, before) in zip(cosines_with_others(outputs), cosines_with_others(others), strict=True):
            chosen = np.take_along_axis(before, found.argmax(axis=1)[:, None], axis=1)[:, 0]
            spread = np.where(np.isfinite(before), before, np.nan)
            same[rows] = chosen >= before.max(axis=1) - SAME * np.nanstd(spread, axis=1)
        return same

    def best_constant(self, targets: np.ndarray, outputs: int) -> np.ndarray:
        """One point for all: everybody is equally near."""
        import numpy as np

        return np.ones((1, outputs), np.float32)

    def fit_head(
        self, features: np.ndarray, targets: np.ndarray, outputs: int, strength: float, tolerance: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Whitening within the labels (Hatch et al. 2006, within-class covariance normalization) with a ridge of
        1 / `strength`, then each direction weighted by its canonical correlation with the labels (linear discriminant
        analysis, Fisher 1936) plus `KEPT`. A low strength leaves the features nearly as they are.

        Of more features than outputs (raw inputs) those are taken that vary most between the labels; what outputs are
        left stay 0. A typical example gets the length √outputs, with which the weights are as large as those of a new
        layer.
        """
        import numpy as np
        from scipy.linalg import solve_triangular

        _, label, counts = np.unique(targets, return_inverse=True, return_counts=True)
        sums = np.zeros((len(counts), features.shape[1]))
        np.add.at(sums, label, features)
        means, shares = sums / counts[:, None], np.sqrt(counts / len(features))[:, None]
        kept = np.sort(np.argsort(-np.square(shares * means).sum(axis=0), kind="stable")[:outputs])
        within, means = (features - means[label])[:, kept], means[:, kept]
        ridged = within.T @ within / len(features) + np.eye(len(kept)) / strength
        whiten = solve_triangular(np.linalg.cholesky(ridged), np.eye(len(kept)), lower=True)
        directions, spreads, _ = np.linalg.svd(whiten @ (shares * means).T, full_matrices=False)
        gains = np.sqrt(spreads**2 / (1 + spreads**2) + KEPT) - KEPT**0.5
        weight = np.zeros((outputs, features.shape[1]))
        weight[: len(kept), kept] = KEPT**0.5 * whiten + (directions * gains) @ (directions.T @ whiten)
        length = np.linalg.norm(features @ weight.T, axis=1).mean()
        return weight * (outputs**0.5 / max(float(length), 1e-12)), np.zeros(outputs)

    def folds(self, targets: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Stratified folds, as in classification."""
        return CLASSES.folds(targets, min(count, CV_FOLDS))

    def vote(self, weights: np.ndarray, targets: np.ndarray, outputs: int) -> np.ndarray:
        """The neighbours of an example say nothing of where it lies."""
        raise NotImplementedError("see `embeds`")

    def answers(self, outputs: np.ndarray, labels: tuple[str, ...]) -> list[Answer]:
        """The embedding itself; it has no label, and its score is its length."""
        rows = [tuple(map(float, row)) for row in outputs]
        return [Answer("", sum(value**2 for value in row) ** 0.5, {}, row) for row in rows]


def cosines_with_others(outputs: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of rows and their cosines with every example: float64 (rows, examples), −∞ with itself."""
    import numpy as np

    points = of_length_one(outputs.astype(np.float64))
    for start in range(0, len(points), BLOCK):
        rows = slice(start, min(start + BLOCK, len(points)))
        cosines = points[rows] @ points.T
        cosines[np.arange(len(cosines)), np.arange(rows.start, rows.stop)] = -np.inf
        yield rows, cosines
