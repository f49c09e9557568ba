"""Run golden inputs through ONNX files and print how far the outputs are from those of the PyTorch reference.

    python reproduce.py [FILE.onnx ...]

Needs numpy and onnxruntime, nothing else. Beside it lie `golden.npz` (inputs, and the reference's outputs) and
`reproduce.json` (which files, and what was measured). Without arguments the files are those of the run it lies in.
Ends with 1 where a number is not the one that was recorded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

TOLERANCE = 0.02
"""By which share a number may differ from the recorded one: another processor or version rounds otherwise."""


def errors(found: np.ndarray, wanted: np.ndarray) -> dict[str, float | None]:
    """Largest absolute error, that as a share of the reference's range, and the signal-to-noise ratio in dB.

    None where there is nothing to compare: another shape, NaN, no range, no noise.
    """
    import numpy as np

    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    if found.shape != wanted.shape or not (np.isfinite(found).all() and np.isfinite(wanted).all()):
        return {"max_abs_error": None, "relative_error": None, "sqnr_db": None}
    largest, scale = float(np.abs(found - wanted).max()), float(wanted.max() - wanted.min())
    noise, signal = float(np.square(found - wanted).sum()), float(np.square(wanted).sum())
    return {
        "max_abs_error": largest,
        "relative_error": largest / scale if scale else None,
        "sqnr_db": 10 * float(np.log10(signal / noise)) if noise and signal else None,
    }


def outputs_of(
    file: Path, inputs: dict[str, np.ndarray], names: Sequence[str], threads: int, optimized: bool = True
) -> np.ndarray:
    """The named outputs side by side: float32 (samples, width); a column of NaN where one is missing."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    there = [output.name for output in session.get_outputs()]
    found = dict(zip(there, session.run(there, inputs), strict=True))
    samples = len(next(iter(inputs.values())))
    missing = np.full((samples, 1), np.nan, np.float32)
    return np.concatenate([found.get(name, missing) for name in names], axis=1)


def same(found: float | None, recorded: float | None) -> bool:
    """Whether two numbers are one, but for rounding."""
    if found is None or recorded is None:
        return found is recorded
    return abs(found - recorded) <= TOLERANCE * max(abs(found), abs(recorded)) + 1e-6


def main(arguments: Sequence[str]) -> int:
    """Print a line for each file; the exit code."""
    import numpy as np

    folder = Path(__file__).resolve().parent
    said: dict[str, Any] = json.loads((folder / "reproduce.json").read_text(encoding="utf-8"))
    with np.load(folder / "golden.npz", allow_pickle=False) as golden:
        arrays = {name: golden[name] for name in golden.files}
    inputs = {name: arrays[f"input.{name}"] for name in said["inputs"]}
    given = {Path(file).name: Path(file) for file in arguments}
    differ = 0
    for step in said["steps"]:
        file = given.get(Path(step["file"]).name) or folder / step["file"]
        outputs = outputs_of(file, inputs, said["outputs"], said["threads"], step["optimized"])
        found = errors(outputs, arrays["reference"])
        agrees = all(same(found[key], step["numbers"][key]) for key in found)
        differ += not agrees
        numbers = ", ".join(f"{key} {'none' if value is None else f'{value:.6g}'}" for key, value in found.items())
        print(f"{step['name']}: {numbers}" + ("" if agrees else f"; recorded: {json.dumps(step['numbers'])}"))
    for line in said["findings"]:
        print(line)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
