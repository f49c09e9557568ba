"""Annotations: workflow commands that GitHub Actions shows beside a job, the worst first.

GitHub takes ten of a type from a step and drops the others without a word, so the tenth says how many there are.
"""

from __future__ import annotations

from typing import Any, Literal

from pipeline.report.facts import Facts, GateFact
from pipeline.report.markup import clean, shorten
from pipeline.report.verdicts import Tests, title_of

Level = Literal["error", "warning", "notice"]

LIMIT = 10
"""Annotations of a type and step (docs.github.com, "Workflow commands": limits of problem matchers and annotations)."""


def render_annotations(run: dict[str, Any]) -> str:
    """A line an annotation: errors for what stops the run, warnings for what is let through, a notice for a good end.

    A line holds one command whatever names and messages hold.
    """
    facts = Facts(run)
    tests = Tests(facts)
    errors = [(f"Stage {stage} failed", why) for stage, why in tests.broken]
    errors += [titled(gate) for gate in tests.gates if gate.stops]
    warnings = [titled(gate) for gate in facts.excused_gates]
    warnings += [("UNPROVEN", facts.unproven_sentence)] if facts.unproven_sentence else []
    if facts.disturbed:
        warnings.append(("Times are unreliable", "other processes used the cores while validate measured"))
    if facts.status != "passed" and not errors:
        errors = [(facts.headline, facts.explanation or facts.headline)]
    notices = [(facts.headline, facts.explanation)] if not errors else []
    lines = [*commands("error", errors), *commands("warning", warnings), *commands("notice", notices)]
    return "".join(f"{line}\n" for line in lines)


def titled(gate: GateFact) -> tuple[str, str]:
    """Title and message: the gate, what it is about, and what was found if that is not simply a failure."""
    found = "" if gate.verdict == "fail" else f" ({gate.verdict})"
    return f"Gate {title_of(gate)}{found}", gate.finding


def commands(level: Level, found: list[tuple[str, str]]) -> list[str]:
    """At most `LIMIT` commands of (title, message)."""
    if len(found) > LIMIT:
        rest = len(found) - LIMIT + 1
        found = [*found[: LIMIT - 1], (f"{rest} more", f"{rest} more are in report.html and report.json of the run")]
    return [f"::{level} title={escape_property(title)}::{escape_data(message)}" for title, message in found]


def escape_data(value: str) -> str:
    """A message of at most 900 characters: %, CR and LF escaped as actions/toolkit does (packages/core/src/command.ts).

    Messages may have several lines; a line of them is never a line of the log.
    """
    lines = "\n".join(shorten(line, 300) for line in clean(value).splitlines() if line.strip())
    return lines[:900].replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def escape_property(value: str) -> str:
    """The value of a property: : and , end it and are escaped as well."""
    return shorten(value, 160).replace("%", "%25").replace(":", "%3A").replace(",", "%2C")
