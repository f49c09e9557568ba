"""validate: every candidate against the unpatched merged PyTorch network on the held-out test split.

Reads: merge-lora's `checkpoint/` (the reference), the candidates of export and quantize, the test split; finetune's
`adapter/` for the first step of the drift.
Writes: `evidence.json`: what was measured, on which bytes, by which gates, and what was chosen; where a candidate fails
`reproduce/`, which shows it without this project.
Gates: enough samples, none of them fitted on; for each candidate, on every provider asked for, outputs that can be
compared, metric drop, agreement, numeric error by precision, slices, and what is asked for of flips, calibration,
other metrics and corrupted inputs; a candidate inside the limits on latency, speed, size and memory, where they are
set; where engines are asked for, one for each target, proven on its device; where a baseline is named, no regression
of the chosen candidate against it. No evidence is never a pass; what leaves it open is inconclusive.
Fails when: a runtime fails, or the bytes of a candidate or of the baseline are not those that were recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import RuntimeInferenceError
from models.onnx_files import weights_beside
from models.runtimes.gpu import gpu_here
from models.tasks import task_of
from models.tasks.single_label import SingleLabel
from stages.artifact import digest_of, unchanged_files, write_json
from stages.base import (
    NETWORK_PACKAGES,
    PROCESSING_PACKAGES,
    PROVIDER_PACKAGES,
    RUNTIME_PACKAGES,
    MachinePart,
    StageContext,
    StageResult,
)
from stages.candidates import Candidate, read_candidates
from stages.data.splits import SplitName
from stages.engines import ENGINE_PACKAGES
from stages.gate import Gate, GateResult
from stages.latency import TIMES, OtherWork, is_disturbed, speedup_of
from stages.validate.baseline import against_baseline, baseline_gates, baseline_outputs
from stages.validate.choice import choose, not_worth_it, ranked
from stages.validate.config import GatesConfig, ValidateConfig
from stages.validate.engine_runs import engine_run_gates, run_engines
from stages.validate.engines import add_receipts, choose_engines, engine_gates, measured_engines
from stages.validate.further import add_further, planned_samples
from stages.validate.gates import Scene, check, choice_gates, limit_results, over_limits, settled
from stages.validate.leaks import FITTED, leak_gate
from stages.validate.noise import NoiseFloor, noise_floor
from stages.validate.notes import REFERENCE, notes_of
from stages.validate.proofs import drift_of, self_test_of
from stages.validate.providers import (
    DEVICES,
    PROVIDERS,
    ProviderName,
    gates_elsewhere,
    name_on,
    require_providers,
    split_runs,
)
from stages.validate.robustness import measure_robustness
from stages.validate.self_test import self_test_gates
from stages.validate.waivers import waiver_notes

if TYPE_CHECKING:
    import numpy as np

    from models.checkpoint import Checkpoint
    from models.runtimes.base import Runtime
    from stages.artifact import Artifact
    from stages.validate.metrics import Outputs

EVIDENCE = "evidence.json"
EVIDENCE_SCHEMA_VERSION = 3


@dataclass(frozen=True)
class Measured:
    """A candidate on a provider, the artifact it comes from, the SHA-256 of its files, and what this run is called."""

    candidate: Candidate
    artifact: Artifact
    files: dict[str, str]
    provider: ProviderName
    name: str

    @property
    def path(self) -> Path:
        """The ONNX file."""
        return self.candidate.path(self.artifact)


class Validate:
    """See the module's docstring."""

    name = "validate"
    config_type = ValidateConfig
    consumes = ("finetune", "merge-lora", "export", "quantize")
    splits: tuple[SplitName, ...] = (*FITTED, "test")
    packages = (
        *NETWORK_PACKAGES, *PROCESSING_PACKAGES, *RUNTIME_PACKAGES, *PROVIDER_PACKAGES, *ENGINE_PACKAGES,
        "scipy", "scikit-learn",
    )  # fmt: skip
    machine: tuple[MachinePart, ...] = ("processor", "threads", "gpu")

    def run(self, context: StageContext, config: ValidateConfig) -> StageResult:
        """Measure the reference and every candidate, check the gates, choose."""
        from models.checkpoint import load_checkpoint

        require_providers(config.providers)
        checkpoint = load_checkpoint(context.inputs["merge-lora"].folder / "checkpoint")
        candidates = accepted_candidates(context, config.providers)
        plan = planned_samples(context, config, [one.candidate for one in candidates])
        released = baseline_outputs(context, config, checkpoint)
        outputs = all_outputs(context, config, checkpoint, candidates)
        with OtherWork() as others:
            timings = all_timings(context, config, checkpoint, candidates, outputs)
        evidence = assemble(context, checkpoint, candidates, outputs, timings, config.providers[0])
        disturbed = is_disturbed(others.cores, context.threads)
        evidence |= {
            "batch_size": config.batch_size,
            "other_work_cores": others.cores,
            "disturbed": disturbed,
            "sample_size": plan,
        }
        floor = noise_floor(context, checkpoint, outputs[REFERENCE].values, config.batch_size)
        evidence["noise_floor"] = floor.to_dict() if floor else None
        files, targets = {one.name: one.path for one in candidates}, targets_of(context, checkpoint)
        entries, runs = evidence["candidates"], evidence["other_runs"]
        further = partial(add_further, context, config, checkpoint, outputs, outputs[REFERENCE], targets, files)
        further([*entries, *runs])
        on_first = [one for one in candidates if one.provider == config.providers[0]]
        evidence["robustness"] = measure_robustness(
            context, config, checkpoint, on_first, outputs[REFERENCE], targets, entries
        )
        scene = scene_of(evidence, config.gates, checkpoint, floor)
        elsewhere = replace(scene, tolerances=ceilings_of(config.gates))

        def checked(entry: dict[str, Any]) -> list[GateResult]:
            # The noise floor is that of the CPU.
            found = check(entry, config, scene if entry["provider"] == "cpu" else elsewhere)
            return settled(found, config, entry["digest"])

        enough = Gate("enough samples", "at least", float(config.gates.min_samples), "samples")
        gates = [enough.check("test split", float(evidence["samples"])), leak_gate(context.data)]
        for entry in entries:
            own = checked(entry)
            results = own + gates_elsewhere(entry["name"], runs, checked)
            broken = [one["provider"] for one in runs if one["candidate"] == entry["name"] and not one["passed"]]
            entry["failed_on"] = [entry["provider"]] * any(one.stops for one in own) + broken
            entry["passed"] = not any(result.stops for result in results)
            entry["over_limits"] = over_limits(entry, config, disturbed)
            judged = [*results, *limit_results(entry, config, disturbed)]
            entry["excused"] = [result.name for result in judged if not result.passed and not result.stops]
            gates += results
        for entry in entries:
            entry["not_worth_it"] = not_worth_it(entry, entries)
        chosen = choose(entries, config.objective)
        gates += choice_gates(entries, chosen, config, disturbed)
        best = next((one for one in candidates if one.name == chosen), None)
        evidence["baseline"] = against_baseline(context, config, checkpoint, released, best, outputs, targets)
        digest = digest_of_files(best.files) if best else None
        gates += baseline_gates(evidence["baseline"], config, scene, digest)
        evidence["engines"] = engines = measured_engines(context)
        add_receipts(engines, evidence["candidates"], [Path(file) for file in config.receipts])
        evidence["engine_runs"] = ran = run_engines(
            context, checkpoint, engines, outputs, targets, config.batch_size, config.latency_calls
        )
        order = ranked(evidence["candidates"], config.objective)
        asked = choose_engines(context, engines, order, config.objective)
        gates += engine_gates(engines, asked, config.gates.engines)
        further(ran)
        gates += engine_run_gates(ran, engines, checked)
        tested = self_test_of(context, config, checkpoint, candidates, scene, outputs[REFERENCE], targets)
        gates += self_test_gates(tested, config.gates.min_mutation_score)
        judged = [*gates, *(one for entry in entries for one in limit_results(entry, config, disturbed))]
        digests = {one["name"]: one["digest"] for one in [*entries, *runs, *ran]}
        evidence |= {
            "self_test": tested,
            "drift": drift_of(context, config, checkpoint, candidates, scene, outputs, targets, evidence),
            "objective": config.objective,
            "chosen": chosen,
            "confusion": confusion(chosen, outputs, context, checkpoint),
            "waivers": waiver_notes(config.waivers, judged, digests),
        }
        write_json(context.output / EVIDENCE, evidence | {"gates": [gate.to_dict() for gate in gates]})
        return StageResult(tuple(gates), evidence, tuple(notes_of(evidence)))


