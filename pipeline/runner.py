"""Plan, skip what is fresh, run, gate, commit.

A stage is fresh when the digest over everything that can change its result (name, configuration,
input digests, data, library versions, the code itself) equals the key in its manifest, and its files
still have the digests that the manifest lists. Never because a file exists.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from models.errors import ConfigError, PipelineError, Problem, StageError
from models.process_memory import peak_memory_bytes, reset_peak_memory
from models.registry import pin
from models.runtimes.gpu import gpu_here
from models.spec import BackboneSpec
from pipeline.config import PipelineConfig
from pipeline.folder import lock_folder, translated_system_errors
from pipeline.machine import (
    REPORTED_PACKAGES,
    describe_hardware,
    processor_name,
    resolve_device,
)
from pipeline.record import RunStatus, StageEntry, gist_of, now, read_json
from stages import STAGES, load_stage
from stages.artifact import (
    MANIFEST,
    SCHEMA_VERSION,
    Artifact,
    commit_folder,
    digest_files,
    digest_of,
    read_artifact,
    verify_files,
    write_json,
)
from stages.base import Progress, Stage, StageContext, StageResult
from stages.data.load import load_data
from stages.data.splits import DataSplits
from stages.environment import digest_of_code, versions_of
from stages.gate import VERDICT_WORDS, outcome_of, stops
from stages.quantize.modelopt_backend import require_modelopt
from stages.validate.providers import require_providers

FRESH = "configuration, inputs, data, versions and files are unchanged"
SCRATCH = ".scratch"
CODE_FOLDERS = ("stages", "models")


@dataclass(frozen=True)
class Decision:
    """Whether a stage runs, and why."""

    stage: str
    fresh: bool
    reason: str


@dataclass
class Runner:
    """One configuration in one run folder."""

    config: PipelineConfig
    backbone: BackboneSpec
    run_dir: Path
    log: logging.Logger
    progress: Progress
    force: bool = False
    entries: dict[str, StageEntry] = field(default_factory=lambda: {name: StageEntry(name) for name in STAGES})

    @cached_property
    def data(self) -> DataSplits:
        """The data splits, read once; what was left out of them is said."""
        data = load_data(self.config.data, self.config.task, self.config.validate_.slices)
        for note in data.notes:
            self.log.warning("%-10s %s", "data", note)
        return data

    @cached_property
    def pinned(self) -> BackboneSpec:
        """The backbone with the commit of its hub weights."""
        return pin(self.backbone)

    @cached_property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return resolve_device(self.config.device)

    @cached_property
    def created_at(self) -> str:
        """When the record was made: the same in `run.json`, on standard output and in the reports."""
        return now()

    # --- planning -------------------------------------------------------------------------------

    def key_parts(self, stage: Stage, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
        """Everything that can change the stage's result, by name."""
        section = self.config.section(stage.name)
        parts: dict[str, Any] = {
            "stage": stage.name,
            "config": section.model_dump(mode="json") | section.outside(),
            "seed": self.config.seed,
            "task": self.config.task,
            "data": {name: self.data.fingerprints[name] for name in stage.splits},
            "packages": versions_of(stage.packages),
            "inputs": {name: artifact.digest for name, artifact in inputs.items()},
            "code": digest_of_code(*CODE_FOLDERS),
        }
        if "threads" in stage.machine:
            parts["threads"] = self.config.threads
        if "device" in stage.machine:
            parts["device"] = self.device
        if "processor" in stage.machine:
            parts["processor"] = processor_name()
        if "gpu" in stage.machine and (gpu := gpu_here()):
            parts["gpu"] = str(gpu)
        if not stage.consumes:
            parts["backbone"] = {"library": self.pinned.library, "weights": self.pinned.weights_digest}
        return parts

    def stale_reason(self, stage: Stage, inputs: Mapping[str, Artifact]) -> str:
        """Why what is on disk is not what would be made now; empty where it is."""
        artifact = read_artifact(stage.name, self.run_dir / stage.name)
        if artifact is None:
            return "there is no result yet"
        parts = self.key_parts(stage, inputs)
        if artifact.manifest["key"] != digest_of(parts):
            return describe_change(artifact.manifest["key_parts"], parts)
        changed = verify_files(artifact)
        return f"its files were touched: {changed}" if changed else ""

    def decide(self, stage: Stage, inputs: Mapping[str, Artifact]) -> Decision:
        """Compare what is on disk with what would be made now."""
        reason = self.stale_reason(stage, inputs) or ("--force" if self.force else "")
        return Decision(stage.name, not reason, reason or FRESH)

    def plan(self, names: Sequence[str]) -> list[Decision]:
        """What would run, without running it. A stage behind one that runs is said to follow it.

        Raises:
            PipelineError: as `run` would: a stage before is stale, the data or the device cannot be used.
        """
        decisions: list[Decision] = []
        stale: set[str] = set()
        with translated_system_errors("plan", self.run_dir):
            self.require_machine(names)  # refused now as it would be then
            self.refuse_foreign_folders(names)
            self.check_upstream(names)
            for name in names:
                stage = load_stage(name)
                behind = [upstream for upstream in stage.consumes if upstream in stale]
                if behind:
                    decisions.append(Decision(name, False, f"its input {behind[0]} runs"))
                else:
                    decisions.append(self.decide(stage, self.inputs_on_disk(stage)))
                if not decisions[-1].fresh:
                    stale.add(name)
                elif failed := self.failed_gate_on_disk(name):
                    decisions[-1] = Decision(name, True, f"gate {failed!r} failed: the run stops here")
                    break
        return decisions

    def require_machine(self, names: Sequence[str]) -> None:
        """Raises `MissingCapabilityError` where a device, provider or quantizer that was asked for is not here."""
        resolve_device(self.config.device)
        if "quantize" in names and self.config.quantize.backend == "modelopt" and self.config.quantize.schemes:
            require_modelopt()
        if "validate" in names:
            require_providers(self.config.validate_.providers)

    def failed_gate_on_disk(self, name: str) -> str:
        """The first gate of a committed stage that stops the run; empty where none does."""
        artifact = read_artifact(name, self.run_dir / name)
        gates = artifact.manifest["gates"] if artifact else []
        return next((gate["name"] for gate in gates if stops(gate)), "")

    def inputs_on_disk(self, stage: Stage) -> dict[str, Artifact]:
        """The committed artifacts among those that the stage consumes."""
        found = {name: read_artifact(name, self.run_dir / name) for name in stage.consumes}
        return {name: artifact for name, artifact in found.items() if artifact}

    # --- running --------------------------------------------------------------------------------

    def run(self, names: Sequence[str]) -> RunStatus:
        """Run the stages of `names` in order; stops at the first that fails or whose gate fails.

        `run.json` and the reports are written whatever happens, unless nothing was run at all.

        Raises:
            ConfigError: a stage before the first of `names` has no usable result, or another run
                holds the folder.
            MissingCapabilityError: this machine lacks a device or a provider that was asked for.
            PipelineError: a stage failed; the artifacts of the stages before it stay.
        """
        self.require_machine(names)
        with lock_folder(self.run_dir):
            try:
                self.refuse_foreign_folders(names)
                self.check_upstream(names)
                status = self.run_stages(names)
                self.fill_from_disk()
            except ConfigError:
                raise
            except BaseException as error:
                try:
                    self.write_run("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
                except StageError as second:
                    self.log.error("%-10s %s", "", second)  # the first error is the one to report
                raise
            self.write_run(status)
            return status

    def run_stages(self, names: Sequence[str]) -> RunStatus:
        """Run or skip each stage in order."""
        for name in names:
            entry = self.entries[name]
            entry.status = "failed"  # until it is known better
            try:
                with translated_system_errors(name, self.run_dir):
                    self.run_or_skip(load_stage(name), entry)
            except KeyboardInterrupt:
                entry.status = "interrupted"
                raise
            except PipelineError as error:
                entry.error = str(error)
                shutil.rmtree(self.run_dir / SCRATCH / name, ignore_errors=True)
                raise
            assert entry.artifact is not None
            gates = entry.artifact.manifest["gates"]
            for gate in gates:
                self.log_gate(name, gate)
            if any(stops(gate) for gate in gates):
                entry.status = "gate-failed"
                return "gate-failed"
        return "passed"

    def log_gate(self, stage: str, gate: Mapping[str, Any]) -> None:
        """Say what is not a pass, and what becomes of it."""
        if gate["verdict"] == "pass":
            return
        log, outcome = (self.log.error, "") if stops(gate) else (self.log.warning, f"; {outcome_of(gate)}")
        log("%-10s gate %s %s for %s: %s%s", stage, gate["name"], VERDICT_WORDS[gate["verdict"]], gate["subject"],
            gate["message"], outcome)  # fmt: skip

    def run_or_skip(self, stage: Stage, entry: StageEntry) -> None:
        """One stage: fresh, or run."""
        inputs = self.inputs_on_disk(stage)
        decision = self.decide(stage, inputs)
        entry.reason = decision.reason
        if decision.fresh:
            entry.artifact = read_artifact(stage.name, self.run_dir / stage.name)
            entry.status = "fresh"
            self.log.info("%-10s fresh: %s", stage.name, decision.reason)
            return
        where = f" on {self.device}" if "device" in stage.machine else ""
        self.log.info("%-10s runs%s: %s", stage.name, where, decision.reason)
        self.run_stage(stage, inputs, entry)

    def run_stage(self, stage: Stage, inputs: Mapping[str, Artifact], entry: StageEntry) -> None:
        """Run one stage in a scratch folder and commit the folder by one rename."""
        parts = self.key_parts(stage, inputs)
        key = digest_of(parts)
        scratch = self.run_dir / SCRATCH
        output, resume = scratch / stage.name, scratch / f"{stage.name}-{key[:16]}"
        for stale in scratch.glob(f"{stage.name}*"):
            if stale != resume:
                shutil.rmtree(stale)
        output.mkdir(parents=True)
        resume.mkdir(parents=True, exist_ok=True)
        context = StageContext(
            output=output,
            resume=resume,
            inputs=inputs,
            task=self.config.task,
            backbone=self.pinned,
            data=self.data,
            seed=self.config.seed,
            device=self.device,
            threads=self.config.threads,
            log=self.log,
            progress=self.progress,
        )
        started_at, started = now(), time.monotonic()
        reset_peak_memory()
        result = stage.run(context, self.config.section(stage.name))
        manifest = self.manifest(stage, parts, key, result, output)
        manifest |= {
            "started_at": started_at,
            "duration_s": round(time.monotonic() - started, 3),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        commit_folder(output, self.run_dir / stage.name, manifest)
        shutil.rmtree(resume, ignore_errors=True)
        entry.artifact = read_artifact(stage.name, self.run_dir / stage.name)
        entry.status = "ran"
        for note in result.notes:
            self.log.info("%-10s %s", "", note)
        self.log.info("%-10s done in %.1f s", stage.name, manifest["duration_s"])

    def manifest(
        self, stage: Stage, parts: dict[str, Any], key: str, result: StageResult, output: Path
    ) -> dict[str, Any]:
        """The manifest of a stage that has run; digests are taken from the files as written."""
        return {
            "schema_version": SCHEMA_VERSION,
            "stage": stage.name,
            "key": key,
            "key_parts": parts,
            "config": parts["config"],
            "inputs": parts["inputs"],
            "files": digest_files(output),
            "io": io_of(output, self.run_dir / "merge-lora"),
            "backbone": {
                "id": self.pinned.id,
                "revision": self.pinned.revision,
                "weights": self.pinned.weights,
                "weights_digest": self.pinned.weights_digest,
            },
            "data_fingerprints": dict(self.data.fingerprints),
            "versions": versions_of(REPORTED_PACKAGES),
            "hardware": describe_hardware(),
            "seed": self.config.seed,
            "gates": [gate.to_dict() for gate in result.gates],
            "measurements": result.measurements,
            "notes": list(result.notes),
        }

    def refuse_foreign_folders(self, names: Sequence[str]) -> None:
        """A stage's folder that this project did not write would be replaced: say so instead.

        Raises:
            ConfigError: one holds files and no manifest, which no interrupted run leaves.
        """
        problems = [
            Problem(
                str(self.run_dir / name),
                f"is in the way: {name} would replace this folder, and no run has written it",
                "name another --run-dir, or move the folder away",
            )
            for name in names
            if (folder := self.run_dir / name).exists()
            and not (folder / MANIFEST).is_file()
            and not (folder.is_dir() and not any(folder.iterdir()))
        ]
        if problems:
            raise ConfigError(problems)

    def check_upstream(self, names: Sequence[str]) -> None:
        """Stages before the first of `names` must be fresh and their gates passed.

        Raises:
            ConfigError: one is missing or stale, or a gate of it failed.
        """
        order = list(STAGES)
        for name in order[: order.index(names[0])]:
            stage = load_stage(name)
            artifact = read_artifact(name, self.run_dir / name)
            stale = self.stale_reason(stage, self.inputs_on_disk(stage))
            problem = f"is stale ({stale})" if artifact and stale else stale
            if artifact and not stale and self.failed_gate_on_disk(name):
                problem = "has a failed gate"
            if problem:
                hint = f"run `pipeline all --until {names[0]}` with the same --config and --run-dir"
                raise ConfigError([Problem(f"{self.run_dir}/{name}", f"{problem}, and {names[0]} builds on it", hint)])
            self.entries[name].artifact = artifact
            self.entries[name].status = "fresh"

    def fill_from_disk(self) -> None:
        """Say of the stages that were not asked for whether their results are still good."""
        for name, entry in self.entries.items():
            if entry.status == "not-run":
                stage = load_stage(name)
                entry.reason = self.stale_reason(stage, self.inputs_on_disk(stage))
                if not entry.reason:
                    entry.artifact = read_artifact(name, self.run_dir / name)
                    entry.status = "fresh"

    # --- reporting ------------------------------------------------------------------------------

    def run_record(self, status: RunStatus) -> dict[str, Any]:
        """The content of `run.json`."""
        packed = self.entries["package"].status in ("ran", "fresh")
        data = self.__dict__.get("data")  # not read where reading it failed
        return {
            "schema_version": SCHEMA_VERSION,
            "run": self.run_dir.name,
            "status": status,
            "created_at": self.created_at,
            "task": self.config.task,
            "backbone": self.config.backbone,
            "config": self.config.model_dump(mode="json", by_alias=True),
            "data_notes": list(data.notes) if data else [],
            "stages": [entry.to_dict() for entry in self.entries.values()],
            "report": "report.html",
            "bundle": "package/bundle" if packed else None,
            "environment": {"versions": versions_of(REPORTED_PACKAGES), "hardware": describe_hardware()},
        }

    def write_run(self, status: RunStatus) -> None:
        """Write `run.json` and the reports beside it, unless they say the same already."""
        from pipeline.report import write_reports

        record, file = self.run_record(status), self.run_dir / "run.json"
        ran = any(entry.status not in ("not-run", "fresh") for entry in self.entries.values())
        if not ran and (self.run_dir / "report.json").exists() and gist_of(read_json(file)) == gist_of(record):
            return
        with translated_system_errors("report", self.run_dir):
            write_json(file, record)
            write_reports(record, self.run_dir)


def io_of(*folders: Path) -> dict[str, Any] | None:
    """The I/O spec of the first checkpoint in the folders: that of a stage's own, or of the network it is about."""
    for folder in folders:
        for name in ("checkpoint", "base"):
            file = folder / name / "model.json"
            if file.exists():
                io: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["io"]
                return io
    return None


def describe_change(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str:
    """The first differences between two sets of key parts, in words."""
    changes = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        label = f"{prefix}{name}"
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes.append(describe_change(before, after, f"{label}."))
        elif isinstance(before, str) and isinstance(after, str) and len(before) == len(after) == 64:
            changes.append(f"{label} changed")
        else:
            changes.append(f"{label} changed from {before!r} to {after!r}")
    return "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")
