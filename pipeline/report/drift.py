"""The drift waterfall in the reports: which step between training and the device adds how much error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report import svg
from pipeline.report.facts import Facts, mapping, number, records, sequence
from pipeline.report.formats import MISSING, capitalized, format_number, format_percent, format_points
from pipeline.report.markup import Html, element, join, shorten
from pipeline.report.parts import scrolling, table

UNMEASURED = "UNPROVEN"


@dataclass(frozen=True)
class Step:
    """One step; errors are shares of the output range, None where nothing was measured."""

    name: str
    after: str
    status: str
    own: float | None
    total: float | None
    sqnr_db: float | None
    agreement: float | None
    metric: float | None
    difference: float | None


def found(facts: Facts) -> dict[str, Any]:
    """What validate recorded of it, empty where there is none."""
    return mapping(facts.measured("validate").get("drift"))


def steps_of(facts: Facts) -> list[Step]:
    """The steps in order."""
    steps = []
    for one in records(found(facts).get("steps")):
        before, since = mapping(one.get("from_before")), mapping(one.get("from_start"))
        steps.append(
            Step(
                name=str(one.get("name") or "unnamed"),
                after=str(one.get("after") or ""),
                status=str(one.get("status") or ""),
                own=number(before.get("relative_error")),
                total=number(since.get("relative_error")) if one.get("after") else None,
                sqnr_db=number(before.get("sqnr_db")),
                agreement=number(since.get("agreement")) if one.get("after") else None,
                metric=number(since.get("metric")),
                difference=number(since.get("metric_difference")) if one.get("after") else None,
            )
        )
    return steps


def findings(facts: Facts) -> list[str]:
    """Where a candidate that failed broke, in sentences."""
    lines = []
    for one in records(found(facts).get("broken")):
        layer = mapping(one.get("layer"))
        first = mapping(layer.get("first"))
        said = f"{one.get('candidate')}: the first step that its gates refuse is {one.get('step') or 'none'}"
        if gates := ", ".join(map(str, sequence(one.get("gates")))):
            said += f" ({gates})"
        if one.get("reason"):
            said += f"; {one['reason']}"
        if first:
            own = number(first.get("own"))
            module = f", module {first['module']}" if first.get("module") else ""
            said += f"; the first layer is {first.get('node') or first.get('tensor')} ({first.get('operator')}{module})"
            said += f", which adds {'NaN' if own is None else format_number(own)} of what it gives"
        elif layer:
            said += "; no node alone adds more than its share"
        lines.append(said)
    return lines


def script(facts: Facts) -> str:
    """The script that shows the numbers, empty where there is none."""
    return str(mapping(found(facts).get("reproduce")).get("script") or "")


def cells_of(step: Step) -> list[str]:
    """The numbers of one step as a person reads them."""
    unmeasured = step.status == UNMEASURED
    return [
        step.after or MISSING,
        UNMEASURED if unmeasured else format_number(step.own),
        MISSING if unmeasured else format_number(step.total),
        MISSING if step.sqnr_db is None else f"{step.sqnr_db:.1f} dB",
        format_percent(step.agreement),
        format_percent(step.metric),
        format_points(step.difference),
    ]


def heads_of(facts: Facts) -> Sequence[str]:
    """The columns of the table."""
    metric = capitalized(shorten(facts.metric, 40))
    return ("Step", "Made of", "Error it adds", "From the start", "SQNR", "Agreement", metric, "Difference")


def engines_in_words(facts: Facts) -> str:
    """On what engines were run: those for the GPU of this machine here, the others where a receipt comes from."""
    ran = [one for one in records(facts.measured("validate").get("engine_runs")) if not one.get("problem")]
    if not ran:
        return "Engines have run on no device here: what a receipt says is on its golden samples."
    names = ", ".join(str(one.get("engine")) for one in ran)
    return shorten(f"Run here on the whole test split: {names}; what a receipt says is on its golden samples.", 400)


def drift_section(facts: Facts) -> Html:
    """The waterfall, its table, and where it broke."""
    steps = steps_of(facts)
    if not steps:
        return Html("")
    falls = [
        svg.Fall(
            step.name,
            step.own,
            step.total,
            "fresh" if step.status == UNMEASURED else "ran",
            (
                UNMEASURED if step.status == UNMEASURED else format_number(step.own),
                format_number(step.total),
                format_percent(step.metric),
            ),
        )
        for step in steps
    ]
    text = "Largest output error of each step, as a share of the output range: " + "; ".join(
        f"{fall.name} {fall.columns[0]}, from the start {fall.columns[1]}" for fall in falls
    )
    plot = svg.waterfall(
        falls,
        ("it adds", "from the start", shorten(facts.metric, 20)),
        shorten(text, 800),
        lambda value: format_number(value, 2),
        "largest output error, as a share of the output range (log scale)",
    )
    samples, start = found(facts).get("samples"), steps[0]
    hint = (
        f"All on the same {samples} examples, from {start.name} on. Bars: the error against the step it is made of; "
        f"diamonds: against the start. {engines_in_words(facts)}"
    )
    rows = [
        element(
            "tr",
            element("th", shorten(step.name, 60), scope="row"),
            *(element("td", cell, class_="number" if place else None) for place, cell in enumerate(cells_of(step))),
        )
        for step in steps
    ]
    parts = [
        element("p", hint, class_="hint"),
        element("figure", scrolling(plot, "Drift by step")),
        table("Drift by step", heads_of(facts), rows, numeric=range(2, 8)),
    ]
    if lines := findings(facts):
        parts.append(element("h3", "Where it broke"))
        parts.append(element("ul", *(element("li", shorten(line, 600)) for line in lines), class_="notes"))
    if script(facts):
        said = "The same numbers with numpy and onnxruntime alone: python "
        parts.append(element("p", said, element("code", script(facts))))
    return join(parts)
