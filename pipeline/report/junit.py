"""`junit.xml`: a test case for every gate, so that CI shows gates where it shows tests."""

from __future__ import annotations

from collections import Counter
from typing import Any
from xml.etree import ElementTree

from pipeline.report.facts import Facts, GateFact, gate_fact, number, records
from pipeline.report.markup import clean, shorten

OUTCOMES = {
    "fail": ("failure", "GateFailed"),
    "inconclusive": ("failure", "GateInconclusive"),
    "error": ("error", "GateWithoutEvidence"),
}
"""Verdict of a gate that stops the run: element and type."""
ERRORS = {"failed": "the stage failed", "interrupted": "the stage was interrupted"}


def render_junit(run: dict[str, Any]) -> str:
    """The gates of a run (`run.json`) as JUnit XML: a suite a stage, a case a gate.

    A gate that failed or is inconclusive is a failure, one without evidence an error; what is waived or let through is
    skipped, with the reason. A stage that failed or was interrupted is a case with an error, a stage that never ran a
    skipped one: neither looks like a pass. Times are in seconds and belong to the stage.
    """
    facts = Facts(run)
    root = ElementTree.Element("testsuites", name=shorten(facts.name, 200))
    totals: Counter[str] = Counter()
    seconds = 0.0
    for stage in facts.stages:
        suite, counts, duration = suite_from(stage, str(run.get("created_at") or ""))
        root.append(suite)
        totals += counts
        seconds += duration
    for key in ("tests", "failures", "errors", "skipped"):
        root.set(key, str(totals[key]))
    root.set("time", f"{seconds:.3f}")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def suite_from(stage: dict[str, Any], timestamp: str) -> tuple[ElementTree.Element, Counter[str], float]:
    """The suite of one stage, its counts and its duration in seconds."""
    name = shorten(stage.get("name") or "stage", 80)
    duration = number(stage.get("duration_s")) or 0.0
    suite = ElementTree.Element("testsuite", name=name)
    cases = [case_from(gate_fact(name, gate)) for gate in records(stage.get("gates"))]
    if (problem := problem_case(name, stage)) is not None:
        cases.append(problem)
    number_duplicates(cases)
    suite.extend(cases)
    counts = Counter(tests=len(cases))
    for key, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        counts[key] = sum(case.find(tag) is not None for case in cases)
    for key in ("tests", "failures", "errors", "skipped"):
        suite.set(key, str(counts[key]))
    suite.set("time", f"{duration:.3f}")
    if timestamp:
        suite.set("timestamp", shorten(timestamp, 40))
    return suite, counts, duration


def case_from(gate: GateFact) -> ElementTree.Element:
    """One gate."""
    title = f"{gate.name} [{gate.subject}]" if gate.subject else gate.name
    case = ElementTree.Element("testcase", classname=shorten(gate.stage, 80), name=shorten(title, 200), time="0.000")
    if gate.outcome:
        ElementTree.SubElement(case, "skipped", message=shorten(f"{gate.verdict}: {gate.finding}", 300))
    elif not gate.passed:
        tag, kind = OUTCOMES[gate.verdict]
        problem = ElementTree.SubElement(case, tag, type=kind, message=shorten(gate.message or "no message", 300))
        problem.text = clean(
            f"gate: {gate.name}\nsubject: {gate.subject}\nmeasured: {gate.measured}\n"
            f"expected: {gate.direction} {gate.threshold} {gate.unit}\n{gate.message}"
        )
    return case


def problem_case(name: str, stage: dict[str, Any]) -> ElementTree.Element | None:
    """A case for a stage that did not come to its end, None for one that did."""
    status = str(stage.get("status"))
    if status not in ERRORS and status != "not-run":
        return None
    case = ElementTree.Element("testcase", classname=name, name=f"{name} ran", time="0.000")
    if status == "not-run":
        ElementTree.SubElement(case, "skipped", message="the stage did not run")
        return case
    message = str(stage.get("error") or ERRORS[status])
    error = ElementTree.SubElement(case, "error", type=f"Stage{status.capitalize()}", message=shorten(message, 300))
    error.text = clean(message)
    return case


def number_duplicates(cases: list[ElementTree.Element]) -> None:
    """Give cases of one name a number: some CI systems keep only the last of them, and hide a failure."""
    seen: Counter[str] = Counter()
    for case in cases:
        name = case.get("name", "")
        seen[name] += 1
        if seen[name] > 1:
            case.set("name", f"{name} ({seen[name]})")
