"""Places, ties and what is said about size; the ranking statistic against a published table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.statistics import tango_interval
from stages.transferability.ranking import (
    SCORES,
    Candidate,
    agreement,
    compare,
    rank,
    ranks_by_score,
    weighted_tau,
    where_smaller_is_enough,
    winners,
)

TABLE = json.loads((Path(__file__).parent / "published_transferability.json").read_text(encoding="utf-8"))
CLEAN = ("Caltech101", "CIFAR10", "CIFAR100", "StanfordCars", "SUN397")
PUBLISHED = TABLE["columns"][2:]


def candidate(name: str, parameters: int, right: int, samples: int = 200, start: int = 0, **scores: float) -> Candidate:
    """One whose probe is right on `right` examples in a row from `start` on."""
    correct = np.zeros(samples, bool)
    correct[np.arange(start, start + right) % samples] = True
    values = {"probe": right / samples, "knn": 0.0, "h_score": 0.0, "log_me": 0.0}
    return Candidate(name, parameters, {**values, **scores}, correct)


# --- the statistic ----------------------------------------------------------------------------------


def column(data_set: str, name: str) -> list[float]:
    """A column of the published table."""
    return [row[TABLE["columns"].index(name)] for row in TABLE["data_sets"][data_set]["rows"]]


def published(data_set: str, name: str) -> float:
    return float(TABLE["data_sets"][data_set]["published_weighted_tau"][PUBLISHED.index(name)])


def tie_broken(values: list[float], sign: int) -> list[float]:
    """The first value that stands twice moved by less than the table's last digit."""
    first = next(index for index, value in enumerate(values) if values.count(value) > 1)
    return [value + sign * 1e-6 * (index == first) for index, value in enumerate(values)]


@pytest.mark.parametrize("data_set", CLEAN)
@pytest.mark.parametrize("name", PUBLISHED)
def test_weighted_tau_is_the_published_one(data_set: str, name: str) -> None:
    """To its three decimals. Where two models have the same rounded LogME the published value comes from digits
    that the table no longer has: one of the two ways to break the tie must give it."""
    values, accuracy = column(data_set, name), column(data_set, "fine_tuned_accuracy")
    found = [weighted_tau(values, accuracy)]
    if len(set(values)) < len(values):
        assert (data_set, name) in {("Caltech101", "log_me"), ("CIFAR100", "log_me")}
        found = [weighted_tau(tie_broken(values, sign), accuracy) for sign in (1, -1)]
    assert min(abs(value - published(data_set, name)) for value in found if value is not None) <= 0.00051


def test_the_means_over_the_clean_data_sets_are_those_of_the_decision_page() -> None:
    page = (Path(__file__).parents[2] / "docs/decisions/0007-ranking.md").read_text(encoding="utf-8")
    for name in PUBLISHED:
        mean = sum(published(one, name) for one in CLEAN) / len(CLEAN)
        found = [weighted_tau(column(one, name), column(one, "fine_tuned_accuracy")) for one in CLEAN]
        # Broken ties move single values of LogME by up to .024, see above.
        assert sum(tau for tau in found if tau is not None) / len(CLEAN) == pytest.approx(mean, abs=0.005)
        assert f"{mean:.3f}"[1:] in page


def tau_by_pairs(scores: list[float], reference: list[float]) -> float:
    """Vigna 2015 from its definition: hyperbolic weights of ranks by either order, summed over all pairs."""

    def ranks(first: list[float], second: list[float]) -> dict[int, int]:
        order = sorted(range(len(first)), key=lambda one: (first[one], second[one]), reverse=True)
        return {one: place for place, one in enumerate(order)}

    def product(x: list[float], y: list[float], place: dict[int, int]) -> float:
        total = 0.0
        for i in range(len(x)):
            for j in range(len(x)):
                weight = 1 / (place[i] + 1) + 1 / (place[j] + 1) if i != j else 0.0
                total += float(np.sign(x[i] - x[j]) * np.sign(y[i] - y[j])) * weight
        return total

    taus = []
    for place in (ranks(scores, reference), ranks(reference, scores)):
        norm = product(scores, scores, place) * product(reference, reference, place)
        taus.append(product(scores, reference, place) / norm**0.5)
    return sum(taus) / 2


@pytest.mark.parametrize("data_set", CLEAN)
def test_weighted_tau_by_its_definition(data_set: str) -> None:
    scores, accuracy = column(data_set, "log_me"), column(data_set, "fine_tuned_accuracy")
    assert weighted_tau(scores, accuracy) == pytest.approx(tau_by_pairs(scores, accuracy), abs=1e-9)


def test_weighted_tau_of_equal_and_of_opposite_orders() -> None:
    assert weighted_tau([3, 2, 1], [30, 20, 10]) == pytest.approx(1)
    assert weighted_tau([1, 2, 3], [30, 20, 10]) == pytest.approx(-1)
    assert weighted_tau([1, 1, 1], [30, 20, 10]) is None
    assert weighted_tau([1], [1]) is None


# --- places -----------------------------------------------------------------------------------------


def places(*candidates: Candidate) -> list[tuple[str, int]]:
    return [(one.candidate.name, one.place) for one in rank(candidates)]


def test_a_clear_difference_makes_two_places() -> None:
    assert places(candidate("worse", 1, 120), candidate("better", 9, 160)) == [("better", 1), ("worse", 2)]


