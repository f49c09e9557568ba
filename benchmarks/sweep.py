"""Which architectures go through the chain: `make sweep` measures it and writes docs/coverage.md.

    python -P benchmarks/sweep.py [--only beit vit …] [--again] [--minutes 60] [--seconds 600] [--gigabytes 12] [--page]

Every family of timm is there by its smallest member, every Hugging Face architecture of architectures.yaml by a small
configuration, with random weights and made-up examples. Each runs in a process of its own with a limit on time and
memory. What it finds goes, one JSON line an architecture, into build/sweep/<versions>.jsonl, so that a sweep that was
stopped goes on where it was; `--again` measures again, `--page` only writes the page.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "sweep"
PAGE = ROOT / "docs" / "coverage.md"
TABLE = ROOT / "benchmarks" / "architectures.yaml"
PACKAGES = ("torch", "timm", "transformers", "peft", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime",
            "tensorrt-rtx-cu13")  # fmt: skip
PRELOADED = ["torch", "timm", "transformers", "peft", "onnx", "onnxruntime", "onnxscript", "stages.export"]
"""Imported once by the server that every measuring process is forked from: they take ten seconds."""

COLUMNS = ("finetune", "LoRA merge", "export", "dynamic shapes", "INT8", "TensorRT-RTX")
SIZES = (64, 96, 128, 224, 256, None)
"""Sides tried, in pixels: the first that a network takes is used. None is its own."""
MAX_LENGTH = 32
SECONDS = (0.5, None)
"""Lengths of a clip tried; None is the encoder's own."""
SAMPLES = 8
LABELS = ("a", "b", "c", "d", "e")
PRETRAINED_LABELS = 3
"""timm's weights come with a head of another size than the new one."""
WORDS = ("a", "good", "bad", "red", "bird", "stone", "tree", "runs", "and", "or", "sea", "hill")

LIMIT_S = 600
LIMIT_GB = 12

Say = Callable[[str, str, str], None]
"""Takes a column, its verdict and a detail."""
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What is measured. `settings` is a configuration of transformers; timm takes the name of a `member`."""

    name: str
    library: str
    modality: str
    member: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> str:
        """Its name among all."""
        return f"{self.library} {self.modality} {self.name}"

    @property
    def task(self) -> Any:
        """The task that the modality stands for."""
        return self.modality if self.modality == "image-text" else f"{self.modality}-classification"

    @property
    def labels(self) -> tuple[str, ...]:
        """None where the text of an image is its label."""
        return () if self.modality == "image-text" else LABELS


def main() -> int:
    """Measure what is not in the cache, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names of families or model types")
    parser.add_argument("--again", action="store_true", help="measure also what is in the cache")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing after so many")
    parser.add_argument("--seconds", type=float, default=LIMIT_S, help="limit on the time of one architecture")
    parser.add_argument("--gigabytes", type=float, default=LIMIT_GB, help="limit on its memory")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    wanted, rows = architectures(), read_rows()
    asked = [one for one in wanted if not arguments.only or one.name in arguments.only]
    asked = [one for one in asked if (arguments.again or one.key not in rows) and not arguments.page]
    started = time.monotonic()
    for index, architecture in enumerate(asked):
        if time.monotonic() - started > arguments.minutes * 60:
            break
        row = rows[architecture.key] = measure_apart(architecture, arguments.seconds, int(arguments.gigabytes * 2**30))
        with cache_file().open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        verdicts = ", ".join(f"{column} {row['cells'][column][0]}" for column in COLUMNS)
        print(f"{index + 1}/{len(asked)} {architecture.key}: {verdicts} ({row['seconds']:.0f} s)", flush=True)
    PAGE.write_text(page(wanted, rows), encoding="utf-8")
    print(f"{sum(one.key in rows for one in wanted)} of {len(wanted)} measured; written to {PAGE.relative_to(ROOT)}")
    return 0


# --- what is measured ---------------------------------------------------------------------------------


