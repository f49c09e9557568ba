"""The last release: the network that a run or a bundle ships, on the same test samples as the candidates.

It gets its own preprocessing, as its users have it, and is compared pair by pair with the candidate that was chosen,
under the margin and the rule of the metric drop. What another task, other labels or another I/O contract leave without
a comparison is no evidence, which no gate passes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.errors import ConfigError, IntegrityError, Problem, RuntimeInferenceError
from models.tasks import task_of
from stages.artifact import Artifact, digest_of, read_artifact, sha256_of_file, unchanged_files
from stages.gate import Gate, GateResult, stops
from stages.latency import OtherWork, is_disturbed, speedup_of

if TYPE_CHECKING:
    import numpy as np

    from models.checkpoint import Checkpoint
    from models.modalities import Processing
    from models.runtimes.base import Runtime
    from models.spec import IOSpec, ModelSpec
    from stages.base import StageContext
    from stages.validate.config import ValidateConfig
    from stages.validate.gates import Scene
    from stages.validate.metrics import Outputs
    from stages.validate.stage import Measured

BUNDLE_FILE = "bundle.json"
BASELINE = "baseline"
LISTED_LABELS = 3
NUMBERS = (
    "baseline_metric", "baseline_more_metrics", "metric", "more_metrics", "metric_difference",
    "metric_difference_interval", "metric_difference_one_sided", "difference_variance", "flips", "flip_rate",
    "flip_rate_interval", "smallest_visible_drop", "agreement", "latency_ratio", "latency_ratio_interval",
)  # fmt: skip
"""What is None where there is nothing to compare."""


@dataclass(frozen=True)
class Baseline:
    """The network that was shipped, its bytes verified. `recorded_metric` and `test_fingerprint` are what its own
    validate measured, and on which samples."""

    name: str
    kind: Literal["run", "bundle"]
    candidate: str
    file: Path
    sha256: str
    task: str
    labels: tuple[str, ...]
    io: IOSpec
    processing: Processing
    recorded_metric: float | None
    test_fingerprint: str | None


@dataclass(frozen=True)
class Released:
    """What is said of the baseline, and its outputs on the test split."""

    entry: dict[str, Any]
    outputs: Outputs


# --- where it is ----------------------------------------------------------------------------------


def digest_of_baseline(path: Path) -> str:
    """What makes it another one: of a tar its SHA-256, of a bundle that of `bundle.json`, which has those of all its
    files; of a run the digests of the files it ships and of its merged network.

    Raises:
        ValueError: it is neither, or ships nothing.
    """
    if path.is_file():
        return sha256_of_file(path)
    if (path / BUNDLE_FILE).is_file():
        return sha256_of_file(path / BUNDLE_FILE)
    _, entry = shipped_by(path)
    return digest_of([entry["files"], artifact_in(path, "merge-lora").digest])


def shipped_by(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the evidence of a run's validate, the entry in it of the candidate that was chosen).

    Raises:
        ValueError: there is none, or a gate of it stopped the run.
    """
    validated = artifact_in(run, "validate")
    if failed := [gate["name"] for gate in validated.manifest["gates"] if stops(gate)]:
        raise ValueError(f"a gate of that run's validate did not pass ({failed[0]}): it released nothing")
    try:
        evidence = json.loads((validated.folder / "evidence.json").read_text(encoding="utf-8"))
        entry = next(one for one in evidence["candidates"] if one["name"] == evidence["chosen"])
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise ValueError("the evidence of that run's validate names no candidate that was chosen") from error
    return evidence, entry


def artifact_in(run: Path, stage: str) -> Artifact:
    """A stage's artifact in the folder of a run. Raises `ValueError` where there is none."""
    artifact = read_artifact(stage, run / stage)
    if artifact is None:
        raise ValueError(
            f"{run} is no bundle, and no run with a result of {stage}; expected a bundle (folder or tar), or the "
            "folder of a run that went through validate"
        )
    return artifact


@contextmanager
def open_baseline(path: Path) -> Iterator[Baseline]:
    """The network of a run or bundle, its digests verified first.

    Raises:
        ConfigError: there is nothing that could be one.
        IntegrityError: a file is not the one that was shipped.
    """
    if path.is_file() or (path / BUNDLE_FILE).is_file():
        from models.bundle import EVIDENCE_FOLDER, open_bundle

        with open_bundle(path) as bundle:
            model = bundle.manifest["models"][bundle.chosen]
            yield Baseline(
                str(bundle.manifest.get("name") or path.name), "bundle", bundle.chosen, bundle.file(model["file"]),
                bundle.manifest["files"][model["file"]], bundle.task, bundle.labels, bundle.io, bundle.processing,
                model.get("metric"), fingerprint_in(bundle.folder / EVIDENCE_FOLDER / "evidence.json"),
            )  # fmt: skip
    else:
        yield baseline_of_run(path)


