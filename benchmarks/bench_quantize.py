"""Export and INT8 against Olive and against ONNX Runtime's bare quantizers: `make bench-quantize`.

    python benchmarks/bench_quantize.py [--recipe vision text] [--threads 1] [--calls 200] [--olive PYTHON]

All start from the same fine-tuned network of each recipe, whose run is made first where it is not there, and calibrate
on the same examples:

- this project's stages export and quantize, asked for FP32 and one INT8 form at a time, as a user types them;
- `quantize_dynamic` and `quantize_static` of ONNX Runtime as its documentation shows them, on the FP32 file of export
  (no time of an export is counted for them);
- Olive, where `--olive` names the Python of an environment that has olive-ai and what this project needs (it loads the
  fine-tuned network): `olive run` with OnnxConversion and OnnxDynamicQuantization or OnnxStaticQuantization at their
  defaults.

Each file is scored on the test split (accuracy, agreement with PyTorch) and timed at batch 1 in turns with all others,
so that ratios are of one run. Everything goes to benchmarks/results/quantize-<date>.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from bench_demo import RESULTS, ROOT, versions

from models.checkpoint import Checkpoint, load_checkpoint
from models.errors import RuntimeInferenceError
from models.runtimes.onnxruntime_session import OnnxRuntimeSession
from models.runtimes.torch_eager import TorchEager
from models.tasks import task_of
from pipeline.config import RECIPES, load_config
from pipeline.progress import QuietProgress
from stages.data.load import load_data
from stages.data.splits import DataSplits
from stages.inputs import predict
from stages.latency import OtherWork, measure_latency, speedup_of

FORMS = {"dynamic": "OnnxDynamicQuantization", "static": "OnnxStaticQuantization"}
CALIBRATION_SAMPLES = 256
BATCH_SIZE = 32


def main() -> int:
    """Make, score, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="*", default=["vision", "text"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--olive", type=Path, help="the Python of an environment with olive-ai")
    arguments = parser.parse_args()
    results = {name: compared(name, arguments) for name in arguments.recipe}
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H%M%S%z")
    file = RESULTS / f"quantize-{date}.json"
    found = {"date": date, "threads": arguments.threads, "versions": versions(), "recipes": results}
    file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"written to {file.relative_to(ROOT)}")
    return 0


