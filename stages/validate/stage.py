"""validate: every candidate against the unpatched merged PyTorch network on the held-out test split.

Reads: merge-lora's `checkpoint/` (the reference), the candidates of export and quantize, the test split.
Writes: `evidence.json`: what was measured, on which bytes, by which gates, and what was chosen.
Gates: enough samples; for each candidate outputs that can be compared, metric drop, agreement and numeric
error by precision; a candidate inside the limits on latency and size, where they are set; where engines are asked for,
one for each target, proven on its device. No evidence is never a pass.
Fails when: a runtime fails, or a candidate's bytes are not those that its stage recorded.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from models.tasks import task_of
from models.tasks.single_label import SingleLabel
from stages.artifact import digest_of, sha256_of_file, unchanged_files, write_json
from stages.base import (
    NETWORK_PACKAGES,
    PROCESSING_PACKAGES,
    RUNTIME_PACKAGES,
    MachinePart,
    StageConfig,
    StageContext,
    StageResult,
)
from stages.candidates import Candidate, read_candidates
from stages.data.splits import SplitName
from stages.gate import Gate, GateResult
from stages.latency import OtherWork, is_disturbed, speedup_of
from stages.validate.engines import (
    EngineRule,
    add_receipts,
    choose_engines,
    engine_gates,
    engine_notes,
    measured_engines,
)

if TYPE_CHECKING:
    import numpy as np

    from models.checkpoint import Checkpoint
    from models.runtimes.base import Runtime
    from stages.artifact import Artifact
    from stages.validate.metrics import Outputs

EVIDENCE = "evidence.json"
EVIDENCE_SCHEMA_VERSION = 2
REFERENCE = "pytorch"
AGREEMENT_INT8 = 0.94
LATENCY_SAMPLES = 8
"""Different real samples that the timed calls take in turn."""

FLOATS = ("fp32", "fp16")
"""Precisions that lose next to nothing: what has fewer bits must be better than these at what is asked for."""

OBJECTIVES = {"latency": "latency_ms_p50", "size": "size_bytes", "accuracy": "metric"}


class GatesConfig(StageConfig):
    """What a release must hold. Every candidate must be true to the reference; a candidate above a limit on latency
    or size is left out of the choice, and one must remain."""

    min_samples: int = Field(
        default=100,
        ge=1,
        description="Fewest test samples that count as evidence (number). 100 see a drop of 6.5 "
        "points where one answer in twenty flips; a drop of 1 point takes thousands.",
    )
    max_metric_drop: float = Field(
        default=0.01, ge=0, description="Largest drop of the metric below the reference (0.01 = 1 point)."
    )
    metric_drop: Literal["observed", "proven"] = Field(
        default="observed",
        description="What max_metric_drop bounds: the drop observed, or the largest one that the samples do not rule "
        "out (one-sided 95 % bound; takes thousands of samples: 8.56·flips/margin²).",
    )
    min_agreement: float = Field(
        default=0.99,
        ge=0,
        le=1,
        description="Smallest share of samples with the reference's answer (its top-1 class), of every candidate.",
    )
    min_agreement_int8: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="The same for INT8 candidates alone. Default: min_agreement where that is written, else 0.94: "
        "near-ties flip in INT8 without harm to the metric, which has a gate of its own.",
    )
    max_relative_error_fp32: float = Field(
        default=1e-3,
        gt=0,
        description="Largest output error of fp32 as a share of the reference's range (ratio).",
    )
    max_relative_error_fp16: float = Field(
        default=2e-2,
        gt=0,
        description="Largest output error of fp16 as a share of the reference's range (ratio).",
    )
    min_sqnr_db: float = Field(
        default=10.0,
        description="Smallest signal-to-quantization-noise ratio of any candidate (dB). Halved logits, which keep "
        "every class, have 6 dB.",
    )
    min_cosine: float = Field(
        default=0.95,
        ge=-1,
        le=1,
        description="Of tasks that give embeddings: smallest cosine similarity of any sample to the reference's. "
        "Agreement on the nearest does not see that all turn together, which breaks an index made before.",
    )
    max_latency_ms: float | None = Field(
        default=None, gt=0, description="Limit: largest p95 latency at batch 1 on this machine (milliseconds)."
    )
    max_size_bytes: int | None = Field(
        default=None, gt=0, description="Limit: largest model, with its external weights (bytes)."
    )

    engines: EngineRule = Field(
        default="require-receipt",
        description="Engines run on devices that this machine is not. require-receipt: each that is shipped has the "
        "receipt of a device (receipts) with its digest; allow-unproven: it may be packed without one, and is named "
        "UNPROVEN wherever it is named.",
    )

    def agreement_of(self, precision: str) -> float:
        """The share of samples that a candidate of this precision must agree on."""
        if precision != "int8":
            return self.min_agreement
        if self.min_agreement_int8 is not None:
            return self.min_agreement_int8
        return self.min_agreement if "min_agreement" in self.model_fields_set else AGREEMENT_INT8


class ValidateConfig(StageConfig):
    """How candidates are measured and which one is shipped."""

    objective: Literal["latency", "size", "accuracy"] = Field(
        default="latency",
        description="What the shipped candidate is best at, among those whose gates all passed (accuracy: the task's "
        "metric).",
    )
    batch_size: int = Field(
        default=32, ge=1, description="Batch size of the metric and throughput measurements (number)."
    )
    latency_calls: int = Field(default=100, ge=20, description="Timed calls of each runtime at batch 1 (number).")
    receipts: tuple[str, ...] = Field(
        default=(), description="Files of `pipeline verify --receipt`, from the devices that engines are built for."
    )
    gates: GatesConfig = Field(default_factory=GatesConfig, description="Thresholds.")

    def outside(self) -> dict[str, str]:
        """What the receipts hold, wherever they lie."""
        found = [sha256_of_file(Path(file)) if Path(file).is_file() else "missing" for file in self.receipts]
        return {"receipts": digest_of(found)}


@dataclass(frozen=True)
class Measured:
    """A candidate, the artifact it comes from, and the SHA-256 of its files."""

    candidate: Candidate
    artifact: Artifact
    files: dict[str, str]

    @property
    def path(self) -> Path:
        """The ONNX file."""
        return self.candidate.path(self.artifact)


class Validate:
    """See the module's docstring."""

    name = "validate"
    config_type = ValidateConfig
    consumes = ("merge-lora", "export", "quantize")
    splits: tuple[SplitName, ...] = ("test",)
    packages = (*NETWORK_PACKAGES, *PROCESSING_PACKAGES, *RUNTIME_PACKAGES, "scipy", "scikit-learn")
    machine: tuple[MachinePart, ...] = ("processor", "threads")

    def run(self, context: StageContext, config: ValidateConfig) -> StageResult:
        """Measure the reference and every candidate, check the gates, choose."""
        from models.checkpoint import load_checkpoint

        checkpoint = load_checkpoint(context.inputs["merge-lora"].folder / "checkpoint")
        candidates = accepted_candidates(context)
        outputs = all_outputs(context, config, checkpoint, candidates)
        with OtherWork() as others:
            timings = all_timings(context, config, checkpoint, candidates)
        evidence = assemble(context, checkpoint, candidates, outputs, timings)
        evidence |= {"other_work_cores": others.cores, "disturbed": is_disturbed(others.cores, context.threads)}
        enough = Gate("enough samples", "at least", float(config.gates.min_samples), "samples")
        gates = [enough.check("test split", float(evidence["samples"]))]
        for entry in evidence["candidates"]:
            embeds = bool(task_of(checkpoint.spec.task).embeds)
            results = check(entry, config.gates, evidence["samples"], evidence["metric_name"], embeds)
            entry["passed"] = all(result.passed for result in results)
            entry["over_limits"] = over_limits(entry, config.gates)
            gates += results
        for entry in evidence["candidates"]:
            entry["not_worth_it"] = not_worth_it(entry, evidence["candidates"])
        chosen = choose(evidence["candidates"], config.objective)
        gates += choice_gates(evidence["candidates"], chosen, config.gates)
        evidence["engines"] = engines = measured_engines(context)
        add_receipts(engines, evidence["candidates"], [Path(file) for file in config.receipts])
        order = ranked(evidence["candidates"], config.objective)
        targets = choose_engines(context, engines, order, config.objective)
        gates += engine_gates(engines, targets, config.gates.engines)
        evidence |= {
            "objective": config.objective,
            "chosen": chosen,
            "confusion": confusion(chosen, outputs, context, checkpoint),
        }
        write_json(context.output / EVIDENCE, evidence | {"gates": [gate.to_dict() for gate in gates]})
        return StageResult(tuple(gates), evidence, tuple(notes_of(evidence)))


