"""package: what validate passed, with all that runs and proves it, as a folder and a deterministic tar.

Reads: merge-lora's `checkpoint/`, the candidates that validate passed, their engines, its `evidence.json`, test
examples.
Writes: `bundle/` and `<name>.tar`; the same inputs give the same bytes.
Gates: the tar, opened as a device opens it, verifies.
Fails when: a candidate's bytes are not those that validate measured, or validate chose none.
"""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from models.bundle import (
    BUNDLE_FILE,
    BUNDLE_SCHEMA_VERSION,
    ENGINES_FOLDER,
    EVIDENCE_FOLDER,
    GOLDEN_FOLDER,
    MODEL_FILE,
    PROCESSING_FOLDER,
    VerifyReport,
    open_bundle,
)
from models.engines.receipt import RUNS
from models.errors import IntegrityError
from models.spec import side_by_side
from models.tasks import Target, task_of
from stages.artifact import digest_files, sha256_of_file, write_json
from stages.base import (
    NETWORK_PACKAGES,
    PROCESSING_PACKAGES,
    RUNTIME_PACKAGES,
    MachinePart,
    StageConfig,
    StageContext,
    StageResult,
)
from stages.data.splits import SplitName
from stages.gate import Gate, GateResult, outcome_of

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint
    from models.modalities import Content, Processing
    from models.spec import IOSpec
    from stages.data.splits import Example

GOLDEN_TOLERANCES = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1, "int8": 5e-2, "int4": 5e-2, "fp8": 5e-2}
"""Golden outputs may differ by this share of the logit range on another device: other kernels add in another
order (floats: export's own ceilings), and INT8 dot products differ between VNNI and AVX2 machines
(nnstreamer 4865), which are what INT4 weights are multiplied in too; of FP8 a value may be rounded the other way."""


MODEL_KEYS = ("precision", "size_bytes", "sha256", "metric", "provider", "latency_ms_p50", "logit_range")
"""What `bundle.json` keeps of a model's evidence; its latency is that on `provider`."""


class PackageConfig(StageConfig):
    """What the bundle is called and holds."""

    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="Name of the tar and of the folder in it. Default: <backbone>-<task>.",
    )
    golden_samples: int = Field(
        default=8, ge=1, le=256, description="Test examples packed with their outputs, for `pipeline verify` (number)."
    )
    include: Literal["chosen", "all-passed"] = Field(
        default="chosen", description="Pack the chosen candidate only, or every one whose gates all passed."
    )


class Package:
    """See the module's docstring."""

    name = "package"
    config_type = PackageConfig
    consumes = ("merge-lora", "export", "quantize", "validate")
    splits: tuple[SplitName, ...] = ("test",)
    packages = (*NETWORK_PACKAGES, *PROCESSING_PACKAGES, *RUNTIME_PACKAGES)
    machine: tuple[MachinePart, ...] = ("threads",)

    def run(self, context: StageContext, config: PackageConfig) -> StageResult:
        """Copy, describe, digest, and open the result as a device would."""
        from models.checkpoint import load_checkpoint

        evidence = json.loads(context.inputs["validate"].file("evidence.json").read_text(encoding="utf-8"))
        shipped = shipped_candidates(evidence, config.include)
        checkpoint = load_checkpoint(context.inputs["merge-lora"].folder / "checkpoint")
        name = config.name or default_name(checkpoint.spec.backbone.name, checkpoint.spec.task)
        bundle = context.output / "bundle"
        models = {entry["name"]: copy_model(context, entry, bundle, evidence["chosen"]) for entry in shipped}
        engines = [copy_engine(context, entry, bundle) for entry in shipped_engines(evidence, config.include)]
        (bundle / PROCESSING_FOLDER).mkdir()
        processing = checkpoint.processing.save(bundle / PROCESSING_FOLDER)
        golden = write_golden(context, checkpoint, models, bundle, config.golden_samples)
        for entry in engines:
            write_script(bundle, checkpoint.spec.io, models[entry["candidate"]], entry)
        (bundle / EVIDENCE_FOLDER).mkdir()
        write_json(bundle / EVIDENCE_FOLDER / "evidence.json", evidence)
        card = model_card(name, checkpoint, evidence, golden["samples"])
        (bundle / "README.md").write_text(card, encoding="utf-8")
        write_manifest(bundle, name, checkpoint, processing, evidence["chosen"], models, engines, golden)
        archive = context.output / f"{name}.tar"
        write_tar(bundle, archive, name)
        with open_bundle(archive) as opened:
            gate = check_verifies(opened.verify(context.threads))
        measurements = {
            "bundle": "bundle",
            "tar": archive.name,
            "size_bytes": archive.stat().st_size,
            "sha256": sha256_of_file(archive),
            "chosen": evidence["chosen"],
            "models": list(models),
            "engines": [f"{entry['name']}: {entry['status']}" for entry in engines],
            "golden_samples": len(golden["samples"]),
        }
        note = f"{archive.name}: {archive.stat().st_size / 1e6:.1f} MB with {', '.join(models)}"
        note += "; digests and golden samples verified" if gate.passed else f"; {gate.message}"
        return StageResult((gate,), measurements, (note, *map(engine_note, engines)))


