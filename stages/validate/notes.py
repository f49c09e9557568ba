"""The evidence in a few lines, for a person."""

from __future__ import annotations

from typing import Any

from stages.validate.baseline import baseline_notes
from stages.validate.drift import drift_findings
from stages.validate.engines import engine_notes
from stages.validate.further import plan_in_words
from stages.validate.robustness import robustness_notes
from stages.validate.self_test import self_test_notes
from stages.validate.slices import slice_notes

REFERENCE = "pytorch"


def notes_of(evidence: dict[str, Any]) -> list[str]:
    """One line a candidate, and what was chosen."""
    reference, metric = evidence["reference"], evidence["metric_name"]
    if reference["metric"] is None or reference["latency_ms_p50"] is None:
        return [f"{REFERENCE}: no evidence on {evidence['samples']} samples"]
    lines = [plan_in_words(evidence["sample_size"])]
    lines += [
        f"{REFERENCE}: {metric} {reference['metric']:.4f} on {evidence['samples']} samples, "
        f"{reference['latency_ms_p50']:.2f} ms"
    ]
    for entry in [*evidence["candidates"], *evidence["other_runs"], *evidence["engine_runs"]]:
        if entry["problem"]:
            lines.append(f"{entry['name']}: {entry['problem']}")
            continue
        lines.append(
            f"{entry['name']}: {metric} {entry['metric']:.4f} ({entry['metric_difference']:+.4f}; drops of "
            f"{entry['smallest_visible_drop']:.4f} or more would show), agreement {entry['agreement']:.4f}, "
            f"{entry['latency_ms_p50']:.2f} ms ({entry['speedup']:.1f}×), {entry['size_bytes'] / 1e6:.1f} MB"
        )
        lines += worst_slice(entry)
        lines += [f"{entry['name']} is left out: {reason}" for reason in entry.get("over_limits", ())]
        if entry.get("not_worth_it"):
            lines.append(f"{entry['name']} does not earn its place here: {'; '.join(entry['not_worth_it'].values())}")
    lines += slice_notes(evidence["candidates"])
    restless = [name for name, entry in timed_entries(evidence) if entry["warm"] is False]
    if restless:
        lines.append(f"times of {', '.join(restless)} had not settled when timing began, after the longest warm-up")
    if evidence["disturbed"]:
        lines.append(
            f"times are unreliable: other processes kept {evidence['other_work_cores']:.1f} cores busy beside the "
            f"{evidence['threads']} threads that were measured"
        )
    lines += robustness_notes(evidence["candidates"])
    lines += baseline_notes(evidence["baseline"], metric)
    lines += evidence["waivers"]
    lines += drift_findings(evidence["drift"]["broken"]) if evidence["drift"] else []
    lines += self_test_notes(evidence["self_test"]) if evidence["self_test"] else []
    chosen = f"chosen for {evidence['objective']} on {evidence['provider']}: {evidence['chosen'] or 'none'}"
    return [*lines, chosen, *engine_notes(evidence)]


def timed_entries(evidence: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, numbers) of everything that may have times."""
    entries = [*evidence["candidates"], *evidence["other_runs"], *evidence["engine_runs"]]
    return [(REFERENCE, evidence["reference"]), *((entry["name"], entry) for entry in entries)]


def worst_slice(entry: dict[str, Any]) -> list[str]:
    """The slice that lost most, by Holm's adjusted p-value, of several that were judged."""
    table = entry["slices"]
    plain = [one for one in table["slices"] if not one["critical"]] if table else []
    if len(plain) < 2:
        return []
    worst = plain[0]
    return [
        f"{entry['name']}: the worst of {table['judged']} slices is {worst['name']} with {-worst['drop']:+.4f} on "
        f"{worst['samples']} samples (adjusted p {worst['adjusted_p']:.2g})"
    ]
