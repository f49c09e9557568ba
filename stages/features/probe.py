"""What frozen features are worth: a linear probe with its regularisation cross-validated, and k nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from models.classifier import Classifier
    from models.tasks import Task

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
    """`weight`: float32 (outputs, features); `bias`: float32 (outputs,). Works on raw features.

    `cv_metric` is that of the chosen C over the folds (None where there were none), `table` has all
    that were tried.
    """

    weight: np.ndarray
    bias: np.ndarray
    regularization: float
    cv_metric: float | None
    table: list[dict[str, float]]


def fit_probe(
    features: np.ndarray, targets: np.ndarray, outputs: int, task: Task, regularization: float | None = None
) -> Probe:
    """The task's linear model, scaler folded into the weights; C is `regularization`, or chosen by cross-validation.

    `features`: float32 (examples, features); `targets`: as `task.targets` makes them, of two classes at least.

    C is chosen by loss: by accuracy it picks overconfident heads, which leave training no gradient. The validation
    split has no part in it, so what the probe reaches there is as honest as what training reaches.

    With x' = (x − μ)/σ and outputs W x' + b, the same outputs on raw x are (W/σ) x + (b − W μ/σ).
    """
    import numpy as np

    mean, deviation = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    deviation = np.where(deviation < 1e-6, 1.0, deviation)
    standardised = (features - mean) / deviation  # float64: lbfgs needs many more steps in float32 (measured: 4×)
    table = [] if regularization else cross_validate(standardised, targets, outputs, task)
    best = min(table, key=lambda entry: entry["loss"], default={"regularization": regularization or 0.1})
    weight, bias = fit_head(standardised, targets, outputs, task, best["regularization"], TOLERANCE)
    scaled = weight / deviation
    folded = scaled.astype(np.float32), (bias - scaled @ mean).astype(np.float32)
    return Probe(*folded, best["regularization"], best.get("metric"), table)


def fit_head(
    features: np.ndarray, targets: np.ndarray, outputs: int, task: Task, c: float, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """float64 (outputs, features) and (outputs,)."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # The steps are so small that BLAS's threads mostly wait for each other: with two of them on two busy cores a fit
    # of 120 × 1280 features took 20 to 60 times as long as with one.
    with warnings.catch_warnings(), threadpool_limits(1, "blas"):
        warnings.simplefilter("ignore", ConvergenceWarning)
        return task.fit_head(features, targets, outputs, c, tolerance)


def cross_validate(features: np.ndarray, targets: np.ndarray, outputs: int, task: Task) -> list[dict[str, float]]:
    """Metric and loss of each C over folds, on at most `CV_EXAMPLES` examples."""
    import numpy as np

    results: dict[float, list[tuple[float, float, int]]] = {value: [] for value in REGULARIZATIONS}
    for train, held_out in task.folds(targets[:CV_EXAMPLES], FOLDS):
        for value in REGULARIZATIONS:
            head = fit_head(features[train], targets[train], outputs, task, value, CV_TOLERANCE)
            scores, loss = score_head(*head, features[held_out], targets[held_out], task)
            results[value].append((float(scores.mean()), loss, len(held_out)))
    return [
        {
            "regularization": value,
            "metric": float(np.average([one[0] for one in found], weights=[one[2] for one in found])),
            "loss": float(np.average([one[1] for one in found], weights=[one[2] for one in found])),
        }
        for value, found in results.items()
        if found
    ]


def outputs_of_neighbours(
    features: np.ndarray, targets: np.ndarray, others: np.ndarray, outputs: int, task: Task
) -> np.ndarray:
    """float32 (others, outputs): the weighted vote of the nearest `features` (float32, examples × features) for each
    of `others`.

    A neighbour of cosine similarity s votes with exp(s / `TEMPERATURE`).
    """
    import numpy as np
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(features)), metric="cosine").fit(features)
    distances, indices = search.kneighbors(others)
    # Less the nearest distance: the weights of an example have a common factor, which must not vanish.
    weights = np.exp((distances.min(axis=1, keepdims=True) - distances).astype(np.float64) / TEMPERATURE)
    return task.vote(weights, targets[indices], outputs)


def score_head(
    weight: np.ndarray, bias: np.ndarray, features: np.ndarray, targets: np.ndarray, task: Task
) -> tuple[np.ndarray, float]:
    """float64 (examples,), the scores of a linear head; and its mean loss."""
    import numpy as np
    import torch

    outputs = np.asarray(features @ weight.T + bias, np.float32)
    loss = float(task.loss(torch.from_numpy(outputs), torch.from_numpy(targets)))
    return task.scores(outputs, targets), loss


def put_into_head(model: Classifier, probe: Probe) -> None:
    """Copy the probe into the network's head."""
    import torch

    from models.classifier import set_head

    set_head(model, torch.from_numpy(probe.weight), torch.from_numpy(probe.bias))