def default_name(backbone: str, task: str) -> str:
    """`<backbone>-<task>` in the characters that every file system takes."""
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{backbone.rstrip('/').rsplit('/', 1)[-1]}-{task}")
    return words.strip("-._")[:100] or "bundle"


def shipped_candidates(evidence: Mapping[str, Any], include: str) -> list[dict[str, Any]]:
    """The chosen candidate's evidence, then with "all-passed" that of the others that passed.

    Raises:
        IntegrityError: validate chose none, or one that did not pass.
    """
    entries = [entry for entry in evidence["candidates"] if entry["passed"] and not entry["over_limits"]]
    chosen = [entry for entry in entries if entry["name"] == evidence["chosen"]]
    if len(chosen) != 1:
        raise IntegrityError(
            f"validate chose {evidence['chosen']!r}, which is not one candidate whose gates all passed; "
            "look at validate's report, then run `pipeline validate` again"
        )
    others = [entry for entry in entries if entry["name"] != evidence["chosen"]]
    if include == "chosen":  # an engine comes with the file that it is built from: its golden outputs are that one's
        needed = {engine["candidate"] for engine in shipped_engines(evidence, include)}
        others = [entry for entry in others if entry["name"] in needed]
    return chosen + others


def shipped_engines(evidence: Mapping[str, Any], include: str) -> list[dict[str, Any]]:
    """The engine that validate chose for each target; with "all-passed" every engine of a candidate that passed."""
    passed = {entry["name"] for entry in evidence["candidates"] if entry["passed"] and not entry["over_limits"]}
    engines = [entry for entry in evidence["engines"] if entry["candidate"] in passed]
    return engines if include == "all-passed" else [entry for entry in engines if entry["ships_for"]]


def engine_note(entry: dict[str, Any]) -> str:
    """One line for a person."""
    return f"engine {entry['name']} for {', '.join(entry['targets'])}: {entry['status']}"


def copy_model(context: StageContext, entry: dict[str, Any], bundle: Path, chosen: str) -> dict[str, Any]:
    """Copy a candidate's files, if they are the bytes that validate measured; its entry of `bundle.json`.

    The copy is what gets digested, so a file that changes while it is copied is found too.

    Raises:
        IntegrityError: a digest differs, or a file is missing.
    """
    artifact = context.inputs[entry["stage"]]
    target = bundle / (MODEL_FILE if entry["name"] == chosen else f"model/{entry['name']}.onnx")
    target.parent.mkdir(parents=True, exist_ok=True)
    for file, digest in entry["files"].items():
        # Weights outside the graph keep their name: the graph refers to it.
        copy = target if file == entry["file"] else target.with_name(Path(file).name)
        source = artifact.file(file)
        if not source.is_file():
            raise IntegrityError(f"{source}, which validate measured, is missing; run `pipeline all` again")
        shutil.copyfile(source, copy)
        if sha256_of_file(copy) != digest:
            raise IntegrityError(
                f"{source} is not the file that validate measured: its SHA-256 is not the one in evidence.json; "
                "run `pipeline validate --force`"
            )
    return {
        "file": target.relative_to(bundle).as_posix(),
        **{key: entry[key] for key in MODEL_KEYS},
    }


