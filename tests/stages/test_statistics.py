"""The score interval and the sample size, against theory and an independent computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.statistics import (
    clopper_pearson,
    drop_p_value,
    holm,
    paired_interval,
    samples_needed,
    smallest_visible_drop,
    tango_interval,
)

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


def test_a_few_small_losses_prove_nothing() -> None:
    """One example of a hundred that is slightly worse shows no more than none."""
    wanted = np.full(100, 0.9)
    found = np.where(np.arange(100) < 1, 0.85, wanted)
    low, high = paired_interval(found, wanted, 0.90)
    flipless = tango_interval(0, 0, 100, 0.90)[1]
    assert low == pytest.approx(-0.0005 - flipless) and high == pytest.approx(-0.0005 + flipless)
    assert smallest_visible_drop(found, wanted) == smallest_visible_drop(*flipped(0, 100))
    assert drop_p_value(found, wanted, 0.0) > 0.4


def test_a_few_losses_are_worth_flips_of_the_largest() -> None:
    """Twelve halves lost and two gained of 300: half of Tango's interval; tiny gains make up for none."""
    wanted = np.full(300, 0.5)
    found = wanted + np.array([-0.5] * 12 + [0.5] * 2 + [0.0] * 286)
    flips = tango_interval(2, 12, 300, 0.90)
    assert paired_interval(found, wanted, 0.90) == pytest.approx([0.5 * bound for bound in flips])
    low = paired_interval(found, wanted, 0.90)[0]
    assert drop_p_value(found, wanted, -paired_interval(found, wanted, 0.90)[1]) == pytest.approx(0.05, abs=1e-4)
    found[14:24] += 0.001
    assert paired_interval(found, wanted, 0.90)[0] == pytest.approx(low, abs=1e-4)


@pytest.mark.parametrize(
    ("gained", "lost", "samples", "published"),
    [(1, 7, 21, (-0.517, -0.026)), (6, 16, 161, (-0.1240, -0.0054))],
)
def test_tango_gives_the_published_intervals(
    gained: int, lost: int, samples: int, published: tuple[float, float]
) -> None:
    """Fagerland, Lydersen and Laake 2017, Statistical Analysis of Contingency Tables, chapter 8: the examples of
    Bentur et al. 2009 and Cavo et al. 2012 (their R package contingencytables prints the second)."""
    digits = 5e-4 if samples == 21 else 5e-5
    assert tango_interval(gained, lost, samples) == pytest.approx(published, abs=digits)


@pytest.mark.parametrize(
    ("count", "samples", "published"),
    [(81, 263, (0.2527, 0.3676)), (15, 148, (0.0578, 0.1617)), (0, 20, (0.0, 0.1684)), (1, 29, (0.0009, 0.1776))],
)
def test_clopper_and_pearson_give_the_published_intervals(
    count: int, samples: int, published: tuple[float, float]
) -> None:
    """Newcombe 1998, Statistics in Medicine 17:857–872, table I, method 5 (two-sided 95 %)."""
    assert clopper_pearson(count, samples, 0.025) == pytest.approx(published, abs=6e-5)


def test_no_flip_in_300_bounds_the_rate_below_one_percent() -> None:
    assert clopper_pearson(0, 300) == (0.0, pytest.approx(1 - 0.05 ** (1 / 300)))
    assert clopper_pearson(7, 7)[1] == 1.0
    with pytest.raises(ValueError, match="found 4 and 3"):
        clopper_pearson(4, 3)


def test_holm_gives_the_textbook_values() -> None:
    """p = .01, .04, .03, .005 at four hypotheses: .005 × 4, .01 × 3, .03 × 2, and .04 × 1, raised to the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_lies_between_the_plain_value_and_bonferroni(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= a <= min(1.0, len(p_values) * p) + 1e-12 for p, a in zip(p_values, adjusted, strict=True))
    assert sorted(adjusted) == [a for _, a in sorted(zip(p_values, adjusted, strict=True))]


@pytest.mark.parametrize("finer", [False, True])
def test_the_p_value_of_a_drop_is_where_its_bound_is(finer: bool) -> None:
    """The interval inverts the test: at the 5 % bound of the drop the p-value is 5 %."""
    random = np.random.default_rng(3)
    before = np.ones(200)
    found = 1 - random.uniform(0, 0.4, 200) if finer else np.where(np.arange(200) < 21, 0.0, 1.0)
    low_drop = -paired_interval(found, before, 0.90)[1]
    assert drop_p_value(found, before, low_drop) == pytest.approx(0.05, abs=1e-4)
    assert drop_p_value(found, before, 0.5) > 0.99 and drop_p_value(found, before, 0.0) < 1e-3


@pytest.mark.parametrize(
    ("flips", "margin", "needed"),
    [(0.01, 0.02, 214), (0.05, 0.01, 4280), (0.10, 0.02, 2140), (0.01, 0.005, 3424), (0.0, 0.01, 268)],
)
def test_a_margin_takes_so_many_samples(flips: float, margin: float, needed: int) -> None:
    """n = 8.56 ψ / margin², and without a flip as many as bring Tango's bound below the margin, and no fewer."""
    assert samples_needed(flips, margin) == pytest.approx(needed, abs=1)
    if not flips:
        assert -tango_interval(0, 0, needed, 0.90)[0] <= margin < -tango_interval(0, 0, needed - 2, 0.90)[0]
    assert samples_needed(flips, 0.0) is None