def architectures() -> list[Architecture]:
    """Every family of timm and every row of architectures.yaml, in the order of the page."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    found = [Architecture(family, "timm", "image", member) for family, member in table.pop("timm").items()]
    for modality, rows in table.items():
        found += [Architecture(name, "hf", modality, name, settings or {}) for name, settings in rows.items()]
    return found


# --- one architecture, in a process of its own --------------------------------------------------------


def measure_apart(architecture: Architecture, limit_s: float, limit_bytes: int) -> Row:
    """A row: what the child said of each column, and why it ended early where it did."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    receiver, sender = processes.Pipe(duplex=False)
    started = time.monotonic()
    with tempfile.NamedTemporaryFile("r") as output:
        child = processes.Process(target=measure_and_send, args=(architecture, limit_bytes, sender, output.name))
        child.start()
        sender.close()
        child.join(limit_s)
        ending = f"ended with {child.exitcode}" if child.exitcode is not None else f"stopped after {limit_s:.0f} s"
        child.kill()
        last = [line.strip() for line in output.read().splitlines() if line.strip()][-1:]
    said: dict[str, tuple[str, str]] = {}
    facts: dict[str, Any] = {}
    try:
        while True:
            column, verdict, detail = receiver.recv()
            said[column] = (verdict, detail)
    except EOFError:
        pass
    facts = json.loads(said.pop("facts", ("", "{}"))[1])
    missing = [column for column in COLUMNS if column not in said]
    said |= dict.fromkeys(missing, ("not reached", ""))
    if missing and child.exitcode != 0:
        said[missing[0]] = ("no", ": ".join([ending, *last])[:300])
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    cells = {column: said[column] for column in COLUMNS}
    return {"key": architecture.key, "date": today, "seconds": time.monotonic() - started, "cells": cells, **facts}


def measure_and_send(architecture: Architecture, limit_bytes: int, sender: Any, output: str) -> None:
    """In the child: what is printed goes to a file, and more than `limit_bytes` of data is a MemoryError here, not the
    end of this machine."""
    import resource

    file = os.open(output, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    measure(architecture, lambda *cell: sender.send(cell))


def measure(architecture: Architecture, say: Say) -> None:
    """Adapt, merge, export and quantize with the project's own stages; says one cell after the other."""
    import warnings

    import torch

    from models.errors import PipelineError

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def step(column: str, work: Callable[[], tuple[str, str]]) -> bool:
        try:
            verdict, detail = work()
        except PipelineError as error:
            verdict, detail = "no", str(error).replace(f"{folder}/", "")
        say(column, verdict, " ".join(detail.split())[:400])
        return verdict != "no"

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), architecture, {})
        step("finetune", lambda: finetune(bench, say))
        if "base" not in bench.artifacts:
            return
        step("LoRA merge", lambda: merge(bench))
        if step("export", lambda: export(bench, say)):
            step("INT8", lambda: quantize(bench))
            step("TensorRT-RTX", lambda: build(bench.artifacts["export"].file("onnx-fp32.onnx")))


@dataclasses.dataclass(frozen=True)
class Bench:
    """What the steps share: a folder, what is measured, and the artifacts made so far."""

    root: Path
    architecture: Architecture
    artifacts: dict[str, Any]

    @property
    def task(self) -> Any:
        """The task that the modality stands for."""
        return self.architecture.task

    def context(self, stage: str) -> Any:
        """What the runner would hand to a stage."""
        from models.registry import resolve
        from pipeline.progress import QuietProgress
        from stages.base import StageContext

        output, resume = self.root / stage, self.root / f"{stage}-resume"
        output.mkdir()
        resume.mkdir()
        backbone = resolve(str(self.root / "pretrained"))
        log, progress = logging.getLogger("sweep"), QuietProgress()
        return StageContext(
            output, resume, self.artifacts, self.task, backbone, self.data(), 0, "cpu", 1, log, progress
        )

    def data(self) -> Any:
        """`SAMPLES` made-up examples, the same in every split."""
        from stages.data.splits import DataSplits, Example

        contents = made_up(self.architecture.modality)
        examples = tuple(
            Example(one, one[1] if isinstance(one, tuple) else index % len(LABELS), str(index), "made up")
            for index, one in enumerate(contents)
        )
        names = ("train", "validation", "calibration", "test")
        return DataSplits(LABELS, dict.fromkeys(names, examples), dict.fromkeys(names, "made up"))

    def keep(self, stage: str, folder: Path) -> None:
        """Make a folder the artifact of a stage."""
        from stages.artifact import Artifact, digest_files

        self.artifacts[stage] = Artifact(stage, folder, {"files": digest_files(folder)})


