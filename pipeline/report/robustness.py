"""The section of the page on corrupted inputs: what each does to PyTorch, and to each candidate beside it."""

from __future__ import annotations

from typing import Any

from pipeline.report.evidence import MAX_ROWS
from pipeline.report.facts import Candidate, Facts, mapping, number, records, sequence
from pipeline.report.formats import MISSING, capitalized, format_interval, format_number, format_percent, format_points
from pipeline.report.markup import Html, element, join, shorten
from pipeline.report.parts import table


def robustness_section(facts: Facts) -> Html:
    """A row for each corruption of the reference, and one for each of every candidate."""
    found = mapping(facts.measured("validate").get("robustness"))
    effects = [effect_row(one) for one in records(found.get("corruptions"))]
    if not effects:
        return Html("")
    note = (
        f"Corrupted before preprocessing, each at one fixed severity, on {format_number(number(found.get('samples')))} "
        "test examples, the same for PyTorch and the candidates. Changed: answers of PyTorch that are others than on "
        "the clean examples."
    )
    metric = capitalized(shorten(facts.metric, 40))
    heads = ("Corruption", f"{metric}, clean", f"{metric}, corrupted", "Changed")
    parts = [
        element("p", note, class_="hint"),
        table("Corruptions of the inputs of PyTorch", heads, effects, range(1, 4)),
    ]
    rows = [
        candidate_row(item, one)
        for item in facts.candidates
        for one in records(mapping(item.numbers.get("robustness")).get("corruptions"))
    ]
    if rows:
        named = ("Candidate", "Corruption", f"{metric}, corrupted", "Difference to PyTorch", "p of the margin kept")
        parts.append(table("Candidates under corruption", named, rows[:MAX_ROWS], range(2, 5)))
    if len(rows) > MAX_ROWS:
        parts.append(element("p", f"{len(rows) - MAX_ROWS} more are in run.json.", class_="hint"))
    return join(parts)


def effect_row(entry: dict[str, Any]) -> Html:
    """What a corruption does to the reference alone."""
    name = element("th", shorten(entry.get("name"), 60), element("div", shorten(entry.get("what"), 120), class_="sub"),
                   scope="row")  # fmt: skip
    cells = [format_percent(number(entry.get(key))) for key in ("clean", "reference", "changed")]
    if entry.get("inert") is True:
        cells[1:] = ["no input changes", MISSING]
    return element("tr", name, *(element("td", cell, class_="number") for cell in cells))


def candidate_row(item: Candidate, entry: dict[str, Any]) -> Html:
    """One candidate under one corruption. Differences are candidate minus PyTorch under the same corruption."""
    drop = number(entry.get("drop"))
    bounds = [value for bound in sequence(entry.get("interval")) if (value := number(bound)) is not None]
    interval = (0.0 - bounds[1], 0.0 - bounds[0]) if len(bounds) == 2 else None
    difference = format_points(None if drop is None else 0.0 - drop)
    return element(
        "tr",
        element("th", shorten(item.name, 60), scope="row"),
        element("td", shorten(entry.get("name"), 60)),
        element("td", format_percent(number(entry.get("metric"))), class_="number"),
        element("td", difference, element("div", format_interval(interval), class_="sub"), class_="number"),
        element("td", format_number(number(entry.get("keeps_p")), 2), class_="number"),
    )
