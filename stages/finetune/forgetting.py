"""What the backbone kept: how alike its layers' outputs are before and after, and how far their weights moved."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from stages.finetune.setup import Setup
from stages.finetune.strategies import Attempt

if TYPE_CHECKING:
    import torch

    from models.classifier import Classifier
    from models.layers import Layer

EXAMPLES = 64
"""Validation examples that similarity is measured on: its debiased estimator is meant for few."""


@dataclass(frozen=True)
class LayerChange:
    """`cka`: similarity of the layer's outputs to the pretrained ones, 1 for the same up to rotation and scale.
    `movement`: ‖W′ − W‖ / ‖W‖ of its weights."""

    layer: str
    cka: float | None
    movement: float


def measure_forgetting(attempt: Attempt, setup: Setup) -> list[dict[str, Any]]:
    """`LayerChange` of each layer, the lowest first; empty where nothing of the backbone was trained."""
    import torch

    from models.adapters import fold
    from models.classifier import Classifier

    if attempt.diverged or not attempt.history:
        return []
    network: Any = attempt.network
    tuned: Classifier = network if isinstance(network, Classifier) else fold(copy.deepcopy(network))
    examples = setup.context.data["validation"][:EXAMPLES]
    arrays = setup.processing.arrays([one.content for one in examples])
    inputs = [torch.from_numpy(arrays[spec.name]) for spec in setup.processing.inputs]
    before = layer_outputs(setup.model, setup.layers, inputs)
    after = layer_outputs(tuned, setup.layers, inputs)
    old, new = dict(setup.model.named_parameters()), dict(tuned.named_parameters())
    return [
        asdict(
            LayerChange(
                layer.name,
                linear_cka(before[index], after[index]) if index in before and index in after else None,
                movement_of([old[name] for name in layer.parameters], [new[name] for name in layer.parameters]),
            )
        )
        for index, layer in enumerate(setup.layers)
    ]


def layer_outputs(
    model: Classifier, layers: Sequence[Layer], inputs: Sequence[torch.Tensor]
) -> dict[int, torch.Tensor]:
    """Layer index → float32 (examples, everything else), what the module of the layer called last gives."""
    import torch

    from models.layers import run_hooked

    owners = {name.rpartition(".")[0]: index for index, layer in enumerate(layers) for name in layer.parameters}
    found: dict[int, torch.Tensor] = {}

    def remember(index: int) -> Any:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and len(output) == len(inputs[0]):
                found[index] = output.float().flatten(1)

        return hook

    named = [(name, module) for name, module in model.named_modules() if name in owners]
    run_hooked(model, inputs, [module.register_forward_hook(remember(owners[name])) for name, module in named])
    return found


def linear_cka(one: torch.Tensor, other: torch.Tensor) -> float | None:
    """Linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414) with the debiased estimator of HSIC
    (Song et al. 2012; as Nguyen et al. 2021, 2010.15327): without it, few examples of wide features look alike
    whatever they are. float32 (examples, features) each; None for fewer than four examples or a constant output.
    """
    import torch

    kernels = [values.double() @ values.double().T for values in (one, other)]
    if len(one) < 4:
        return None
    cross, left, right = hsic(kernels[0], kernels[1]), hsic(kernels[0], kernels[0]), hsic(kernels[1], kernels[1])
    scale = torch.sqrt(left.clamp(min=0) * right.clamp(min=0))
    return float(cross / scale) if float(scale) > 0 else None


def hsic(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The unbiased estimator: with K̃, L̃ without their diagonals and n examples,
    (tr(K̃L̃) + 1ᵀK̃1 · 1ᵀL̃1 / ((n−1)(n−2)) − 2/(n−2) · 1ᵀK̃L̃1) / (n(n−3))."""
    count = len(one)
    k, m = one - one.diag().diag(), other - other.diag().diag()
    trace = (k * m).sum()
    means = k.sum() * m.sum() / ((count - 1) * (count - 2))
    return (trace + means - 2 / (count - 2) * (k.sum(0) @ m.sum(0))) / (count * (count - 3))


def movement_of(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float:
    """‖W′ − W‖ / ‖W‖ over all weights of a layer."""
    pairs = list(zip(before, after, strict=True))
    moved = sum(float((new.detach() - old.detach()).double().square().sum()) for old, new in pairs)
    size = sum(float(old.detach().double().square().sum()) for old in before)
    return (moved / size) ** 0.5 if size else 0.0
