"""`pipeline diff`: what changed from one run or bundle to another, and whether a metric fell past its allowance."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from models.errors import ConfigError, Problem
from pipeline.record import read_json, read_run
from pipeline.report.facts import Facts, mapping, number, records
from pipeline.report.formats import (
    MISSING,
    format_bytes,
    format_ms,
    format_number,
    format_percent,
    format_points,
    format_ratio,
)
from pipeline.report.verdicts import Tests, title_of
from stages.artifact import MANIFEST

SCHEMA_VERSION = 1
REFERENCE = "PyTorch"
SHIPPED = "what ships"
SHARES = ("metric", "agreement")
NUMBERS = (
    *SHARES, "latency_ms_p50", "latency_ms_p95", "throughput_per_s", "size_bytes", "cosine", "sqnr_db"
)  # fmt: skip
"""What is compared of the reference and of every candidate."""
ROUNDING = 1e-9
"""0.86 − 0.85 is more than 0.01 in double precision; a metric is a mean over far fewer than 10⁹ examples."""
WIDTH = 160
"""Columns where the output is no terminal: a log is not to lose half of a table."""


@dataclass(frozen=True)
class Side:
    """One of the two: a run's record, or what a bundle holds of it. `fingerprints`: split → digest of its examples."""

    path: str
    kind: Literal["run", "bundle"]
    facts: Facts
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    @property
    def chosen(self) -> str | None:
        """The candidate that ships."""
        return self.facts.chosen.name if self.facts.chosen else None

    @cached_property
    def candidates(self) -> dict[str, dict[str, Any]]:
        """Name → the numbers of every candidate."""
        return {one.name: one.numbers for one in self.facts.candidates}


# --- reading ----------------------------------------------------------------------------------------


def read_side(path: Path) -> Side:
    """A run by its folder, or a bundle (folder or tar) by the evidence inside.

    Raises:
        ConfigError: it is neither.
        IntegrityError: a bundle does not verify.
    """
    if (path / "bundle.json").is_file() or path.suffix == ".tar":
        from models.bundle import EVIDENCE_FOLDER, open_bundle

        with open_bundle(path) as bundle:
            evidence = mapping(read_json(bundle.file(f"{EVIDENCE_FOLDER}/evidence.json")))
            stage = {"name": "validate", "status": "ran", "gates": evidence.get("gates"), "measurements": evidence}
            record = {"run": path.name, "status": "passed", "task": bundle.task, "stages": [stage]}
        return Side(str(path), "bundle", Facts(record), fingerprints_of(record, ()))
    record = read_run(path)
    manifests = [] if path.is_file() else [mapping(read_json(file)) for file in sorted(path.glob(f"*/{MANIFEST}"))]
    return Side(str(path), "run", Facts(record), fingerprints_of(record, manifests))


