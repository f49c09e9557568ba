"""Plots of the page about single measurements: how times spread from turn to turn, and what each class loses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.report import svg
from pipeline.report.facts import Candidate, Facts, mapping, number, records, sequence
from pipeline.report.formats import MINUS, MISSING, format_ms, signed
from pipeline.report.markup import Html, element, join, shorten
from pipeline.report.parts import scrolling, table

MAX_ROWS = 24
"""Rows of a plot: more are no picture. Tables and run.json have them all."""


def front_of(facts: Facts) -> list[tuple[float, float]]:
    """(median latency in ms, metric) of what nothing else beats in both: the reference and the candidates whose gates
    passed, from the fastest to the best."""
    reference = (number(facts.reference.get("latency_ms_p50")), number(facts.reference.get("metric")))
    pairs = [reference, *((one.p50_ms, one.metric) for one in facts.candidates if one.passed)]
    front: list[tuple[float, float]] = []
    known = [(ms, metric) for ms, metric in pairs if ms is not None and metric is not None]
    for ms, metric in sorted(known, key=lambda pair: (pair[0], -pair[1])):
        if not front or metric > front[-1][1]:
            front.append((ms, metric))
    return front


def latency_plot(facts: Facts) -> Html:
    """Each runtime with the medians of its turns and its 95th percentile; empty where no turns were recorded."""
    entries = [("PyTorch", "reference", facts.reference)]
    entries += [(one.name, "chosen" if one.chosen else "plain", one.numbers) for one in by_choice(facts)[:MAX_ROWS]]
    rows = [row for entry in entries if (row := latency_row(*entry))]
    if not rows:
        return Html("")
    text = "Latency of one example: " + "; ".join(f"{row.name} {row.detail}" for row in rows)
    plot = svg.interval_rows(rows, shorten(text, 600), "latency of one example, ms", lambda tick: f"{tick:g}")
    note = "Dots: the median of each turn; all runtimes take turns on the same examples. Bar: the median of all calls. "
    note += "The line ends at the 95th percentile, or at the slowest turn where that is slower."
    if len(facts.candidates) > MAX_ROWS:
        note += f" {len(facts.candidates) - MAX_ROWS} more are in the table."
    if facts.disturbed:
        note += " Other processes used the cores meanwhile."
    heading = element("h3", "Latency from turn to turn")
    return element("figure", heading, scrolling(plot, "Latency from turn to turn"), element("figcaption", note))


def latency_table(facts: Facts) -> Html:
    """Single-stream percentiles with their upper bounds, and offline throughput; empty where no calls were counted."""
    entries = [("PyTorch", facts.reference), *((one.name, one.numbers) for one in by_choice(facts)[:MAX_ROWS])]
    rows = [timed_row(name, numbers) for name, numbers in entries if number(numbers.get("latency_calls"))]
    if not rows:
        return Html("")
    size = number(facts.measured("validate").get("batch_size"))
    heads = ("Runtime", *(f"Single-stream p{one}" for one in (50, 90, 99)), "Calls",
             f"Offline, batches of {size:.0f}" if size else "Offline")  # fmt: skip
    note = (
        "Single-stream: one example a call, one call after the other; ≤: the upper bound at 99% confidence, by order "
    )
    note += "statistics, which takes 64 calls for p90 and 662 for p99. Offline: batch after batch."
    return join([table("Latency and throughput", heads, rows, range(1, 6)), element("p", note, class_="hint")])


def timed_row(name: str, numbers: Mapping[str, Any]) -> Html:
    """One runtime."""
    bounds, cells = mapping(numbers.get("latency_bounds_ms")), []
    for one in (50, 90, 99):
        bound = number(bounds.get(f"p{one}"))
        beside = "no bound" if bound is None else f"≤ {format_ms(bound)}"
        cells.append(join([format_ms(number(numbers.get(f"latency_ms_p{one}"))), element("div", beside, class_="sub")]))
    rate = number(numbers.get("throughput_per_s"))
    values = [*cells, f"{number(numbers.get('latency_calls')):.0f}", MISSING if rate is None else f"{rate:,.0f} / s"]
    head = element("th", shorten(name, 60), scope="row")
    return element("tr", head, *(element("td", value, class_="number") for value in values))


def latency_row(name: str, style: str, numbers: Mapping[str, Any]) -> svg.Row | None:
    """One runtime, None where its times are not known."""
    turns = tuple(value for turn in sequence(numbers.get("turns_ms")) if (value := number(turn)) is not None)
    median, high = number(numbers.get("latency_ms_p50")), number(numbers.get("latency_ms_p95"))
    if not turns or median is None:
        return None
    slowest = max(*turns, median, high or median)
    detail = f"p50 {format_ms(median)}, p95 {format_ms(high)}"
    return svg.Row(name, median, (min(*turns, median), slowest), style, detail, turns)


def slice_plot(facts: Facts, item: Candidate) -> Html:
    """What a candidate loses in each class or other part of the test split, the worst first, with the intervals; empty
    where there are none."""
    entries, metric = records(mapping(item.numbers.get("slices")).get("slices")), shorten(facts.metric, 40)
    rows = [row for entry in entries if (row := slice_row(entry))]
    if not rows:
        return Html("")
    drawn = rows[:MAX_ROWS]
    text = f"{metric} difference by slice: " + "; ".join(f"{row.name} {row.detail}" for row in drawn)
    label = f"{metric} difference to PyTorch, points"
    plot = svg.interval_rows(drawn, shorten(text, 600), label, points, "as PyTorch")
    note = f"{item.name} against PyTorch on the same examples, the worst first. Lines: both one-sided 95% bounds; of "
    note += "many slices one looks bad by chance."
    if len(rows) > MAX_ROWS:
        note += f" {len(rows) - MAX_ROWS} more are in run.json."
    return element("figure", scrolling(plot, "Difference by slice"), element("figcaption", note))


def by_choice(facts: Facts) -> list[Candidate]:
    """The candidates, the chosen one first."""
    return sorted(facts.candidates, key=lambda one: not one.chosen)


def slice_row(entry: Mapping[str, Any]) -> svg.Row | None:
    """One slice, as the difference of candidate and reference: a drop goes to the left. None without an interval."""
    bounds = [value for bound in sequence(entry.get("interval")) if (value := number(bound)) is not None]
    drop = number(entry.get("drop"))
    if drop is None or len(bounds) != 2:
        return None
    samples = number(entry.get("samples")) or 0
    low, high = sorted(0.0 - bound for bound in bounds)
    detail = f"{signed(-100 * drop)} ({signed(100 * low)} … {signed(100 * high)}) pt, {samples:.0f} examples"
    margin = number(entry.get("margin"))
    style = "failed" if margin is not None and drop > margin else "plain"
    return svg.Row(str(entry.get("name")), 0.0 - drop, (low, high), style, detail)


def points(value: float) -> str:
    """A tick of the axis: a difference of shares in percentage points."""
    return f"{100 * value:g}".replace("-", MINUS)