def accepted_candidates(context: StageContext, providers: Sequence[ProviderName]) -> list[Measured]:
    """Every accepted candidate of export and quantize on every provider, with the digests of the bytes about to be
    measured.

    Raises:
        IntegrityError: a file is not as its stage recorded it.
    """
    found = []
    for stage in ("export", "quantize"):
        artifact = context.inputs[stage]
        for candidate in read_candidates(artifact):
            if not candidate.accepted:
                continue
            both = (candidate.file, weights_beside(Path(candidate.file)).as_posix())
            names = [name for name in both if name in artifact.manifest["files"]]
            files = unchanged_files(artifact, names)
            found.append(Measured(candidate, artifact, files, providers[0], candidate.name))
    return [
        replace(one, provider=provider, name=name_on(one.name, provider, providers[0]))
        for provider in providers
        for one in found
    ]


def all_outputs(
    context: StageContext, config: ValidateConfig, checkpoint: Checkpoint, candidates: list[Measured]
) -> dict[str, Outputs]:
    """What the reference and every candidate make of the whole test split.

    Where a provider other than the CPU does not run a candidate, or not all of it, that is the problem of its outputs.
    """
    from models.runtimes.onnxruntime_session import OnnxRuntimeSession
    from models.runtimes.torch_eager import TorchEager
    from stages.validate.metrics import Outputs, collect_outputs

    def outputs_of(runtime: Runtime, name: str) -> Outputs:
        test, io = context.data["test"], checkpoint.spec.io
        return collect_outputs(runtime, checkpoint.processing, test, io, config.batch_size, context.progress, name)

    with TorchEager(checkpoint.model, checkpoint.spec.io, "cpu", context.threads) as reference:
        outputs = {REFERENCE: outputs_of(reference, REFERENCE)}
    for one in candidates:
        try:
            with OnnxRuntimeSession(one.path, PROVIDERS[one.provider], context.threads) as session:
                outputs[one.name] = outputs_of(session, one.name)
        except RuntimeInferenceError as error:
            if one.provider == "cpu":
                raise
            outputs[one.name] = Outputs(None, str(error))
    return outputs