def copy_engine(context: StageContext, entry: dict[str, Any], bundle: Path) -> dict[str, Any]:
    """Copy an engine, its fingerprint and the mended graph that it comes from; its entry of `bundle.json`.

    Raises:
        IntegrityError: a digest differs, or a file is missing.
    """
    artifact = context.inputs[entry["stage"]]
    folder = bundle / ENGINES_FOLDER
    folder.mkdir(exist_ok=True)
    copied = {}
    for file, digest in entry["files"].items():
        source = artifact.file(file)
        if not source.is_file():
            raise IntegrityError(f"{source}, which validate listed, is missing; run `pipeline all` again")
        if Path(file).parent.name != ENGINES_FOLDER:
            continue  # the candidate's own file, which lies in model/
        copied[file] = f"{ENGINES_FOLDER}/{source.name}"
        shutil.copyfile(source, bundle / copied[file])
        if sha256_of_file(bundle / copied[file]) != digest:
            raise IntegrityError(
                f"{source} is not the engine that validate listed: its SHA-256 is not the one in evidence.json; "
                "run `pipeline validate --force`"
            )
    keys = ("name", "candidate", "precision", "sha256", "size_bytes", "targets", "runtime", "library_version",
            "compute_capabilities", "profile", "onnx_sha256", "mends", "status")  # fmt: skip
    files = {"file": copied.get(entry["file"]), "source": copied.get(entry["source"])}
    return {**files, **{key: entry[key] for key in keys}}


def write_script(bundle: Path, io: IOSpec, model: Mapping[str, Any], entry: dict[str, Any]) -> None:
    """The script that proves an engine on its device, and the golden arrays as trtexec reads them: without a header.

    Adds to `entry` how many of the golden samples an engine takes at once.
    """
    import numpy as np

    from models.engines.script import Shapes, proving_script

    entry["source"] = entry["source"] or model["file"]
    largest = min((shapes[-1][0] for shapes in entry["profile"].values()), default=1)
    inputs = {one.name: np.load(bundle / GOLDEN_FOLDER / f"{one.name}.npy", allow_pickle=False) for one in io.inputs}
    golden = np.load(bundle / GOLDEN_FOLDER / f"{model['golden_outputs']}.npy", allow_pickle=False)
    widths = np.cumsum([int(one.dims[1]) for one in io.outputs])[:-1]
    outputs = dict(zip([one.name for one in io.outputs], np.split(golden, widths, axis=1), strict=True))
    entry["golden_samples"] = count = min(len(golden), largest)
    runs: dict[str, tuple[Shapes, dict[str, str], dict[str, str]]] = {}
    raw = bundle / GOLDEN_FOLDER / "raw"
    raw.mkdir(exist_ok=True)
    for run, samples in zip(RUNS, (count, 1), strict=True):
        files: tuple[dict[str, str], dict[str, str]] = ({}, {})
        for kind, arrays in zip(files, (inputs, outputs), strict=True):
            for name, array in arrays.items():
                stem = f"{run}-{model['golden_outputs']}-{name}" if kind is files[1] else f"{run}-{name}"
                kind[name] = f"{GOLDEN_FOLDER}/raw/{stem}.{samples}.bin"
                (bundle / kind[name]).write_bytes(np.ascontiguousarray(array[:samples]).tobytes())
        runs[run] = ({name: (samples, *array.shape[1:]) for name, array in inputs.items()}, *files)
    text = proving_script(
        entry["name"], entry["source"], entry["file"], entry["profile"], runs, float(model["golden_tolerance"])
    )
    (bundle / ENGINES_FOLDER / f"{entry['name']}.sh").write_text(text, encoding="utf-8")


# --- golden samples ---------------------------------------------------------------------------------


def write_golden(
    context: StageContext, checkpoint: Checkpoint, models: dict[str, dict[str, Any]], bundle: Path, count: int
) -> dict[str, Any]:
    """Raw inputs, the arrays they become, the outputs of every shipped model and of the reference.

    Adds the name of its outputs and its tolerance (in their unit) to each of `models`.
    """
    import numpy as np

    from models.runtimes.onnxruntime_session import OnnxRuntimeSession
    from models.runtimes.torch_eager import TorchEager

    folder = bundle / GOLDEN_FOLDER
    folder.mkdir()
    examples = golden_examples(context.data["test"], count)
    names = [write_sample(folder, index, checkpoint.processing, one.content) for index, one in enumerate(examples)]
    # From the files as written: what is on the device is what made these arrays.
    arrays = checkpoint.processing.arrays(
        [checkpoint.processing.from_file((folder / name).read_bytes()) for name in names]
    )
    with TorchEager(checkpoint.model, checkpoint.spec.io, "cpu", context.threads) as runtime:
        saved = {**arrays, "outputs-reference": side_by_side(runtime.infer(arrays))}
    for name, model in models.items():
        with OnnxRuntimeSession(bundle / model["file"], threads=context.threads) as session:
            outputs = side_by_side(session.infer(arrays))
        model["golden_outputs"] = f"outputs-{name}"
        model["golden_tolerance"] = GOLDEN_TOLERANCES[model["precision"]] * float(model.pop("logit_range"))
        saved[model["golden_outputs"]] = outputs
    for name, array in saved.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    spec = checkpoint.spec
    samples = [
        {"file": f"{GOLDEN_FOLDER}/{name}", "label": task_of(spec.task).describe(example.label, spec.labels)}
        for name, example in zip(names, examples, strict=True)
    ]
    return {"samples": samples, "reference_outputs": "outputs-reference"}