def fingerprint_in(evidence: Path) -> str | None:
    """The digest of the test split that a bundle was validated on, where its evidence has one."""
    try:
        found = json.loads(evidence.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(found["data_fingerprint"]) if isinstance(found, dict) and "data_fingerprint" in found else None


def baseline_of_run(run: Path) -> Baseline:
    """See `open_baseline`."""
    from models.checkpoint import load_spec
    from models.modalities import processing_from_dict

    try:
        unchanged_files(artifact_in(run, "validate"), ["evidence.json"])
        evidence, entry = shipped_by(run)
        source, merged = artifact_in(run, entry["stage"]), artifact_in(run, "merge-lora")
    except ValueError as error:
        raise ConfigError([Problem("validate.baseline", str(error))]) from error
    if unchanged_files(source, entry["files"]) != entry["files"]:
        raise IntegrityError(
            f"{source.file(entry['file'])} is not the file that validate measured there; run `pipeline all` there again"
        )
    folder = merged.folder / "checkpoint"
    described = [name for name in merged.manifest["files"] if not name.endswith(".safetensors")]
    unchanged_files(merged, described)
    spec = load_spec(folder)
    return Baseline(
        run.resolve().name, "run", entry["name"], source.file(entry["file"]), entry["sha256"], spec.task, spec.labels,
        spec.io, processing_from_dict(spec.processing, folder), entry.get("metric"), evidence.get("data_fingerprint"),
    )  # fmt: skip


# --- what it does ---------------------------------------------------------------------------------


def baseline_outputs(context: StageContext, config: ValidateConfig, checkpoint: Checkpoint) -> Released | None:
    """What the baseline makes of the test split on the provider that decides; None where there is none.

    Raises:
        ConfigError: it lies in the folder of this very run.
        IntegrityError: it is not as it was shipped.
    """
    from models.runtimes.onnxruntime_session import OnnxRuntimeSession
    from stages.validate.metrics import Outputs, collect_outputs
    from stages.validate.providers import PROVIDERS

    if config.baseline is None:
        return None
    path = Path(config.baseline)
    if path.resolve().is_relative_to(context.inputs["merge-lora"].folder.parent.resolve()):
        hint = "name the run or bundle of the last release, or give this run another folder"
        raise ConfigError([Problem("validate.baseline", f"{path} is in the folder of this very run", hint)])
    with open_baseline(path) as baseline:
        problem = incomparable(baseline, checkpoint.spec)
        outputs, test = Outputs(None, problem), context.data["test"]
        if not problem:
            try:
                with OnnxRuntimeSession(baseline.file, PROVIDERS[config.providers[0]], context.threads) as session:
                    outputs = collect_outputs(
                        session, baseline.processing, test, baseline.io, config.batch_size, context.progress, BASELINE
                    )
            except RuntimeInferenceError as error:
                outputs = Outputs(None, str(error))
        entry = {
            "name": baseline.name,
            "kind": baseline.kind,
            "candidate": baseline.candidate,
            "sha256": baseline.sha256,
            "recorded_metric": baseline.recorded_metric,
            "same_test_split": baseline.test_fingerprint == context.data.fingerprints["test"],
            "same_preprocessing": baseline.processing == checkpoint.processing,
        }
    return Released(entry, outputs)


def incomparable(baseline: Baseline, spec: ModelSpec) -> str:
    """Why its answers are not to the same question; empty where they are."""
    if baseline.task != spec.task:
        return f"{baseline.name} has the task {baseline.task}, this network {spec.task}"
    if baseline.labels != spec.labels:
        return f"{baseline.name} has other labels: {label_changes(baseline.labels, spec.labels)}"
    pairs = zip((*baseline.io.inputs, *baseline.io.outputs), (*spec.io.inputs, *spec.io.outputs), strict=False)
    if baseline.io != spec.io:
        before, after = next(((one, other) for one, other in pairs if one != other), (baseline.io, spec.io))
        return f"{baseline.name} has another I/O contract: {before}, this network {after}"
    return ""


def label_changes(before: Sequence[str], after: Sequence[str]) -> str:
    """In words: what is there only, what is here only."""

    def listed(names: list[str]) -> str:
        more = f" and {len(names) - LISTED_LABELS} more" if len(names) > LISTED_LABELS else ""
        return ", ".join(map(repr, names[:LISTED_LABELS])) + more

    only = [(word, [one for one in some if one not in others])
            for word, some, others in (("there only", before, after), ("here only", after, before))]  # fmt: skip
    return "; ".join(f"{word} {listed(names)}" for word, names in only if names) or "the same in another order"


def against_baseline(
    context: StageContext,
    config: ValidateConfig,
    checkpoint: Checkpoint,
    released: Released | None,
    chosen: Measured | None,
    outputs: Mapping[str, Outputs],
    targets: np.ndarray,
) -> dict[str, Any] | None:
    """The chosen candidate against the baseline, sample by sample; differences are candidate minus baseline. Where
    `max_latency_regression` asks for it also their times, in turns on the same arrays: `latency_ratio` is candidate by
    baseline, its interval that of `speedup_of`."""
    from stages.validate.metrics import decisions

    if released is None:
        return None
    before, after = released.outputs, outputs[chosen.name] if chosen else None
    entry = {**released.entry, "chosen": chosen.name if chosen else None, **dict.fromkeys(NUMBERS), "disturbed": False}
    entry["problem"] = before.problem or ("" if after else "no candidate was chosen that could be compared with it")
    entry["problem"] = entry["problem"] or (after.problem if after else "")
    if entry["problem"] or chosen is None or after is None or before.values is None or after.values is None:
        return entry
    task = task_of(checkpoint.spec.task)
    entry |= decisions(after.values, before.values, targets, task)
    entry["baseline_metric"] = float(task.scores(before.values, targets).mean())
    entry["baseline_more_metrics"] = task.more_metrics(before.values, targets)
    if config.gates.max_latency_regression is not None:
        entry |= latency_against(context, config, checkpoint, chosen)
    return entry


def latency_against(
    context: StageContext, config: ValidateConfig, checkpoint: Checkpoint, chosen: Measured
) -> dict[str, Any]:
    """Times of both networks in turns, with equal threads on equal arrays; none where the baseline does not take these
    arrays (a tokenizer with fewer tokens)."""
    from models.runtimes.onnxruntime_session import OnnxRuntimeSession
    from stages.latency import LATENCY_SAMPLES, measure_latency
    from stages.validate.providers import PROVIDERS

    provider, threads = PROVIDERS[chosen.provider], context.threads
    contents = [one.content for one in context.data["test"][: config.batch_size]]
    singles = [checkpoint.processing.arrays([content]) for content in contents[:LATENCY_SAMPLES]]
    batch = checkpoint.processing.arrays(contents)
    try:
        with (
            open_baseline(Path(str(config.baseline))) as baseline,
            OnnxRuntimeSession(baseline.file, provider, threads) as before,
            OnnxRuntimeSession(chosen.path, provider, threads) as after,
            OtherWork() as others,
        ):
            both: dict[str, Runtime] = {BASELINE: before, chosen.name: after}
            times = measure_latency(both, singles, batch, config.latency_calls, context.progress)
    except RuntimeInferenceError:
        return {}
    ratio, interval = speedup_of(times[chosen.name]["turns_ms"], times[BASELINE]["turns_ms"])
    disturbed = is_disturbed(others.cores, threads)
    return {"latency_ratio": ratio, "latency_ratio_interval": interval, "disturbed": disturbed}


def baseline_gates(
    found: Mapping[str, Any] | None, config: ValidateConfig, scene: Scene, digest: str | None
) -> list[GateResult]:
    """The gates of the chosen candidate, whose files have `digest`, against the baseline."""
    from stages.validate.gates import doubted, drop_gate, interval_of, settled
    from stages.validate.waivers import waived

    if found is None:
        return []
    gates, subject = config.gates, f"{found['chosen'] or 'no candidate'}, against {found['name']}"
    if found["problem"]:
        gate = Gate(f"{scene.metric} regression", "at most", gates.max_metric_drop, scene.metric)
        results = [gate.check(subject, None, scene.samples, found["problem"])]
    else:
        own = replace(scene, reference_metric=found["baseline_metric"])
        results = [drop_gate({**found, "name": subject}, gates, own, "regression")]
    if gates.max_latency_regression is not None:
        gate = Gate("latency regression", "at most", gates.max_latency_regression, "times the baseline's")
        result = gate.check_interval(subject, found["latency_ratio"], interval_of(found["latency_ratio_interval"]))
        results.append(result)
    certain = settled(results, config, digest)
    if not found["disturbed"]:
        return certain
    return [waived(doubted(one, {}), config.waivers, digest) for one in certain]


def baseline_notes(found: Mapping[str, Any] | None, metric: str) -> list[str]:
    """What the last release was worth on the same samples, in a line or two."""
    if found is None:
        return []
    release = f"{found['name']} ({found['candidate']})"
    if found["problem"]:
        return [f"baseline {release}: {found['problem']}"]
    line = (
        f"baseline {release}: {metric} {found['baseline_metric']:.4f} on the same samples; {found['chosen']} is at "
        f"{found['metric']:.4f} ({found['metric_difference']:+.4f}), {found['flips']} answers flip"
    )
    if found["latency_ratio"] is not None:
        line += f", {found['latency_ratio']:.2f} times its latency"
    lines = [line]
    if not found["same_test_split"]:
        lines.append(
            f"{release} was validated on another test split: some of this one may be what it was trained on, and then "
            "it looks better than it is"
        )
    return lines
