"""Our gates beside those of others, on the same good and broken networks: `make gate-comparison` writes the page.

    python -P benchmarks/gate_comparison.py [--recipe vision text] [--runs FOLDER] [--samples 512] [--page]

The variants are those of validate's self-test (`stages/validate/self_test/defects.py`), put into two fine-tuned
backbones with real weights, and the candidates of export and quantize. Each is run once on the test samples, on
optimum's dummy input and on the example that torch.onnx would have been given, and every tool judges what came out.

- ours: the gates of validate at their defaults, as the self-test judges; and once more with `metric_drop: observed`
- Polygraphy: `Comparator.compare_accuracy` at its defaults, on all test samples, from the raw example on (its own
  command would be given tensors, and could not see a wrong preprocessing)
- optimum: what `validate_models_outputs` of optimum-onnx does (optimum/exporters/onnx/convert.py at 0749e2e13): equal
  names, equal shapes, `np.allclose` at `ATOL_FOR_VALIDATION` (model_configs.py at 012f0d143) on one dummy input
- torch.onnx: `torch.onnx.verification.VerificationInfo` of one example, with the limits of `verify=True`
  (torch/onnx/_internal/exporter/_core.py of torch 2.13)
- MLPerf-99: at least 99 % of the reference's metric on the test samples (Reddi et al. 2020, arXiv 1911.02549)

A finished run of each recipe is taken from `--runs`, or made in build/gate-comparison. What was measured goes to
benchmarks/results/gate-comparison.json, one entry a recipe, and docs/gate-comparison.md is made of that.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "build" / "gate-comparison"
RESULTS = ROOT / "benchmarks" / "results" / "gate-comparison.json"
PAGE = ROOT / "docs" / "gate-comparison.md"
PACKAGES = ("torch", "onnx", "onnxruntime-gpu", "onnxruntime", "polygraphy")
STAGES = ("finetune", "merge-lora", "export", "quantize")

BACKBONES = {"vision": "EfficientNet-Lite0 on Fashion-MNIST", "text": "MiniLM on WordNet topics"}
ATOL = {"timm": 1e-3, "hf": 1e-4}
"""optimum's `ATOL_FOR_VALIDATION` of any timm network (TimmDefaultOnnxConfig) and of BERT (BertOnnxConfig)."""
DUMMY_BATCH, DUMMY_LENGTH = 2, 16
"""optimum's DEFAULT_DUMMY_SHAPES; of images the size is the network's own, there as here."""
TORCH_ABSOLUTE, TORCH_RELATIVE = 5e-3, 1e-1
"""From where on `torch.onnx.export(verify=True)` warns."""
MLPERF = 0.99

PRECISIONS = ("fp32", "fp16", "int8")
PEERS = ("Polygraphy", "optimum", "torch.onnx", "MLPerf-99")
PARTS = {
    "all_outputs": "reference and candidates once over the data",
    "all_timings": "latency and throughput",
    "noise_floor": "noise floor",
    "add_further": "slices, calibration",
    "drift_of": "drift",
}
"""The functions of stages/validate/stage.py whose time is taken, and what they are called."""

Calls = list[tuple[dict[str, np.ndarray], int]]
Named = dict[str, np.ndarray]