def test_what_the_examples_cannot_tell_apart_shares_a_place() -> None:
    """160 and 163 of 200 right, on mostly different examples."""
    ranked = rank([candidate("small", 1, 160, start=20), candidate("large", 9, 163), candidate("poor", 5, 90)])
    assert [(one.candidate.name, one.place) for one in ranked] == [("large", 1), ("small", 1), ("poor", 3)]
    assert ranked[0].to_best.value == 0 and ranked[1].to_best.value == pytest.approx(-3 / 200)
    assert ranked[1].to_best.tied and not ranked[2].to_best.tied
    assert ranked[2].to_place.value == 0  # it is the first of its place


def test_of_equally_accurate_ones_the_smaller_comes_first() -> None:
    assert places(candidate("large", 9, 160), candidate("small", 1, 160)) == [("small", 1), ("large", 1)]


def test_nested_examples_decide_where_independent_ones_would_not() -> None:
    """Paired: 12 more right and none less is a difference, although both accuracies have wide intervals."""
    assert places(candidate("a", 1, 100), candidate("b", 1, 112)) == [("b", 1), ("a", 2)]
    assert {place for _, place in places(candidate("a", 1, 100), candidate("b", 1, 112, start=100))} == {1}


def test_the_order_of_the_arguments_does_not_matter() -> None:
    drawn = (("a", 3, 150, 0), ("b", 2, 148, 9), ("c", 1, 90, 0), ("d", 4, 90, 0))
    given = [candidate(name, size, right, start=start) for name, size, right, start in drawn]
    expected = places(*given)
    assert expected == [("a", 1), ("b", 1), ("c", 3), ("d", 3)]
    for turn in range(4):
        assert places(*given[turn:], *given[:turn]) == expected


def test_the_intervals_of_all_pairs_hold_together() -> None:
    one, other = candidate("a", 1, 100), candidate("b", 1, 108)
    pair, ten = compare(other, one, 2), compare(other, one, 5)
    assert (pair.low, pair.high) == tango_interval(8, 0, 200, 0.95)
    assert (ten.low, ten.high) == pytest.approx(tango_interval(8, 0, 200, 0.995))
    assert pair.value == ten.value == 8 / 200
    alone = compare(one, one, 1)
    assert alone.value == 0 and alone.tied


def test_ties_are_false_alarms_of_five_percent_at_most() -> None:
    """Four equally good backbones, independent of each other: simulated with a fixed seed."""
    random = np.random.default_rng(0)
    split = 0
    for _ in range(300):
        drawn = random.random((4, 150)) < 0.8
        made = [Candidate(str(i), i, dict.fromkeys(SCORES, row.mean()), row) for i, row in enumerate(drawn)]
        split += len({one.place for one in rank(made)}) > 1
    assert split / 300 <= 0.05 + 2 * (0.05 * 0.95 / 300) ** 0.5


# --- what the scores say together -------------------------------------------------------------------


def test_ranks_by_each_score_and_their_mean() -> None:
    one = candidate("one", 1, 150, knn=0.7, h_score=3.0, log_me=0.5)
    two = candidate("two", 1, 120, knn=0.7, h_score=4.0, log_me=0.1)
    assert ranks_by_score([one, two])["one"] == {"probe": 1, "knn": 1.5, "h_score": 2, "log_me": 1}
    assert {row.candidate.name: row.mean_rank for row in rank([one, two])} == {"one": 1.375, "two": 1.625}


def test_the_winners_of_each_score() -> None:
    one = candidate("one", 1, 150, knn=0.7, h_score=3.0, log_me=0.5)
    two = candidate("two", 1, 120, knn=0.7, h_score=4.0, log_me=0.1)
    assert winners([one, two]) == {"probe": ["one"], "knn": ["one", "two"], "h_score": ["two"], "log_me": ["one"]}
    assert agreement([one, two]) == pytest.approx({"knn": None, "h_score": -1, "log_me": 1})


def sentences(*candidates: Candidate) -> list[tuple[str, str, bool]]:
    return [(one.smaller.name, one.larger.name, one.difference.tied) for one in where_smaller_is_enough(candidates)]


def test_a_smaller_one_that_is_better_or_tied_is_named() -> None:
    small, tied, large = candidate("small", 10, 160), candidate("tied", 20, 158), candidate("large", 80, 100)
    assert sentences(large, small, tied) == [("small", "large", False), ("small", "tied", True)]


@pytest.mark.parametrize(("small", "large"), [(100, 160), (40, 199)])
def test_where_the_larger_one_is_better_nothing_is_said(small: int, large: int) -> None:
    assert sentences(candidate("small", 10, small), candidate("large", 80, large)) == []


def test_equal_sizes_are_no_argument() -> None:
    assert sentences(candidate("a", 10, 150), candidate("b", 10, 100)) == []


def test_the_most_accurate_of_the_smaller_ones_is_named() -> None:
    tiny, small, large = candidate("tiny", 1, 60), candidate("small", 10, 160), candidate("large", 80, 161)
    assert sentences(tiny, small, large) == [("small", "large", True)]
    tiny = candidate("tiny", 1, 159)
    assert sentences(tiny, small, large) == [("small", "large", True), ("tiny", "small", True)]
    tiny = candidate("tiny", 1, 160)
    assert sentences(tiny, small, large)[0] == ("tiny", "large", True)  # as accurate as the other, and smaller


def test_every_score_has_a_name_and_the_probe_is_first() -> None:
    values: dict[str, Any] = candidate("x", 1, 1).scores  # type: ignore[assignment]
    assert list(SCORES) == list(values) and next(iter(SCORES)) == "probe"