def all_timings(
    context: StageContext,
    config: ValidateConfig,
    checkpoint: Checkpoint,
    candidates: list[Measured],
    outputs: dict[str, Outputs],
) -> dict[str, dict[str, Any]]:
    """Latency and throughput of the reference and every candidate, with equal threads, in turns; one provider after the
    other, with PyTorch on the same device. What another provider than the CPU did not run has no times."""
    from models.runtimes.onnxruntime_session import OnnxRuntimeSession
    from models.runtimes.torch_eager import TorchEager
    from stages.latency import LATENCY_SAMPLES, measure_latency
    from stages.validate.metrics import first_outputs

    contents = [one.content for one in context.data["test"][: config.batch_size]]
    if not contents:
        return {}
    singles = [checkpoint.processing.arrays([content]) for content in contents[:LATENCY_SAMPLES]]
    batch = checkpoint.processing.arrays(contents)
    timings: dict[str, dict[str, Any]] = {}
    for provider in config.providers:
        with ExitStack() as stack:
            eager = TorchEager(checkpoint.model, checkpoint.spec.io, DEVICES[provider], context.threads)
            reference = name_on(REFERENCE, provider, config.providers[0])
            runtimes: dict[str, Runtime] = {reference: stack.enter_context(eager)}
            for one in candidates:
                if one.provider == provider and (provider == "cpu" or outputs[one.name].values is not None):
                    session = OnnxRuntimeSession(one.path, PROVIDERS[provider], context.threads)
                    runtimes[one.name] = stack.enter_context(session)
            earlier = first_outputs(outputs, checkpoint.spec.io, len(contents))
            timings |= measure_latency(runtimes, singles, batch, config.latency_calls, context.progress, earlier)
    return timings