def main() -> int:
    """Measure the recipes asked for, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="*", default=list(BACKBONES), choices=BACKBONES)
    parser.add_argument("--runs", type=Path, default=RUNS, help="a folder with a finished run of each recipe")
    parser.add_argument("--samples", type=int, default=512, help="test samples, at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--costs", action="store_true", help="measure again only what validate costs")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    arguments = parser.parse_args()
    if not arguments.page and not version_of("polygraphy"):
        raise SystemExit("polygraphy is not installed; `make gate-comparison` puts it into build/polygraphy")
    for recipe in [] if arguments.page else arguments.recipe:
        found = measure(recipe, arguments.runs / recipe, arguments.samples, arguments.threads, arguments.costs)
        results = read_results()
        results[recipe] = results.get(recipe, {}) | found
        RESULTS.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(*overhead_lines(found["overhead"]), sep="\n")
    PAGE.write_text(page(read_results()), encoding="utf-8")
    print(f"written to {PAGE.relative_to(ROOT)}")
    return 0


def read_results() -> dict[str, Any]:
    """What was measured so far, by recipe."""
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    return found


# --- measuring ----------------------------------------------------------------------------------------


def measure(recipe: str, run: Path, samples: int, threads: int, costs: bool) -> dict[str, Any]:
    """Everything that is known of one recipe, as plain values; or what validate costs alone."""
    from pipeline.config import RECIPES, load_config

    started = time.perf_counter()
    if not all((run / stage / "manifest.json").is_file() for stage in STAGES):
        make_run(recipe, run)
    config, backbone = load_config(RECIPES / f"{recipe}.yaml", [f"data.max_test_samples={samples}"])
    with tempfile.TemporaryDirectory() as folder:
        found = validated(context_of(config, backbone, run, threads, Path(folder)), config.validate_)
    if costs:
        return {"overhead": found.overhead}
    rows = compared(found)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: version for name in PACKAGES if (version := version_of(name))},
        "threads": threads,
        "samples": len(found.examples),
        "metric": found.judge("proven").task.metric,
        "reference_metric": found.judge("proven").scene.reference_metric,
        "atol": ATOL[found.checkpoint.spec.backbone.library],
        "overhead": found.overhead,
        "rows": rows,
        "seconds": round(time.perf_counter() - started, 1),
    }


def make_run(recipe: str, run: Path) -> None:
    """As a user would, up to quantize."""
    command = [str(Path(sys.executable).with_name("pipeline")), "all", "-c", f"pipeline/recipes/{recipe}.yaml"]
    done = subprocess.run([*command, "--run-dir", str(run), "--until", "quantize", "--quiet"], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"the run of {recipe} ended with {done.returncode}")


def version_of(package: str) -> str | None:
    """As it is installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def context_of(config: Any, backbone: Any, run: Path, threads: int, output: Path) -> Any:
    """What the runner would hand to validate."""
    from pipeline.progress import QuietProgress
    from stages.artifact import read_artifact
    from stages.base import StageContext
    from stages.data.load import load_data

    artifacts = {stage: read_artifact(stage, run / stage) for stage in STAGES}
    if missing := [stage for stage, artifact in artifacts.items() if artifact is None]:
        raise SystemExit(f"{run / missing[0]} is no artifact of this version; remove it, and it is made again")
    data = load_data(config.data, config.task)
    log = logging.getLogger("gate-comparison")
    return StageContext(
        output, output, artifacts, config.task, backbone, data, config.seed, "cpu", threads, log, QuietProgress()
    )


@dataclass(frozen=True)
class Validated:
    """What validate did, and with what; `arguments` are those of its self-test."""

    arguments: tuple[Any, ...]
    overhead: dict[str, Any]

    @property
    def checkpoint(self) -> Any:
        """The reference."""
        return self.arguments[2]

    @property
    def candidates(self) -> Sequence[Any]:
        """Those of export and quantize."""
        return self.arguments[3]

    @property
    def examples(self) -> Sequence[Any]:
        """The test samples."""
        return self.arguments[0].data["test"]

    def judge(self, metric_drop: str) -> Any:
        """The gates' defaults, with what is asked of the metric."""
        from stages.validate.proofs import judge_of

        context, config, checkpoint, _, scene, reference, targets = self.arguments
        gates = config.gates.model_copy(update={"metric_drop": metric_drop})
        config = config.model_copy(update={"gates": gates})
        return judge_of(context, config, checkpoint, scene, reference, targets, range(len(targets)))

    def setup(self) -> Any:
        """What the self-test puts defects into."""
        from stages.validate.self_test import SelfTest

        context, config, checkpoint, candidates, *_ = self.arguments
        (base,) = (one.path for one in candidates if one.candidate.precision == "fp32")
        precisions = tuple(dict.fromkeys(one.candidate.precision for one in candidates))
        return SelfTest(
            base, checkpoint, self.examples, precisions, config.batch_size, context.threads, context.progress
        )


