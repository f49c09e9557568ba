"""INT8 rounding inside a PyTorch network that trains (fake quantization), in the form in which static INT8 is made.

The rounding is PyTorch's own (`torch.fake_quantize_…`), whose gradient is that of the identity, and zero outside of the
range (straight-through; Jacob et al. 2018, arXiv 1712.05877, section 3). Where it stands:

- weights of linear and convolutional layers: symmetric, −127 to 127, a scale for each output. ONNX Runtime quantizes
  them with batch norm folded in, which multiplies an output's weights and its scale alike: the integers are the same,
  so nothing needs folding here.
- what these layers read: 256 steps a tensor over a range that holds zero, or symmetric.

Products of two activations, residual additions and embedding tables are not rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

INPUT = "int8_input"
"""Name of the submodule that holds the range of what a layer reads."""

AVERAGING = 0.01
"""Share of a batch in the moving average of a range while the network trains, as in PyTorch's own observers."""

WEIGHT_STEPS = 127


class RoundedWeight(nn.Module):
    """A parametrization: weights as symmetric INT8 has them, with a scale for each index of `axis`."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.observes = False

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The same shape and dtype; unchanged while ranges are observed."""
        if self.observes:
            return weight
        values = weight.float()
        others = [axis for axis in range(values.ndim) if axis != self.axis]
        scale = step_of(values.detach().abs().amax(others), WEIGHT_STEPS)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        rounded = torch.fake_quantize_per_channel_affine(values, scale, zero, self.axis, -WEIGHT_STEPS, WEIGHT_STEPS)
        return rounded.to(weight.dtype)


class RoundedInput(nn.Module):
    """Rounds what a layer reads. Its range is observed first (see `observing`), and follows the batches in training."""

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, symmetric: bool) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.observes = False
        self.handle: Any = None
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(0.0))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The same shape and dtype; unchanged while it observes, or where it has seen nothing but zeros."""
        if self.observes or self.training:
            low, high = (one.float() for one in torch.aminmax(values.detach()))
            if self.observes:
                self.low.copy_(torch.minimum(self.low, low))
                self.high.copy_(torch.maximum(self.high, high))
                return values
            self.low.lerp_(low.clamp(max=0), AVERAGING)
            self.high.lerp_(high.clamp(min=0), AVERAGING)
        return self.rounded(values)

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """As ONNX Runtime quantizes and dequantizes: UINT8 with a zero point, or INT8 without."""
        if self.symmetric:
            scale = step_of(torch.maximum(-self.low, self.high), WEIGHT_STEPS)
            zero, lowest, highest = torch.zeros_like(scale, dtype=torch.int32), -WEIGHT_STEPS, WEIGHT_STEPS
        else:
            scale = step_of(self.high - self.low, 255)
            zero, lowest, highest = torch.round(-self.low / scale).to(torch.int32), 0, 255
        rounded = torch.fake_quantize_per_tensor_affine(values.float(), scale, zero, lowest, highest)
        return rounded.to(values.dtype)


def step_of(width: torch.Tensor, steps: int) -> torch.Tensor:
    """The scale of a range; 1 where it is empty, as ONNX Runtime has it."""
    return torch.where(width > torch.finfo(torch.float32).tiny * steps, width / steps, 1.0)


def insert_rounding(network: nn.Module, symmetric: bool = False) -> int:
    """Round the weights and the inputs of every linear and convolutional layer, in place; how many layers there are.

    A layer whose weight is parametrized already (the positional convolution of wav2vec 2.0, by its weight norm) stays
    as it is: its weight is no parameter that could be given back.

    `symmetric`: of the inputs. Parameters keep their place but not their names, until `remove_rounding`.
    """
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D)
    layers = [one for one in network.modules() if isinstance(one, kinds) and not parametrize.is_parametrized(one)]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", RoundedWeight(1 if isinstance(layer, Conv1D) else 0))
        rounding = RoundedInput(symmetric).to(layer.weight.device)
        layer.add_module(INPUT, rounding)
        rounding.handle = layer.register_forward_pre_hook(round_first)
    return len(layers)


def round_first(layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A hook before the layer's forward."""
    return (layer.get_submodule(INPUT)(arguments[0]), *arguments[1:])


def remove_rounding(network: nn.Module) -> None:
    """Leave the plain network, in place: its trained weights, which nothing has rounded."""
    for layer in list(network.modules()):
        rounding = getattr(layer, INPUT, None)
        if isinstance(rounding, RoundedInput):
            rounding.handle.remove()
            delattr(layer, INPUT)
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


@contextmanager
def observing(network: nn.Module) -> Iterator[None]:
    """Inside, every range widens to what passes, and nothing is rounded."""
    roundings = [one for one in network.modules() if isinstance(one, RoundedInput | RoundedWeight)]
    for one in roundings:
        one.observes = True
    try:
        yield
    finally:
        for one in roundings:
            one.observes = False
