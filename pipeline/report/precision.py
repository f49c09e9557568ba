"""The precision section of the page: what lower precision costs, and which modules of the network decide it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.report import svg
from pipeline.report.facts import Facts, number, records, sequence
from pipeline.report.formats import MISSING, capitalized, format_number, format_percent
from pipeline.report.markup import Html, element, join, shorten
from pipeline.report.parts import chip, table

MAX_MODULES = 12
"""Rows of the table; all are in run.json."""


def precision_section(facts: Facts) -> Html:
    """The curve of every candidate that the search had to mend, and its most sensitive modules; what repairs did."""
    candidates = records(facts.measured("quantize").get("candidates"))
    searched = [one for one in candidates if len(points_of(one)) > 1]
    parts = [part for one in searched for part in (curve_of(one), sensitive_table(one))]
    return join([*parts, repairs_table(candidates)])


def points_of(candidate: dict[str, Any]) -> list[dict[str, Any]]:
    """What the search tried, from the least to the largest share in lower precision; only with all numbers."""
    keys = ("narrow_share", "metric", "agreement")
    points = [one for one in records(candidate.get("tried")) if all(number(one.get(key)) is not None for key in keys)]
    return sorted(points, key=lambda one: float(one["narrow_share"]))


def curve_of(candidate: dict[str, Any]) -> Html:
    """Metric and agreement on the validation split against the share of the arithmetic in lower precision."""
    points = points_of(candidate)
    metric = shorten(candidate.get("metric_name") or "metric", 40)

    def series(key: str, name: str, style: str) -> svg.Series:
        return svg.Series(name, tuple((100 * one["narrow_share"], float(one[key])) for one in points), style)

    lines = [series("metric", metric, "first"), series("agreement", "agreement", "second")]
    reference, share = number(candidate.get("reference_metric")), number(candidate.get("narrow_share"))
    text = f"{candidate.get('name')}: by share of the arithmetic in {narrow_of(candidate)}, " + "; ".join(
        f"{item.name} from {item.points[0][1]:.1%} at {item.points[0][0]:.0f}% "
        f"to {item.points[-1][1]:.1%} at {item.points[-1][0]:.0f}%"
        for item in lines
    )
    chart = svg.line_chart(
        lines,
        text,
        lambda value: f"{100 * value:.1f}%",
        f"share of the multiply-accumulates in {narrow_of(candidate)}, %",
        [(f"PyTorch {metric}", reference)] if reference is not None else [],
        None if share is None else 100 * share,
    )
    note = "On the validation split; from right to left more of the most sensitive nodes stay in floating point."
    heading = element("h3", f"{capitalized(metric)} and agreement of {shorten(candidate.get('name'), 60)}")
    return element("figure", heading, chart, element("figcaption", note))


def narrow_of(candidate: dict[str, Any]) -> str:
    """The precision that the shares are of."""
    return shorten(candidate.get("narrow") or "lower precision", 20)


def sensitive_table(candidate: dict[str, Any]) -> Html:
    """The modules that lower precision harms most, alone, and which of them stay in floating point."""
    kept = set(map(str, sequence(candidate.get("float_modules"))))
    rows = [sensitive_row(one, str(one.get("module")) in kept) for one in records(candidate.get("sensitivity"))]
    if not rows:
        return Html("")
    heads = ("Module", "Harm alone", "Share of the arithmetic", "")
    more = f"; {len(rows) - MAX_MODULES} more are in run.json" if len(rows) > MAX_MODULES else ""
    note = f"Harm: mean squared change of the outputs over calibration examples when it alone is quantized{more}."
    shown: Sequence[Html] = rows[:MAX_MODULES]
    name = f"The most sensitive modules of {shorten(candidate.get('name'), 60)}"
    return join([table(name, heads, shown, numeric=(1, 2)), element("p", note, class_="hint")])


def sensitive_row(entry: dict[str, Any], kept: bool) -> Html:
    """One module."""
    harm = number(entry.get("harm"))
    return element(
        "tr",
        element("th", shorten(entry.get("module"), 80), scope="row"),
        element("td", MISSING if harm is None else format_number(harm, 3), class_="number"),
        element("td", format_percent(number(entry.get("mac_share"))), class_="number"),
        element("td", chip("floating point", "plain") if kept else ""),
    )


def repairs_table(candidates: Sequence[dict[str, Any]]) -> Html:
    """What SmoothQuant and bias correction did to each candidate, and whether that was kept."""
    rows = [repair_row(one, entry) for one in candidates for entry in records(one.get("repairs"))]
    if not rows:
        return Html("")
    heads = ("Candidate", "Repair", "Places", "Error before", "Error after", "")
    note = "Error: mean squared change of the outputs over calibration examples with everything in INT8."
    repairs = table("Repairs", heads, rows, numeric=(2, 3, 4))
    return join([element("h3", "Repairs"), repairs, element("p", note, class_="hint")])


def repair_row(candidate: dict[str, Any], entry: dict[str, Any]) -> Html:
    """One repair of one candidate."""
    values = [number(entry.get(key)) for key in ("places", "error_before", "error_after")]
    shown = [MISSING if value is None else format_number(value, 3) for value in values]
    return element(
        "tr",
        element("td", shorten(candidate.get("name"), 60)),
        element("td", shorten(entry.get("repair"), 40)),
        *(element("td", value, class_="number") for value in shown),
        element("td", chip("✓ kept", "pass") if entry.get("kept") is True else chip("left", "plain")),
    )
