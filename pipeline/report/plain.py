"""`report.json`: the verdict of a run as plain values, for programs that decide something by it.

`run.json` is the record: everything that was configured and measured, and the one source of every report. This is the
small part of it that CI asks for, in a form of its own that does not change when a stage measures something else.
"""

from __future__ import annotations

import json
from typing import Any

from pipeline.report.facts import Facts, GateFact, number, sequence
from pipeline.report.markup import json_text
from pipeline.report.verdicts import Tests

SCHEMA_VERSION = 1
NUMBERS = ("metric", "latency_ms_p50", "latency_ms_p95", "throughput_per_s", "size_bytes")


def render_plain(run: dict[str, Any]) -> str:
    """The report of a run (`run.json`) as JSON, by the schema in `report.schema.json`; the same run, the same bytes."""
    facts = Facts(run)
    tests, validated = Tests(facts), facts.measured("validate")
    report = {
        "schema_version": SCHEMA_VERSION,
        "run": facts.name,
        "status": facts.status,
        "verdict": facts.verdict,
        "headline": facts.headline,
        "explanation": facts.explanation,
        "created_at": str(run.get("created_at") or ""),
        "task": str(run.get("task") or ""),
        "backbone": str(run.get("backbone") or ""),
        "metric": facts.metric,
        "samples": number(validated.get("samples")),
        "counts": tests.counts,
        "gates": [gate_values(gate) for gate in tests.gates],
        "reference": {key: number(facts.reference.get(key)) for key in NUMBERS},
        "candidates": candidate_values(facts),
        "chosen": facts.chosen.name if facts.chosen else None,
        "left_out": [{"stage": stage, "name": name, "reason": why} for stage, name, why in facts.left_out],
        "engines": [
            {"name": one.name, "targets": one.targets, "library": one.library, "status": one.status}
            for one in facts.engines
        ],
        "stages": [stage_values(stage) for stage in facts.stages],
        "bundle": bundle_values(facts),
        "notes": [{"from": source, "text": note} for source, note in facts.notes],
    }
    return json_text(json.dumps(report, indent=2)) + "\n"


def gate_values(gate: GateFact) -> dict[str, Any]:
    """One gate."""
    return {
        "stage": gate.stage,
        "name": gate.name,
        "subject": gate.subject,
        "verdict": gate.verdict,
        "stops": gate.stops,
        "excuse": gate.outcome,
        "measured": gate.measured,
        "direction": gate.direction,
        "threshold": gate.threshold,
        "unit": gate.unit,
        "message": gate.message,
    }


def candidate_values(facts: Facts) -> list[dict[str, Any]]:
    """What validate measured of every candidate."""
    return [
        {
            "name": one.name,
            "precision": one.precision,
            "sha256": one.numbers.get("sha256") if isinstance(one.numbers.get("sha256"), str) else None,
            "digest": one.numbers.get("digest") if isinstance(one.numbers.get("digest"), str) else None,
            **{key: number(one.numbers.get(key)) for key in NUMBERS},
            "metric_difference": one.difference,
            "metric_difference_interval": list(one.interval) if one.interval else None,
            "agreement": one.agreement,
            "speedup": one.speedup,
            "passed": one.passed,
            "chosen": one.chosen,
            "over_limits": [str(reason) for reason in sequence(one.numbers.get("over_limits"))],
        }
        for one in facts.candidates
    ]


def stage_values(stage: dict[str, Any]) -> dict[str, Any]:
    """What became of one stage."""
    return {
        "name": str(stage.get("name")),
        "status": str(stage.get("status")),
        "digest": stage.get("digest") if isinstance(stage.get("digest"), str) else None,
        "duration_s": number(stage.get("duration_s")),
        "peak_memory_bytes": number(stage.get("peak_memory_bytes")),
        "error": str(stage["error"]) if stage.get("error") else None,
    }


def bundle_values(facts: Facts) -> dict[str, str] | None:
    """Where the bundle is, and what its tar's bytes are; None where none was made."""
    package = facts.measured("package")
    if not facts.packed or not isinstance(facts.run.get("bundle"), str):
        return None
    return {
        "folder": facts.run["bundle"],
        "tar": f"package/{package['tar']}" if package.get("tar") else "",
        "sha256": str(package.get("sha256") or ""),
    }