def compared(recipe: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one recipe."""
    folder = ROOT / "build" / "bench-quantize" / recipe
    run = folder / "run"
    command = ["-c", str(RECIPES / f"{recipe}.yaml"), "--run-dir", str(run), "--set", f"threads={arguments.threads}"]
    pipeline("all", *command, "--until", "merge-lora", "--quiet")
    config, _ = load_config(RECIPES / f"{recipe}.yaml")
    checkpoint, data = load_checkpoint(run / "merge-lora/checkpoint"), load_data(config.data, config.task)
    files: dict[str, Path] = {}
    seconds: dict[str, float] = {}
    for form in FORMS:
        narrow = ["--set", "export.precisions=[fp32]", "--set", f"quantize.schemes=[int8-{form}]"]
        before = time.perf_counter()
        pipeline("export", *command, *narrow, "--force", "--quiet")
        pipeline("quantize", *command, *narrow, "--force", "--quiet")
        seconds[f"ours {form}"] = time.perf_counter() - before
        for stage, name in (("export", "onnx-fp32"), ("quantize", f"onnx-int8-{form}")):
            if (made := run / stage / f"{name}.onnx").is_file():
                kept = files["fp32" if stage == "export" else f"ours {form}"] = folder / made.name
                kept.write_bytes(made.read_bytes())
    examples = calibration_arrays(checkpoint, data)
    for form in FORMS:
        before = time.perf_counter()
        target = folder / f"bare-{form}.onnx"
        bare_quantize(form, files["fp32"], target, examples)
        seconds[f"bare {form}"] = time.perf_counter() - before
        files[f"bare {form}"] = target
    if arguments.olive:
        stored = folder / "calibration.npz"
        np.savez(stored, allow_pickle=False, **as_one_array(examples))
        for form in FORMS:
            before = time.perf_counter()
            files[f"olive {form}"] = run_olive(arguments.olive, form, checkpoint, run, folder, stored)
            seconds[f"olive {form}"] = time.perf_counter() - before
    rows = scored(files, checkpoint, data, arguments)
    for name, row in rows["files"].items():
        row["export_and_quantize_s"] = seconds.get(name)
    show(recipe, rows)
    return rows


def pipeline(*arguments: str) -> None:
    """Run the command; a budget that no candidate keeps (exit 1) is a result like others."""
    done = subprocess.run([str(Path(sys.executable).with_name("pipeline")), *arguments], check=False, cwd=ROOT)
    if done.returncode not in (0, 1):
        raise SystemExit(done.returncode)


def calibration_arrays(checkpoint: Checkpoint, data: DataSplits) -> list[dict[str, np.ndarray]]:
    """The calibration examples, one by one."""
    return [checkpoint.processing.arrays([one.content]) for one in data["calibration"][:CALIBRATION_SAMPLES]]


def as_one_array(examples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Examples below each other, padded with zeros to the longest: a mask says what is padding."""
    stacked = {}
    for name in examples[0]:
        rows = [one[name][0] for one in examples]
        shape = np.max([row.shape for row in rows], axis=0)
        stacked[name] = np.stack(
            [np.pad(row, [(0, size - own) for size, own in zip(shape, row.shape, strict=True)]) for row in rows]
        )
    return stacked


def bare_quantize(form: str, source: Path, target: Path, examples: list[dict[str, np.ndarray]]) -> None:
    """ONNX Runtime's documentation: pre-process, then one call."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(examples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    if form == "dynamic":
        quantize_dynamic(str(prepared), str(target))
    else:
        quantize_static(str(prepared), str(target), Reader())
    prepared.unlink()


def run_olive(python: Path, form: str, checkpoint: Checkpoint, run: Path, folder: Path, stored: Path) -> Path:
    """`olive run` from the fine-tuned network: conversion, then its quantization at defaults."""
    io = checkpoint.spec.io
    output = folder / f"olive-{form}"
    quantization: dict[str, Any] = {"type": FORMS[form]}
    if form == "static":
        quantization["data_config"] = "calibration"
    config = {
        "input_model": {
            "type": "PyTorchModel",
            "model_path": str(run / "merge-lora/checkpoint"),
            "model_loader": "load_network",
            "model_script": str(ROOT / "benchmarks/olive_script.py"),
            "io_config": {
                "input_names": [one.name for one in io.inputs],
                "input_shapes": [[size if isinstance(size, int) else 2 for size in one.dims] for one in io.inputs],
                "input_types": [one.dtype for one in io.inputs],
                "output_names": [one.name for one in io.outputs],
                "dynamic_axes": {one.name: {str(axis): name for axis, name in one.dynamic_axes.items()}
                                 for one in (*io.inputs, *io.outputs)},
            },
        },
        "data_configs": [{
            "name": "calibration",
            "type": "DataContainer",
            "user_script": str(ROOT / "benchmarks/olive_script.py"),
            "load_dataset_config": {"type": "calibration_examples"},
            "dataloader_config": {"type": "one_by_one"},
        }],
        "passes": {
            "conversion": {"type": "OnnxConversion", "target_opset": 20},
            "quantization": quantization,
        },
        "output_dir": str(output),
        "cache_dir": str(folder / f"olive-cache-{form}"),
        "clean_cache": True,
        "evaluate_input_model": False,
    }  # fmt: skip
    file = folder / f"olive-{form}.json"
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "ADAPT_TO_EDGE_CALIBRATION": str(stored), "OLIVE_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    log = folder / f"olive-{form}.log"
    with log.open("w") as stream:
        done = subprocess.run(
            [str(python), "-m", "olive", "run", "--config", str(file), "--disable_telemetry"],
            check=False, env=environment, stdout=stream, stderr=subprocess.STDOUT,
        )  # fmt: skip
    found = sorted(output.rglob("*.onnx"))
    if done.returncode or len(found) != 1:
        raise SystemExit(f"Olive ended with {done.returncode} and {len(found)} files; see {log}")
    return found[0]


def scored(
    files: dict[str, Path], checkpoint: Checkpoint, data: DataSplits, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Accuracy and agreement on the test split, size, and latency in turns, of PyTorch and of each file."""
    spec, examples, quiet = checkpoint.spec, data["test"], QuietProgress()
    task = task_of(spec.task)
    targets = task.targets([one.label for one in examples], spec.io.width)
    rows: dict[str, Any] = {}
    with ExitStack() as stack:
        network = TorchEager(checkpoint.model, spec.io, threads=arguments.threads)
        runtimes: dict[str, Any] = {"PyTorch": stack.enter_context(network)}
        for name, file in files.items():
            runtimes[name] = stack.enter_context(OnnxRuntimeSession(file, threads=arguments.threads))
        reference = predict(runtimes["PyTorch"], checkpoint.processing, examples, BATCH_SIZE, quiet, "PyTorch")
        for name, runtime in list(runtimes.items()):
            size = files[name].stat().st_size if name in files else None
            try:
                outputs = predict(runtime, checkpoint.processing, examples, BATCH_SIZE, quiet, name)
            except RuntimeInferenceError as error:  # a batch that was frozen, say
                rows[name] = {"problem": str(error)[:300], "size_bytes": size}
                del runtimes[name]
                continue
            rows[name] = {
                "metric": float(task.scores(outputs, targets).mean()),
                "agreement": float(task.same(outputs, reference).mean()),
                "size_bytes": size,
            }
        singles = [checkpoint.processing.arrays([one.content]) for one in examples[:8]]
        batch = checkpoint.processing.arrays([one.content for one in examples[:BATCH_SIZE]])
        with OtherWork() as others:
            times = measure_latency(runtimes, singles, batch, arguments.calls, quiet)
    for name, measured in times.items():
        ratio, interval = speedup_of(times["fp32"]["turns_ms"], measured["turns_ms"])
        rows[name] |= {"latency_ms_p50": measured["latency_ms_p50"], "times_fp32_speed": ratio, "of_turns": interval}
    return {"samples": len(examples), "other_work_cores": others.cores, "files": rows}


def show(recipe: str, found: dict[str, Any]) -> None:
    """The figures for a person."""
    print(f"{recipe}, {found['samples']} test examples, other work {found['other_work_cores']:.2f} cores")
    for name, row in found["files"].items():
        if "problem" in row:
            print(f"  {name:<16}{row['problem']}")
            continue
        size = f"{row['size_bytes'] / 1e6:6.1f} MB" if row["size_bytes"] else " " * 9
        taken = f"{row['export_and_quantize_s']:6.1f} s" if row["export_and_quantize_s"] else ""
        print(
            f"  {name:<16}{row['metric']:.4f}  agreement {row['agreement']:.4f}  {row['latency_ms_p50']:6.2f} ms "
            f"({row['times_fp32_speed']:.2f}× fp32)  {size}  {taken}"
        )


if __name__ == "__main__":
    sys.exit(main())
