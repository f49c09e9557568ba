"""What Olive asks of a user: how to load the network, and examples to calibrate on. Used by bench_quantize.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from olive.data.registry import Registry

CALIBRATION = "ADAPT_TO_EDGE_CALIBRATION"
"""Names the .npz file of the calibration examples: input → array (examples, …)."""


def load_network(path: str) -> Any:
    """The fine-tuned network of a run's merge-lora, in eval mode."""
    from models.checkpoint import load_checkpoint

    return load_checkpoint(Path(path)).model.eval()


class Examples:
    """Calibration examples one by one: (inputs, nothing)."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], int]:
        if index >= len(self):
            raise IndexError(index)
        return {name: array[index : index + 1] for name, array in self.arrays.items()}, 0


@Registry.register_dataset()
def calibration_examples(**_: Any) -> Examples:
    """What the benchmark has written."""
    with np.load(os.environ[CALIBRATION], allow_pickle=False) as stored:
        return Examples(dict(stored))


@Registry.register_dataloader()
def one_by_one(dataset: Examples, **_: Any) -> Examples:
    """Texts differ in length, so that they make no batch."""
    return dataset