def made_up(modality: str) -> list[Any]:
    """Noise with a structure: patches in random colours, random words, tones; texts and sounds of several lengths.
    Images with a text are pairs of the first two."""
    import numpy as np

    from models.modalities.audio import Waveform

    if modality == "image-text":
        return list(zip(made_up("image"), made_up("text"), strict=True))
    random = np.random.default_rng(0)
    if modality == "text":
        return [" ".join(random.choice(WORDS, 2 + 3 * index)) for index in range(SAMPLES)]
    if modality == "audio":
        waves = [np.sin(np.arange(3000 + 900 * index) * 0.1 * (index + 1)) for index in range(SAMPLES)]
        return [Waveform((0.3 * one + 0.05 * random.standard_normal(len(one))).astype("f4"), 16_000) for one in waves]
    patches = random.integers(0, 256, (SAMPLES, 16, 16, 3), dtype=np.uint8)
    return list(patches.repeat(16, axis=1).repeat(16, axis=2))


# --- the folder that a user would name ----------------------------------------------------------------


def write_pretrained(architecture: Architecture, folder: Path) -> None:
    """Random weights as timm and transformers save them for the hub."""
    if architecture.library == "timm":
        import timm
        from safetensors.torch import save_file
        from timm.models._hub import save_config_for_hf

        network = timm.create_model(architecture.member, pretrained=False, num_classes=PRETRAINED_LABELS)
        randomize(network)
        folder.mkdir()
        save_config_for_hf(network, str(folder / "config.json"))
        # timm's own save_for_hf refuses layers that share their weights (coat).
        save_file({name: one.clone() for name, one in network.state_dict().items()}, folder / "model.safetensors")
        return
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    settings: dict[str, Any] = {"architectures": [], **architecture.settings}
    words = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    if architecture.modality == "text":
        settings = words | settings
    if architecture.modality == "image-text":
        settings["text_config"] = words | settings["text_config"]
        folder.mkdir()
        declared = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": 32}
        declared |= {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
        (folder / "preprocessor_config.json").write_text(json.dumps(declared), encoding="utf-8")
    if architecture.modality in ("text", "image-text"):
        PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(), pad_token="[PAD]").save_pretrained(folder)
    network = AutoModel.from_config(AutoConfig.for_model(architecture.member, **settings))
    randomize(network)
    network.save_pretrained(folder)


