"""Order backbones by their probe, with ties shown as ties, and say what the scores together tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.statistics import tango_interval

if TYPE_CHECKING:
    import numpy as np

CONFIDENCE = 0.95
"""Of all differences between the backbones together."""

SCORES = {"probe": "linear probe", "knn": "kNN", "h_score": "H-score", "log_me": "LogME"}
"""Key of a score → its name. The first is the one that orders."""


@dataclass(frozen=True)
class Candidate:
    """A backbone that was scored. `scores`: one number for each of `SCORES`, larger is better; `correct`: bool
    (examples,), which examples its probe got right, the same examples in the same order for all."""

    name: str
    parameters: int
    scores: Mapping[str, float]
    correct: np.ndarray


@dataclass(frozen=True)
class Difference:
    """The accuracy of one probe minus that of another, with the interval that it may lie in (accuracy, −1 to 1)."""

    value: float
    low: float
    high: float

    @property
    def tied(self) -> bool:
        """Whether the examples cannot tell the two apart."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Ranked:
    """A candidate in its place, compared with the most accurate of all and with the first of its place."""

    candidate: Candidate
    place: int
    to_best: Difference
    to_place: Difference
    ranks: dict[str, float]

    @property
    def mean_rank(self) -> float:
        """The mean of its ranks by the single scores."""
        return sum(self.ranks.values()) / len(self.ranks)


@dataclass(frozen=True)
class SmallerIsEnough:
    """`smaller` has fewer parameters than `larger`, and its probe is better or cannot be told apart."""

    smaller: Candidate
    larger: Candidate
    difference: Difference


def compare(one: Candidate, other: Candidate, candidates: int) -> Difference:
    """The accuracy of `one` minus that of `other` on the same held-out examples, with a paired interval.

    Tango's score interval over examples that one probe got right and the other did not. With several candidates the
    intervals of all pairs hold together with `CONFIDENCE` (Bonferroni), because which of them is looked at is only
    known afterwards. What it leaves out: that other folds, or other examples to learn from, would give other probes
    (Bengio & Grandvalet 2004: the variance of cross-validation has no unbiased estimate).
    """
    gained = int((one.correct & ~other.correct).sum())
    lost = int((~one.correct & other.correct).sum())
    samples, pairs = len(one.correct), candidates * (candidates - 1) // 2
    low, high = tango_interval(gained, lost, samples, 1 - (1 - CONFIDENCE) / max(pairs, 1))
    return Difference((gained - lost) / samples, low, high)


def rank(candidates: Sequence[Candidate]) -> list[Ranked]:
    """The candidates by the accuracy of their probe; of equally accurate ones the smaller comes first.

    The most accurate takes place 1 together with all that cannot be told apart from it; the most accurate of the
    others takes the next free number, and so on. So all of one place are tied with its first, not always with each
    other.
    """
    ranks = ranks_by_score(candidates)
    left = sorted(candidates, key=lambda one: (-one.scores["probe"], one.parameters, one.name))
    to_best = {one.name: compare(one, left[0], len(candidates)) for one in candidates}
    ranked: list[Ranked] = []
    while left:
        to_place = {one.name: compare(one, left[0], len(candidates)) for one in left}
        tied = [one for one in left if to_place[one.name].tied]
        place = len(ranked) + 1
        ranked += [Ranked(one, place, to_best[one.name], to_place[one.name], ranks[one.name]) for one in tied]
        left = [one for one in left if not to_place[one.name].tied]
    return ranked


def ranks_by_score(candidates: Sequence[Candidate]) -> dict[str, dict[str, float]]:
    """Name → score → rank, 1 for the largest; equal scores share the mean of their ranks."""
    from scipy.stats import rankdata

    found: dict[str, dict[str, float]] = {one.name: {} for one in candidates}
    for score in SCORES:
        values = rankdata([-one.scores[score] for one in candidates])
        for one, value in zip(candidates, values, strict=True):
            found[one.name][score] = float(value)
    return found


def winners(candidates: Sequence[Candidate]) -> dict[str, list[str]]:
    """Score → the names with its largest value."""
    best = {score: max(one.scores[score] for one in candidates) for score in SCORES}
    return {score: [one.name for one in candidates if one.scores[score] == best[score]] for score in SCORES}


def weighted_tau(scores: Sequence[float], reference: Sequence[float]) -> float | None:
    """How far two orders agree, from −1 to 1: Kendall's τ that counts exchanges at the top for more (Vigna 2015).

    Hyperbolic weights by rank, the mean of both orders' ranks: what transferability scores are judged by (You et al.
    2021). None for fewer than two values, or where all are equal.
    """
    import numpy as np
    from scipy.stats import weightedtau

    if len(scores) < 2:
        return None
    value = float(weightedtau(scores, reference).statistic)
    return value if np.isfinite(value) else None


def agreement(candidates: Sequence[Candidate]) -> dict[str, float | None]:
    """Score → the weighted τ of its order with that of the probe."""
    first, *others = SCORES
    reference = [one.scores[first] for one in candidates]
    return {score: weighted_tau([one.scores[score] for one in candidates], reference) for score in others}


def where_smaller_is_enough(candidates: Sequence[Candidate]) -> list[SmallerIsEnough]:
    """For each candidate the most accurate of the smaller ones, where that is more accurate or tied with it; the
    largest candidate first."""
    found = []
    for larger in sorted(candidates, key=lambda one: -one.parameters):
        smaller = [one for one in candidates if one.parameters < larger.parameters]
        if smaller:
            best = max(smaller, key=lambda one: (one.scores["probe"], -one.parameters))
            difference = compare(best, larger, len(candidates))
            if difference.high >= 0:
                found.append(SmallerIsEnough(best, larger, difference))
    return found
