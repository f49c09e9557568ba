"""No evidence is never a pass."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stages.gate import Gate


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
    assert result.verdict == "fail"
    assert result.measured is None


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("direction", ["at most", "at least"])
def test_a_threshold_that_nothing_can_be_held_to_fails(direction: Any, threshold: float) -> None:
    result = Gate("error", direction, threshold).check("x", 0.0, 10)
    assert not result.passed and "nothing can be held to" in result.message


def test_zero_samples_fail() -> None:
    assert not Gate("g", "at most", 1.0).check("x", 0.0, 0).passed
