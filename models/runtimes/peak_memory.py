"""Peak memory of a process that runs a model as a device does: `python -P -m models.runtimes.peak_memory MODEL INPUTS
THREADS` prints it in bytes. Measured in a process of its own: this one has held PyTorch and other models before.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import RuntimeInferenceError
from models.process_memory import peak_memory_bytes

if TYPE_CHECKING:
    import numpy as np

CALLS = 3
"""The first call allocates what the following ones use."""
LIMIT_S = 600


def peak_memory_of(model: Path, inputs: Mapping[str, np.ndarray], threads: int) -> int:
    """Peak resident memory (bytes) of a fresh process that loads `model` with ONNX Runtime and runs `inputs`.

    Raises:
        RuntimeInferenceError: the process failed, which has its last words, or takes more than ten minutes.
    """
    import numpy as np
    from safetensors.numpy import save_file

    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "inputs.safetensors"
        save_file({name: np.ascontiguousarray(array) for name, array in inputs.items()}, arrays)
        command = [sys.executable, "-P", "-m", "models.runtimes.peak_memory", str(model), str(arrays), str(threads)]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise RuntimeInferenceError(f"{model.name} was not run within {LIMIT_S} s to measure its memory") from error
    if done.returncode or not done.stdout.strip().isdecimal():
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise RuntimeInferenceError(f"the process that measures the memory of {model.name} failed; it said: {said}")
    return int(done.stdout)


def main(model: Path, arrays: Path, threads: int) -> int:
    """Run the model and print the peak."""
    from safetensors.numpy import load_file

    from models.runtimes.onnxruntime_session import OnnxRuntimeSession

    inputs = load_file(arrays)
    with OnnxRuntimeSession(model, threads=threads) as session:
        for _ in range(CALLS):
            session.infer(inputs)
    print(peak_memory_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
