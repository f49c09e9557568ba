"""The plots: places follow the numbers, labels do not cover each other."""

from __future__ import annotations

import re

import pytest

from pipeline.report import svg
from pipeline.report.formats import (
    format_bytes,
    format_duration,
    format_number,
    format_percent,
    format_points,
    format_ratio,
    format_time,
)


def test_scatter_puts_better_candidates_up_and_left() -> None:
    points = [svg.Point("slow", 20.0, 0.80, "plain", ""), svg.Point("fast", 5.0, 0.90, "chosen", "")]
    source = svg.scatter(points, "plot", "x", "y", str, str)
    slow, fast = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', source)]
    assert fast[0] < slow[0]
    assert fast[1] < slow[1]


def test_labels_of_close_points_do_not_overlap() -> None:
    boxes: list[svg.Box] = []
    for offset in range(6):
        _, _, box = svg.free_place(300.0 + offset, 150.0, 100.0, boxes, (0.0, 0.0, 980.0, 330.0))
        assert not any(svg.overlaps(box, other) for other in boxes)
        boxes.append(box)


def test_end_labels_are_moved_apart_in_order() -> None:
    moved = svg.spread([100.0, 101.0, 40.0], 14)
    assert moved[1] - moved[0] == pytest.approx(14)
    assert moved[2] < moved[0]
    assert svg.spread([], 14) == []


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.842, 0.8721), (0.0, 29.03), (-3.0, 1e-9), (0.0, 1e9)])
def test_ticks_are_round_and_cover_the_range(low: float, high: float) -> None:
    ticks = svg.nice_ticks(low, high, 4)
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-6 * abs(high)
    assert 3 <= len(ticks) <= 8


def test_time_ticks_are_whole_minutes_for_minutes() -> None:
    assert svg.time_ticks(254) == [0, 60, 120, 180, 240]
    assert svg.time_ticks(0.4) == [0]


def test_histogram_bars_are_as_high_as_their_counts() -> None:
    source = svg.histogram([0.0, 1.0, 2.0, 3.0], [10, 0, 5], "errors", str)
    heights = [float(height) for height in re.findall(r'height="([\d.]+)" class="bar"', source)]
    assert len(heights) == 2
    assert heights[0] == pytest.approx(2 * heights[1])


def test_histogram_names_powers_of_ten_in_log_bins() -> None:
    edges = [10.0 ** (power / 2) for power in range(-8, 3)]
    assert [round(edges[index], 9) for index in svg.labelled_edges(edges)] == [1e-4, 1e-2, 1.0]
    assert svg.labelled_edges([0.0, 0.25, 0.5]) == [0, 1, 2]


def test_line_chart_of_one_epoch_draws_its_point() -> None:
    series = [svg.Series("validation", ((1.0, 0.5),), "first"), svg.Series("train", (), "second")]
    source = svg.line_chart(series, "loss", str, "epoch", marked_x=1.0)
    assert source.count("<circle") == 1
    assert "nan" not in source


def test_text_in_a_plot_is_escaped() -> None:
    source = svg.heatmap(["<b>&", '"x"'], [[1, 0], [0, 2]], "matrix <of> two")
    assert "<b>" not in source
    assert "<of>" not in source
    assert "&lt;b&gt;&amp;" in source


def test_numbers_as_a_person_reads_them() -> None:
    assert format_percent(0.8412) == "84.1%"
    assert (format_percent(1.0), format_percent(0.99999), format_percent(None)) == ("100.0%", ">99.9%", "–")
    assert (format_points(-0.003), format_points(0.0), format_points(-0.0001)) == ("−0.3 pt", "0.0 pt", "0.0 pt")
    assert (format_number(1e-4), format_number(2.13e-5), format_number(1234.4)) == ("1e−4", "2.13e−5", "1,234")
    assert (format_bytes(512), format_bytes(13_612_544), format_bytes(1_610_000_000)) == ("512 B", "13.6 MB", "1.61 GB")
    assert (format_duration(0), format_duration(3.84), format_duration(59.7), format_duration(7260)) == (
        "0 s", "3.8 s", "1 min", "2 h 01 min",
    )  # fmt: skip
    assert (format_ratio(3.08), format_ratio(0.94)) == ("3.1×", "0.94×")
    assert format_time("2026-11-24T02:44:10+00:00") == "2026-11-24 02:44 UTC"
    assert format_time("soon") == "soon"
