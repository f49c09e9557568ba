"""Engines among the candidates: which are shipped for which target, and what proves them.

Most engines are built for devices that this machine is not. Its candidate's ONNX file is measured like any other; of
an engine itself there is no evidence but a receipt from its device, or its run here where this machine has the GPU
that it is for (engine_runs.py). Without either it is UNPROVEN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from models.engines.receipt import Receipt, read_receipt
from models.engines.targets import Target, target_of
from models.errors import IntegrityError
from stages.artifact import unchanged_files
from stages.base import StageContext
from stages.engines import UNPROVEN, asked_engines, read_engines
from stages.gate import Gate, GateResult

EngineRule = Literal["require-receipt", "allow-unproven"]
PROVEN = "PROVEN"


def measured_engines(context: StageContext) -> list[dict[str, Any]]:
    """An entry for each engine of export and quantize, with the digests of its files as they are now.

    Raises:
        IntegrityError: a file is not as its stage recorded it.
    """
    entries = []
    for stage in ("export", "quantize"):
        artifact = context.inputs[stage]
        for engine in read_engines(artifact):
            files = unchanged_files(artifact, engine.files)
            entry = asdict(engine)
            del entry["build_seconds"]
            entries.append(
                {**entry, "stage": stage, "files": files, "status": UNPROVEN, "ships_for": [], "receipts": {}}
            )
    return entries


def add_receipts(engines: list[dict[str, Any]], candidates: Sequence[dict[str, Any]], paths: Sequence[Path]) -> None:
    """Put each receipt beside its engine, under the target that it comes from.

    Raises:
        ConfigError: a file is missing.
        IntegrityError: a receipt is none, or of other bytes than those of this run.
    """
    ranges = {entry["name"]: entry["logit_range"] for entry in candidates}
    known = {entry["name"]: entry for entry in engines}
    for path in paths:
        receipt = read_receipt(path)
        entry = known.get(receipt.engine)
        if entry is None or receipt.target not in entry["targets"]:
            raise IntegrityError(
                f"{path} is about the engine {receipt.engine} on {receipt.target}, which this run has not; "
                f"it has {', '.join(known) or 'none'}"
            )
        built = entry["sha256"] is None or receipt.engine_sha256 == entry["sha256"]
        if receipt.onnx_sha256 != entry["onnx_sha256"] or not built:
            what = "engine" if not built else "ONNX file"
            raise IntegrityError(
                f"{path} is about another {what} than this run's {receipt.engine}: its SHA-256 differs"
            )
        check_version(path, receipt, target_of(receipt.target))
        error, span = receipt.max_abs_error, ranges.get(entry["candidate"])  # none where it does not run here
        share = error / span if error is not None and span else None
        entry["receipts"][receipt.target] = {"kind": "receipt", **receipt.to_dict(), "relative_error": share}


def check_version(path: Path, receipt: Receipt, target: Target) -> None:
    """Raises `IntegrityError` where another version of the library ran than the target has."""
    known = [part for part in target.versions.split() if part != "or"]
    if not any(f"{receipt.library_version}.".startswith(f"{short}.") for short in map(release_of, known)):
        raise IntegrityError(
            f"{path}: TensorRT {receipt.library_version} ran, and {target.name} has {target.versions}; "
            "build and prove the engine with that one"
        )


def release_of(version: str) -> str:
    """The parts of a version that trtexec's banner names: three at most."""
    return ".".join(version.split(".")[:3])


def choose_engines(
    context: StageContext, engines: list[dict[str, Any]], ranked: Sequence[str], objective: str
) -> tuple[str, ...]:
    """Fill in which engine is shipped for which target. The asked targets.

    One that a device has proven goes first, one that a device has found wrong last. Then for size and for latency the
    smallest: how fast the candidates are on this processor says nothing of a GPU, and what is read from memory does.
    INT8 engines may be larger than FP16 ones (EfficientNet-Lite0: 9.8 and 7.5 MB). Where all of a target were timed on
    the GPU here, the fastest is chosen for latency. For accuracy it is that of the best candidate.
    """

    def rank(entry: dict[str, Any], target: str, timed: bool) -> tuple[int, float, int]:
        evidence = entry["receipts"].get(target, {})
        proven = 1 if evidence.get("relative_error") is None else 0 if holds(entry, target) else 2
        cost = 0 if objective == "accuracy" else entry["size_bytes"] or 0
        return proven, evidence["latency_ms_p50"] if timed else cost, ranked.index(entry["candidate"])

    request = asked_engines(context.inputs["export"])
    targets = request.targets if request else ()
    for target in targets:
        fitting = [entry for entry in engines if target in entry["targets"] and entry["candidate"] in ranked]
        if fitting:
            found = [entry["receipts"].get(target, {}) for entry in fitting]
            timed = all(one.get("kind") == "run here" and one["latency_ms_p50"] is not None for one in found)
            best = min(fitting, key=partial(rank, target=target, timed=timed and objective == "latency"))
            best["ships_for"].append(target)
    return targets


def holds(entry: dict[str, Any], target: str) -> bool:
    """Whether there is a receipt from this target, with outputs inside the tolerance."""
    error = entry["receipts"].get(target, {}).get("relative_error")
    return error is not None and error <= entry["tolerance"]


def engine_gates(engines: list[dict[str, Any]], targets: Sequence[str], rule: EngineRule) -> list[GateResult]:
    """Each target gets an engine, what receipts say of it holds, and where receipts are required it has one. Fills in
    `status`: PROVEN only where every target that an engine is shipped for has a receipt whose outputs hold."""
    shipped = [entry for entry in engines if entry["ships_for"]]
    served = [target for entry in shipped for target in entry["ships_for"]]
    there = Gate("an engine can ship", "at least", 1.0, "engines")
    detail = "no candidate that passed has an engine for it"
    results = [
        there.check(target, float(served.count(target)), detail="" if target in served else detail)
        for target in targets
    ]
    for entry in shipped:
        parity = Gate("engine parity", "at most", entry["tolerance"], "of the output range")
        found = [
            parity.check(f"{entry['name']} on {target}", receipt["relative_error"], receipt["samples"])
            for target, receipt in entry["receipts"].items()
        ]
        proven = all(holds(entry, target) for target in entry["ships_for"]) and all(one.passed for one in found)
        entry["status"] = PROVEN if proven else UNPROVEN
        results += found
        if rule == "require-receipt":
            there = Gate("engine has a receipt", "at least", 1.0, "receipts")
            for target in entry["ships_for"]:
                good = target in entry["receipts"]
                results.append(
                    there.check(f"{entry['name']} on {target}", float(good), detail="" if good else HOW_TO_PROVE)
                )
    return results


HOW_TO_PROVE = (
    f"{UNPROVEN}. Pack a bundle with validate.gates.engines: allow-unproven, run its script engines/<name>.sh on the "
    "device, make a receipt there (pipeline verify BUNDLE --proof FOLDER --receipt receipt.json), and give it to "
    "pipeline validate --receipt"
)


def engine_notes(evidence: dict[str, Any]) -> list[str]:
    """One line a shipped engine."""
    return [
        f"engine for {', '.join(entry['ships_for'])}: {entry['name']}, {entry['status']}"
        for entry in evidence["engines"]
        if entry["ships_for"]
    ]
