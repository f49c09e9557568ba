"""Layer-wise learning rates: how fast each layer of the network learns.

timm's own layer decay acts only through timm's schedulers, and finds one layer only in a network that something else
wraps; here every parameter gets its rate by name, in parameter groups that any optimizer and scheduler keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from models.layers import Layer, layer_of, layers_by_module

if TYPE_CHECKING:
    import torch

    from models.classifier import Classifier

HEAD = "task_head"


@dataclass(frozen=True)
class LayerRate:
    """The peak rate of one layer and how many of its parameters are trained, of how many."""

    layer: str
    rate: float
    trained: int
    parameters: int


@dataclass(frozen=True)
class Rates:
    """Peak learning rates: of the head, and of each of `layers`, the lowest first."""

    head: float
    layers: tuple[Layer, ...]
    by_layer: tuple[float, ...]

    @property
    def summary(self) -> str:
        """For messages: `0.001 (head), 0.0001 to 0.0009 (backbone)`."""
        low, high = min(self.by_layer), max(self.by_layer)
        backbone = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        return f"{backbone} (backbone) and {self.head:g} (head)"


def one_rate(layers: Sequence[Layer], head: float, backbone: float) -> Rates:
    """The same rate in the whole backbone."""
    return Rates(head, tuple(layers), (backbone,) * len(layers))


def decaying_rates(layers: Sequence[Layer], head: float, ratio: float) -> Rates:
    """Rates in geometric steps, so that the lowest layer learns `ratio` times more slowly than the head.

    The decay from layer to layer is ratio^(−1/L) with L layers below the head: a fixed decay gives another ratio to
    every depth (0.75 is 42 for twelve blocks and a stem, and 7·10⁹ for densenet161).
    """
    decay = ratio ** (-1 / len(layers))
    return Rates(head, tuple(layers), tuple(head * decay ** (len(layers) - index) for index in range(len(layers))))


def parameter_groups(model: torch.nn.Module, rates: Rates, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: the trained parameters by rate; norms and biases (one dimension) do not decay.

    `model` may be the network itself or peft's wrapper around it.

    Raises:
        AssertionError: a parameter of the backbone is in no layer. It would learn at the head's rate unseen.
    """
    modules = layers_by_module(rates.layers)
    groups: dict[tuple[float, bool], list[Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        index = layer_of(name, modules)
        assert index is not None or HEAD in name, f"{name} is in no layer"
        rate = rates.head if index is None else rates.by_layer[index]
        groups.setdefault((rate, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": weight_decay if decayed else 0.0}
        for (rate, decayed), parameters in groups.items()
    ]


def rate_table(model: torch.nn.Module, rates: Rates) -> list[dict[str, Any]]:
    """What is stored and shown: `LayerRate` of each layer from the head down. Untrained layers have the rate 0."""
    modules = layers_by_module(rates.layers)
    trained, total = [0] * (len(rates.layers) + 1), [0] * (len(rates.layers) + 1)
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # peft's copy of the untrained head is none of the network's
            continue
        index = layer_of(name, modules)
        position = len(rates.layers) if index is None else index
        total[position] += parameter.numel()
        trained[position] += parameter.numel() if parameter.requires_grad else 0
    names = [*(layer.name for layer in rates.layers), "head"]
    peaks = [*rates.by_layer, rates.head]
    rows = [
        LayerRate(name, peak if some else 0.0, some, whole)
        for name, peak, some, whole in zip(names, peaks, trained, total, strict=True)
    ]
    return [asdict(row) for row in reversed(rows)]


def rates_in_words(table: Sequence[dict[str, Any]], most: int = 40) -> list[str]:
    """One line a layer of `rate_table`, for a person; of more than `most` layers the top and the bottom ones."""
    if len(table) > most:
        half = most // 2
        return [
            *rates_in_words(table[:half]),
            f"… {len(table) - 2 * half} more layers, as the report has them",
            *rates_in_words(table[-half:]),
        ]
    width = max(len(str(row["layer"])) for row in table)
    return [
        f"{row['layer']:<{width}}  rate {row['rate']:.2e}  {row['trained']:>11,} of {row['parameters']:,} learn"
        for row in table
    ]


def unfreeze(model: Classifier, layers: Sequence[Layer]) -> None:
    """Train the head and these layers, and nothing else."""
    chosen = {name for layer in layers for name in layer.parameters}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(f"{HEAD}.") or name in chosen
