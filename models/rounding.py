"""How much of a difference between two runs of a network is rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def rounding_error(
    model: torch.nn.Module, batches: Sequence[Sequence[torch.Tensor]], singles: Sequence[torch.Tensor]
) -> float | None:
    """How far a network's fp32 outputs (`singles`, one a batch of inputs) are from its own in fp64 at most: no merge
    and no export can be held to less.

    None where the network does not run in fp64 (some cast inside). `model` is made fp64 and fp32 again, which changes
    no number of it, and takes half of the memory of a copy beside it.
    """
    import torch

    largest = 0.0
    double = model.double()
    try:
        with torch.inference_mode():
            for inputs, single in zip(batches, singles, strict=True):
                # The inputs are integers; networks cast them to their own type.
                largest = max(largest, float((double(*inputs).double() - single.double()).abs().max()))
    except RuntimeError:
        return None
    finally:
        model.float()
    return largest
