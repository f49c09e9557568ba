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
from typing import TYPE_CHECKING, Any

from models.tasks import task_of
from models.tasks.single_label import SingleLabel
from stages.artifact import unchanged_files, write_json
from stages.base import (
    NETWORK_PACKAGES,
    PROCESSING_PACKAGES,
    RUNTIME_PACKAGES,
    MachinePart,
    StageContext,
    StageResult,
)
from stages.candidates import Candidate, read_candidates
from stages.data.splits import SplitName
from stages.gate import Gate
from stages.latency import OtherWork, is_disturbed, speedup_of
from stages.validate.choice import choose, not_worth_it, ranked
from stages.validate.config import ValidateConfig
from stages.validate.engines import add_receipts, choose_engines, engine_gates, measured_engines
from stages.validate.gates import check, choice_gates, over_limits
from stages.validate.notes import REFERENCE, notes_of

if TYPE_CHECKING:
    import numpy as np

    from models.checkpoint import Checkpoint
    from models.runtimes.base import Runtime
    from stages.artifact import Artifact
    from stages.validate.metrics import Outputs

EVIDENCE = "evidence.json"
EVIDENCE_SCHEMA_VERSION = 2
LATENCY_SAMPLES = 8
"""Different real samples that the timed calls take in turn."""


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


def confusion(
    chosen: str | None, outputs: dict[str, Outputs], context: StageContext, checkpoint: Checkpoint
) -> list[list[int]]:
    """The confusion matrix of the chosen candidate; empty where there is none, or where an answer is not one class."""
    from stages.validate.metrics import confusion_of

    values, targets = outputs[chosen].values if chosen else None, targets_of(context, checkpoint)
    if values is None or not isinstance(task_of(checkpoint.spec.task), SingleLabel):
        return []
    return confusion_of(values, targets, len(checkpoint.spec.labels))