def validated(context: Any, config: Any) -> Validated:
    """Run validate, and take the time of its parts; imports, which one run of the pipeline does once, are no part."""
    import sklearn.metrics  # noqa: F401

    from models.checkpoint import load_checkpoint
    from stages.validate import Validate, stage

    load_checkpoint(context.inputs["merge-lora"].folder / "checkpoint")

    seconds = dict.fromkeys(PARTS, 0.0)
    arguments: list[tuple[Any, ...]] = []

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                seconds[name] += time.perf_counter() - started

        return call

    with ExitStack() as stack:
        for name in PARTS:
            stack.enter_context(mock.patch.object(stage, name, timed(name, getattr(stage, name))))
        stack.enter_context(mock.patch.object(stage, "self_test_of", lambda *given: arguments.append(given)))
        started = time.perf_counter()
        result = Validate().run(context, config)
        total = time.perf_counter() - started
    overhead = {
        "total_s": total,
        "parts_s": seconds | {"rest": total - sum(seconds.values())},
        "candidates": len(result.measurements["candidates"]),
        "other_work_cores": result.measurements["other_work_cores"],
    }
    return Validated(arguments[0], overhead)


# --- the variants -------------------------------------------------------------------------------------


@dataclass
class Kept:
    """What a variant gave, as it came: for the test samples by calls, for the dummy input, for the example. `errors`:
    which of the three it did not run on, and why."""

    calls: Calls = field(default_factory=list)
    dummy: Named = field(default_factory=dict)
    example: Named = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def joined(self) -> Named:
        """All calls below each other, whatever outputs there are."""
        return {name: np.concatenate([found[name] for found, _ in self.calls]) for name in self.calls[0][0]}


@dataclass
class Recorder:
    """Collects a mutant's outputs for the self-test, and keeps them for the others; each mutant is run once."""

    dummy: Named
    example: Named
    kept: dict[str, Kept] = field(default_factory=dict)

    def __call__(self, mutant: Any, setup: Any, description: str) -> Any:
        """See `stages.validate.self_test.run.Collect`."""
        from models.errors import RuntimeInferenceError
        from stages.validate.metrics import outputs_of_calls

        name = description.rpartition(": ")[2]
        if name not in self.kept:
            self.kept[name] = self.run(mutant, setup)
        found = self.kept[name]
        if "samples" in found.errors:
            raise RuntimeInferenceError(found.errors["samples"])
        return outputs_of_calls(found.calls, setup.checkpoint.spec.io)

    def run(self, mutant: Any, setup: Any) -> Kept:
        """On the test samples with all that is wrong; on single inputs the graph alone, which is given tensors."""
        from models.errors import RuntimeInferenceError
        from stages.inputs import batches
        from stages.validate.self_test.run import Before, given, opened

        found = Kept()
        processing, examples, batch_size = given(mutant, setup)

        def samples(runtime: Any) -> None:
            found.calls = [(runtime.infer(one), count) for one, count in batches(processing, examples, batch_size)]

        def single(name: str, inputs: Named) -> Callable[[Any], None]:
            def call(runtime: Any) -> None:
                network = runtime.runtime if isinstance(runtime, Before) else runtime
                setattr(found, name, network.infer(inputs))

            return call

        steps = {"samples": samples, "dummy": single("dummy", self.dummy), "example": single("example", self.example)}
        try:
            with opened(mutant, setup) as runtime:
                for name, step in steps.items():
                    try:
                        step(runtime)
                    except RuntimeInferenceError as error:
                        found.errors[name] = str(error)
        except RuntimeInferenceError as error:
            found.errors = dict.fromkeys(steps, str(error))
        return found