def word_tokenizer() -> Any:
    """A tokenizer that knows `WORDS` and frames every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def randomize(network: Any) -> None:
    """Make weights random that start constant, and batch-norm statistics that start neutral.

    Otherwise much would not be measured: residual branches that start at zero, norms that do nothing.
    """
    import torch

    with torch.no_grad():
        for weight in network.parameters():
            if weight.numel() and float(weight.max() - weight.min()) == 0.0:
                weight.add_(torch.randn_like(weight) * 0.1)
        for module in network.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)


# --- the steps ----------------------------------------------------------------------------------------


def finetune(bench: Bench, say: Say) -> tuple[str, str]:
    """LoRA and a new head, one step, saved, and the same after a reload; all weights where LoRA finds no layer."""
    import torch

    from models.adapters import (
        AdapterSettings,
        adapter_weights,
        inject_adapters,
        load_adapted,
        save_adapter,
        untrained_adapters,
    )
    from models.checkpoint import save_checkpoint
    from models.classifier import hold_batchnorm, make_spec, new_classifier
    from models.errors import ModelError

    write_pretrained(bench.architecture, bench.root / "pretrained")
    context = bench.context("finetune")
    loaded = load_as_it_fits(bench, context.backbone)
    spec = make_spec(bench.task, context.backbone, loaded, bench.architecture.labels)
    model = new_classifier(loaded, spec.io.width)
    if loaded.head is None:
        torch.nn.init.normal_(model.task_head.weight, std=0.5)
    parameters = sum(one.numel() for one in model.backbone.parameters())
    processing = getattr(loaded.processing, "image", loaded.processing)
    size = getattr(processing, "size", getattr(processing, "samples", MAX_LENGTH))
    say("facts", "", json.dumps({"size": size, "parameters": parameters}))
    save_checkpoint(context.output / "base", model, spec, loaded.processing)
    bench.keep("base", context.output)
    arrays = loaded.processing.arrays([one.content for one in context.data["train"]])
    inputs = [torch.from_numpy(arrays[tensor.name]) for tensor in loaded.processing.inputs]
    try:
        adapted: Any = inject_adapters(model.eval(), AdapterSettings("lora", 4, 8.0, 0.0), inputs)
    except ModelError as error:
        train_a_step(model, inputs, bench)
        save_checkpoint(context.output / "checkpoint", model, spec, loaded.processing)
        bench.keep("finetune", context.output)
        return "part", f"all weights only: {error}"
    hold_batchnorm(adapted)
    before = adapter_weights(adapted)
    train_a_step(adapted, inputs, bench)
    if untrained := untrained_adapters(adapted, before):
        layers = len(adapted.targeted_module_names)
        return "no", f"{len(untrained)} of {layers} adapters had no gradient, the first is {untrained[0]}"
    save_adapter(adapted, context.output / "adapter")
    bench.keep("finetune", context.output)
    again = load_adapted(context.output / "base", context.output / "adapter")
    with torch.inference_mode():
        live, reloaded = adapted(*inputs), again(*inputs)
    moved = float((live - reloaded).abs().max() / (live.max() - live.min()))
    if not moved <= 1e-6:
        return "no", f"the reloaded adapter gives other logits, by {moved:.2g} of their range"
    return "yes", f"{len(adapted.targeted_module_names)} layers"


def load_as_it_fits(bench: Bench, spec: Any) -> Any:
    """The backbone at the first size or length that it takes."""
    from models.errors import ModelError
    from models.registry import load_backbone

    image, pairs = (bench.architecture.modality == one for one in ("image", "image-text"))
    least = bench.architecture.settings.get("image_size", 0)  # at fewer pixels some attention is over one token
    sizes = [size for size in SIZES if size is None or not isinstance(least, int) or size >= least]
    tried: Iterable[Any] = sizes if image else (None,) if pairs else SECONDS
    for last in tried:
        seconds = last if bench.architecture.modality == "audio" else None
        length = None if pairs else MAX_LENGTH
        try:
            return load_backbone(spec, bench.task, last if image else None, length, max_seconds=seconds)
        except ModelError as error:
            refusal = error
    raise refusal


def train_a_step(model: Any, inputs: Sequence[Any], bench: Bench) -> None:
    """One step of Adam on made-up labels, in training mode."""
    import torch

    from models.classifier import for_loss
    from models.tasks import task_of

    torch.manual_seed(0)
    model.train()
    weights = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=1e-2)
    labels = torch.arange(len(inputs[0])) % len(LABELS)
    task_of(bench.task).loss(for_loss(model, model(*inputs)), labels).backward()
    optimizer.step()
    model.eval()


def merge(bench: Bench) -> tuple[str, str]:
    """The stage merge-lora with its gates. What follows takes the network without adapter where there is none."""
    from stages.merge_lora import MergeLora, MergeLoraConfig

    if "finetune" not in bench.artifacts:
        folder = bench.root / "unadapted"
        folder.mkdir()
        (bench.artifacts["base"].folder / "base").rename(folder / "checkpoint")
        bench.keep("merge-lora", folder)
        return "no", "there is no adapter"
    context = bench.context("merge-lora")
    result = MergeLora().run(context, MergeLoraConfig())
    bench.keep("merge-lora", context.output)
    if failed := [gate.message for gate in result.gates if not gate.passed]:
        return "no", "; ".join(failed)
    if result.measurements["passed_through"]:
        return "not needed", "there is no adapter"
    return "yes", f"{result.measurements['max_abs_error'] / result.measurements['logit_range']:.1g} of the logit range"


def export(bench: Bench, say: Say) -> tuple[str, str]:
    """The stage export with its gates, in fp32."""
    from stages.export import Export, ExportConfig

    context = bench.context("export")
    result = Export().run(context, ExportConfig(precisions=("fp32",)))
    bench.keep("export", context.output)
    if failed := [f"{gate.subject}: {gate.message}" for gate in result.gates if not gate.passed]:
        return "no", failed[0]
    say("dynamic shapes", "yes", ", ".join(result.measurements["candidates"][0]["shapes_tried"]))
    return "yes", "attention written out" if result.measurements["attention"] == "plain" else ""


def quantize(bench: Bench) -> tuple[str, str]:
    """Both schemes of the stage quantize, with no budget: random weights have no accuracy to lose."""
    from stages.quantize import Quantize, QuantizeConfig

    config = QuantizeConfig(
        calibration_samples=8, sensitivity_samples=8, keep_float="none", max_metric_drop=1.0, min_int8_share=0.0,
        min_agreement=0.0,
    )  # fmt: skip
    candidates = Quantize().run(bench.context("quantize"), config).measurements["candidates"]
    told = [
        f"{one['name'].removeprefix('onnx-int8-')}: "
        + (f"{one['narrow_share']:.0%} of the arithmetic" if one["accepted"] else one["reason"])
        for one in candidates
    ]
    return "yes" if any(one["accepted"] for one in candidates) else "no", "; ".join(told)


def build(model: Path) -> tuple[str, str]:
    """A TensorRT-RTX engine for SM 8.6, where the library is installed; it needs no GPU to build one."""
    if util.find_spec("tensorrt_rtx") is None:
        return "not tried", "tensorrt_rtx is not installed"
    from models.engines.build import build_engine
    from models.engines.targets import runtime_of, target_of
    from stages.engines import load_graph, profile_shapes

    target = target_of("sm86")
    profile = profile_shapes(load_graph(model), {"batch": (1, 2, 8), "sequence": (4, 16, MAX_LENGTH)})
    with tempfile.TemporaryDirectory() as folder:
        engine = Path(folder) / "engine"
        outcome = build_engine(
            model, engine, runtime_of(target), (target.sm,), profile, Path(folder), LIMIT_S, LIMIT_GB * 2**30
        )
        if outcome.built:
            return "yes", f"{engine.stat().st_size / 1e6:.1f} MB"
    return "no", "; ".join(f"{one.operator} {one.node}: {one.reason}" for one in outcome.refusals[:2])


# --- the cache and the page ---------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Installed versions of the libraries that decide."""
    installed = {one.metadata["Name"].replace("_", "-").lower(): one.version for one in metadata.distributions()}
    return {package: installed[package] for package in PACKAGES if package in installed}


