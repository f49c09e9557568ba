"""`report.md`: for a CI job summary or a pull-request comment, never longer than GitHub takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.report import baseline, drift, self_test
from pipeline.report.facts import Facts, GateFact, number
from pipeline.report.formats import (
    MISSING,
    capitalized,
    format_bytes,
    format_duration,
    format_interval,
    format_ms,
    format_number,
    format_percent,
    format_points,
    format_ratio,
    format_time,
)
from pipeline.report.markup import clean, markdown_text, shorten

MAX_CHARACTERS = 64_000
"""GitHub takes 65,536 characters in a comment and 1 MiB in a job summary: this fits both, with a marker of the
action's before it."""
SHARE = MAX_CHARACTERS // 3
"""The most that the candidates may take, and the gates: so many of either leave room for the other."""
CUT = "\n\n_{} more in report.html._"
BADGES = {"pass": "✅", "fail": "❌", "partial": "🟡", "inconclusive": "❓", "error": "🚫"}


def render_markdown(run: dict[str, Any]) -> str:
    """The report of a run (`run.json`) as GitHub Markdown of at most `MAX_CHARACTERS` characters.

    A section that does not fit is cut at its end, where what matters least stands, and says how much is left out.
    """
    facts = Facts(run)
    title = f"## {BADGES[facts.verdict]} {markdown_text(facts.headline, 200)}"
    parts = [title, explanation(facts), counted(facts)]
    first = [cut(section, SHARE) for section in (candidates(facts), gates(facts))]
    others = (released, drifted, self_tested, training, stages, lineage)
    for part in (*first, *(section(facts) for section in others)):
        taken = sum(len(one) + 2 for one in parts)
        parts.append(cut(part, MAX_CHARACTERS - taken - 2))
    return "\n\n".join(part for part in parts if part) + "\n"


def cut(section: str, room: int) -> str:
    """The first lines of a section that fit into `room` characters, and how many entries (table rows, items) do not."""
    if len(section) <= room:
        return section
    lines, end = section.split("\n"), "\n\n</details>"
    entries, kept = entries_of(lines), 0
    left = room - len(end) - len(CUT.format(len(lines)))
    while (left := left - len(lines[kept]) - 1) >= 0:
        kept += 1
    while kept and not entries[kept - 1]:
        kept -= 1  # a heading or the head of a table says nothing alone
    opened = "</details>" not in lines[:kept] and any(line.startswith("<details>") for line in lines[:kept])
    note = CUT.format(sum(entries[kept:]))
    text = "\n".join(lines[:kept]) + end * opened + note
    return text.strip() if len(text) <= room else ""


def entries_of(lines: Sequence[str]) -> list[bool]:
    """Which lines are entries: rows below the head of a table, items, sentences."""
    rules = [*(line.startswith(("| --- |", "| ---: |")) for line in lines), False]
    return [
        bool(line) and not line.startswith(("#", "<")) and not rules[index] and not rules[index + 1]
        for index, line in enumerate(lines)
    ]


def explanation(facts: Facts) -> str:
    """The error as a block, or a sentence."""
    if facts.broken_stage.get("error"):
        return preformatted(facts.explanation)
    return markdown_text(facts.explanation, 600)


def preformatted(text: str, limit: int = 4000) -> str:
    """Lines as they are, inside `<pre>`: nothing in it has a meaning."""
    lines = [line for line in clean(text)[:limit].replace("\t", "    ").splitlines() if line.strip()]
    return "<pre>" + "<br>".join(markdown_text(line, 500) for line in lines) + "</pre>"


