"""How far the reference is from itself: no candidate can be held to less."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.inputs import predict

if TYPE_CHECKING:
    import numpy as np

    from models.checkpoint import Checkpoint
    from stages.base import StageContext
    from stages.data.splits import Example

SAMPLES = 32
DOUBLE_SAMPLES = 8
"""In fp64, which takes several times as long."""

NOISE_FACTOR = 20.0
"""Largest error of a faithful fp32 file over the whole test split as a multiple of the floor that export measures on a
dozen inputs: up to 2.6 on the recipes (EfficientNet-Lite0, MiniLM, Whisper, 102 to 2000 samples)."""
MINIMUM_FLOOR = 1e-6
"""Of the output range: fp32's own roundoff is 6e-8 and a kernel sums thousands of terms."""


@dataclass(frozen=True)
class NoiseFloor:
    """The largest change of any output as a share of the reference's range, over the first test samples: from another
    batch size, from another number of threads, and from fp32 to fp64 (None where the network does not run in it)."""

    samples: int
    batch: float
    threads: float
    fp64: float | None

    @property
    def largest(self) -> float:
        """The floor."""
        return max(self.batch, self.threads, self.fp64 or 0.0)

    def tolerances(self, ceilings: Mapping[str, float]) -> dict[str, tuple[float, str]]:
        """Precision → (tolerance, where it is from). Of fp16, whose unit is 2¹³ that of fp32, twenty times the smallest
        floor is above any useful ceiling, which holds alone; so of bf16."""
        tolerance = min(ceilings["fp32"], NOISE_FACTOR * max(self.largest, MINIMUM_FLOOR))
        words = f"noise floor {self.largest:.2g}, ceiling {ceilings['fp32']:.2g}"
        return {name: (ceiling, "the ceiling") for name, ceiling in ceilings.items()} | {"fp32": (tolerance, words)}

    def to_dict(self) -> dict[str, Any]:
        """For the evidence."""
        shares = {"batch": self.batch, "threads": self.threads, "fp64": self.fp64, "largest": self.largest}
        return {"samples": self.samples, **shares, "factor": NOISE_FACTOR, "minimum": MINIMUM_FLOOR}


def noise_floor(
    context: StageContext, checkpoint: Checkpoint, reference: np.ndarray | None, batch_size: int
) -> NoiseFloor | None:
    """The reference again on the first test samples, one by one and with another number of threads, and in fp64.

    `reference`: float32 (samples, outputs), its outputs at `batch_size` and the run's threads. None where there are
    none, or no two of them differ: then there is no range.

    Raises:
        RuntimeInferenceError: the runtime failed.
    """
    from models.runtimes.torch_eager import TorchEager

    examples = context.data["test"][:SAMPLES]
    if reference is None or not examples or not (scale := float(reference.max()) - float(reference.min())):
        return None

    def outputs(threads: int, size: int) -> np.ndarray:
        with TorchEager(checkpoint.model, checkpoint.spec.io, "cpu", threads) as runtime:
            return predict(runtime, checkpoint.processing, examples, size, context.progress, "noise floor")

    first = reference[: len(examples)]
    single = outputs(context.threads, 1 if batch_size > 1 else 2)
    threaded = outputs(1 if context.threads > 1 else 2, batch_size)
    double = double_error(checkpoint, examples[:DOUBLE_SAMPLES])
    return NoiseFloor(
        samples=len(examples),
        batch=largest_change(first, single) / scale,
        threads=largest_change(first, threaded) / scale,
        fp64=None if double is None else double / scale,
    )


def largest_change(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference of any output."""
    import numpy as np

    return float(np.abs(one.astype(np.float64) - other).max())


def double_error(checkpoint: Checkpoint, examples: Sequence[Example]) -> float | None:
    """How far the outputs are from the same network's in fp64 (see `models.rounding`)."""
    import torch

    from models.rounding import rounding_error

    arrays: Mapping[str, np.ndarray] = checkpoint.processing.arrays([one.content for one in examples])
    inputs = [torch.from_numpy(arrays[tensor.name]) for tensor in checkpoint.spec.io.inputs]
    with torch.inference_mode():
        single = checkpoint.model(*inputs)
    return rounding_error(copy.deepcopy(checkpoint.model), [inputs], [single])
