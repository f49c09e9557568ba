"""The summary at the end of a run, on a terminal or in a CI log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.report import self_test
from pipeline.report.facts import Facts, number, records
from pipeline.report.formats import (
    MISSING,
    format_bytes,
    format_duration,
    format_ms,
    format_percent,
    format_points,
    format_ratio,
)
from pipeline.report.markup import terminal_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

STYLES = {"pass": "green", "fail": "red", "partial": "yellow"}
STATUS_STYLES = {"ran": "green", "fresh": "dim", "failed": "red", "gate-failed": "red", "interrupted": "yellow"}
GATE_WORDS = {"fail": "failed", "inconclusive": "inconclusive", "error": "without evidence"}
MAX_FAILED_GATES = 10


def print_summary(run: dict[str, Any], console: Console) -> None:
    """Print stages, candidates, failed gates and the verdict of a run (`run.json`)."""
    from rich.text import Text

    facts = Facts(run)
    console.print(stage_table(facts))
    if facts.candidates:
        console.print()
        console.print(candidate_table(facts))
    if self_test.found(facts):
        console.print()
        console.print(self_test_table(facts))
        console.print(Text(terminal_text(f"self-test: {self_test.summary(facts)}", 300)), soft_wrap=True)
    console.print()
    for gates, style in ((facts.failed_gates, "red"), (facts.excused_gates, "yellow")):
        for gate in gates[:MAX_FAILED_GATES]:
            line = f"gate {GATE_WORDS[gate.verdict]}: {gate.stage} {gate.name} [{gate.subject}]: {gate.finding}"
            console.print(Text(terminal_text(line, 400), style=style), soft_wrap=True)
        if len(gates) > MAX_FAILED_GATES:
            more = "failed gates" if style == "red" else "gates that are waived or let through"
            console.print(Text(f"and {len(gates) - MAX_FAILED_GATES} more {more}"), soft_wrap=True)
    console.print(Text(terminal_text(facts.headline), style=f"bold {STYLES[facts.verdict]}"), soft_wrap=True)
    if facts.explanation and not facts.failed_gates:
        console.print(Text(terminal_text(facts.explanation, 600)), soft_wrap=True)


def stage_table(facts: Facts) -> Table:
    """Status, time, memory and gates of every stage."""
    rows = []
    for stage in facts.stages:
        gates = records(stage.get("gates"))
        passed = sum(gate.get("verdict") == "pass" for gate in gates)
        status = str(stage.get("status"))
        rows.append(
            (
                [
                    str(stage.get("name")),
                    status,
                    format_duration(number(stage.get("duration_s"))),
                    format_bytes(number(stage.get("peak_memory_bytes"))),
                    f"{passed}/{len(gates)}" if gates else MISSING,
                ],
                STATUS_STYLES.get(status, "dim"),
            )
        )
    return plain_table(("stage", "status", "time", "peak memory", "gates"), rows, numeric=(2, 3, 4))


def candidate_table(facts: Facts) -> Table:
    """The candidates against the reference."""
    reference = facts.reference
    values = {key: number(reference.get(key)) for key in ("metric", "latency_ms_p50", "size_bytes")}
    rows = [
        (
            [
                "PyTorch",
                format_percent(values["metric"]),
                MISSING,
                format_ms(values["latency_ms_p50"]),
                "1×",
                format_bytes(values["size_bytes"]),
                "",
            ],
            "dim",
        )
    ]
    for item in facts.candidates:
        verdict = ("pass" if item.passed else "fail") + item.excused + (", chosen" if item.chosen else "")
        cells = [
            item.name,
            format_percent(item.metric),
            format_points(item.difference),
            format_ms(item.p50_ms),
            format_ratio(item.speedup),
            format_bytes(item.size_bytes),
            verdict,
        ]
        rows.append((cells, "bold" if item.chosen else "red" if not item.passed else ""))
    return plain_table(
        ("candidate", facts.metric, "difference", "p50", "speed", "size", "gates"), rows, numeric=range(1, 6)
    )


def self_test_table(facts: Facts) -> Table:
    """Which of the injected defects the gates caught."""
    styles = {"✗ not caught": "red"}
    rows = [((name, verdict, by), styles.get(verdict, "")) for name, verdict, by in self_test.markdown_cells(facts)]
    return plain_table(("defect", "verdict", "gates"), rows, numeric=())


def plain_table(heads: Sequence[str], rows: Sequence[tuple[Sequence[str], str]], numeric: Sequence[int]) -> Table:
    """A table without borders; cells are text, never rich markup."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for index, head in enumerate(heads):
        # Names are cut rather than folded where a terminal is narrow.
        table.add_column(head, justify="right" if index in numeric else "left", no_wrap=True, overflow="ellipsis")
    for cells, style in rows:
        table.add_row(*(Text(terminal_text(cell, 60)) for cell in cells), style=style)
    return table