def cache_file() -> Path:
    """Where the rows of these versions are."""
    CACHE.mkdir(parents=True, exist_ok=True)
    return CACHE / f"{hashlib.sha256(json.dumps(versions()).encode()).hexdigest()[:12]}.jsonl"


def read_rows() -> dict[str, Row]:
    """Key → the last row measured with these versions."""
    if not cache_file().is_file():
        return {}
    rows = [json.loads(line) for line in cache_file().read_text(encoding="utf-8").splitlines()]
    return {row["key"]: row for row in rows}


MARKS = {"yes": "✓", "part": "(✓)", "no": "✗", "not needed": "–", "not tried": "not tried", "not reached": "–"}
LIBRARIES = {"timm": "timm", "hf": "Hugging Face"}
UNITS = {"image": "px", "text": "tokens", "audio": "samples", "image-text": "px"}

INTRODUCTION = """# Coverage

Which architectures go through `finetune` → `merge-lora` → `export` → `quantize`: measured by `make sweep`
(benchmarks/sweep.py), never assumed.

{stamp}

{counts}

Every row is the smallest member of a family (timm) or a small configuration (Hugging Face) with random weights, loaded
from a local folder as its library saves it: at the smallest image size of {sizes} that it takes, or its
own; with texts of up to {length} tokens; with half a second of sound. Dual encoders are trained with their own
contrastive loss and keep their own projections. The columns, each with the project's own stages
and their gates:

- **finetune**: LoRA adapters and a new head of another size, one optimizer step; every adapter was trained, and the
  adapter reloaded from disk gives the same logits.
- **LoRA merge**: the stage's gates hold for the adapter reloaded from disk.
- **export**: the ONNX graph is valid and equals the unpatched PyTorch network within the stage's fp32 tolerance.
- **dynamic shapes**: … at batch sizes 1, 3 and 8, and for texts at several lengths.
- **INT8**: the dynamic or the static form is made, loads in ONNX Runtime and runs. Random weights have no accuracy, so
  nothing is said about it.
- **TensorRT-RTX**: an engine is built for SM 8.6 on the CPU; whether it computes the same is not measured.

✓ holds · (✓) holds with the remark below · ✗ does not, see below · – not needed or not reached
"""