def accepted_candidates(context: StageContext) -> list[Measured]:
    """Every accepted candidate of export and quantize, with the digests of the bytes about to be measured.

    Raises:
        IntegrityError: a file is not as its stage recorded it.
    """
    found = []
    for stage in ("export", "quantize"):
        artifact = context.inputs[stage]
        for candidate in read_candidates(artifact):
            if not candidate.accepted:
                continue
            names = [name for name in (candidate.file, f"{candidate.file}.data") if name in artifact.manifest["files"]]
            found.append(Measured(candidate, artifact, unchanged_files(artifact, names)))
    return found


def all_outputs(
    context: StageContext, config: ValidateConfig, checkpoint: Checkpoint, candidates: list[Measured]
) -> dict[str, Outputs]:
    """What the reference and every candidate make of the whole test split."""
    from models.runtimes.onnxruntime_session import OnnxRuntimeSession
    from models.runtimes.torch_eager import TorchEager
    from stages.validate.metrics import collect_outputs

    def outputs_of(runtime: Runtime, name: str) -> Outputs:
        test, io = context.data["test"], checkpoint.spec.io
        return collect_outputs(runtime, checkpoint.processing, test, io, config.batch_size, context.progress, name)

    with TorchEager(checkpoint.model, checkpoint.spec.io, "cpu", context.threads) as reference:
        outputs = {REFERENCE: outputs_of(reference, REFERENCE)}
    for one in candidates:
        with OnnxRuntimeSession(one.path, threads=context.threads) as session:
            outputs[one.candidate.name] = outputs_of(session, one.candidate.name)
    return outputs