def compared(found: Validated) -> list[dict[str, Any]]:
    """A row a variant: controls, candidates, defects, in this order."""
    import onnx

    from models.runtimes.torch_eager import TorchEager
    from stages.validate.self_test import run_self_test
    from stages.validate.self_test.run import largest_change
    from stages.validate.self_test.subject import Mutant

    setup, checkpoint = found.setup(), found.checkpoint
    example = checkpoint.processing.arrays([one.content for one in found.examples[:DUMMY_BATCH]])
    recorder = Recorder(dummy_inputs(checkpoint.spec), example)
    judges = {name: found.judge(name) for name in ("proven", "observed")}
    tables = {name: run_self_test(setup, judge, recorder) for name, judge in judges.items()}
    with TorchEager(checkpoint.model, checkpoint.spec.io, "cpu", setup.threads) as runtime:
        wanted = Kept(dummy=runtime.infer(recorder.dummy), example=runtime.infer(example))
    reference = judges["proven"].reference
    (output,) = checkpoint.spec.io.outputs
    wanted.calls = [({output.name: reference.values}, len(found.examples))]
    unchanged = recorder(Mutant(), setup, "unchanged")
    rows = []
    for one in found.candidates:
        outputs = recorder(Mutant(model=onnx.load(str(one.path))), setup, one.name)
        precision = one.candidate.precision
        row = {"name": one.name, "place": "candidate", "what": f"the {precision.upper()} file as it ships"}
        row |= {"kind": "good", "status": "good", "moved": largest_change(outputs, reference)}
        row |= {name: red_of(judge, outputs, [precision]) for name, judge in judges.items()}
        rows.append(row)
    for kind in ("controls", "defects"):
        for proven, observed in zip(*(tables[name][kind] for name in judges), strict=True):
            harmless = kind == "controls" or proven["status"] == "equivalent"
            row = {key: proven[key] for key in ("name", "place", "what", "status", "moved", "reason")}
            row["kind"] = "good" if harmless else "none" if proven["status"] == "not applicable" else "defect"
            if harmless:
                outputs = recorder(Mutant(), setup, proven["name"])  # recorded before
                row |= {name: red_of(judge, outputs, setup.precisions) for name, judge in judges.items()}
            else:
                row |= {"proven": said_of(proven), "observed": said_of(observed)}
            rows.append(row)
    rows.sort(key=lambda one: ("good", "defect", "none").index(one["kind"]))
    for row in rows:
        if row["kind"] != "none":
            kept = recorder.kept[row["name"]]
            row["peers"] = peers(kept, wanted, judges["proven"], ATOL[checkpoint.spec.backbone.library])
            row["metric_difference"] = difference(kept, unchanged, judges["proven"])
    return rows


def dummy_inputs(spec: Any) -> Named:
    """Random as optimum's generators make them (DummyVisionInputGenerator, DummyTextInputGenerator), always the same:
    pixels, tokens, segments, and a mask whose end is padding."""
    random = np.random.default_rng(0)
    sizes = {"batch": DUMMY_BATCH}
    found = {}
    for tensor in spec.io.inputs:
        shape = [dim if isinstance(dim, int) else sizes.get(dim, DUMMY_LENGTH) for dim in tensor.dims]
        if tensor.name == "attention_mask":
            values = np.ones(shape)
            values[:, -int(random.integers(1, shape[-1])) :] = 0
        else:
            most = spec.architecture["config"]["vocab_size"] if tensor.name == "input_ids" else 2
            values = random.integers(0, 256 if tensor.dtype == "uint8" else most, shape)
        found[tensor.name] = values.astype(tensor.dtype)
    return found


def red_of(judge: Any, outputs: Any, precisions: Sequence[str]) -> dict[str, list[list[str]]]:
    """Precision → (gate, verdict) of all that does not pass, of what is no defect."""
    numbers = judge.numbers(outputs)
    return {
        name: [[one.name, one.verdict] for one in judge.verdicts("variant", name, numbers) if one.verdict != "pass"]
        for name in precisions
    }


