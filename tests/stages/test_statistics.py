"""The score interval and the sample size, against theory and an independent computation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stages.statistics import paired_interval, smallest_visible_drop, tango_interval

Z95 = 1.959964


def score_by_search(gained: int, lost: int, samples: int, difference: float) -> float:
    """The score statistic with the restricted likelihood maximised numerically instead of in closed form."""
    from scipy.optimize import minimize_scalar

    def loss(q: float) -> float:  # q: probability of a loss; a gain then has q + difference
        p, rest = q + difference, 1 - 2 * q - difference
        terms = ((gained, p), (lost, q), (samples - gained - lost, rest))
        return -sum(count * math.log(max(share, 1e-300)) for count, share in terms if count)

    low, high = max(0.0, -difference), (1 - difference) / 2
    q = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-13}).x
    return (gained - lost - samples * difference) / math.sqrt(samples * (2 * q + difference - difference**2))


@pytest.mark.parametrize(("gained", "lost", "samples"), [(9, 3, 44), (1, 4, 50), (30, 55, 2000), (5, 5, 100)])
def test_the_bounds_are_where_the_score_reaches_z(gained: int, lost: int, samples: int) -> None:
    low, high = tango_interval(gained, lost, samples)
    assert low < (gained - lost) / samples < high
    assert score_by_search(gained, lost, samples, low) == pytest.approx(Z95, abs=1e-3)
    assert score_by_search(gained, lost, samples, high) == pytest.approx(-Z95, abs=1e-3)


@pytest.mark.parametrize("samples", [1, 20, 2000])
def test_without_a_flip_the_interval_has_its_closed_form(samples: int) -> None:
    low, high = tango_interval(0, 0, samples)
    assert high == pytest.approx(Z95**2 / (samples + Z95**2), rel=1e-4)
    assert low == pytest.approx(-high)


@pytest.mark.parametrize(("gained", "lost", "samples"), [(7, 0, 7), (0, 7, 7), (0, 1, 1), (3, 4, 7)])
def test_extreme_tables_stay_inside_minus_one_and_one(gained: int, lost: int, samples: int) -> None:
    low, high = tango_interval(gained, lost, samples)
    assert -1 <= low <= (gained - lost) / samples <= high <= 1


def test_swapping_the_two_mirrors_the_interval() -> None:
    low, high = tango_interval(3, 11, 200)
    assert tango_interval(11, 3, 200) == pytest.approx((-high, -low))


def test_ninety_percent_is_narrower_than_ninety_five() -> None:
    wide, narrow = tango_interval(3, 11, 200), tango_interval(3, 11, 200, 0.90)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize(("gained", "lost", "samples"), [(0, 0, 0), (-1, 0, 5), (3, 3, 5)])
def test_an_impossible_table_is_refused(gained: int, lost: int, samples: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        tango_interval(gained, lost, samples)


def test_the_interval_covers_the_true_difference() -> None:
    """At n = 60 and a true drop of 5 points, about 95 % of the intervals hold it (simulated, fixed seed)."""
    tables = np.random.default_rng(0).multinomial(60, [0.03, 0.08, 0.89], size=1500)
    held = [low <= -0.05 <= high for low, high in (tango_interval(int(a), int(b), 60) for a, b, _ in tables)]
    assert 0.93 <= sum(held) / len(held) <= 0.975


def test_the_smallest_visible_drop_is_the_known_sample_size_solved_for_the_margin() -> None:
    assert smallest_visible_drop(*flipped(214, 4282)) == pytest.approx(0.01, rel=0.01)
    assert smallest_visible_drop(*flipped(214, 2141)) == pytest.approx(0.02, rel=0.01)
    finer = np.linspace(-1, 1, 1000)  # of variance 1/3
    assert smallest_visible_drop(finer, np.zeros(1000)) == pytest.approx(math.sqrt(8.56 / 3000), rel=0.01)


def test_no_flip_is_no_proof_that_flips_cannot_happen() -> None:
    assert smallest_visible_drop(*flipped(0, 300)) == smallest_visible_drop(*flipped(3, 300)) > 0


def flipped(count: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of two networks that differ on so many samples."""
    right = np.ones(samples)
    return right, np.where(np.arange(samples) < count, 0.0, 1.0)


def test_scores_between_right_and_wrong_have_students_interval() -> None:
    random = np.random.default_rng(0)
    held = []
    for _ in range(400):
        before = random.uniform(0, 1, 80)
        found = before + random.exponential(0.2, 80) - 0.25  # skewed, of mean −0.05
        low, high = paired_interval(found, before)
        held.append(low <= -0.05 <= high)
    assert 0.92 <= sum(held) / len(held) <= 0.975
    assert paired_interval(*flipped(11, 200)) == tango_interval(11, 0, 200)


def test_no_difference_of_scores_is_no_proof_either() -> None:
    scores = np.array([0.0, 0.5, 1.0] * 8)
    low, high = paired_interval(scores, scores)
    assert (low, high) == tango_interval(0, 0, 24) and low < -0.1
    assert smallest_visible_drop(scores, scores) == smallest_visible_drop(*flipped(0, 24)) > 0.2
    assert paired_interval(np.array([0.4]), np.array([0.7])) == (-1.0, 1.0)