def counted(facts: Facts) -> str:
    """Run, backbone and gates in one line."""
    passed = sum(gate.passed for gate in facts.gates)
    gates_text = f"{passed} of {len(facts.gates)} gates passed" if facts.gates else "no gate was checked"
    gates_text += f", {facts.excused_sentence}" if facts.excused_gates else ""
    about = [f"run {facts.name}", str(facts.run.get("backbone", "")), format_time(facts.run.get("created_at", ""))]
    return f"**{gates_text}** · " + " · ".join(markdown_text(part) for part in about if part)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A GitHub table of cells that are escaped already."""
    rule = ["---:" if index in numeric else "---" for index in range(len(heads))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *rows))


def candidates(facts: Facts) -> str:
    """The candidates against the reference, and what quantize left out."""
    parts = []
    if facts.candidates:
        reference = facts.reference
        values = [number(reference.get(key)) for key in ("metric", "latency_ms_p50", "latency_ms_p95", "size_bytes")]
        rows = [
            [
                "PyTorch (reference)",
                "fp32",
                format_percent(values[0]),
                MISSING,
                MISSING,
                format_ms(values[1]),
                format_ms(values[2]),
                "1×",
                format_bytes(values[3]),
                "",
            ]
        ]
        for item in [*facts.candidates, *facts.other_runs]:
            name = markdown_text(item.name, 60)
            difference = format_points(item.difference) + (
                f" ({format_interval(item.interval)})" if item.interval else ""
            )
            rows.append(
                [
                    f"**{name}**" if item.chosen else name,
                    markdown_text(item.arithmetic or item.precision, 60),
                    format_percent(item.metric),
                    difference,
                    format_percent(item.agreement),
                    format_ms(item.p50_ms),
                    format_ms(item.p95_ms),
                    format_ratio(item.speedup),
                    format_bytes(item.size_bytes),
                    BADGES["pass" if item.passed else "fail"] + item.excused,
                ]
            )
        metric = markdown_text(capitalized(facts.metric), 40)
        heads = (
            "Candidate", "Arithmetic", metric, "Difference (interval)", "Agreement", "p50", "p95", "Speed", "Size",
            "Gates",
        )  # fmt: skip
        parts.append(
            f"### Candidates{f' on {facts.provider}' if facts.provider else ''}\n\n" + table(heads, rows, range(2, 9))
        )
    if facts.engines:
        rows = [
            [
                markdown_text(one.targets, 80),
                markdown_text(one.name, 80),
                markdown_text(one.library, 60),
                format_bytes(one.size_bytes),
                f"{BADGES['pass' if one.proven else 'partial']} {one.status}",
                markdown_text(one.mends, 120),
            ]
            for one in facts.engines
        ]
        parts.append(
            "### Engines\n\n" + table(("Target", "Engine", "Library", "Size", "On the device", "Mended"), rows, (3,))
        )
    parts += [
        f"**{markdown_text(name, 60)}** does not earn its place here: {markdown_text(reason, 300)}"
        for name, reason in facts.unearned
    ]
    parts += [
        f"Left out by {stage}: **{markdown_text(name, 60)}**: {markdown_text(reason, 300)}"
        for stage, name, reason in facts.left_out
    ]
    return "\n\n".join(parts)


def gates(facts: Facts) -> str:
    """The gates that did not pass, those that stop the run first, then those that passed, folded."""
    if not facts.gates:
        return ""
    parts = ["### Gates"]
    passed = [gate for gate in facts.gates if gate.passed]
    if others := sorted((gate for gate in facts.gates if not gate.passed), key=lambda gate: gate.rank):
        parts.append(gate_table(others))
    if passed:
        parts.append(f"<details><summary>{len(passed)} passed</summary>\n\n{gate_table(passed)}\n\n</details>")
    return "\n\n".join(parts)


def gate_table(chosen: Sequence[GateFact]) -> str:
    """One row a gate."""
    rows = [
        [
            f"{BADGES[gate.verdict]} {gate.verdict}",
            markdown_text(gate.name, 60),
            markdown_text(gate.subject, 60),
            markdown_text(gate.stage, 40),
            format_number(gate.measured, 4),
            markdown_text(f"{gate.direction} {format_number(gate.threshold, 4)} {gate.unit}", 60),
            markdown_text(gate.finding, 160),
        ]
        for gate in chosen
    ]
    return table(("", "Gate", "Subject", "Stage", "Measured", "Threshold", "Finding"), rows, (4,))


def drifted(facts: Facts) -> str:
    """The error of each step, and where a candidate that failed broke."""
    steps = drift.steps_of(facts)
    if not steps:
        return ""
    rows = [[markdown_text(cell, 60) for cell in (step.name, *drift.cells_of(step))] for step in steps]
    heads = [markdown_text(head, 40) for head in drift.heads_of(facts)]
    samples = markdown_text(drift.found(facts).get("samples"), 20)
    waterfall = table(heads, rows, range(2, 8))
    parts = ["### Where the error comes from"]
    parts += [f"- {markdown_text(line, 500)}" for line in drift.findings(facts)[:10]]
    if drift.script(facts):
        parts.append(f"- the same numbers with numpy and onnxruntime alone: {markdown_text(drift.script(facts), 120)}")
    if len(parts) > 1:
        parts = [parts[0], "\n".join(parts[1:])]
    parts.append(f"<details><summary>Error by step, on {samples} examples</summary>\n\n{waterfall}\n\n</details>")
    return "\n\n".join(parts)


def released(facts: Facts) -> str:
    """The chosen candidate against the last release."""
    if not baseline.found(facts):
        return ""
    return f"### Against the last release\n\n{markdown_text(baseline.summary(facts), 500)}"


def self_tested(facts: Facts) -> str:
    """The score of the self-test, and its table, folded."""
    if not self_test.found(facts):
        return ""
    rows = [[markdown_text(cell, 120) for cell in cells] for cells in self_test.markdown_cells(facts)]
    text = f"### What the gates catch\n\n{markdown_text(self_test.summary(facts), 400)}"
    if not rows:
        return text
    folded = table(("Defect", "", "Gates"), rows)
    return f"{text}\n\n<details><summary>Injected defects</summary>\n\n{folded}\n\n</details>"


def training(facts: Facts) -> str:
    """One line on the training."""
    measured = facts.measured("finetune")
    if not measured:
        return ""
    named = (
        (f"validation {measured.get('metric') or 'metric'}", "validation_metric"),
        ("frozen probe", "probe_validation_metric"),
        (str(measured.get("constant") or "constant answer"), "constant_baseline"),
    )
    numbers = [
        f"{markdown_text(name, 40)} {format_percent(number(measured.get(key)))}"
        for name, key in named
        if number(measured.get(key)) is not None
    ]
    strategy = f"strategy {markdown_text(measured.get('strategy'), 40)}" if measured.get("strategy") else ""
    return "### Training\n\n" + ", ".join(part for part in (strategy, *numbers) if part)


def stages(facts: Facts) -> str:
    """Status, time and memory of every stage, and the notes."""
    rows = [
        [
            markdown_text(stage.get("name"), 40),
            markdown_text(stage.get("status"), 20),
            format_duration(number(stage.get("duration_s"))),
            format_bytes(number(stage.get("peak_memory_bytes"))),
            markdown_text(stage.get("reason") or "", 120),
        ]
        for stage in facts.stages
    ]
    notes = [f"- {markdown_text(source, 40)}: {markdown_text(note, 300)}" for source, note in facts.notes]
    text = "### Stages\n\n" + table(("Stage", "Status", "Time", "Peak memory", "Why"), rows, (2, 3))
    return text + ("\n\n" + "\n".join(notes) if notes else "")


def lineage(facts: Facts) -> str:
    """Digest of every stage and of the bundle."""
    rows = [
        [markdown_text(stage.get("name"), 40), markdown_text(shorten(stage["digest"], 64))]
        for stage in facts.stages
        if stage.get("digest")
    ]
    package = facts.measured("package")
    if package.get("sha256"):
        rows.append([markdown_text(package.get("tar") or "bundle", 80), markdown_text(package["sha256"], 64)])
    if not rows:
        return ""
    return "<details><summary>Digests</summary>\n\n" + table(("Artifact", "SHA-256"), rows) + "\n\n</details>"