def all_timings(
    context: StageContext, config: ValidateConfig, checkpoint: Checkpoint, candidates: list[Measured]
) -> dict[str, dict[str, Any]]:
    """Latency and throughput of the reference and every candidate, with equal threads, in turns."""
    from models.runtimes.onnxruntime_session import OnnxRuntimeSession
    from models.runtimes.torch_eager import TorchEager
    from stages.latency import measure_latency

    contents = [one.content for one in context.data["test"][: config.batch_size]]
    if not contents:
        return {}
    singles = [checkpoint.processing.arrays([content]) for content in contents[:LATENCY_SAMPLES]]
    with ExitStack() as stack:
        eager = TorchEager(checkpoint.model, checkpoint.spec.io, "cpu", context.threads)
        runtimes: dict[str, Runtime] = {REFERENCE: stack.enter_context(eager)}
        for one in candidates:
            session = OnnxRuntimeSession(one.path, threads=context.threads)
            runtimes[one.candidate.name] = stack.enter_context(session)
        batch = checkpoint.processing.arrays(contents)
        return measure_latency(runtimes, singles, batch, config.latency_calls, context.progress)


def assemble(
    context: StageContext,
    checkpoint: Checkpoint,
    candidates: list[Measured],
    outputs: dict[str, Outputs],
    timings: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Everything that was measured, as plain values."""
    from stages.validate.metrics import compare

    spec = checkpoint.spec
    task, targets = task_of(spec.task), targets_of(context, checkpoint)
    reference, reference_times = outputs[REFERENCE].values, timings.get(REFERENCE, dict.fromkeys(TIMES))
    entries = []
    for one in candidates:
        times = timings.get(one.candidate.name, dict.fromkeys(TIMES))
        before, after = reference_times["turns_ms"], times["turns_ms"]
        speedup, interval = speedup_of(before, after) if before and after else (None, None)
        entries.append(
            {
                "name": one.candidate.name,
                "stage": one.artifact.stage,
                "precision": one.candidate.precision,
                "file": one.candidate.file,
                "files": one.files,
                "sha256": one.files[one.candidate.file],
                "mac_shares": one.candidate.measurements.get("mac_shares", {}),
                "size_bytes": sum(one.artifact.file(name).stat().st_size for name in one.files),
                **compare(outputs[one.candidate.name], outputs[REFERENCE], targets, task),
                **times,
                "speedup": speedup,
                "speedup_interval": interval,
            }
        )
    weights = context.inputs["merge-lora"].file("checkpoint/model.safetensors")
    return {
        "schema_version": EVIDENCE_SCHEMA_VERSION,
        "samples": len(targets),
        "metric_name": task.metric,
        "data_fingerprint": context.data.fingerprints["test"],
        "threads": context.threads,
        "labels": list(spec.labels),
        "reference": {
            "metric": float(task.scores(reference, targets).mean()) if reference is not None else None,
            "more_metrics": task.more_metrics(reference, targets) if reference is not None else {},
            "size_bytes": weights.stat().st_size,
            **reference_times,
        },
        "candidates": entries,
    }


TIMES = ("latency_ms_p50", "latency_ms_p95", "throughput_per_s", "turns_ms")
"""The keys of a runtime's timings; None where there was no sample to run."""


def targets_of(context: StageContext, checkpoint: Checkpoint) -> np.ndarray:
    """What every test example should give, as the task's array."""
    spec = checkpoint.spec
    return task_of(spec.task).targets([one.label for one in context.data["test"]], spec.io.width)


def check(
    entry: dict[str, Any], gates: GatesConfig, samples: int, metric: str, embeds: bool = False
) -> list[GateResult]:
    """The gates of one candidate. `embeds`: its outputs are embeddings."""
    name, precision, problem = entry["name"], entry["precision"], entry["problem"]
    agreement = gates.agreement_of(precision)
    key = "metric_difference" if gates.metric_drop == "observed" else "metric_difference_bound"
    drop = None if entry[key] is None else 0.0 - entry[key]
    visible = "" if drop is None else f"{samples} samples can see drops of {entry['smallest_visible_drop']:.4f} or more"
    results = [
        Gate("comparable outputs", "at most", 0.0, "problems").check(name, float(bool(problem)), samples, problem),
        Gate(f"{metric} drop", "at most", gates.max_metric_drop, metric).check(name, drop, samples, visible),
        Gate("agreement", "at least", agreement).check(name, entry["agreement"], samples),
        Gate("SQNR", "at least", gates.min_sqnr_db, "dB").check(name, entry["sqnr_db"], samples),
    ]
    if embeds:
        results.append(Gate("cosine", "at least", gates.min_cosine).check(name, entry["cosine"], samples))
    limits = {"fp32": gates.max_relative_error_fp32, "fp16": gates.max_relative_error_fp16}
    if precision in limits:
        gate = Gate("output error", "at most", limits[precision], "of the output range")
        results.append(gate.check(name, entry["relative_error"], samples))
    return results


def limits_of(gates: GatesConfig) -> list[tuple[str, Gate]]:
    """(what is measured, its limit) for the limits that are set."""
    limits = []
    if gates.max_latency_ms is not None:
        limits.append(("latency_ms_p95", Gate("p95 latency", "at most", gates.max_latency_ms, "ms")))
    if gates.max_size_bytes is not None:
        limits.append(("size_bytes", Gate("size", "at most", gates.max_size_bytes, "bytes")))
    return limits


def over_limits(entry: dict[str, Any], gates: GatesConfig) -> list[str]:
    """The limits that a candidate does not keep, in words: it may be a good network and still not the one to ship."""
    found = [gate.check(entry["name"], entry[key]) for key, gate in limits_of(gates)]
    return [f"{result.name}: {result.message}" for result in found if not result.passed]


def choice_gates(entries: list[dict[str, Any]], chosen: str | None, gates: GatesConfig) -> list[GateResult]:
    """A candidate is left to ship, and it keeps the limits."""
    reasons = [f"{entry['name']}: {'; '.join(entry['over_limits'])}" for entry in entries if entry["over_limits"]]
    gate = Gate("a candidate can ship", "at least", 1.0, "candidates")
    results = [gate.check("validate", float(bool(chosen)), detail="" if chosen else ". ".join(reasons))]
    for entry in entries:
        if entry["name"] == chosen:
            results += [limit.check(entry["name"], entry[key]) for key, limit in limits_of(gates)]
    return results


def not_worth_it(entry: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, str]:
    """Objective → why a candidate of fewer bits is no better at it than one in floating point that may ship too.

    Faster is what the paired turns show, not what two medians happen to say: a tie goes to floating point, which is
    nearer to the reference. Empty for floating point itself, and where none of it may ship.
    """
    floats = [one for one in entries if one["precision"] in FLOATS and one["passed"] and not one["over_limits"]]
    if entry["precision"] in FLOATS or not floats or not entry["turns_ms"]:
        return {}
    found = {}
    fastest = min(floats, key=lambda one: float(one["latency_ms_p50"]))
    ratio, (low, _) = speedup_of(fastest["turns_ms"], entry["turns_ms"])
    if low <= 1:
        found["latency"] = f"not faster than {fastest['name']}: {ratio:.2f}× its speed, {low:.2f}× at least"
    smallest = min(floats, key=lambda one: int(one["size_bytes"]))
    if entry["size_bytes"] >= smallest["size_bytes"]:
        sizes = (f"{one['size_bytes'] / 1e6:.1f} MB" for one in (entry, smallest))
        found["size"] = f"not smaller than {smallest['name']}: {' against '.join(sizes)}"
    return found


def choose(entries: list[dict[str, Any]], objective: str) -> str | None:
    """The best of those that may be shipped and are worth their lower precision, or None where there is none."""
    worth = {entry["name"] for entry in entries if objective not in entry["not_worth_it"]}
    return next((name for name in ranked(entries, objective) if name in worth), None)


def ranked(entries: list[dict[str, Any]], objective: str) -> list[str]:
    """The names of those that passed and keep the limits, the best first; of equals the faster, then the smaller."""
    sign = -1 if objective == "accuracy" else 1
    eligible = [entry for entry in entries if entry["passed"] and not entry["over_limits"]]

    def rank(entry: dict[str, Any]) -> tuple[float, float, float]:
        return sign * entry[OBJECTIVES[objective]], entry["latency_ms_p50"], entry["size_bytes"]

    return [str(entry["name"]) for entry in sorted(eligible, key=rank)]


def confusion(
    chosen: str | None, outputs: dict[str, Outputs], context: StageContext, checkpoint: Checkpoint
) -> list[list[int]]:
    """The confusion matrix of the chosen candidate; empty where there is none, or where an answer is not one class."""
    from stages.validate.metrics import confusion_of

    values, targets = outputs[chosen].values if chosen else None, targets_of(context, checkpoint)
    if values is None or not isinstance(task_of(checkpoint.spec.task), SingleLabel):
        return []
    return confusion_of(values, targets, len(checkpoint.spec.labels))


def notes_of(evidence: dict[str, Any]) -> list[str]:
    """One line a candidate, and what was chosen."""
    reference, metric = evidence["reference"], evidence["metric_name"]
    if reference["metric"] is None or reference["latency_ms_p50"] is None:
        return [f"{REFERENCE}: no evidence on {evidence['samples']} samples"]
    lines = [
        f"{REFERENCE}: {metric} {reference['metric']:.4f} on {evidence['samples']} samples, "
        f"{reference['latency_ms_p50']:.2f} ms"
    ]
    for entry in evidence["candidates"]:
        if entry["problem"]:
            lines.append(f"{entry['name']}: {entry['problem']}")
            continue
        lines.append(
            f"{entry['name']}: {metric} {entry['metric']:.4f} ({entry['metric_difference']:+.4f}; drops of "
            f"{entry['smallest_visible_drop']:.4f} or more would show), agreement {entry['agreement']:.4f}, "
            f"{entry['latency_ms_p50']:.2f} ms ({entry['speedup']:.1f}×), {entry['size_bytes'] / 1e6:.1f} MB"
        )
        lines += [f"{entry['name']} is left out: {reason}" for reason in entry["over_limits"]]
        if entry["not_worth_it"]:
            lines.append(f"{entry['name']} does not earn its place here: {'; '.join(entry['not_worth_it'].values())}")
    if evidence["disturbed"]:
        lines.append(
            f"times are unreliable: other processes kept {evidence['other_work_cores']:.1f} cores busy beside the "
            f"{evidence['threads']} threads that were measured"
        )
    return [*lines, f"chosen for {evidence['objective']}: {evidence['chosen'] or 'none'}", *engine_notes(evidence)]
