"""The folder that shows a failure to somebody who has numpy and onnxruntime, and nothing of this project."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.artifact import write_json

if TYPE_CHECKING:
    import numpy as np

SCRIPT, GOLDEN, RECORD = "reproduce.py", "golden.npz", "reproduce.json"


def write_reproduction(
    folder: Path,
    files: Sequence[tuple[str, Path, str, bool]],
    inputs: Mapping[str, np.ndarray],
    outputs: Sequence[str],
    reference: np.ndarray,
    findings: Sequence[str],
    threads: int,
) -> dict[str, Any]:
    """Write the script, its inputs and what it should print. What was written, for the report.

    `files` are (name, ONNX file, its place below the run's folder, whether ONNX Runtime optimizes it); `outputs` the
    names in their order, `reference` float32 (samples, width) those of the PyTorch network side by side. The numbers
    come from the script's own functions, run here. A file that does not run is named in the findings.
    """
    import numpy as np
    import onnxruntime

    from models.runtimes.onnxruntime_session import onnxruntime_errors
    from stages.validate.drift import script

    folder.mkdir(parents=True)
    shutil.copyfile(Path(script.__file__), folder / SCRIPT)
    golden = {f"input.{name}": array for name, array in inputs.items()}
    np.savez(folder / GOLDEN, allow_pickle=False, reference=reference, **golden)
    steps, said = [], list(findings)
    for name, path, place, optimized in files:
        try:
            found = script.outputs_of(path, dict(inputs), outputs, threads, optimized)
        except onnxruntime_errors() as error:
            said.append(f"{name} does not run: {str(error).partition(chr(10))[0][:300]}")
            continue
        steps.append(
            {
                "name": name,
                "file": f"../../{place}",
                "optimized": optimized,
                "numbers": script.errors(found, reference),
            }
        )
    record = {
        "inputs": list(inputs),
        "outputs": list(outputs),
        "threads": threads,
        "onnxruntime": onnxruntime.__version__,
        "steps": steps,
        "findings": said,
    }
    write_json(folder / RECORD, record)
    return {"script": f"validate/reproduce/{SCRIPT}", "samples": len(reference), "steps": steps}
