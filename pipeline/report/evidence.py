"""Plots of the page about single measurements: how times spread from turn to turn, and what each class loses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.report import svg
from pipeline.report.facts import Candidate, Facts, mapping, number, records, sequence
from pipeline.report.formats import MINUS, MISSING, format_ms, format_percent, format_points, signed
from pipeline.report.markup import Html, element, join, shorten
from pipeline.report.parts import scrolling, table

MAX_ROWS = 24
"""Rows of a plot: more are no picture. The tables beside have them all."""


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


def latency_row(name: str, style: str, numbers: Mapping[str, Any]) -> svg.Row | None:
    """One runtime, None where its times are not known."""
    turns = tuple(value for turn in sequence(numbers.get("turns_ms")) if (value := number(turn)) is not None)
    median, high = number(numbers.get("latency_ms_p50")), number(numbers.get("latency_ms_p95"))
    if not turns or median is None:
        return None
    slowest = max(*turns, median, high or median)
    detail = f"p50 {format_ms(median)}, p95 {format_ms(high)}"
    return svg.Row(name, median, (min(*turns, median), slowest), style, detail, turns)


def slices_section(facts: Facts) -> Html:
    """What the chosen candidate (or the first with such numbers) loses in each class or other part of the test split,
    the worst first, with the intervals."""
    found = next((one for one in by_choice(facts) if records(mapping(one.numbers.get("slices")).get("slices"))), None)
    if found is None:
        return Html("")
    judged = mapping(found.numbers["slices"])
    slices = [one for one in records(judged["slices"]) if number(one.get("drop")) is not None]
    rows = [row for one in slices[:MAX_ROWS] if (row := slice_row(one))]
    metric = shorten(facts.metric, 40)
    counts = [f"{value:.0f} {words}" for key, words in COUNTS if (value := number(judged.get(key)))]
    hint = f"{found.name} against PyTorch on the same examples, the worst first; {', '.join(counts)}."
    parts = [element("p", hint, class_="hint")]
    if rows:
        text = f"{metric} difference by slice: " + "; ".join(f"{row.name} {row.detail}" for row in rows)
        label = f"{metric} difference to PyTorch, points"
        plot = svg.interval_rows(
            rows, shorten(text, 600), label, lambda tick: f"{100 * tick:g}".replace("-", MINUS), "as PyTorch"
        )
        note = "Lines: both one-sided 95% bounds. Of many slices one looks bad by chance: the gate corrects for that."
        parts.append(element("figure", scrolling(plot, "Difference by slice"), element("figcaption", note)))
    more = len(slices) - len(rows)
    summary = f"All {len(slices)} slices of the record" + (f"; {more} are not drawn" if more else "")
    parts.append(element("details", element("summary", summary), slice_table(slices, metric)))
    return join(parts)


COUNTS = (("judged", "slices were judged"), ("too_small", "had too few examples"))


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


def slice_table(slices: list[dict[str, Any]], metric: str) -> Html:
    """Every slice of the record in numbers."""
    rows = [
        element(
            "tr",
            element("th", shorten(one.get("name"), 80), scope="row"),
            element("td", f"{number(one.get('samples')) or 0:.0f}", class_="number"),
            element("td", format_percent(number(one.get("reference"))), class_="number"),
            element("td", format_points(-(number(one.get("drop")) or 0.0)), class_="number"),
            element("td", p_value(number(one.get("adjusted_p"))), class_="number"),
            element("td", "critical" if one.get("critical") is True else ""),
        )
        for one in slices
    ]
    heads = ("Slice", "Examples", f"PyTorch {metric}", "Difference", "Adjusted p", "")
    return table("Slices", heads, rows, numeric=(1, 2, 3, 4))


def p_value(value: float | None) -> str:
    """A probability; small ones are bounded, as their last digits say nothing."""
    return MISSING if value is None else "<0.001" if value < 1e-3 else f"{value:.3f}"