def passing_share(drop: float, flips: float, samples: int, margin: float, runs: int = 4000) -> float:
    """How often the non-inferiority test proves `margin` of a candidate with a true drop, simulated."""
    gain, loss = (flips - drop) / 2, (flips + drop) / 2
    tables = np.random.default_rng(1).multinomial(samples, [gain, loss, 1 - gain - loss], size=runs)[:, :2]
    kinds, counts = np.unique(tables, axis=0, return_counts=True)
    proven = [-tango_interval(int(gained), int(lost), samples, 0.90)[0] <= margin for gained, lost in kinds]
    return float(counts[np.array(proven)].sum()) / runs


@pytest.mark.slow
@pytest.mark.parametrize(("flips", "samples"), [(0.05, 100), (0.05, 1000), (0.10, 500), (0.30, 60)])
def test_the_gate_lets_a_drop_at_the_margin_pass_in_one_run_of_twenty(flips: float, samples: int) -> None:
    """Size: 5 %, of Tango's test up to 5.5 % at small n, and three standard errors of the simulation (1 %)."""
    assert passing_share(0.02, flips, samples, 0.02) <= 0.055 + 0.0104


FRACTIONS = (1 / 3, 2 / 3, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "gained", "sizes", "samples"),
    [
        (0.02, 0.0, (0.5,), 250),  # Student's t alone passed 10 to 15 % of such
        (0.02, 0.0, (0.5,), 400),
        (0.05, 0.03, FRACTIONS, 250),
        (0.02, 0.0, (0.25, 0.5), 400),
        (0.15, 0.05, FRACTIONS, 400),  # from here on t decides
        (0.10, 0.05, FRACTIONS, 1000),
        (0.08, 0.06, (0.5,), 2000),
    ],
)
def test_fractional_scores_let_a_drop_at_the_margin_pass_in_one_run_of_twenty(
    lost: float, gained: float, sizes: tuple[float, ...], samples: int
) -> None:
    """Size: 5 % and three standard errors of 4000 simulated runs (1 %), the margin being the true drop."""
    random, runs = np.random.default_rng(5), 4000
    kind, size = random.uniform(size=(runs, samples)), random.choice(sizes, (runs, samples))
    differences = np.where(kind < lost, -size, np.where(kind < lost + gained, size, 0.0))
    margin = (lost - gained) * float(np.mean(sizes))
    # The bound lies below the mean, so that only a mean within the margin can pass.
    close = differences[differences.mean(1) > -margin]
    wanted = np.full(samples, 0.3)
    proven = sum(paired_interval(wanted + one, wanted, 0.90)[0] >= -margin for one in close)
    assert proven / runs <= 0.05 + 0.0104


@pytest.mark.slow
@pytest.mark.parametrize(("flips", "margin"), [(0.05, 0.02), (0.10, 0.02), (0.05, 0.01)])
def test_so_many_samples_have_the_stated_power(flips: float, margin: float) -> None:
    """90 % where there is no drop; a normal approximation, so that a few percent either way are left to it."""
    needed = samples_needed(flips, margin)
    assert needed is not None and passing_share(0.0, flips, needed, margin) == pytest.approx(0.90, abs=0.03)


@pytest.mark.slow
def test_a_hundred_good_classes_give_no_false_alarm_and_a_bad_one_is_found() -> None:
    """100 classes of 50 samples, 5 % flips and no drop: some class loses ten points in a quarter of the runs and more,
    and Holm's correction alarms in one of twenty at most."""
    random, seen, alarms = np.random.default_rng(0), 0, 0
    for _ in range(100):
        tables = random.multinomial(50, [0.025, 0.025, 0.95], size=100)
        worst = min(gained - lost for gained, lost, _ in tables)
        seen += worst <= -5
        scores = [as_scores(*map(int, table)) for table in tables]
        alarms += min(holm([drop_p_value(found, before, 0.0) for found, before in scores])) < 0.05
    assert seen >= 15 and alarms <= 5 + 6  # 5 % of 100 and nearly three standard errors
    broken = [as_scores(0, 25, 25), *(as_scores(1, 1, 48) for _ in range(99))]
    adjusted = holm([drop_p_value(found, before, 0.05) for found, before in broken])
    assert adjusted[0] < 0.05 <= min(adjusted[1:])


def as_scores(gained: int, lost: int, same: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of candidate and reference with so many gains and losses."""
    found = np.array([1.0] * gained + [0.0] * lost + [1.0] * same)
    return found, np.array([0.0] * gained + [1.0] * lost + [1.0] * same)