def said_of(row: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """The same of a row of the self-test. What does not run has no gate, and ends validate with an error."""
    return {name: row["said"].get(name) or [[one, "error"] for one in gates] for name, gates in row["judged"].items()}


def difference(kept: Kept, unchanged: Any, judge: Any) -> float | None:
    """What the metric loses or gains against the reference, where there are outputs."""
    if "samples" in kept.errors or len(kept.joined()) != 1:
        return None
    (values,) = kept.joined().values()
    if values.shape != unchanged.values.shape or not np.isfinite(values).all():
        return None
    scores, before = (judge.task.scores(one, judge.targets) for one in (values, judge.reference.values))
    return float(scores.mean() - before.mean())


# --- the others ---------------------------------------------------------------------------------------


def peers(kept: Kept, wanted: Kept, judge: Any, atol: float) -> dict[str, bool]:
    """Which of the others object. What a tool cannot run, it objects to."""
    return {
        "Polygraphy": "samples" in kept.errors or polygraphy_objects(wanted.joined(), kept.joined()),
        "optimum": "dummy" in kept.errors or optimum_objects(wanted.dummy, kept.dummy, atol),
        "torch.onnx": "example" in kept.errors or torch_objects(wanted.example, kept.example),
        "MLPerf-99": "samples" in kept.errors or mlperf_objects(wanted.joined(), kept.joined(), judge),
    }


def polygraphy_objects(wanted: Named, found: Named) -> bool:
    """`Comparator.compare_accuracy` at its defaults (element by element, 1e-5 absolute or 1e-5 relative)."""
    from polygraphy.comparator import Comparator, RunResults
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    results = RunResults()
    results.add([wanted], runner_name="reference")
    results.add([found], runner_name="variant")
    try:
        return not bool(Comparator.compare_accuracy(results))
    except PolygraphyException:
        return True


def optimum_objects(wanted: Named, found: Named, atol: float) -> bool:
    """OutputMatchError, ShapeError or AtolError, of which optimum's command turns the first and the last into
    warnings."""
    if wanted.keys() != found.keys():
        return True
    return any(
        found[name].shape != value.shape or not np.allclose(value, found[name], atol=atol)
        for name, value in wanted.items()
    )


def torch_objects(wanted: Named, found: Named) -> bool:
    """The warnings of `verify=True`; outputs are paired by their place, as it does."""
    import torch
    from torch.onnx.verification import VerificationInfo

    for (name, expected), actual in zip(wanted.items(), found.values(), strict=False):
        try:
            info = VerificationInfo.from_tensors(name, torch.from_numpy(expected), torch.from_numpy(actual))
        except RuntimeError:  # shapes that do not fit: the report says that it did not run
            return True
        if info.max_abs_diff >= TORCH_ABSOLUTE or info.max_rel_diff >= TORCH_RELATIVE:
            return True
    return False


def mlperf_objects(wanted: Named, found: Named, judge: Any) -> bool:
    """The metric alone; outputs that it cannot be taken of are objected to."""
    (name, before), *_ = wanted.items()
    if name not in found or found[name].shape != before.shape:
        return True
    after, reference = (float(judge.task.scores(one, judge.targets).mean()) for one in (found[name], before))
    return not after >= MLPERF * reference


# --- the page -----------------------------------------------------------------------------------------

INTRODUCTION = """# Gates side by side

The gates of `pipeline validate` beside Polygraphy's comparator, optimum's check, torch.onnx's verify and MLPerf's 99 %,
on the same good and broken networks: two backbones with real weights, the defects of validate's self-test put into
each. Measured by `make gate-comparison` (benchmarks/gate_comparison.py), which writes this page.

| | is given | objects where |
| --- | --- | --- |
| ours | all test samples, from the raw example on; gates at their defaults | a gate does not pass |
| ours, observed | the same with `metric_drop: observed`, as the recipes have it; in every precision | the same |
| Polygraphy | the same samples, also from the raw example on | an element differs by over 1e-5, and over 1e-5 of it |
| optimum | one random input of two samples | names or shapes differ, or not `np.allclose` at {atol} |
| torch.onnx | the first two test samples, as tensors | an element differs by 5e-3, or by a tenth of it |
| MLPerf-99 | all test samples | the metric is below 99 % of the reference's |

What a tool cannot run it objects to. optimum's command turns most of what it finds into a warning and ends with
success, and so does torch.onnx's; here both count as objecting. Polygraphy is treated kindly too: its own command gives
tensors to both sides, and sees no preprocessing. A defect is judged as a candidate of each precision that there is one
of, since its gates are what it would ship through; the others know no precision.

✓ objects · ? inconclusive: the run stops, for want of samples · – does not · **!** objects to what is good
"""


def page(results: Mapping[str, dict[str, Any]]) -> str:
    """docs/gate-comparison.md."""
    atol = " and ".join(f"{value:g} ({name})" for name, value in {"timm": ATOL["timm"], "BERT": ATOL["hf"]}.items())
    parts = [INTRODUCTION.format(atol=atol)]
    shown = [(recipe, results[recipe]) for recipe in BACKBONES if recipe in results]
    for recipe, found in shown:
        parts.append("\n".join(section(recipe, found)))
    parts += [wrapped(one) + "\n" for one in discussion(shown)]
    parts.append("\n".join(costs(shown)))
    return "\n".join(parts)


def wrapped(paragraph: str) -> str:
    """In lines of 120."""
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)


