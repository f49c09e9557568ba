"""`report.html`: one file that needs no network and no script, for a person who decides what ships."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

from pipeline.report import svg
from pipeline.report.baseline import baseline_section
from pipeline.report.drift import drift_section
from pipeline.report.evidence import front_of, latency_plot, latency_table
from pipeline.report.facts import Candidate, Facts, GateFact, mapping, number, sequence
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
from pipeline.report.markup import Html, element, join, shorten
from pipeline.report.parts import chip, scrolling, table
from pipeline.report.precision import precision_section
from pipeline.report.robustness import robustness_section
from pipeline.report.self_test import self_test_section
from pipeline.report.slices import slices_section
from pipeline.report.training import training_section

VERDICT_WORDS = {"pass": "✓ passed", "fail": "✗ not shipped", "partial": "◐ incomplete"}
GATE_CHIPS = {
    "pass": ("✓ pass", "pass"),
    "fail": ("✗ fail", "fail"),
    "inconclusive": ("? inconclusive", "partial"),
    "error": ("✗ no evidence", "fail"),
}
STATUS_WORDS = {
    "ran": ("✓ ran", "pass"),
    "fresh": ("✓ reused", "plain"),
    "failed": ("✗ failed", "fail"),
    "gate-failed": ("✗ gate failed", "fail"),
    "interrupted": ("◐ interrupted", "partial"),
    "not-run": ("not run", "plain"),
}
MAX_MATRIX_LABELS = 40
"""Beyond that a cell is smaller than a reader can point at; the list of confused pairs stays."""
MAX_GATE_ROWS = 400
MAX_HISTOGRAMS = 12
MAX_ERROR_CHARACTERS = 20_000
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""The page may load nothing and run nothing, whatever a class name holds."""


