"""What a candidate loses of the metrics that are no means over examples: macro F1, mAP, Spearman and others."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from stages.statistics import paired_interval, tango_interval

if TYPE_CHECKING:
    import numpy as np

    from models.tasks import Task

RESAMPLES = 1000
"""Of the paired bootstrap: the 5 % quantile is then good to .7 % of probability (√(.05 · .95 / 1000))."""
CORRECTED_SAMPLES = 2000
"""The correction for bias and skewness (BCa) leaves each sample out in turn; with more of them it says next to nothing
and costs as much as the resamples."""


def further_drops(
    found: np.ndarray, wanted: np.ndarray, targets: np.ndarray, task: Task, names: Iterable[str], seed: int
) -> dict[str, dict[str, Any]]:
    """By name of a further metric: `drop`, what the candidate (`found`) is worse than the reference (`wanted`), and
    `interval`, between both one-sided 95 % bounds.

    Where examples of a split are each other's neighbours a sample drawn twice would find itself: those metrics are
    means of `more_scores` and compared pair by pair. The others are resampled, the same samples of both.
    """
    means, means_before = task.more_scores(found, targets), task.more_scores(wanted, targets)
    drops = {}
    for name in names:
        sign = task.further_metrics[name]
        if name in means:
            low, high = paired_interval(means_before[name], means[name], 0.90)
            drop = float((means_before[name] - means[name]).mean())
        else:

            def loss(rows: np.ndarray, name: str = name, sign: int = sign) -> float:
                before, after = (task.more_metrics(one[rows], targets[rows]) for one in (wanted, found))
                return sign * (before.get(name, float("nan")) - after.get(name, float("nan")))

            drop, low, high = resampled(loss, len(targets), seed)
        drops[name] = {"drop": drop, "interval": [low, high]}
    return drops


def resampled(statistic: Callable[[np.ndarray], float], samples: int, seed: int) -> tuple[float, float, float]:
    """A statistic of row indices, and both of its one-sided 95 % bounds: bias-corrected and accelerated (BCa, Efron
    1987) where that is defined, else percentiles. Of a statistic that no resample changes they are as far from it as
    Tango's interval for no flip: that nothing differs is no proof that nothing can. NaN where a resample has no value.

    BCa is not defined where leaving one sample out changes nothing, as with no pair that differs.
    """
    import numpy as np
    from scipy.stats import bootstrap

    rows = np.arange(samples)
    whole = float(statistic(rows))
    if samples < 2:
        return whole, float("nan"), float("nan")

    def of_rows(drawn: np.ndarray) -> float:
        return float(statistic(drawn.astype(np.int64)))

    options = {"vectorized": False, "confidence_level": 0.90}
    first = bootstrap((rows,), of_rows, n_resamples=RESAMPLES, method="percentile",
                      rng=np.random.default_rng(seed), **options)  # fmt: skip
    low, high = (float(one) for one in first.confidence_interval)
    if low == high == whole:
        below, above = tango_interval(0, 0, samples, 0.90)
        return whole, whole + below, whole + above
    if samples <= CORRECTED_SAMPLES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # 0 / 0 where BCa is not defined
            better = bootstrap((rows,), of_rows, n_resamples=0, bootstrap_result=first, method="BCa", **options)
        bounds = [float(one) for one in better.confidence_interval]
        if all(map(np.isfinite, bounds)):
            low, high = bounds
    return whole, low, high
