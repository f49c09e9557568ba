"""Statistics of paired comparisons on the same samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

POWER_FACTOR = 8.56
"""(z.95 + z.90)² = (1.645 + 1.282)²: one-sided α = .05 and 90 % power."""
FLIPLESS_FACTOR = 2.706
"""z.95²: of samples without a flip Tango's bound is z² / (n + z²)."""
FEW = 30
"""Differences below which Student's t says too little of how a few rare ones vary."""


def tango_interval(gained: float, lost: float, samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval for the difference of two paired proportions (Tango 1998, Statistics in Medicine 17:891–908).

    `gained` samples are right in the candidate only, `lost` in the reference only; the difference is
    (gained − lost) / samples. The bounds are the differences d at which the score statistic
    (gained − lost − n·d) / sqrt(n (2 q(d) + d (1 − d))) equals ∓z, with q the restricted maximum
    likelihood estimate of the probability of a loss. Wald's interval is too narrow for few discordant pairs.

    Raises:
        ValueError: there are no samples, or more discordant pairs than samples.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    if samples <= 0 or gained < 0 or lost < 0 or gained + lost > samples:
        raise ValueError(f"expected 0 ≤ gained + lost ≤ samples and samples > 0, found {gained}, {lost}, {samples}")
    z = float(norm.ppf(0.5 + confidence / 2))
    observed = (gained - lost) / samples

    def score(difference: float) -> float:
        return _tango_score(gained, lost, samples, difference)

    edge = 1 - 1e-9
    lower = -1.0 if score(-edge) < z else float(brentq(lambda d: score(d) - z, -edge, observed, xtol=1e-10))
    upper = 1.0 if score(edge) > -z else float(brentq(lambda d: score(d) + z, observed, edge, xtol=1e-10))
    return lower, upper


def _tango_score(gained: float, lost: float, samples: int, difference: float) -> float:
    """Tango's statistic at a hypothetical difference; falls monotonically in it."""
    numerator = gained - lost - samples * difference
    a = 2 * samples
    b = -gained - lost + (2 * samples - gained + lost) * difference
    c = -lost * difference * (1 - difference)
    q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = samples * (2 * q + difference * (1 - difference))
    if variance <= 1e-12:
        return 0.0 if abs(numerator) < 1e-12 else math.copysign(math.inf, numerator)
    return numerator / math.sqrt(variance)


def paired_interval(found: np.ndarray, wanted: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of the mean of `found` − `wanted`, two scores of each sample: float64 (samples,).

    Tango's where every score is 0 or 1, where no sample differs, which alone is no proof that none can, and where fewer
    than `FEW` differ (see `as_flips`); else Student's t on the paired differences. Neither bound is nearer to the mean
    than Tango's is where nothing flips: what no sample shows may be there. One sample says nothing: from −1 to 1.

    Simulated at α = .05 one-sided, t's size is 5 to 5.5 % where some examples gain and some lose; where all of 40 to
    80 that differ lose, up to 7.5 %, for their mean is skewed.

    Raises:
        ValueError: there are no samples.
    """
    import numpy as np
    from scipy.stats import norm, t

    samples = len(found)
    if are_flips(found, wanted):
        return tango_interval(int((found > wanted).sum()), int((wanted > found).sum()), samples, confidence)
    if samples == 1:
        return -1.0, 1.0
    differences = found - wanted
    mean, z = float(differences.mean()), float(norm.ppf(0.5 + confidence / 2))
    least = z**2 / (samples + z**2)
    if np.count_nonzero(differences) < FEW:
        gained, lost, largest = as_flips(differences)
        low, high = (largest * bound for bound in tango_interval(gained, lost, samples, confidence))
    else:
        reach = float(t.ppf(0.5 + confidence / 2, samples - 1)) * float(np.std(differences, ddof=1))
        low, high = mean - reach / math.sqrt(samples), mean + reach / math.sqrt(samples)
    return min(low, mean - least), max(high, mean + least)


def drop_p_value(found: np.ndarray, wanted: np.ndarray, margin: float) -> float:
    """Of the hypothesis that the mean of `wanted` − `found`, two scores of each sample, is at most `margin`: small
    where a larger drop is shown. By the test that `paired_interval` inverts; 1 for one sample.

    Raises:
        ValueError: there are no samples.
    """
    import numpy as np
    from scipy.stats import norm, t

    samples = len(found)
    if are_flips(found, wanted):
        counts = int((found > wanted).sum()), int((wanted > found).sum()), samples
        if samples == 0:
            raise ValueError("there are no samples")
        return float(norm.cdf(_tango_score(*counts, -min(margin, 1 - 1e-9))))
    if samples == 1:
        return 1.0
    differences = found - wanted
    distance = float(differences.mean()) + margin
    beyond = min(max(-distance, 0.0), 1 - 1e-9)
    flipless = float(norm.cdf(-math.sqrt(samples * beyond / (1 - beyond))))
    if np.count_nonzero(differences) < FEW:
        gained, lost, largest = as_flips(differences)
        shown = float(norm.cdf(_tango_score(gained, lost, samples, -min(margin / largest, 1 - 1e-9))))
        return max(shown, flipless)
    error = float(np.std(differences, ddof=1)) / math.sqrt(samples)
    return max(float(t.cdf(distance / error, samples - 1)) if error else float(distance >= 0), flipless)


def are_flips(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether a difference of two scores is that of a right and a wrong answer, or there is none."""
    return (are_binary(found) and are_binary(wanted)) or bool((found == wanted).all())


def as_flips(differences: np.ndarray) -> tuple[float, float, float]:
    """(gained, lost, the largest difference) of `differences`, float64 (samples,) and not all 0, as Tango's interval
    takes them: a difference of half the largest counts as half a sample that flips.

    Gains and losses of the largest size with the same mean vary more than what is seen, so that the interval is rather
    too wide. To count each whole would not be: ten tiny gains would make up for ten large losses.
    """
    import numpy as np

    largest = float(np.abs(differences).max())
    shares = differences / largest
    return float(shares[shares > 0].sum()), float(-shares[shares < 0].sum()), largest


def keep_p_value(found: np.ndarray, wanted: np.ndarray, margin: float) -> float:
    """Of the other hypothesis, that the mean of `wanted` − `found` is above `margin`: small where it is shown to be
    less. The other tail of the same test; 1 for one sample.

    Raises:
        ValueError: there are no samples.
    """
    return 1.0 if len(found) == 1 else 1.0 - drop_p_value(found, wanted, margin)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979, Scandinavian Journal of Statistics 6:65–70): to reject what is below α keeps the
    chance of one wrong rejection among all below α, whatever their dependence."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda one: p_values[one])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def clopper_pearson(count: int, samples: int, alpha: float = 0.05) -> tuple[float, float]:
    """Both one-sided exact bounds of a share, each at level `alpha` (Clopper and Pearson 1934, Biometrika 26:404–413).

    Raises:
        ValueError: there are no samples, or more counted than there are.
    """
    from scipy.stats import beta

    if not 0 <= count <= samples or samples < 1:
        raise ValueError(f"expected 0 ≤ count ≤ samples and samples > 0, found {count} and {samples}")
    low = float(beta.ppf(alpha, count, samples - count + 1)) if count else 0.0
    high = float(beta.ppf(1 - alpha, count + 1, samples - count)) if count < samples else 1.0
    return low, high


def bound_rank(samples: int, share: float, confidence: float = 0.99) -> int | None:
    """The rank r (1 is the smallest) of the order statistic that bounds the `share` quantile from above, whatever the
    distribution of independent samples: the least with P(Bin(samples, share) < r) ≥ `confidence` (David and Nagaraja
    2003, Order Statistics, 7.1). None where that would be the largest of all, which is one interrupted call as often as
    not: as in MLPerf Inference's early stopping p90 takes 64 samples, p99 662.
    """
    from scipy.stats import binom

    rank = int(binom.ppf(confidence, samples, share)) + 1 if samples else 1
    return rank if rank < samples else None


def samples_for_bound(share: float, confidence: float = 0.99) -> int:
    """The fewest samples with which `bound_rank` has a rank."""
    samples = 2
    while share**samples + samples * (1 - share) * share ** (samples - 1) > 1 - confidence:
        samples += 1
    return samples


def are_binary(scores: np.ndarray) -> bool:
    """Whether every score is 0 or 1."""
    return bool(((scores == 0) | (scores == 1)).all())


def smallest_visible_drop(found: np.ndarray, wanted: np.ndarray) -> float:
    """The drop of the mean score that a paired non-inferiority test on these samples sees with 90 % power at α = .05.

    n = 8.56 ψ / m², with ψ the variance of the paired differences (for right and wrong answers the share of samples
    that flip) and m the margin, solved for m; where fewer than `FEW` differ, ψ is that of `as_flips`, and at least
    3 / n (the rule of three). No less than Tango's bound where nothing flips, and at most 1: a handful of samples sees
    nothing.
    """
    import numpy as np

    samples, differences = len(found), found - wanted
    variance = float(np.square(differences).mean())
    if are_flips(found, wanted) or np.count_nonzero(differences) < FEW:
        largest = float(np.abs(differences).max())
        variance = max(largest * float(np.abs(differences).mean()), 3 / samples)
    least = FLIPLESS_FACTOR / (samples + FLIPLESS_FACTOR)
    return min(1.0, max(math.sqrt(POWER_FACTOR * variance / samples), least))


def samples_needed(variance: float, margin: float) -> int | None:
    """How many samples a paired non-inferiority test takes to prove that a drop is at most `margin`, at α = .05 and
    with 90 % power where there is none: 8.56 · `variance` / margin². `variance` is that of the paired differences of
    scores (of right and wrong answers the share that flips). Even without a flip Tango's bound must come below the
    margin. None for a margin of 0, which no number of samples proves.
    """
    if margin <= 0:
        return None
    flipless = FLIPLESS_FACTOR * max(1 - margin, 0.0) / margin
    return max(1, math.ceil(round(POWER_FACTOR * variance / margin**2, 6)), math.ceil(flipless))


@dataclass(frozen=True)
class Gain:
    """How much better one network does than another on the same examples: the difference of their mean scores and its
    interval (see `paired_interval`)."""

    difference: float
    low: float
    high: float
    confidence: float

    def __str__(self) -> str:
        return f"{self.difference:+.4f} ({self.confidence:.0%} interval {self.low:+.4f} to {self.high:+.4f})"


def gain_of(scores: np.ndarray, others: np.ndarray, confidence: float) -> Gain:
    """`scores` against `others`: float64 (examples,), the same examples in the same order."""
    low, high = paired_interval(scores, others, confidence)
    return Gain(float((scores - others).mean()), low, high, confidence)


def smallest_cosine(found: np.ndarray, wanted: np.ndarray, parts: int) -> float | None:
    """The smallest cosine similarity of the same sample in `found` and `wanted`, float (samples, outputs), over all
    samples and the `parts` (embeddings side by side) of their outputs; None where one has no length."""
    import numpy as np

    pairs = zip(np.split(found, parts, axis=1), np.split(wanted, parts, axis=1), strict=True)
    cosines = []
    for one, other in pairs:
        norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        if not norms.all():
            return None
        cosines.append(float(((one * other).sum(1) / norms).min()))
    return min(cosines)