def assemble(
    context: StageContext,
    checkpoint: Checkpoint,
    candidates: list[Measured],
    outputs: dict[str, Outputs],
    timings: dict[str, dict[str, Any]],
    deciding: ProviderName,
) -> dict[str, Any]:
    """Everything that was measured, as plain values. `deciding` is the provider whose numbers are the candidates'."""
    from stages.validate.metrics import compare

    spec = checkpoint.spec
    task, targets = task_of(spec.task), targets_of(context, checkpoint)
    reference, nothing = outputs[REFERENCE].values, dict.fromkeys(TIMES)
    entries = []
    for one in candidates:
        times = timings.get(one.name, nothing)
        reference_times = timings.get(name_on(REFERENCE, one.provider, deciding), nothing)
        before, after = reference_times["turns_ms"], times["turns_ms"]
        speedup, interval = speedup_of(before, after) if before and after else (None, None)
        entries.append(
            {
                "name": one.name,
                "candidate": one.candidate.name,
                "provider": one.provider,
                "stage": one.artifact.stage,
                "precision": one.candidate.precision,
                "file": one.candidate.file,
                "files": one.files,
                "sha256": one.files[one.candidate.file],
                "digest": digest_of_files(one.files),
                "mac_shares": one.candidate.measurements.get("mac_shares", {}),
                "size_bytes": sum(one.artifact.file(name).stat().st_size for name in one.files),
                **compare(outputs[one.name], outputs[REFERENCE], targets, task),
                **times,
                "speedup": speedup,
                "speedup_interval": interval,
            }
        )
    decided, elsewhere = split_runs(entries, deciding)
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
            **timings.get(REFERENCE, nothing),
        },
        "provider": deciding,
        "gpu": str(gpu) if (gpu := gpu_here()) else None,
        "candidates": decided,
        "other_runs": elsewhere,
    }


def digest_of_files(files: Mapping[str, str]) -> str:
    """What a waiver is bound to: the SHA-256 of a model that is one file, else of the list of its files' digests."""
    return next(iter(files.values())) if len(files) == 1 else digest_of(files)


def scene_of(
    evidence: Mapping[str, Any], gates: GatesConfig, checkpoint: Checkpoint, floor: NoiseFloor | None
) -> Scene:
    """What every candidate is judged by."""
    tolerances = ceilings_of(gates)
    if floor:
        tolerances = floor.tolerances(gates.ceilings)
    return Scene(
        samples=evidence["samples"],
        metric=evidence["metric_name"],
        reference_metric=evidence["reference"]["metric"],
        embeds=bool(task_of(checkpoint.spec.task).embeds),
        tolerances=tolerances,
    )


def ceilings_of(gates: GatesConfig) -> dict[str, tuple[float, str]]:
    """Precision → the tolerance where no noise floor is known, and why it is that."""
    return {name: (value, "the ceiling: the noise floor is not known") for name, value in gates.ceilings.items()}


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
