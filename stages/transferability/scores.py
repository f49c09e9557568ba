"""How well the features of a frozen backbone fit the labels: four scores, each a plain function of arrays.

`features`: float32 (examples, features); `labels`: int64 (examples,), class numbers. Larger is better in all four.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.errors import DataError
from models.tasks.single_label import SingleLabel
from stages.features.probe import fit_probe, outputs_of_neighbours, score_head

if TYPE_CHECKING:
    import numpy as np

    from stages.base import Progress

    Fold = tuple[np.ndarray, np.ndarray]
    """Indices to learn from and indices to judge by: int64."""

CLASSIFICATION = SingleLabel()

FOLDS = 5
SMALLEST_CLASS = 4
"""Two classes need so many examples: then both are in every part that the nested folds learn from."""

REGULARIZATIONS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Inverse strengths C that the probe chooses from, on standardised features."""

RIDGE_RANGE = 1e-10, 1e10
"""Where LogME looks for its ratio α / β, in units of the largest eigenvalue of FᵀF: at its ends the prior no longer
matters, or nothing else does."""


@dataclass(frozen=True)
class Judged:
    """`correct`: bool (examples,), whether each example was right while its fold was held out."""

    correct: np.ndarray

    @property
    def accuracy(self) -> float:
        """The share of right ones."""
        return float(self.correct.mean())


def make_folds(labels: np.ndarray, seed: int) -> list[Fold]:
    """Stratified folds, the same for every backbone, so that their results can be compared example by example.

    Raises:
        DataError: fewer than two classes have `SMALLEST_CLASS` examples.
    """
    counts = sorted(Counter(labels.tolist()).values(), reverse=True)
    if len(counts) < 2 or counts[1] < SMALLEST_CLASS:
        raise DataError(
            f"the train split has {len(labels)} examples in {len(counts)} classes of at most {counts[0]}; "
            f"cross-validation needs two classes with {SMALLEST_CLASS} examples at least; add examples, or let more "
            "of them into train"
        )
    return stratified(labels, seed)