def section(recipe: str, found: Mapping[str, Any]) -> Iterator[str]:
    """A backbone: what was measured, the sums, every variant."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    yield f"## {BACKBONES[recipe]}\n"
    said = (
        f"{found['samples']} test samples, {found['metric']} of the reference {found['reference_metric']:.4f}; "
        f"{found['date'][:10]}, {versions}; {found['seconds']:.0f} s, threads: {found['threads']}."
    )
    yield f"{wrapped(said)}\n"
    heads = [*(f"ours, {name.upper()}" for name in PRECISIONS), "ours, observed", *PEERS]
    rule = "| --- " * (len(heads) + 1) + "|"
    rows = found["rows"]
    yield f"| | {' | '.join(heads)} |\n{rule}"
    for kind, words in (("defect", "defects objected to"), ("good", "good ones objected to")):
        chosen = [row for row in rows if row["kind"] == kind]
        cells = [cells_of(row) for row in chosen]
        judged = [[cell for cell in column if cell] for column in zip(*cells, strict=True)]
        yield f"| {words} | {' | '.join(sum_of(column) for column in judged)} |"
    yield f"\n| variant | {' | '.join(heads)} |\n{rule}"
    for row in rows:
        if row["kind"] != "none":
            yield f"| {label(row)} | {' | '.join(cells_of(row))} |"
    absent = [row for row in rows if row["kind"] == "none"]
    yield f"\n{wrapped('Not of this model: ' + ', '.join(row['name'] for row in absent) + '.')}\n"


def label(row: Mapping[str, Any]) -> str:
    """What a variant is, and what it does to the metric."""
    good = "" if row["kind"] == "defect" else " (no effect here)" if row["status"] == "equivalent" else " (good)"
    change = "" if row["metric_difference"] is None else f", {100 * row['metric_difference']:+.1f} pt"
    return f"{row['name']}{good}{change}"


def cells_of(row: Mapping[str, Any]) -> list[str]:
    """A mark a column."""
    good = row["kind"] == "good"
    own = [mark(row["proven"].get(name), good) for name in PRECISIONS]
    observed = [mark(said, good) for said in row["observed"].values()]
    # A defect ships through the loosest gates; a good one is stopped by the strictest.
    order = ("✓", "**!**", "?", "–")
    weakest = max(observed, key=order.index) if not good else min(observed, key=order.index)
    return [*own, weakest, *(("**!**" if good else "✓") if row["peers"][name] else "–" for name in PEERS)]


def mark(said: Sequence[Sequence[str]] | None, good: bool) -> str:
    """Of the gates that do not pass; empty where nothing was judged."""
    if said is None:
        return ""
    if any(verdict in ("fail", "error") for _, verdict in said):
        return "**!**" if good else "✓"
    return "?" if said else "–"


def sum_of(column: Sequence[str]) -> str:
    """How many of how many."""
    open_ones = sum(cell == "?" for cell in column)
    objecting = sum(cell in ("✓", "**!**", "?") for cell in column)
    return f"{objecting} of {len(column)}" + (f" ({open_ones} ?)" if open_ones else "")


def discussion(shown: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    """What the tables say, from the tables: paragraphs."""
    rows = [
        row | {"backbone": BACKBONES[recipe].partition(" ")[0]}
        for recipe, found in shown
        for row in found["rows"]
        if row["kind"] != "none"
    ]
    defects, good = ([row for row in rows if row["kind"] == kind] for kind in ("defect", "good"))
    yield "## What it says"
    missed = [row for row in defects if not caught_in_all(row, "proven")]
    by_precision = [
        f"as {name.upper()} {counted([row for row in missed if row['proven'].get(name) == []])}" for name in PRECISIONS
    ]
    others = [
        f"{name} objects to {counted([row for row in missed if row['peers'][name]])}"
        for name in PEERS
        if any(row["peers"][name] for row in missed)
    ]
    yield (
        f"**What ours missed.** Of {len(defects)} defects {len(missed)} would ship in some precision: "
        f"{'; '.join(by_precision)}. {'; '.join(others) + '.' if others else ''}"
    )
    changes = [abs(row["metric_difference"]) for row in missed if row["metric_difference"] is not None]
    if changes:
        yield f"Those that ours missed change the metric by at most {100 * max(changes):.1f} points on these samples."
    left_open = [row for row in defects if any(mark(said, False) == "?" for said in row["proven"].values())]
    if left_open:
        yield (
            "Some are stopped in some precision only because so few samples leave the drop open; more samples could "
            f"settle it either way: {counted(left_open)}."
        )
    escaped = [f"{name} {counted([row for row in defects if not row['peers'][name]])}" for name in PEERS]
    yield f"**What the others missed.** Of {len(defects)}: {'; '.join(escaped)}."
    alarms = [f"{name} objects to {counted([row for row in good if row['peers'][name]])}" for name in PEERS]
    failed = [row for row in good if any(mark(said, True) == "**!**" for said in row["proven"].values())]
    stopped, observed = ([row for row in good if any(row[key].values())] for key in ("proven", "observed"))
    yield (
        f"**The good ones.** Of {len(good)} {'; '.join(alarms)}. Ours fails {counted(failed)}, and stops, with those "
        f"that are inconclusive, {counted(stopped)}; with `metric_drop: observed` {counted(observed)}."
    )
    deaf = [
        f"{name} of {row['backbone']}"
        for name in PEERS
        for row in good
        if row["place"] == "candidate" and "fp32" in row["proven"] and row["peers"][name]
    ]
    if deaf:
        yield f"Who objects to the good FP32 file has said nothing by objecting to a broken one: {', '.join(deaf)}."
    passed = [row for row in stopped if not row["peers"]["MLPerf-99"]]
    sure = [row for row in left_open if row["peers"]["MLPerf-99"]]
    lost = [row for row in defects if caught_in_all(row, "proven") and not caught_in_all(row, "observed")]
    objected = sum(row["peers"]["MLPerf-99"] for row in defects)
    yield (
        f"**What a point estimate gets right.** MLPerf's one number objects to {objected} of the defects, and outright "
        f"where ours is inconclusive: {counted(sure)}. Of the good ones that ours stops it passes {counted(passed)}. "
        f"With `metric_drop: observed` ours no longer stops {counted(lost)}. What keeps the answers the metric cannot "
        "see, however far the outputs have moved."
    )
    yield (
        "**How to read it.** A tolerance of 1e-5 on every element is a test of an FP32 export: it cannot tell a file "
        "that is broken from one that is quantized. Checks of one input see what breaks a graph everywhere, and "
        "neither the preprocessing, nor the pairing, nor another batch size. The defects are this project's own table, "
        "and its gates were built with that in view: the counts compare kinds of checks, and are no estimate of what "
        "each would catch of the defects of others."
    )


def caught_in_all(row: Mapping[str, Any], key: str) -> bool:
    """Whether our gates stop a defect in every precision."""
    return all(bool(said) for said in row[key].values())


def counted(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many, and which: those of several backbones, then those of one alone."""
    if not rows:
        return "none"
    backbones: dict[str, list[str]] = {}
    for row in rows:
        backbones.setdefault(row["name"], []).append(row["backbone"])
    alone: dict[str, list[str]] = {}
    for name, of in backbones.items():
        alone.setdefault(of[0] if len(of) == 1 else "", []).append(name)
    both = [", ".join(alone.pop(""))] if "" in alone else []
    groups = [*both, *(f"in {backbone} {', '.join(names)}" for backbone, names in alone.items())]
    return f"{len(rows)} ({'; '.join(groups)})"


