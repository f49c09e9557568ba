"""The last release in the reports: what its network is worth on the same examples, and what the new one loses of it."""

from __future__ import annotations

from typing import Any

from pipeline.report.facts import Facts, mapping, number, sequence
from pipeline.report.formats import (
    MISSING,
    capitalized,
    format_interval,
    format_number,
    format_percent,
    format_points,
    format_ratio,
)
from pipeline.report.markup import Html, element, join, shorten
from pipeline.report.parts import table


def found(facts: Facts) -> dict[str, Any]:
    """What validate recorded of it, empty where none was named."""
    return mapping(facts.measured("validate").get("baseline"))


def names(facts: Facts) -> tuple[str, str]:
    """(the release with what it ships, the candidate that is compared with it)."""
    entry = found(facts)
    release = f"{shorten(entry.get('name'), 80)} ({shorten(entry.get('candidate'), 60)})"
    return release, shorten(entry.get("chosen") or "no candidate", 60)


def interval_of(value: object) -> tuple[float, float] | None:
    """Two numbers, or None for anything else."""
    bounds = [one for bound in sequence(value) if (one := number(bound)) is not None]
    return (bounds[0], bounds[1]) if len(bounds) == 2 else None


def summary(facts: Facts) -> str:
    """One or two sentences."""
    entry, (release, chosen) = found(facts), names(facts)
    if entry.get("problem") or number(entry.get("metric_difference")) is None:
        return f"{release}: {entry.get('problem') or 'nothing was compared'}"
    interval = interval_of(entry.get("metric_difference_interval"))
    text = (
        f"{chosen} has {format_percent(number(entry.get('metric')))} {facts.metric}, {release} "
        f"{format_percent(number(entry.get('baseline_metric')))} on the same examples: "
        f"{format_points(number(entry.get('metric_difference')))} (interval {format_interval(interval)})."
    )
    ratio = number(entry.get("latency_ratio"))
    if ratio is not None:
        text += f" {format_ratio(ratio)} its latency"
        text += ", on a busy machine." if entry.get("disturbed") is True else "."
    if entry.get("same_test_split") is not True:
        text += " It was validated on another test split: some of this one may be what it was trained on."
    return text


def baseline_section(facts: Facts) -> Html:
    """A sentence, and the numbers side by side."""
    entry = found(facts)
    if not entry:
        return Html("")
    release, chosen = names(facts)
    lead = element("p", summary(facts), class_="lead")
    if number(entry.get("metric_difference")) is None:
        return lead
    metric = capitalized(shorten(facts.metric, 40))
    rows = [
        (metric, *(format_percent(number(entry.get(key))) for key in ("baseline_metric", "metric")),
         format_points(number(entry.get("metric_difference"))),
         format_interval(interval_of(entry.get("metric_difference_interval")))),
        ("Answers that flip", MISSING, MISSING, format_number(number(entry.get("flips"))),
         format_percent(number(entry.get("flip_rate")))),
        ("Latency, times the release's", MISSING, MISSING, format_ratio(number(entry.get("latency_ratio"))),
         " … ".join(format_ratio(one) for one in interval_of(entry.get("latency_ratio_interval")) or ())),
    ]  # fmt: skip
    cells = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell, class_="number") for cell in row[1:]))
        for row in rows
    ]
    own = "with the preprocessing of this network" if entry.get("same_preprocessing") is True else "with its own"
    note = f"SHA-256 of what it ships: {shorten(entry.get('sha256'), 64)}; run here {own}"
    note += "." if entry.get("same_preprocessing") is True else " preprocessing."
    heads = ("", release, chosen, "Difference", "Interval")
    return join([lead, table("Against the last release", heads, cells, range(1, 5)), element("p", note, class_="hint")])
