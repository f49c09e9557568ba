"""The self-test in the reports: which of the injected defects the configured gates caught."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.facts import Facts, mapping, number, records, sequence
from pipeline.report.formats import format_duration, format_number, format_percent
from pipeline.report.markup import Html, element, join, shorten
from pipeline.report.parts import chip, table

WORDS = {
    "caught": ("✓ caught", "pass"),
    "escaped": ("✗ not caught", "fail"),
    "equivalent": ("no effect", "plain"),
    "not applicable": ("does not apply", "plain"),
}
OUTSIDE_WORDS = {"caught": ("✓ would be seen", "pass"), "escaped": ("✗ would not be seen", "plain")}
OUTSIDE = ("preprocessing", "samples")
"""Where a defect stands for a device that prepares its inputs otherwise; no candidate differs there."""
CONTROL_WORDS = {"caught": ("✗ false alarm", "fail"), "escaped": ("✓ passes", "pass")}


@dataclass(frozen=True)
class Row:
    """One defect, or a control. `by` says which gates were red, by precision, in words; `outside`: it is none of a
    candidate, see `OUTSIDE`."""

    name: str
    what: str
    status: str
    by: str
    error: float | None
    agreement: float | None
    outside: bool

    @property
    def verdict(self) -> tuple[str, str]:
        """The verdict on a defect in words, and the kind of its chip."""
        words = WORDS | OUTSIDE_WORDS if self.outside else WORDS
        return words.get(self.status, (self.status, "plain"))


def found(facts: Facts) -> dict[str, Any]:
    """What validate recorded of it, empty where it was not asked for."""
    return mapping(facts.measured("validate").get("self_test"))


def rows_of(entries: object) -> list[Row]:
    """What was not caught first, and what is outside the candidates last."""
    order = ("escaped", "caught", "equivalent", "not applicable")
    rows = [row_of(one) for one in records(entries)]
    return sorted(rows, key=lambda row: (row.outside, order.index(row.status) if row.status in order else len(order)))


def row_of(entry: dict[str, Any]) -> Row:
    """One entry of the record."""
    judged = {
        str(name): [str(gate) for gate in sequence(gates)] for name, gates in mapping(entry.get("judged")).items()
    }
    said = [f"as {name} by {', '.join(gates)}" for name, gates in judged.items() if gates]
    said += [f"not as {name}" for name, gates in judged.items() if not gates]
    if len(judged) > 1 and len({tuple(gates) for gates in judged.values()}) == 1:
        said = [f"by {', '.join(gates)}" for gates in list(judged.values())[:1] if gates]
    status = str(entry.get("status") or "")
    numbers = mapping(entry.get("numbers"))
    reason = str(entry.get("reason") or "") if status in ("equivalent", "not applicable") else ""
    return Row(
        str(entry.get("name") or "unnamed"),
        str(entry.get("what") or ""),
        status,
        reason or "; ".join(said),
        number(numbers.get("relative_error")),
        number(numbers.get("agreement")),
        entry.get("place") in OUTSIDE,
    )


def summary(facts: Facts) -> str:
    """The score in a sentence."""
    test = found(facts)
    if test.get("problem") or number(test.get("counted")) is None:
        return str(test.get("problem") or "nothing was counted")
    controls, alarms = records(test.get("controls")), number(test.get("false_alarms")) or 0
    score = format_percent(number(test.get("score")))
    parts = [f"{test.get('caught')} of {test.get('counted')} injected defects caught ({score})"]
    for name, counts in mapping(test.get("by_precision")).items():
        one = [number(count) for count in sequence(counts)]
        if len(one) == 2:
            parts.append(f"as {name} {format_number(one[0])} of {format_number(one[1])}")
    outside = [number(count) for count in sequence(test.get("outside"))]
    if len(outside) == 2 and outside[1]:
        seen, differ = map(format_number, outside)
        parts.append(f"{seen} of {differ} would be seen if a device prepared its inputs otherwise")
    red = f"{alarms:.0f} of {len(controls)} unchanged controls red"
    seconds = format_duration(number(test.get("seconds")))
    return f"{', '.join(parts)}; {red}; on {test.get('samples')} samples, in {seconds}"


def self_test_section(facts: Facts) -> Html:
    """The table of defects, then the controls."""
    test = found(facts)
    if not test:
        return Html("")
    hint = (
        "Known defects, put into this model, its graph and its preprocessing, and judged by the configured gates as a "
        "candidate would be. One is caught where it is seen in every precision that there is a candidate of; one that "
        "moves no output is not counted. Nor are those of preprocessing and samples, which all candidates share "
        "here. They stand for a device that prepares its inputs otherwise, and say whether the gates would see it."
    )
    heads = ("Defect", "", "Error, of the range", "Agreement", "Gates")
    defects = [table_row(row, row.verdict) for row in rows_of(test.get("defects"))]
    controls = [
        table_row(row, CONTROL_WORDS.get(row.status, (row.status, "plain"))) for row in rows_of(test.get("controls"))
    ]
    parts = [element("p", f"{summary(facts)}.", class_="lead"), element("p", hint, class_="hint")]
    if defects:
        parts.append(table("Injected defects", heads, defects, numeric=(2, 3)))
    if controls:
        parts.append(element("h3", "Controls: changes that are none"))
        parts.append(table("Controls", ("Control", *heads[1:]), controls, numeric=(2, 3)))
    return join(parts)


def table_row(row: Row, verdict: tuple[str, str]) -> Html:
    """One row of the page, with its verdict in words and the kind of its chip."""
    return element(
        "tr",
        element("th", shorten(row.name, 60), element("div", shorten(row.what, 120), class_="sub"), scope="row"),
        element("td", chip(*verdict)),
        element("td", format_number(row.error), class_="number"),
        element("td", format_percent(row.agreement), class_="number"),
        element("td", shorten(row.by, 300), class_="message"),
        class_="bad" if verdict[1] == "fail" else None,
    )


def markdown_cells(facts: Facts) -> Sequence[Sequence[str]]:
    """(defect, verdict, gates) for each that has an effect, not escaped for any place."""
    return [
        (row.name, row.verdict[0], row.by)
        for row in rows_of(found(facts).get("defects"))
        if row.status in ("escaped", "caught")
    ]