def golden_examples(examples: Sequence[Example], count: int) -> list[Example]:
    """The first example of every label or set of them, then the second, and so on, up to `count`."""
    seen: Counter[Target] = Counter()
    ranked = []
    for position, example in enumerate(examples):
        ranked.append((seen[example.label], position))
        seen[example.label] += 1
    return [examples[position] for _, position in sorted(ranked)[:count]]


def write_sample(folder: Path, index: int, processing: Processing, content: Content) -> str:
    """Write one raw input as a file of its kind; the file's name."""
    suffix, data = processing.to_file(content)
    name = f"{index:03}{suffix}"
    (folder / name).write_bytes(data)
    return name


# --- bundle.json, card, tar -------------------------------------------------------------------------


def write_manifest(
    bundle: Path,
    name: str,
    checkpoint: Checkpoint,
    processing: dict[str, Any],
    chosen: str,
    models: dict[str, dict[str, Any]],
    engines: list[dict[str, Any]],
    golden: dict[str, Any],
) -> None:
    """`bundle.json`: the contract, and the SHA-256 of every other file. No times and no paths of this machine."""
    spec = checkpoint.spec
    backbone = {
        key: getattr(spec.backbone, key) for key in ("id", "library", "name", "revision", "weights", "weights_digest")
    }
    write_json(
        bundle / BUNDLE_FILE,
        {
            "schema_version": BUNDLE_SCHEMA_VERSION,
            "name": name,
            "task": spec.task,
            "labels": list(spec.labels),
            "io": spec.io.to_dict(),
            "processing": processing,
            "chosen": chosen,
            "models": models,
            "engines": engines,
            "golden": golden,
            "backbone": backbone,
            "files": digest_files(bundle),
        },
    )


def model_card(name: str, checkpoint: Checkpoint, evidence: dict[str, Any], samples: Sequence[Any]) -> str:
    """README.md: what the model is, how good it is by which evidence, and how to run it."""
    spec = checkpoint.spec
    chosen = next(entry for entry in evidence["candidates"] if entry["name"] == evidence["chosen"])
    low, high = chosen["metric_difference_interval"]
    task, metric = task_of(spec.task), evidence["metric_name"]
    inputs = "\n".join(f"- `{one.name}`: {one.dtype} ({', '.join(map(str, one.dims))})" for one in spec.io.inputs)
    outputs = "; ".join(f"`{one.name}`, {one.dtype} ({', '.join(map(str, one.dims))})" for one in spec.io.outputs)
    outputs = f"Output{'s' * (len(spec.io.outputs) > 1)}: {outputs}"
    return f"""# {plain(name)}

{spec.task} with {spec.io.width} outputs, adapted from {plain(spec.backbone.id)} ({plain(spec.backbone.weights)}).
Shipped as {chosen["name"]} ({chosen["precision"]}, {chosen["size_bytes"]} bytes), chosen for {evidence["objective"]}.

## Measured on {evidence["samples"]} held-out samples

{measured_table(evidence, chosen)}

The {metric} differs from the reference's by {chosen["metric_difference"]:+.4f}, 95 % interval {low:+.4f} to
{high:+.4f} (paired by sample). So many samples can see a drop of
{chosen["smallest_visible_drop"]:.4f} or more (90 % power); smaller ones may be there unseen. Latency was measured
on the machine that built this{on_provider(evidence)}, with {evidence["threads"]} threads; another one differs.

{gates_table(evidence, chosen["name"])}
{engines_table(evidence)}
## Use

    pipeline verify BUNDLE              # digests, and {len(samples)} golden samples on this device
    pipeline predict BUNDLE INPUT…

Inputs; preprocessing is described in `bundle.json`, and normalisation is inside the network:

{inputs}

{outputs}. {task.reading}

{chr(10).join(f"{index}. {plain(label)}" for index, label in enumerate(spec.labels))}
"""


