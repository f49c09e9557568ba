"""Whether a candidate's probabilities mean what the reference's do: halved logits keep every class, and show here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from models.tasks.single_label import SingleLabel
from stages.statistics import paired_interval

if TYPE_CHECKING:
    import numpy as np

    from models.tasks import Task

BINS = 15
"""Of equal width, as in Guo et al. 2017 (arXiv 1706.04599)."""
RESAMPLES = 2000
"""Of the paired bootstrap: its 5 % and 95 % quantiles are then good to about half a percent of probability."""

CALIBRATION = (
    "ece", "reference_ece", "ece_increase", "ece_increase_interval", "nll", "reference_nll", "nll_increase",
    "nll_increase_interval",
)  # fmt: skip
"""The keys of `calibration`."""


def calibration(found: np.ndarray, wanted: np.ndarray, targets: np.ndarray, task: Task, seed: int) -> dict[str, Any]:
    """Expected calibration error and negative log-likelihood (nats) of candidate (`found`) and reference (`wanted`),
    float32 (samples, classes) logits, and what the candidate adds to each, with the interval between both one-sided
    95 % bounds: Student's of the paired differences, and of the error the paired bootstrap's percentiles. Every number
    is None where the outputs are not those of one choice.
    """
    if not isinstance(task, SingleLabel):
        return dict.fromkeys(CALIBRATION)
    after, before = gaps_of(found, targets), gaps_of(wanted, targets)
    losses, others = losses_of(found, targets), losses_of(wanted, targets)
    low, high = resampled_increase(after, before, seed)
    fewer, more = paired_interval(losses, others, 0.90)
    return {
        "ece": calibration_error(after),
        "reference_ece": calibration_error(before),
        "ece_increase": calibration_error(after) - calibration_error(before),
        "ece_increase_interval": [low, high],
        "nll": float(losses.mean()),
        "reference_nll": float(others.mean()),
        "nll_increase": float((losses - others).mean()),
        "nll_increase_interval": [fewer, more],
    }


def losses_of(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The negative log-likelihood of each sample's class in nats: float64 (samples,)."""
    import numpy as np

    from stages.validate.metrics import log_probabilities

    return np.asarray(-log_probabilities(logits.astype(np.float64))[np.arange(len(targets)), targets])


def gaps_of(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Confidence minus correctness of each sample, in the column of its confidence: float64 (samples, BINS)."""
    import numpy as np

    from models.tasks.single_label import probabilities_from_logits

    shares = probabilities_from_logits(logits)
    confidence, right = shares.max(axis=1), shares.argmax(axis=1) == targets
    gaps = np.zeros((len(targets), BINS))
    columns = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps[np.arange(len(targets)), columns] = confidence - right
    return gaps


def calibration_error(gaps: np.ndarray) -> float:
    """The expected calibration error: the mean over bins of the gap between confidence and accuracy, weighted by their
    samples, which is the sum of |Σ gaps| / samples."""
    import numpy as np

    return float(np.abs(gaps.sum(axis=0)).sum() / len(gaps))


def resampled_increase(after: np.ndarray, before: np.ndarray, seed: int) -> tuple[float, float]:
    """The 5 % and 95 % quantiles of the increase over samples drawn with replacement, the same of both.

    Where no sample's gap differs they are 0 and 0 whatever the number of samples: then Tango's interval for no flip
    holds, as of the metric.
    """
    import numpy as np

    samples = len(after)
    if bool((after == before).all()):
        return paired_interval(np.zeros(samples), np.zeros(samples), 0.90)
    random = np.random.default_rng(seed)
    both = np.concatenate([after, before], axis=1)
    increases = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        drawn = np.bincount(random.integers(0, samples, samples), minlength=samples)
        sums = np.abs(drawn @ both)
        increases[index] = (sums[:BINS].sum() - sums[BINS:].sum()) / samples
    low, high = np.quantile(increases, (0.05, 0.95))
    return float(low), float(high)
