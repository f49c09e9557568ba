"""Do graph optimizers bring what ONNX Runtime does not do itself when it loads a file?

    python benchmarks/bench_graphs.py FILE [FILE …] [--threads 1] [--turns 10]

Each ONNX file (export's) against what onnxslim and ONNX Runtime's transformer fusions make of it: size, nodes, time to
load, latency at batch 1 in turns, and the largest difference of the outputs as a share of their range. Inputs are made
up: tokens of one text, or an image of noise.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from models.onnx_files import size_of_file
from models.runtimes.onnxruntime_session import OnnxRuntimeSession
from models.spec import side_by_side
from stages.latency import speedup_of

LENGTH = 32
CALLS = 20


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=10)
    arguments = parser.parse_args()
    for file in arguments.files:
        with tempfile.TemporaryDirectory() as folder:
            compare(file, Path(folder), arguments.threads, arguments.turns)
    return 0


def compare(file: Path, folder: Path, threads: int, turns: int) -> None:
    """One file and what is made of it."""
    variants = {"as exported": file}
    for name, make in (("onnxslim", slimmed), ("transformer fusions", fused)):
        variants[name] = folder / f"{name}.onnx"
        make(file, variants[name])
    inputs = inputs_of(file)
    sessions: dict[str, Any] = {}
    loads: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(3):
        for name, path in variants.items():
            before = time.perf_counter()
            sessions[name] = OnnxRuntimeSession(path, threads=threads).__enter__()
            loads[name].append(time.perf_counter() - before)
    outputs = {name: side_by_side(session.infer(inputs)) for name, session in sessions.items()}
    turns_ms: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(turns):
        for name, session in sessions.items():
            times = []
            for _ in range(CALLS):
                before = time.perf_counter()
                session.infer(inputs)
                times.append(1e3 * (time.perf_counter() - before))
            turns_ms[name].append(float(np.median(times)))
    wanted = outputs["as exported"]
    print(file.parent.parent.name, file.name)
    for name, path in variants.items():
        nodes = len(onnx.load(str(path), load_external_data=False).graph.node)
        ratio, (low, high) = speedup_of(turns_ms["as exported"], turns_ms[name])
        error = float(np.abs(outputs[name] - wanted).max() / (wanted.max() - wanted.min()))
        about = f"{size_of_file(path) / 1e6:7.2f} MB {nodes:5d} nodes  load {np.median(loads[name]):.3f} s"
        speed = f"{np.median(turns_ms[name]):.3f} ms, {ratio:.3f} times as fast ({low:.3f} to {high:.3f})"
        print(f"  {name:<20}{about}  {speed}  error {error:.1e}")


def slimmed(source: Path, target: Path) -> None:
    """What onnxslim makes of a file."""
    import onnxslim

    onnx.save(onnxslim.slim(str(source)), target)


def fused(source: Path, target: Path) -> None:
    """What ONNX Runtime's fusions for transformers make of a file: operators of its own in the place of attention,
    layer norm with its addition, GELU."""
    from onnxruntime.transformers.optimizer import optimize_model

    optimize_model(str(source), model_type="bert", opt_level=0).save_model_to_file(str(target))


def inputs_of(file: Path) -> dict[str, np.ndarray]:
    """One made-up example."""
    random, found = np.random.default_rng(0), {}
    for value in onnx.load(str(file), load_external_data=False).graph.input:
        dims = [
            dim.dim_value or (1 if index == 0 else LENGTH) for index, dim in enumerate(value.type.tensor_type.shape.dim)
        ]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        high = 2 if value.name == "attention_mask" else 256
        found[value.name] = np.ones(dims, dtype) if high == 2 else random.integers(0, high, dims).astype(dtype)
    return found


if __name__ == "__main__":
    sys.exit(main())
