"""NVIDIA ModelOpt in a process of its own: it replaces functions of ONNX Runtime's quantizer, and prints.

Called by `stages.quantize.modelopt_backend` as `python -m stages.quantize.modelopt_worker FOLDER`; the folder holds the
request and the batches, and gets the graph.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

REQUEST = "request.json"
SOURCE = "source.onnx"
RESULT = "result.onnx"


def main(folder: Path) -> None:
    """Quantize `source.onnx` as the request says."""
    import numpy as np
    from modelopt.onnx.quantization import quantize
    from onnxruntime.quantization import CalibrationDataReader

    class Batches(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime has no types
        def __init__(self) -> None:
            self.rewind()

        def get_next(self) -> dict[str, np.ndarray] | None:
            path = next(self.left, None)
            return None if path is None else dict(np.load(path, allow_pickle=False))

        def get_first(self) -> dict[str, np.ndarray]:
            """ModelOpt looks at one batch before it starts."""
            return dict(np.load(next(iter(sorted(folder.glob("batch-*.npz")))), allow_pickle=False))

        def rewind(self) -> None:
            """From the first batch again."""
            self.left = iter(sorted(folder.glob("batch-*.npz")))

    settings = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    quantize(
        str(folder / SOURCE),
        output_path=str(folder / RESULT),
        calibration_data_reader=Batches(),
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        log_level="ERROR",
        **settings,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