def on_provider(evidence: dict[str, Any]) -> str:
    """Where times were measured, if not on the CPU."""
    if evidence["provider"] == "cpu":
        return ""
    return " " + plain(f"(by ONNX Runtime's {evidence['provider']} provider on {evidence['gpu']})")


def measured_table(evidence: dict[str, Any], chosen: dict[str, Any]) -> str:
    """Reference and shipped model side by side."""
    reference = evidence["reference"]
    before, after = reference["more_metrics"], chosen["more_metrics"]
    rows = [
        (evidence["metric_name"], f"{reference['metric']:.4f}", f"{chosen['metric']:.4f}"),
        *((name, f"{before[name]:.4f}", f"{after[name]:.4f}") for name in before if name in after),
        ("same answer as the reference", "", f"{chosen['agreement']:.4f}"),
        ("latency at batch 1, p50 (ms)", f"{reference['latency_ms_p50']:.2f}", f"{chosen['latency_ms_p50']:.2f}"),
        ("size (bytes)", str(reference["size_bytes"]), str(chosen["size_bytes"])),
    ]
    head = ["| | PyTorch reference | this model |", "| --- | --- | --- |"]
    return "\n".join([*head, *(f"| {name} | {before} | {after} |" for name, before, after in rows)])


def gates_table(evidence: dict[str, Any], candidate: str) -> str:
    """The gates of the shipped model, on every provider that it was measured on."""
    head = ["| gate | verdict | found |", "| --- | --- | --- |"]
    names = {candidate: ""} | {
        run["name"]: f" on {run['provider']}" for run in evidence["other_runs"] if run["candidate"] == candidate
    }
    rows = [
        f"| {gate['name']}{names[gate['subject']]} | {gate['verdict']} | {plain(finding(gate))} |"
        for gate in evidence["gates"]
        if gate["subject"] in names
    ]
    return "\n".join([*head, *rows])


def finding(gate: dict[str, Any]) -> str:
    """What a gate found, and why one that did not pass stops nothing."""
    outcome = outcome_of(gate)
    return f"{gate['message']}; {outcome}" if outcome else str(gate["message"])


def engines_table(evidence: dict[str, Any]) -> str:
    """The engines by target and what proves them; nothing where there is none."""
    engines = [entry for entry in evidence["engines"] if entry["ships_for"]]
    if not engines:
        return ""
    rows = [
        f"| {', '.join(one['ships_for'])} | {one['name']} | {one['runtime']} {one['library_version'] or ''} | "
        f"{one['size_bytes'] or 'built on the device'} | {one['status']} |"
        for one in engines
    ]
    head = ["| target | engine | library, exactly | size (bytes) | on the device |", "| --- | --- | --- | --- | --- |"]
    how = (
        "`sh engines/<name>.sh FOLDER` runs an engine on its device with trtexec, and "
        "`pipeline verify BUNDLE --proof FOLDER --receipt receipt.json` says what came of it."
    )
    return "\n## Engines\n\n" + "\n".join([*head, *rows, "", how]) + "\n"


def plain(text: str) -> str:
    """Text that Markdown and HTML show as it is: names and labels come from outside."""
    text = " ".join(text.split())
    return re.sub(r"([\\`*{}\[\]<>|#&!])", lambda match: f"&#{ord(match[0])};", text)


def write_tar(bundle: Path, archive: Path, name: str) -> None:
    """A tar that depends on names and contents only: sorted, no times, owners or modes of this machine."""
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
            entry = tarfile.TarInfo(f"{name}/{path.relative_to(bundle).as_posix()}")
            entry.size = path.stat().st_size
            entry.mode = 0o644
            with path.open("rb") as stream:
                tar.addfile(entry, stream)


def check_verifies(report: VerifyReport) -> GateResult:
    """The packed bundle holds on this machine."""
    failed = [f"{check.name}: {check.message}" for check in report.checks if not check.ok]
    gate = Gate("the bundle verifies", "at most", 0.0, "failed checks")
    return gate.check(
        "bundle", float(len(failed)), len(report.checks), "; ".join(failed) or "digests and golden samples"
    )