def page(wanted: Sequence[Architecture], rows: Mapping[str, Row]) -> str:
    """docs/coverage.md."""
    dates = sorted({row["date"] for row in rows.values()})
    stamp = f"Measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))}" if dates else "Not measured yet,"
    stamp += " on Linux with " + ", ".join(f"{name} {version}" for name, version in versions().items()) + "."
    sections = [
        (f"{LIBRARIES[library]}: {modality}", list(chosen))
        for (library, modality), chosen in itertools.groupby(wanted, lambda one: (one.library, one.modality))
    ]
    counts = "\n".join(counts_of(sections, rows))
    sizes = ", ".join(map(str, SIZES[:-1]))
    parts = [INTRODUCTION.format(counts=counts, sizes=sizes, length=MAX_LENGTH, stamp=textwrap.fill(stamp, 120))]
    for title, chosen in sections:
        parts += [f"## {title}\n\n" + "\n".join(table(chosen, rows)) + "\n"]
        parts += ["\n".join(remarks) + "\n"] if (remarks := list(remarks_of(chosen, rows))) else []
    return "\n".join(parts)


def counts_of(sections: Iterable[tuple[str, list[Architecture]]], rows: Mapping[str, Row]) -> Iterator[str]:
    """A table of how many hold, a row a section."""
    yield f"| | architectures | measured | {' | '.join(COLUMNS)} |"
    yield "| --- |" + " --- |" * (2 + len(COLUMNS))
    for title, chosen in sections:
        measured = [rows[one.key]["cells"] for one in chosen if one.key in rows]
        held = [sum(cells[column][0] in ("yes", "part") for cells in measured) for column in COLUMNS]
        yield f"| {title} | {len(chosen)} | {len(measured)} | {' | '.join(map(str, held))} |"


def table(chosen: Sequence[Architecture], rows: Mapping[str, Row]) -> Iterator[str]:
    """One section's rows as Markdown."""
    yield f"| architecture | measured on | {' | '.join(COLUMNS)} |"
    yield "| --- |" + " --- |" * (1 + len(COLUMNS))
    for one in chosen:
        row = rows.get(one.key)
        member = one.member if one.library == "timm" else "small"
        if row and "size" in row:
            member += f", {row['parameters'] / 1e6:.1f} M, {row['size']} {UNITS[one.modality]}"
        marks = [MARKS[row["cells"][column][0]] for column in COLUMNS] if row else ["not measured"] * len(COLUMNS)
        yield f"| {one.name} | {member} | {' | '.join(marks)} |"


def remarks_of(chosen: Sequence[Architecture], rows: Mapping[str, Row]) -> Iterator[str]:
    """Why a cell is not a plain tick, and what was needed where export is one."""
    for one in chosen:
        for column, (verdict, detail) in rows[one.key]["cells"].items() if one.key in rows else ():
            if detail and (verdict in ("no", "part") or (verdict == "yes" and column == "export")):
                yield f"- {one.name}, {column}: {detail}"


if __name__ == "__main__":
    sys.exit(main())