def render_html(run: dict[str, Any]) -> str:
    """The report of a run (`run.json`) as one HTML page; the same run gives the same bytes."""
    facts = Facts(run)
    sections = [(identity, title, content(facts)) for identity, title, content in SECTIONS]
    shown = [(identity, title, content) for identity, title, content in sections if content]
    style = Html(resources.files("pipeline.report").joinpath("style.css").read_text(encoding="utf-8"))
    head = element(
        "head",
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        element("title", f"{facts.headline} · {facts.name}"),
        element("style", style),
    )
    body = element(
        "body",
        element("a", "Skip to the numbers", href="#main", class_="skip"),
        header(facts, [(identity, title) for identity, title, _ in shown]),
        element("main", *(section(*item) for item in shown), id="main"),
        footer(facts),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def section(identity: str, title: str, content: Html) -> Html:
    """One block with a heading that links can point at."""
    heading = element("h2", title, id=identity)
    return element("section", heading, content, aria_labelledby=identity)


def header(facts: Facts, contents: Sequence[tuple[str, str]]) -> Html:
    """Verdict, one sentence, key figures, links to the sections."""
    links = [element("li", element("a", title, href=f"#{identity}")) for identity, title in contents]
    lead_text = facts.explanation.strip().partition("\n")[0]
    lead = element("p", shorten(lead_text, 420), class_="lead") if lead_text else Html("")
    return element(
        "header",
        element(
            "div",
            chip(VERDICT_WORDS[facts.verdict], facts.verdict),
            f"  {facts.run.get('task', '')} · run {facts.name} · {format_time(facts.run.get('created_at', ''))}",
            class_="eyebrow",
        ),
        element("h1", facts.headline),
        lead,
        key_figures(facts),
        element("nav", element("ul", *links), aria_label="Sections"),
    )


def key_figures(facts: Facts) -> Html:
    """The five numbers that a manager asks for."""
    failed, total = len(facts.failed_gates), len(facts.gates)
    passed = sum(gate.passed for gate in facts.gates)
    figures = []
    chosen, reference = facts.chosen, facts.reference
    if chosen:
        before = number(reference.get("metric"))
        share = facts.size_share
        figures = [
            (capitalized(facts.metric), format_percent(chosen.metric), f"PyTorch {format_percent(before)}"),
            (
                "Speed",
                format_ratio(chosen.speedup),
                f"{format_ms(chosen.p50_ms)} against {format_ms(number(reference.get('latency_ms_p50')))}"
                + (", on a busy machine" if facts.disturbed else ""),
            ),
            ("Size", format_bytes(chosen.size_bytes), f"{share:.0%} of PyTorch" if share else ""),
            ("Agreement", format_percent(chosen.agreement), "same answer as PyTorch"),
        ]
    gates = f"{passed} / {total}" if total else "none"
    others = f"{failed} failed" if failed else facts.excused_sentence or "all passed"
    figures.append(("Gates passed", gates, others if total else "nothing was checked"))
    figures.append(
        ("Time", format_duration(total_seconds(facts)), f"{stages_done(facts)} of {len(facts.stages)} stages")
    )
    return element(
        "dl",
        *(
            element(
                "div",
                element("dt", name),
                element("dd", element("div", value, class_="value"), element("div", beside, class_="beside")),
            )
            for name, value, beside in figures
        ),
        class_="figures",
    )


def total_seconds(facts: Facts) -> float | None:
    """Sum of the stages' durations, None where no stage has one."""
    durations = [value for stage in facts.stages if (value := number(stage.get("duration_s"))) is not None]
    return sum(durations) if durations else None


def stages_done(facts: Facts) -> int:
    """How many stages have a result."""
    return sum(stage.get("status") in ("ran", "fresh", "gate-failed") for stage in facts.stages)


# --- what happened --------------------------------------------------------------------------------


def problem_section(facts: Facts) -> Html:
    """The error of the stage that failed, in full; the gates that failed."""
    parts = []
    if facts.broken_stage:
        error = str(facts.broken_stage.get("error") or "No message was recorded; see the log of the run.")
        parts.append(
            element(
                "p", f"Stage {facts.broken_stage.get('name')}: {STATUS_WORDS[str(facts.broken_stage['status'])][0]}"
            )
        )
        parts.append(element("pre", error[:MAX_ERROR_CHARACTERS], class_="error"))
    if facts.failed_gates:
        items = [
            element("li", element("strong", f"{gate.name} · {gate.subject}"), f" ({gate.stage}): {gate.message}")
            for gate in facts.failed_gates[:20]
        ]
        if len(facts.failed_gates) > 20:
            items.append(element("li", f"and {len(facts.failed_gates) - 20} more, in the table of gates"))
        parts.append(element("ul", *items, class_="notes"))
    return join(parts)


def candidates_section(facts: Facts) -> Html:
    """Accuracy against latency, the table, the engines, and what quantize left out."""
    parts = []
    if facts.candidates:
        validated = facts.measured("validate")
        samples = number(validated.get("samples"))
        objective = f" Chosen for {validated['objective']}." if validated.get("objective") else ""
        measured = f"Measured on {samples:,.0f} held-out examples" if samples else "Measured on held-out examples"
        where = f", times on {facts.provider}" if facts.provider else ""
        hint = f"{measured}{where}; PyTorch eager in FP32 with as many threads is the reference.{objective}"
        if facts.other_runs:
            hint += " Speed elsewhere is against PyTorch on the same device."
        parts += [element("p", hint, class_="hint"), candidate_plot(facts), candidate_table(facts), latency_plot(facts)]
        parts.append(latency_table(facts))
    if facts.unearned:
        items = [element("li", element("strong", name), f": {reason}") for name, reason in facts.unearned]
        parts.append(element("p", "Fewer bits that do not earn their place here:", class_="hint"))
        parts.append(element("ul", *items, class_="notes"))
    if facts.engines:
        parts.append(engine_table(facts))
    if facts.left_out:
        parts.append(element("p", "Left out:", class_="hint"))
        rows = [
            element("li", element("strong", name), f" (by {stage}): {shorten(reason, 300)}")
            for stage, name, reason in facts.left_out
        ]
        parts.append(element("ul", *rows, class_="notes"))
    return join(parts)


def engine_table(facts: Facts) -> Html:
    """The engines that are shipped, by target; what nothing has proven is named so."""
    rows = [
        element(
            "tr",
            element("th", shorten(one.targets, 80), scope="row"),
            element("td", shorten(one.name, 80)),
            element("td", shorten(one.library, 60)),
            element("td", format_bytes(one.size_bytes)),
            element("td", chip(*(("✓ PROVEN", "pass") if one.proven else ("◐ UNPROVEN", "partial")))),
            element("td", shorten(one.mends, 200)),
        )
        for one in facts.engines
    ]
    heads = ("Target", "Engine", "Library", "Size", "On the device", "Mended")
    return join([element("h3", "Engines"), table("Engines", heads, rows)])


def candidate_plot(facts: Facts) -> Html:
    """The scatter plot of every candidate with a metric and a latency."""
    points = []
    reference_metric, reference_ms = (
        number(facts.reference.get("metric")),
        number(facts.reference.get("latency_ms_p50")),
    )
    if reference_metric is not None and reference_ms is not None:
        detail = f"{format_percent(reference_metric)}, {format_ms(reference_ms)}"
        points.append(svg.Point("PyTorch", reference_ms, reference_metric, "reference", detail))
    for item in facts.candidates:
        if item.metric is None or item.p50_ms is None:
            continue
        style = "failed" if not item.passed else "chosen" if item.chosen else "plain"
        base = item.metric - item.difference if item.difference is not None else None
        interval = (base + item.interval[0], base + item.interval[1]) if item.interval and base is not None else None
        detail = f"{format_percent(item.metric)}, {format_ms(item.p50_ms)}"
        points.append(svg.Point(item.name, item.p50_ms, item.metric, style, detail, interval))
    if not points:
        return Html("")
    metric = shorten(facts.metric, 40)
    text = f"{capitalized(metric)} against median latency: " + "; ".join(
        f"{point.name} {point.detail}" for point in points
    )
    plot = svg.scatter(
        points,
        shorten(text, 600),
        "median latency of one example, ms →",
        f"{metric} ↑",
        lambda tick: f"{tick:g}",
        lambda tick: f"{100 * tick:.1f}%",
        front_of(facts),
    )
    note = f"Up and left is better. Bars: the interval of the {metric} difference to PyTorch, on the same examples."
    note += " Dashed: the front, which nothing beats in both among what passed its gates."
    return element("figure", scrolling(plot, f"Candidates by {metric} and latency"), element("figcaption", note))


CANDIDATE_HEADS = (
    "Candidate",
    "Difference to PyTorch",
    "Agreement",
    "p50",
    "p95",
    "Throughput",
    "Speed",
    "Size",
    "Gates",
)


def candidate_table(facts: Facts) -> Html:
    """One row for the reference and one a candidate."""
    reference = facts.reference
    rows = []
    if reference:
        values = [
            format_percent(number(reference.get("metric"))),
            MISSING,
            MISSING,
            *(format_ms(number(reference.get(f"latency_ms_{part}"))) for part in ("p50", "p95")),
            per_second(number(reference.get("throughput_per_s"))),
            "1×",
            format_bytes(number(reference.get("size_bytes"))),
        ]
        rows.append(row("PyTorch (reference)", "fp32", values, Html("")))
    for item in [*facts.candidates, *facts.other_runs]:
        difference = join(
            [format_points(item.difference), element("div", format_interval(item.interval), class_="sub")]
        )
        values = [
            format_percent(item.metric),
            difference,
            format_percent(item.agreement),
            format_ms(item.p50_ms),
            format_ms(item.p95_ms),
            per_second(item.throughput_per_s),
            format_ratio(item.speedup),
            format_bytes(item.size_bytes),
        ]
        mark = "chosen" if item.chosen else ""
        rows.append(
            row(
                item.name,
                item.arithmetic or item.precision,
                values,
                chip(*((f"✓ pass{item.excused}", "pass") if item.passed else ("✗ fail", "fail"))),
                mark,
            )
        )
    heads = (CANDIDATE_HEADS[0], capitalized(shorten(facts.metric, 40)), *CANDIDATE_HEADS[1:])
    return table("Candidates and the PyTorch reference", heads, rows, numeric=range(1, 9))


def row(name: str, below: str, values: Sequence[object], last: Html, mark: str = "") -> Html:
    """A row of the candidate table."""
    title = element(
        "th", shorten(name, 60), element("div", below + (" · chosen" if mark else ""), class_="sub"), scope="row"
    )
    return element(
        "tr",
        title,
        *(element("td", value, class_="number") for value in values),
        element("td", last),
        class_=mark or None,
    )


def per_second(value: float | None) -> str:
    """Throughput."""
    return MISSING if value is None else f"{format_number(value)} /s"


def gates_section(facts: Facts) -> Html:
    """Every gate, those that stop the run first, then those that are waived or let through."""
    if not facts.gates:
        return element("p", "No gate was checked in this run.", class_="hint")
    ordered = sorted(facts.gates, key=lambda gate: gate.rank)
    rows = [
        element(
            "tr",
            element("td", gate_chips(gate)),
            element("th", shorten(gate.name, 80), scope="row"),
            element("td", shorten(gate.subject, 80)),
            element("td", gate.stage),
            element("td", format_number(gate.measured, 4), class_="number"),
            element(
                "td", f"{gate.direction} {format_number(gate.threshold, 4)} {gate.unit}".strip(), class_="threshold"
            ),
            element("td", shorten(gate.finding, 400), class_="message"),
            class_="bad" if gate.stops else None,
        )
        for gate in ordered[:MAX_GATE_ROWS]
    ]
    more = len(ordered) - len(rows)
    note = element("p", f"{more} more passed gates are in run.json.", class_="hint") if more > 0 else Html("")
    heads = ("Verdict", "Gate", "Subject", "Stage", "Measured", "Threshold", "Finding")
    return join([table("Gates", heads, rows, numeric=(4,)), note])


def gate_chips(gate: GateFact) -> Html:
    """The verdict of a gate, and in a second chip that it stops nothing all the same."""
    verdict = chip(*GATE_CHIPS[gate.verdict])
    return join([verdict, Html(" "), chip(gate.word, "plain")]) if gate.word else verdict


PARITY = (
    ("max_abs_error", "Max error"),
    ("p999_abs_error", "p99.9 error"),
    ("mean_abs_error", "Mean error"),
    ("cosine", "Cosine"),
    ("sqnr_db", "SQNR, dB"),
    ("kl", "KL, nats"),
    ("flip_rate", "Flips"),
    ("ece_increase", "ECE change"),
    ("nll_increase", "NLL change, nats"),
)


def parity_section(facts: Facts) -> Html:
    """How far each candidate's outputs are from PyTorch's."""
    if not facts.candidates:
        return Html("")
    figures = [figure for item in facts.candidates[:MAX_HISTOGRAMS] if (figure := error_histogram(item))]
    rows = []
    for item in facts.candidates:
        cells = [element("td", parity_number(key, number(item.numbers.get(key))), class_="number") for key, _ in PARITY]
        rows.append(
            element("tr", element("th", item.name, scope="row"), *cells, class_="chosen" if item.chosen else None)
        )
    heads = ("Candidate", *(name for _, name in PARITY))
    return join(
        [
            element(
                "p",
                "Absolute difference of every output to the merged, unpatched PyTorch model in FP32, on the same data."
                + noise_sentence(facts),
                class_="hint",
            ),
            element("div", *figures, class_="trio") if figures else Html(""),
            table("Parity of every candidate", heads, rows, numeric=range(1, len(heads))),
        ]
    )


def noise_sentence(facts: Facts) -> str:
    """How far PyTorch is from itself, where that was measured."""
    floor = mapping(facts.measured("validate").get("noise_floor"))
    shares = {name: number(floor.get(key)) for name, key in NOISES if number(floor.get(key)) is not None}
    if not shares:
        return ""
    found = ", ".join(f"{format_number(share, 2)} with {name}" for name, share in shares.items())
    return f" As a share of its output range PyTorch differs from itself by {found}: no tolerance is below that."


NOISES = (("another batch size", "batch"), ("other threads", "threads"), ("fp64", "fp64"))


def parity_number(key: str, value: float | None) -> str:
    """Cosines differ in their last digits only."""
    if key == "flip_rate":
        return format_percent(value)
    return MISSING if value is None else f"{value:.6f}" if key == "cosine" else format_number(value)


def error_histogram(item: Candidate) -> Html:
    """The histogram of one candidate's errors, empty where there is none."""
    recorded = mapping(item.numbers.get("error_histogram"))
    edges = [value for edge in sequence(recorded.get("edges")) if (value := number(edge)) is not None]
    counts = [value for count in sequence(recorded.get("counts")) if (value := number(count)) is not None]
    if not counts or len(edges) != len(counts) + 1:
        return Html("")
    ends = f"between {format_number(edges[0])} and {format_number(edges[-1])}"
    text = f"Absolute output error of {item.name}: {sum(counts):,.0f} values {ends}"
    return element(
        "figure", element("h3", item.name), svg.histogram(edges, counts, text, lambda edge: format_number(edge, 2))
    )


def confusion_section(facts: Facts) -> Html:
    """The confusion matrix of the chosen candidate and its most frequent mistakes."""
    validated = facts.measured("validate")
    labels = [str(label) for label in sequence(validated.get("labels"))]
    matrix = [[number(count) or 0.0 for count in sequence(line)] for line in sequence(validated.get("confusion"))]
    if not labels or len(matrix) != len(labels) or any(len(line) != len(labels) for line in matrix):
        return Html("")
    parts = [
        element("p", f"{validated.get('chosen') or 'The chosen candidate'} on the held-out examples.", class_="hint")
    ]
    mistakes = element("div", mistakes_table(labels, matrix))
    if len(labels) > MAX_MATRIX_LABELS:
        hint = f"{len(labels)} classes are too many to draw; the matrix is in run.json."
        return join([*parts, element("p", hint, class_="hint"), mistakes])
    right = sum(matrix[index][index] for index in range(len(labels)))
    text = f"Confusion matrix of {len(labels)} classes; {right:.0f} of {sum(map(sum, matrix)):.0f} on the diagonal"
    figure = element("figure", scrolling(svg.heatmap(labels, matrix, text), "Confusion matrix"))
    return join([*parts, element("div", figure, mistakes, class_="beside-table")])


def mistakes_table(labels: Sequence[str], matrix: Sequence[Sequence[float]], limit: int = 8) -> Html:
    """The most frequent confusions."""
    pairs = [(count, i, j) for i, line in enumerate(matrix) for j, count in enumerate(line) if i != j and count > 0]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    rows = [
        element(
            "tr",
            element("td", shorten(labels[i], 60)),
            element("td", shorten(labels[j], 60)),
            element("td", f"{count:.0f}", class_="number"),
            element("td", format_percent(count / (sum(matrix[i]) or 1)), class_="number"),
        )
        for count, i, j in pairs[:limit]
    ]
    if not rows:
        return Html("")
    return join(
        [
            element("h3", "Most frequent mistakes"),
            table(
                "Most frequent mistakes",
                ("True class", "Predicted as", "Examples", "Share"),
                rows,
                numeric=(2, 3),
            ),
        ]
    )


def stages_section(facts: Facts) -> Html:
    """Durations one after the other, peak memory, and why each stage ran."""
    bars, start = [], 0.0
    for stage in facts.stages:
        status, duration = str(stage.get("status")), number(stage.get("duration_s"))
        memory = number(stage.get("peak_memory_bytes"))
        columns = (format_duration(duration), format_bytes(memory), STATUS_WORDS.get(status, (status, ""))[0])
        style = "fresh" if status == "fresh" else "failed" if status in ("failed", "gate-failed") else "ran"
        bars.append(svg.Bar(shorten(stage.get("name"), 16), start, duration, style, columns))
        start += duration or 0.0
    text = "Stages one after the other: " + "; ".join(f"{bar.name} {bar.columns[0]}" for bar in bars)
    plot = svg.timeline(bars, ("duration", "peak memory", "status"), text, format_duration)
    notes = [element("li", element("strong", source), f": {shorten(note, 400)}") for source, note in facts.notes]
    listed = join([element("h3", "Notes"), element("ul", *notes, class_="notes")]) if notes else Html("")
    caption = "Peak memory is that of the whole process while the stage ran."
    if any(stage.get("status") == "fresh" for stage in facts.stages):
        caption = f"Pale bars were reused from an earlier run, with the time they took then. {caption}"
    figure = element("figure", scrolling(plot, "Stage timeline"), element("figcaption", caption))
    return join([figure, listed])


def lineage_section(facts: Facts) -> Html:
    """What was made from what: the digest of every stage, and of every candidate and the bundle."""
    from stages import STAGES

    rows = []
    for stage in facts.stages:
        name = str(stage.get("name"))
        inputs = sorted(
            mapping(stage.get("inputs")), key=lambda item: list(STAGES).index(item) if item in STAGES else 99
        )
        made_from = ", ".join(inputs) or ("backbone, data" if name == next(iter(STAGES)) else MISSING)
        rows.append(lineage_row(name, made_from, stage.get("digest")))
    for item in facts.candidates:
        if item.numbers.get("sha256"):
            rows.append(
                lineage_row(
                    str(item.numbers.get("file") or item.name), "as measured by validate", item.numbers["sha256"]
                )
            )
        if item.numbers.get("digest") not in (None, item.numbers.get("sha256")):
            rows.append(lineage_row(f"{item.name}, all its files", "as measured by validate", item.numbers["digest"]))
    package = facts.measured("package")
    if package.get("sha256"):
        rows.append(lineage_row(str(package.get("tar") or "bundle"), "package", package["sha256"]))
    return table("Lineage", ("Artifact", "Made from", "SHA-256"), rows)


def lineage_row(name: str, made_from: str, digest: object) -> Html:
    """One artifact and its digest in full."""
    return element(
        "tr",
        element("th", shorten(name, 80), scope="row"),
        element("td", made_from),
        element("td", element("code", digest or MISSING)),
    )


def record_section(facts: Facts) -> Html:
    """Configuration and environment, folded away."""
    environment = mapping(facts.run.get("environment"))
    hardware, versions = mapping(environment.get("hardware")), mapping(environment.get("versions"))
    if number(hardware.get("memory_bytes")) is not None:
        hardware["memory"] = format_bytes(number(hardware.pop("memory_bytes")))
    pairs = [("Machine", hardware), ("Versions", versions)]
    tables = [
        join(
            [
                element("h3", title),
                table(
                    title,
                    ("Name", "Value"),
                    [
                        element("tr", element("th", key, scope="row"), element("td", value))
                        for key, value in values.items()
                    ],
                ),
            ]
        )
        for title, values in pairs
        if values
    ]
    config = json.dumps(facts.run.get("config"), indent=2, ensure_ascii=False, default=str)
    return join(
        [
            element("details", element("summary", "Configuration"), element("pre", config, tabindex="0")),
            element("details", element("summary", "Machine and versions"), element("div", *tables, class_="pair")),
        ]
    )


def footer(facts: Facts) -> Html:
    """Where the numbers come from."""
    origin = f"Made from run.json of the run {facts.name}, {format_time(facts.run.get('created_at', ''))}."
    return element("footer", f"{origin} Every number above is in that file.")


SECTIONS: tuple[tuple[str, str, Callable[[Facts], Html]], ...] = (
    ("problems", "What went wrong", problem_section),
    ("candidates", "Candidates", candidates_section),
    ("precision", "Precision", precision_section),
    ("gates", "Gates", gates_section),
    ("baseline", "Against the last release", baseline_section),
    ("slices", "Slices", slices_section),
    ("robustness", "Under corruption", robustness_section),
    ("drift", "Where the error comes from", drift_section),
    ("self-test", "What the gates catch", self_test_section),
    ("parity", "Parity with PyTorch", parity_section),
    ("confusion", "Confusion matrix", confusion_section),
    ("training", "Training", training_section),
    ("stages", "Stages", stages_section),
    ("lineage", "Lineage", lineage_section),
    ("record", "Configuration and environment", record_section),
)
