"""What training costs, counted: FLOPs, and the memory that the backward pass needs. Times are measured elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from models.modalities import Processing
    from stages.data.splits import Example

TYPICAL_OF = 31
"""The example whose inputs have the median size among so many is the one that FLOPs and latency are of."""

ADAMW_COPIES = 4
"""Weights, gradients and AdamW's two moments, all in fp32."""


def typical_example(processing: Processing, examples: Sequence[Example]) -> Example:
    """The one with inputs of median size: images are all alike, texts are not."""
    sizes: list[tuple[int, int]] = []
    for example in examples[:TYPICAL_OF]:
        arrays = processing.arrays([example.content])
        sizes.append((sum(array.size for array in arrays.values()), len(sizes)))
    return examples[sorted(sizes)[len(sizes) // 2][1]]


def inputs_of(processing: Processing, examples: Sequence[Example], device: str) -> list[torch.Tensor]:
    """The network's inputs for one batch."""
    import torch

    arrays = processing.arrays([example.content for example in examples])
    return [torch.from_numpy(arrays[tensor.name]).to(device) for tensor in processing.inputs]


def count_flops(module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> int:
    """Floating-point operations of one forward pass; elementwise work and normalisation are not counted.

    Attention is computed by its plain formula here: the counter of torch 2.13 has no entry for the CPU's fused
    kernel and would leave it out without a word.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        module(*inputs)
    return int(counter.get_total_flops())


def take(examples: Sequence[Example], start: int, count: int) -> list[Example]:
    """`count` examples from `start` on, from the beginning again after the last."""
    return [examples[(start + index) % len(examples)] for index in range(count)]


@contextmanager
def saved_for_backward(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Address → bytes of each tensor that autograd keeps inside for the backward pass, the network's own left out.

    Tensors that share memory are counted once. None of the kept ones is freed before the backward pass, so that no
    address stands for two.
    """
    import torch

    own = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
