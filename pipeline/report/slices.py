"""The slices section of the page: where the chosen candidate loses most, class by class and column by column."""

from __future__ import annotations

from typing import Any

from pipeline.report.evidence import MAX_ROWS, slice_plot
from pipeline.report.facts import Candidate, Facts, mapping, number, records, sequence
from pipeline.report.formats import MISSING, capitalized, format_interval, format_number, format_percent, format_points
from pipeline.report.markup import Html, element, join, shorten
from pipeline.report.parts import chip, table


def slices_section(facts: Facts) -> Html:
    """The slices of the chosen candidate, or where none is chosen of the last one that has any."""
    sliced = [item for item in facts.candidates if records(mapping(item.numbers.get("slices")).get("slices"))]
    shown = [item for item in sliced if item.chosen] or sliced[-1:]
    return join([part(facts, item) for item in shown for part in (slice_plot, slice_table)])


def slice_table(facts: Facts, item: Candidate) -> Html:
    """The worst slices first; a critical one is marked."""
    found = mapping(item.numbers.get("slices"))
    rows = [slice_row(one) for one in records(found.get("slices"))[:MAX_ROWS]]
    small = number(found.get("too_small")) or 0
    note = (
        f"{item.name} against PyTorch on the same examples of each slice; the worst of {found.get('judged', 0)} that "
        f"have enough examples, {small:.0f} more have too few. p: of a loss of at most the margin, after Holm's "
        "correction for their number."
    )
    heads = ("Slice", "Examples", f"{capitalized(shorten(facts.metric, 40))} of PyTorch", "Difference", "Margin", "p")
    return join(
        [element("p", note, class_="hint"), table("Slices of the test split", heads, rows, numeric=range(1, 6))]
    )


def slice_row(entry: dict[str, Any]) -> Html:
    """One slice. Differences are candidate minus reference."""
    drop, p_value = number(entry.get("drop")), number(entry.get("adjusted_p"))
    bounds = [number(bound) for bound in sequence(entry.get("interval"))]
    low, high = bounds if len(bounds) == 2 else (None, None)
    interval = (-high, -low) if low is not None and high is not None else None
    name = (
        [shorten(entry.get("name"), 80), " ", chip("critical", "plain")]
        if entry.get("critical")
        else [shorten(entry.get("name"), 80)]
    )
    return element(
        "tr",
        element("th", *name, scope="row"),
        element("td", format_number(number(entry.get("samples"))), class_="number"),
        element("td", format_percent(number(entry.get("reference"))), class_="number"),
        element(
            "td",
            format_points(None if drop is None else 0.0 - drop),
            element("div", format_interval(interval), class_="sub"),
            class_="number",
        ),
        element("td", format_points(number(entry.get("margin"))), class_="number"),
        element("td", MISSING if p_value is None else format_number(p_value, 2), class_="number"),
    )