def fingerprints_of(record: dict[str, Any], manifests: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Split → digest of its examples, by what validate measured on and by the manifests of the stages."""
    tested = Facts(record).measured("validate").get("data_fingerprint")
    found = {"test": tested} if tested else {}
    for manifest in manifests:
        found = mapping(manifest.get("data_fingerprints")) | found
    return {str(split): digest for split, digest in found.items() if isinstance(digest, str)}


# --- comparing --------------------------------------------------------------------------------------


def compare(before: Side, after: Side, max_metric_drop: float | None, allow_other_data: bool = False) -> dict[str, Any]:
    """What changed, as plain values; `regressions` are what ends the command with 1.

    `max_metric_drop`: the largest drop of a metric that is allowed, in its unit (0.01 = 1 point); None takes the
    stricter of the two sides': whoever loosens it in a change is not to pass that change by it. Metrics on other test
    examples are not comparable, and that is a regression too, unless `allow_other_data`.

    Raises:
        ConfigError: it is None, and neither side says what is allowed.
    """
    allowance = max_metric_drop if max_metric_drop is not None else allowance_of(before, after)
    gates = gate_changes(before, after)
    return {
        "schema_version": SCHEMA_VERSION,
        "before": before.path,
        "after": after.path,
        "config": config_changes(before, after),
        "data": data_changes(before, after),
        "environment": environment_changes(before.facts.run, after.facts.run),
        "artifacts": artifact_changes(before, after),
        "chosen": {"before": before.chosen, "after": after.chosen},
        "metric_name": after.facts.metric,
        "numbers": list(number_changes(before, after)),
        "gates": gates,
        "max_metric_drop": allowance,
        "regressions": [
            *fallen_metrics(before, after, allowance, allow_other_data),
            *fallen_gates(gates),
        ],
        "notes": list(notes(before, after)),
    }


def allowance_of(*sides: Side) -> float:
    """The smallest `max_metric_drop` of the sides that have one: of the configuration, or of the gate that held it."""
    found = []
    for side in sides:
        section = mapping(mapping(mapping(side.facts.run.get("config")).get("validate")).get("gates"))
        if (value := number(section.get("max_metric_drop"))) is not None:
            found.append(value)
            continue
        thresholds = [gate.threshold for gate in side.facts.gates if gate.name == f"{side.facts.metric} drop"]
        if thresholds and thresholds[0] is not None:
            found.append(thresholds[0])
    if found:
        return min(found)
    problem = "is not known: neither side says how far a metric may fall"
    raise ConfigError([Problem("--max-metric-drop", problem, "give it, e.g. --max-metric-drop 0.01")])


def pairs_of(before: Side, after: Side) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(subject, numbers before, numbers after): the reference, what ships where that is not the same candidate, and
    every candidate. Of what a side does not have the numbers are empty."""
    yield REFERENCE, before.facts.reference, after.facts.reference
    if before.chosen is None or before.chosen != after.chosen:
        old, new = (side.candidates.get(side.chosen or "", {}) for side in (before, after))
        yield SHIPPED, old, new
    for name in dict.fromkeys((*before.candidates, *after.candidates)):
        yield name, before.candidates.get(name, {}), after.candidates.get(name, {})


def config_changes(before: Side, after: Side) -> list[dict[str, Any]] | None:
    """Every key of the configuration with another value; None where a side has none (a bundle)."""
    configs = [side.facts.run.get("config") for side in (before, after)]
    if not all(isinstance(config, Mapping) for config in configs):
        return None
    old, new = (dict(leaves(config)) for config in configs)
    return [
        {"key": key, "before": old.get(key), "after": new.get(key)}
        for key in dict.fromkeys((*old, *new))
        if (key in old) is not (key in new) or old[key] != new[key]
    ]


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested mappings that is no mapping with keys."""
    if not isinstance(value, Mapping) or not value:
        yield prefix, value
        return
    for key, item in value.items():
        yield from leaves(item, f"{prefix}.{key}" if prefix else str(key))


def data_changes(before: Side, after: Side) -> list[dict[str, Any]]:
    """Each split with the digests of its examples; `same` is None where a side does not tell."""
    splits = dict.fromkeys((*before.fingerprints, *after.fingerprints))
    found = [(split, before.fingerprints.get(split), after.fingerprints.get(split)) for split in splits]
    return [
        {"split": split, "before": old, "after": new, "same": old == new if old and new else None}
        for split, old, new in found
    ]


def environment_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Versions and hardware that differ, where both sides tell."""
    found = []
    for part in ("versions", "hardware"):
        old, new = (mapping(mapping(run.get("environment")).get(part)) for run in (before, after))
        if old and new:
            names = dict.fromkeys((*old, *new))
            found += [
                {"name": name, "before": old.get(name), "after": new.get(name)}
                for name in names
                if old.get(name) != new.get(name)
            ]
    return found


def artifact_changes(before: Side, after: Side) -> list[dict[str, Any]] | None:
    """The stages whose artifact has another digest; None where a side has none (a bundle)."""
    if "bundle" in (before.kind, after.kind):
        return None
    names = [str(stage.get("name")) for stage in after.facts.stages]
    pairs = [(name, before.facts.stage(name).get("digest"), after.facts.stage(name).get("digest")) for name in names]
    return [{"stage": name, "before": old, "after": new} for name, old, new in pairs if old != new]


def number_changes(before: Side, after: Side) -> Iterator[dict[str, Any]]:
    """Every number of the reference and the candidates that at least one side has."""
    for subject, old, new in pairs_of(before, after):
        olds, news = (
            {name: values.get(name) for name in NUMBERS} | mapping(values.get("more_metrics")) for values in (old, new)
        )
        for name in dict.fromkeys((*olds, *news)):
            was, now = number(olds.get(name)), number(news.get(name))
            if was is not None or now is not None:
                change = now - was if was is not None and now is not None else None
                yield {"subject": subject, "name": name, "before": was, "after": now, "change": change}


def gate_changes(before: Side, after: Side) -> list[dict[str, Any]]:
    """The gates that ended otherwise, that are new (`before` is None) and that are gone (`after` is None). A bundle
    holds those of validate alone, so then only they are compared."""
    old, new = (verdicts_of(side.facts) for side in (before, after))
    part = "validate: " if "bundle" in (before.kind, after.kind) else ""
    return [
        {"gate": name, "before": old.get(name), "after": new.get(name)}
        for name in dict.fromkeys((*new, *old))
        if old.get(name) != new.get(name) and name.startswith(part)
    ]


def verdicts_of(facts: Facts) -> dict[str, str]:
    """Gate → verdict, and whether it is let through; of two gates with one name the worse."""
    found: dict[str, str] = {}
    for gate in Tests(facts).gates:  # the worst first
        found.setdefault(title_of(gate), f"{gate.verdict} ({gate.word})" if gate.word else gate.verdict)
    return found


def fallen_gates(changes: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The gates that passed and do not any more, waived or let through ones too. One that is gone is none: it stands
    among the changes."""
    for one in changes:
        if one["before"] == "pass" and one["after"] is not None:
            reason = f"passed, and ends with {one['after']} now"
            yield {"subject": one["gate"], "before": None, "after": None, "drop": None, "reason": reason}


def fallen_metrics(before: Side, after: Side, allowance: float, allow_other_data: bool) -> Iterator[dict[str, Any]]:
    """What fell by more than `allowance`: the reference, what ships, and every candidate that both sides have.

    Where nothing was measured nothing is shown not to have fallen: of the reference and of what ships that is a
    regression as well, and so are another metric and other test examples.
    """
    tested = [side.fingerprints.get("test") for side in (before, after)]
    if None not in tested and tested[0] != tested[1] and not allow_other_data:
        reason = "not comparable: the test examples are not the same; --allow-other-data compares them all the same"
        yield {"subject": SHIPPED, "before": None, "after": None, "drop": None, "reason": reason}
        return
    if before.facts.metric != after.facts.metric:
        reason = f"the metric is {after.facts.metric} and was {before.facts.metric}: they cannot be compared"
        yield {"subject": SHIPPED, "before": None, "after": None, "drop": None, "reason": reason}
        return
    for subject, *values in pairs_of(before, after):
        old, new = (number(one.get("metric")) for one in values)
        found = {"subject": subject, "before": old, "after": new, "drop": None}
        if old is None or new is None:
            if subject in (REFERENCE, SHIPPED):
                yield found | {"reason": f"nothing was measured in {before.path if old is None else after.path}"}
        elif (drop := old - new) > allowance + ROUNDING:
            reason = f"{after.facts.metric} fell by {format_number(drop, 4)}; {format_number(allowance, 4)} is allowed"
            yield found | {"drop": drop, "reason": reason}


def notes(before: Side, after: Side) -> Iterator[str]:
    """What a reader of the numbers must know."""
    tested = [side.fingerprints.get("test") for side in (before, after)]
    if None in tested:
        yield "whether both were measured on the same examples is not known"
    elif tested[0] != tested[1]:
        yield "the test examples are not the same: a difference of the metrics may be theirs"
    processors = [
        mapping(mapping(side.facts.run.get("environment")).get("hardware")).get("processor") for side in (before, after)
    ]
    if None not in processors and processors[0] != processors[1]:
        yield "the times are those of two machines"
    if before.facts.disturbed or after.facts.disturbed:
        yield "the times are unreliable: a machine was busy"


# --- on the terminal --------------------------------------------------------------------------------


def print_difference(difference: Mapping[str, Any]) -> None:
    """A difference for a person: what changed, and what fell too far at the end."""
    from rich.console import Console
    from rich.text import Text

    from pipeline.report.markup import terminal_text
    from pipeline.report.terminal import plain_table

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for title, heads, rows in tables_of(difference):
        if rows:
            console.print(Text(title, style="bold"))
            console.print(plain_table(heads, [(row, "") for row in rows], numeric=range(2, len(heads))))
            console.print()
    for line in said_of(difference):
        console.print(Text(terminal_text(line, 400)), soft_wrap=True)
    for one in records(difference["regressions"]):
        line = f"regressed: {one['subject']}: {one['reason']}"
        console.print(Text(terminal_text(line, 400), style="red"), soft_wrap=True)
    if not difference["regressions"]:
        most = format_number(difference["max_metric_drop"], 4)
        allowed = f"no gate that passed is red, and no metric fell by more than {most}"
        console.print(Text(allowed, style="green"), soft_wrap=True)


def tables_of(difference: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str], list[list[str]]]]:
    """(title, heads, rows) of the tables; one without rows is not shown."""
    for title, key, name in (("configuration", "config", "key"), ("environment", "environment", "name")):
        rows = [[str(one[name]), shown(one["before"]), shown(one["after"])] for one in records(difference[key])]
        yield title, (name, "before", "after"), rows
    changed = [one for one in records(difference["numbers"]) if one["change"] != 0]
    cells = [[str(one["subject"]), str(one["name"]), *number_cells(one)] for one in changed]
    yield "numbers", ("of", "number", "before", "after", "change"), cells
    rows = [
        [str(one["gate"]), one["before"] or MISSING, one["after"] or MISSING] for one in records(difference["gates"])
    ]
    yield "gates", ("gate", "before", "after"), rows


def shown(value: object) -> str:
    """A value of the configuration."""
    return MISSING if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def number_cells(one: Mapping[str, Any]) -> list[str]:
    """Before, after and the change, as a person reads that number."""
    name, pair = str(one["name"]), (one["before"], one["after"])
    change, before = one["change"], one["before"]
    times = f"{format_ratio(pair[1] / before)}" if change is not None and before else MISSING
    if name.startswith("latency_ms"):
        return [*map(format_ms, pair), times]
    if name == "size_bytes":
        return [*map(format_bytes, pair), times]
    if name in SHARES:
        return [*map(format_percent, pair), format_points(change)]
    return [*(format_number(value, 4) for value in pair), times]


def said_of(difference: Mapping[str, Any]) -> Iterator[str]:
    """What is no table, a line each."""
    if difference["config"] is None:
        yield "configuration: not in a bundle"
    elif not difference["config"]:
        yield "configuration: the same"
    for one in records(difference["data"]):
        words = {True: "the same examples", False: "other examples", None: "not known"}
        yield f"data, {one['split']}: {words[one['same']]}"
    if difference["artifacts"] is not None:
        changed = ", ".join(str(one["stage"]) for one in records(difference["artifacts"]))
        yield f"artifacts: other bytes from {changed}" if changed else "artifacts: the same bytes"
    chosen = difference["chosen"]
    yield f"ships: {chosen['after'] or 'nothing'}" + (
        f" instead of {chosen['before'] or 'nothing'}" if chosen["before"] != chosen["after"] else ""
    )
    yield from map(str, difference["notes"])
