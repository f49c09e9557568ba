"""What frozen features are worth: a linear probe with its regularisation cross-validated, and k nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from models.classifier import Classifier

REGULARIZATIONS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Inverse strengths C tried for the probe, on standardised features."""

FOLDS = 5
CV_EXAMPLES = 5000
"""More examples than these say nothing new about C."""

TOLERANCE, CV_TOLERANCE = 1e-4, 1e-3
"""Of the fits: scikit-learn's default, and a coarser one that chooses the same C three times as fast (measured)."""

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""Of k nearest neighbours by cosine similarity: Wu et al. 2018 (arXiv 1805.01978), Caron et al. 2021 (2104.14294)."""


@dataclass(frozen=True)
class Probe:
    """`weight`: float32 (classes, features); `bias`: float32 (classes,). Works on raw features.

    `cv_accuracy` is that of the chosen C over the folds (None where there were none), `table` has all
    that were tried.
    """

    weight: np.ndarray
    bias: np.ndarray
    regularization: float
    cv_accuracy: float | None
    table: list[dict[str, float]]


def fit_probe(features: np.ndarray, labels: np.ndarray, classes: int, regularization: float | None = None) -> Probe:
    """Multinomial logistic regression, scaler folded into the weights; C is `regularization`, or chosen by
    cross-validation.

    `features`: float32 (examples, features); `labels`: int64 (examples,), two classes among them at least.

    C is chosen by log loss: by accuracy it picks overconfident heads, which leave training no gradient. The
    validation split has no part in it, so what the probe reaches there is as honest as what training reaches.

    With x' = (x − μ)/σ and logits W x' + b, the same logits on raw x are (W/σ) x + (b − W μ/σ).
    """
    import numpy as np

    mean, deviation = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    deviation = np.where(deviation < 1e-6, 1.0, deviation)
    standardised = (features - mean) / deviation  # float64: lbfgs needs many more steps in float32 (measured: 4×)
    table = [] if regularization else cross_validate(standardised, labels, classes)
    best = min(table, key=lambda entry: entry["loss"], default={"regularization": regularization or 0.1})
    weight, bias = fit_head(standardised, labels, classes, best["regularization"], TOLERANCE)
    scaled = weight / deviation
    folded = scaled.astype(np.float32), (bias - scaled @ mean).astype(np.float32)
    return Probe(*folded, best["regularization"], best.get("accuracy"), table)


def fit_head(
    features: np.ndarray, labels: np.ndarray, classes: int, c: float, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """float64 (classes, features) and (classes,). A class that is not in `labels` is never predicted."""
    import warnings

    import numpy as np
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    regression = LogisticRegression(C=c, max_iter=300, tol=tolerance)
    # The steps are so small that BLAS's threads mostly wait for each other: with two of them on two busy cores a fit
    # of 120 × 1280 features took 20 to 60 times as long as with one.
    with warnings.catch_warnings(), threadpool_limits(1, "blas"):
        warnings.simplefilter("ignore", ConvergenceWarning)
        regression.fit(features, labels)
    weight, bias = regression.coef_, regression.intercept_
    if len(regression.classes_) == 2:  # scikit-learn has one row then, the logit of the second class
        weight, bias = np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])
    all_weight, all_bias = np.zeros((classes, features.shape[1])), np.full(classes, -1e4)
    all_weight[regression.classes_], all_bias[regression.classes_] = weight, bias
    return all_weight, all_bias


def cross_validate(features: np.ndarray, labels: np.ndarray, classes: int) -> list[dict[str, float]]:
    """Accuracy and log loss (nats) of each C over stratified folds, on at most `CV_EXAMPLES` examples.

    In a fold whose training part lacks a class (it has one example) examples of that class are not scored.
    """
    import numpy as np

    results: dict[float, list[tuple[float, float, int]]] = {value: [] for value in REGULARIZATIONS}
    for train, held_out in folds_of(labels):
        scored = held_out[np.isin(labels[held_out], labels[train])]
        if len(np.unique(labels[train])) < 2 or not len(scored):
            continue
        for value in REGULARIZATIONS:
            head = fit_head(features[train], labels[train], classes, value, CV_TOLERANCE)
            correct, loss = score_head(*head, features[scored], labels[scored])
            results[value].append((float(correct.mean()), loss, len(scored)))
    return [
        {
            "regularization": value,
            "accuracy": float(np.average([one[0] for one in found], weights=[one[2] for one in found])),
            "loss": float(np.average([one[1] for one in found], weights=[one[2] for one in found])),
        }
        for value, found in results.items()
        if found
    ]


def folds_of(labels: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(training, held-out) indices of stratified folds. The data is shuffled already."""
    import warnings

    import numpy as np
    from sklearn.model_selection import StratifiedKFold

    some = np.arange(min(len(labels), CV_EXAMPLES))
    largest = int(np.bincount(labels[some]).max())
    if largest < 2:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer examples than folds
        yield from StratifiedKFold(min(FOLDS, largest)).split(some, labels[some])


def predict_by_neighbours(features: np.ndarray, labels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """int64 (others,): the weighted vote of the nearest `features` (float32, examples × features) for each of `others`.

    A neighbour of cosine similarity s votes with exp(s / `TEMPERATURE`).
    """
    import numpy as np
    from sklearn.neighbors import KNeighborsClassifier

    def votes(distances: np.ndarray) -> np.ndarray:
        weights: np.ndarray = np.exp((1 - distances) / TEMPERATURE)
        return weights

    voters = KNeighborsClassifier(min(NEIGHBOURS, len(features)), weights=votes, metric="cosine")
    predicted: np.ndarray = voters.fit(features, labels).predict(others)
    return predicted


def score_head(
    weight: np.ndarray, bias: np.ndarray, features: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, float]:
    """bool (examples,), which of them a linear head has right; and its mean cross-entropy (nats)."""
    import numpy as np
    from scipy.special import log_softmax

    logits = features @ weight.T + bias
    chosen = log_softmax(logits, axis=1)[range(len(labels)), labels]
    correct: np.ndarray = np.equal(logits.argmax(1), labels)
    return correct, float(-chosen.mean())


def put_into_head(model: Classifier, probe: Probe) -> None:
    """Copy the probe into the network's head."""
    import torch

    with torch.no_grad():
        model.task_head.weight.copy_(torch.from_numpy(probe.weight))
        model.task_head.bias.copy_(torch.from_numpy(probe.bias))
