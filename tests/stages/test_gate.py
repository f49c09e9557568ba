"""No evidence is never a pass."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stages.gate import Gate, outcome_of, stops


@pytest.mark.parametrize(
    ("direction", "measured", "passes"),
    [("at most", 1.0, True), ("at most", 1.01, False), ("at least", 1.0, True), ("at least", 0.99, False)],
)
def test_thresholds_are_inclusive(direction: str, measured: float, passes: bool) -> None:
    assert Gate("g", direction, 1.0).check("x", measured, 5).passed is passes  # type: ignore[arg-type]


@pytest.mark.parametrize("measured", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("direction", ["at most", "at least"])
def test_no_evidence_fails(direction: str, measured: float | None) -> None:
    result = Gate("g", direction, 1.0).check("x", measured, 5)  # type: ignore[arg-type]
    assert result.verdict == "error"
    assert result.measured is None


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("direction", ["at most", "at least"])
def test_a_threshold_that_nothing_can_be_held_to_fails(direction: Any, threshold: float) -> None:
    result = Gate("error", direction, threshold).check("x", 0.0, 10)
    assert not result.passed and "nothing can be held to" in result.message


def test_zero_samples_fail() -> None:
    assert not Gate("g", "at most", 1.0).check("x", 0.0, 0).passed


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.2, 0.9), "pass"),
        ((0.2, 1.0), "pass"),
        ((0.2, 1.1), "inconclusive"),
        ((1.01, 2.0), "fail"),
        ((math.nan, 0.5), "error"),
        ((0.2, math.inf), "error"),
        (None, "error"),
    ],
)
def test_an_interval_passes_whole_fails_whole_or_says_nothing(
    interval: tuple[float, float] | None, verdict: str
) -> None:
    assert Gate("g", "at most", 1.0).check_interval("x", 0.8, interval, 10).verdict == verdict
    if interval is not None and all(map(math.isfinite, interval)):
        mirrored = (-interval[1], -interval[0])
        assert Gate("g", "at least", -1.0).check_interval("x", -0.8, mirrored, 10).verdict == verdict


@pytest.mark.parametrize(("measured", "samples"), [(None, 5), (math.nan, 5), (0.1, 0)])
def test_an_interval_is_no_evidence_without_a_number_and_samples(measured: float | None, samples: int) -> None:
    assert Gate("g", "at most", 1.0).check_interval("x", measured, (0.0, 0.5), samples).verdict == "error"


@pytest.mark.parametrize(
    ("gate", "ends", "outcome"),
    [
        ({"verdict": "pass"}, False, ""),
        ({"verdict": "fail"}, True, ""),
        ({"verdict": "error"}, True, ""),
        ({"verdict": "inconclusive"}, True, ""),
        ({"verdict": "inconclusive", "tolerated": True}, False, "let through by on_inconclusive: pass"),
        ({"verdict": "fail", "tolerated": True}, True, ""),
        ({"verdict": "error", "tolerated": True}, True, ""),
        ({"verdict": "fail", "waived": "by A until B: C"}, False, "waived by A until B: C"),
        ({}, True, ""),
        ({"verdict": "good"}, True, ""),
    ],
)
def test_only_what_is_let_through_does_not_end_the_run(gate: dict[str, Any], ends: bool, outcome: str) -> None:
    assert (stops(gate), outcome_of(gate)) == (ends, outcome)