def costs(shown: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    """What validate takes beside running the networks."""
    yield "## What validate costs\n"
    said = (
        "Wall time of `validate` as the recipes configure it (no self-test), imports left out, against running the "
        "reference and every candidate once over the same samples, preprocessing included. The aim is 1.3."
    )
    yield f"{wrapped(said)}\n"
    for recipe, found in shown:
        overhead = found["overhead"]
        other = overhead["other_work_cores"]
        busy = "" if other is None else f"; other processes used {other:.2f} cores"
        yield f"{BACKBONES[recipe]}, {found['samples']} samples, {overhead['candidates']} candidates{busy}:\n"
        yield "| part | seconds | of once over the data |\n| --- | --- | --- |"
        yield from (f"| {name} | {seconds:.1f} | {share:.2f} |" for name, seconds, share in parts_of(overhead))
        yield f"\n{wrapped(verdict_on(found))}\n"


def parts_of(overhead: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """(name, seconds, share of the base) of each part, then of the whole."""
    seconds = overhead["parts_s"]
    base = seconds["all_outputs"]
    for name, value in seconds.items():
        yield PARTS.get(name, "the rest: loading, digests, comparison"), value, value / base
    total = overhead["total_s"]
    yield "**all**", total, total / base
    yield "all, without latency", total - seconds["all_timings"], (total - seconds["all_timings"]) / base
    lean = total - seconds["all_timings"] - seconds["drift_of"]
    yield "all, without latency and drift", lean, lean / base


def verdict_on(found: Mapping[str, Any]) -> str:
    """Whether it keeps the aim, and where it would."""
    seconds, total = found["overhead"]["parts_s"], found["overhead"]["total_s"]
    base = seconds["all_outputs"]
    if total <= 1.3 * base:
        return f"{total / base:.2f} times: inside the aim."
    fixed = seconds["all_timings"] + seconds["noise_floor"] + seconds["drift_of"]
    largest = max((name for name in seconds if name != "all_outputs"), key=lambda name: seconds[name])
    grows = (seconds["add_further"] + seconds["rest"]) / base
    enough = ""
    if grows < 0.3:
        needed = round(found["samples"] * fixed / ((0.3 - grows) * base), -2)
        enough = (
            f" If the rest grows with the samples, 1.3 is kept from about {needed:.0f} samples on (computed, not run)."
        )
    return (
        f"{total / base:.2f} times: above the aim. The most is {PARTS.get(largest, 'the rest')} "
        f"({seconds[largest]:.1f} s). Latency (a fixed number of calls), the noise floor (32 samples) and the drift "
        f"(at most 256) do not grow with the data: {fixed:.1f} s here.{enough}"
    )


def overhead_lines(overhead: Mapping[str, Any]) -> Iterator[str]:
    """The parts for a person."""
    for name, seconds, share in parts_of(overhead):
        yield f"{name.strip('*'):<48}{seconds:>8.1f} s{share:>8.2f}"


if __name__ == "__main__":
    sys.exit(main())