def stratified(labels: np.ndarray, seed: int) -> list[Fold]:
    """At most `FOLDS` folds; a class with fewer examples than folds is in some of them only."""
    import numpy as np
    from sklearn.model_selection import StratifiedKFold

    largest = int(np.unique(labels, return_counts=True)[1].max())
    splitter = StratifiedKFold(min(FOLDS, largest), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")
        return list(splitter.split(np.zeros(len(labels)), labels))


def judge_probe(
    features: np.ndarray, labels: np.ndarray, folds: Sequence[Fold], seed: int, progress: Progress, name: str
) -> Judged:
    """A linear probe: multinomial logistic regression on standardised features, judged on held-out folds.

    Its regularisation is chosen without the fold that it is judged on: by log loss on a part of the others, which are
    then learnt from as a whole. By accuracy too many strengths would be equally good.
    """
    import numpy as np

    correct, classes = np.zeros(len(labels), bool), int(labels.max()) + 1
    with progress.task(f"probe of {name}", len(folds)) as advance:
        for learn, judge in folds:
            strength = choose_regularization(features[learn], labels[learn], classes, seed)
            probe = fit_probe(features[learn], labels[learn], classes, CLASSIFICATION, strength)
            scores, _ = score_head(probe.weight, probe.bias, features[judge], labels[judge], CLASSIFICATION)
            correct[judge] = scores > 0
            advance()
    return Judged(correct)


def choose_regularization(features: np.ndarray, labels: np.ndarray, classes: int, seed: int) -> float:
    """The C of `REGULARIZATIONS` with the lowest log loss on one fold held out.

    An example of a class that the fold has not taught adds the same to all.
    """
    learn, judge = stratified(labels, seed)[0]
    losses = []
    for strength in REGULARIZATIONS:
        probe = fit_probe(features[learn], labels[learn], classes, CLASSIFICATION, strength)
        losses.append(score_head(probe.weight, probe.bias, features[judge], labels[judge], CLASSIFICATION)[1])
    return REGULARIZATIONS[losses.index(min(losses))]


def judge_neighbours(features: np.ndarray, labels: np.ndarray, folds: Sequence[Fold]) -> Judged:
    """A weighted vote of the nearest neighbours by cosine, judged on held-out folds.

    As a predictor of transfer it surpassed 23 metrics in 42,000 experiments (Sorkhei et al. 2025, arXiv 2503.18528).
    """
    import numpy as np

    correct, classes = np.zeros(len(labels), bool), int(labels.max()) + 1
    for learn, judge in folds:
        voted = outputs_of_neighbours(features[learn], labels[learn], features[judge], classes, CLASSIFICATION)
        correct[judge] = CLASSIFICATION.scores(voted, labels[judge]) > 0
    return Judged(correct)


def h_score(features: np.ndarray, labels: np.ndarray) -> float:
    """The H-score with a shrunk covariance: Ibrahim et al. 2022, "Newer is not always better" (arXiv 2110.06893).

    (1 − α) tr(Σ_α⁻¹ Σ_B), with Σ_B the covariance of the class means, Σ_α = (1 − α) Σ + α tr(Σ)/d I the covariance of
    the features and α as Ledoit & Wolf 2004 estimate it. From 0 to one less than the number of classes; the covariance
    of Bao et al. 2019 without shrinkage cannot be inverted where there are more features than examples.

    In the basis of the right singular vectors of the centred features all of it is diagonal, and directions
    in which nothing varies drop out.
    """
    import numpy as np
    from sklearn.covariance import ledoit_wolf_shrinkage

    centred = features.astype(np.float64)
    centred -= centred.mean(0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    kept = singular > singular.max(initial=0) * max(centred.shape) * np.finfo(np.float64).eps
    left, variances = left[:, kept], singular[kept] ** 2 / len(labels)
    alpha = ledoit_wolf_shrinkage(centred, assume_centered=True)
    shrunk = (1 - alpha) * variances + alpha * variances.sum() / centred.shape[1]
    between = np.zeros(len(variances))
    for label in np.unique(labels):
        members = labels == label
        between += members.mean() * left[members].mean(0) ** 2 * singular[kept] ** 2
    return float((1 - alpha) * (between / shrunk).sum())


def log_me(features: np.ndarray, labels: np.ndarray) -> float:
    """The logarithm of maximum evidence: You et al. 2021 (arXiv 2102.11005), in nats an example.

    For each class its indicator y is taken for F w + noise, w ~ N(0, I/α), noise ~ N(0, I/β); the mean over the
    classes of the largest log p(y | F, α, β) / n over α and β. Given the ratio λ = α/β the best β has a closed form:
    with K = I + F Fᵀ/λ it is n / yᵀK⁻¹y, and log p = −(n log(2πe yᵀK⁻¹y / n) + log |K|) / 2. So one number is searched
    for, on a grid and then between its points, in place of the fixed-point iteration of the paper.
    """
    import numpy as np
    from scipy.optimize import minimize_scalar

    left, singular, _ = np.linalg.svd(features.astype(np.float64), full_matrices=False)
    eigenvalues = singular**2
    samples, unit = len(labels), float(eigenvalues.max(initial=0)) or 1.0
    grid = np.log(unit) + np.linspace(np.log(RIDGE_RANGE[0]), np.log(RIDGE_RANGE[1]), 81)
    evidences = []
    for label in np.unique(labels):
        target = (labels == label).astype(np.float64)
        inside = (left.T @ target) ** 2
        outside = max(float(target.sum() - inside.sum()), 0.0)

        def loss(log_ratio: float, inside: np.ndarray = inside, outside: float = outside) -> float:
            ratio = np.exp(log_ratio)
            square = (inside * ratio / (ratio + eigenvalues)).sum() + outside
            determinant = np.log1p(eigenvalues / ratio).sum()
            return float(np.log(2 * np.pi * np.e * square / samples) + determinant / samples) / 2

        losses = [loss(point) for point in grid]
        best = losses.index(min(losses))
        bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
        found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
        evidences.append(-min(float(found.fun), losses[best]))
    return float(np.mean(evidences))
