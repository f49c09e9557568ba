"""The adapted network: a backbone that gives features, and a head: one linear layer, or projections to embeddings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from models.spec import BackboneSpec, IOSpec, ModelSpec, TaskName
from models.tasks import task_of

if TYPE_CHECKING:
    from models.backbones.build import LoadedBackbone


LARGEST_SCALE = 100.0
"""Of the cosines in a contrastive loss, so that training stays stable (Radford et al. 2021, CLIP)."""


class UnitHead(nn.Module):
    """An embedding of length 1 of the features: float32 (batch, embedding)."""

    def __init__(self, features: int, embedding: int) -> None:
        super().__init__()
        self.projection = nn.Linear(features, embedding)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """float32 (batch, embedding)."""
        return nn.functional.normalize(self.projection(features), dim=1)


class Capped(torch.autograd.Function):
    """A tensor, at most `limit`, whose gradient passes above it too where descent leads back: that of a clamp is zero
    there, so that a value which begins at the limit could never learn."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, limit: float) -> torch.Tensor:
        """Of the shape and type of `value`."""
        ctx.save_for_backward(value < limit)
        return value.clamp(max=limit)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor, None]:
        """Of `value`; `limit` has none."""
        (below,) = ctx.saved_tensors
        (gradient,) = gradients
        return torch.where(below | (gradient > 0), gradient, 0), None


class PairHead(nn.Module):
    """Embeddings of length 1 of the two halves of the features: float32 (batch, 2 × embedding).

    A half has as many columns as the wider of both backbones gives features; behind those of the other are zeros.
    """

    def __init__(self, widths: tuple[int, int], embedding: int, scale: float) -> None:
        super().__init__()
        self.image = nn.Linear(widths[0], embedding)
        self.text = nn.Linear(widths[1], embedding)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        """Of the cosines in the loss: the inverse of the temperature."""

    @property
    def scale(self) -> float:
        """What the loss multiplies cosines by now."""
        return min(math.exp(self.log_scale.item()), LARGEST_SCALE)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """float32 (batch, 2 × embedding)."""
        images, texts = features.chunk(2, dim=1)
        projected = self.image(images[:, : self.image.in_features]), self.text(texts[:, : self.text.in_features])
        return torch.cat([nn.functional.normalize(one, dim=1) for one in projected], dim=1)

    def lengthened(self, outputs: torch.Tensor) -> torch.Tensor:
        """The outputs with the scale as the length of the image's embedding."""
        images, texts = outputs.chunk(2, dim=1)
        capped: Any = Capped.apply
        scale = capped(self.log_scale.exp(), LARGEST_SCALE)
        return torch.cat([images * scale.to(images.device), texts], dim=1)


class Classifier(nn.Module):
    """`backbone(*inputs)` → features; `task_head(features)` → logits, or embeddings side by side. Inputs come in the
    order of the I/O spec."""

    def __init__(self, backbone: nn.Module, head: nn.Linear | UnitHead | PairHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.task_head = head

    def features(self, *inputs: torch.Tensor) -> torch.Tensor:
        """float32 (batch, features)."""
        features: torch.Tensor = self.backbone(*inputs)
        return features

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """float32 (batch, outputs)."""
        logits: torch.Tensor = self.task_head(self.backbone(*inputs))
        return logits


def new_classifier(loaded: LoadedBackbone, outputs: int, embeds: int = 0) -> Classifier:
    """A loaded backbone with a new head of so many `outputs`: small random weights, zero bias; or with the projections
    that the backbone brings. `embeds`: how many embeddings the outputs are (see `Task.embeds`)."""
    head = make_head(loaded.architecture, loaded.feature_dim, outputs, embeds)
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
    if loaded.head is not None:
        head.load_state_dict(loaded.head)
    return Classifier(loaded.module, head)


def make_head(
    architecture: dict[str, Any], features: int, outputs: int, embeds: int = 0
) -> nn.Linear | UnitHead | PairHead:
    """The head of a backbone of this architecture, with random weights. `embeds` as in `new_classifier`."""
    if architecture["library"] != "dual":
        return UnitHead(features, outputs) if embeds else nn.Linear(features, outputs)
    from models.tasks.retrieval import TEMPERATURE

    image, text = architecture["widths"]
    return PairHead((image, text), outputs // 2, 1 / TEMPERATURE)


def set_head(model: Classifier, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Make the head the linear map `weight` (outputs, features), `bias` (outputs,) of the features: of a pair the
    blocks of it that take a half to its embedding."""
    head = model.task_head
    if isinstance(head, PairHead):
        parts = [head.image, head.text]
    else:
        parts = [head.projection if isinstance(head, UnitHead) else head]
    rows, columns = weight.shape[0] // len(parts), weight.shape[1] // len(parts)
    with torch.no_grad():
        for index, part in enumerate(parts):
            start = index * columns
            part.weight.copy_(weight[index * rows :][:rows, start : start + part.in_features])
            part.bias.copy_(bias[index * rows :][:rows])


def for_loss(network: Any, outputs: torch.Tensor) -> torch.Tensor:
    """The outputs of `network`, which may be in peft's wrapper, as the task's loss takes them."""
    lengthened = getattr(network.task_head, "lengthened", None)
    return outputs if lengthened is None else lengthened(outputs)


def make_spec(task: TaskName, backbone: BackboneSpec, loaded: LoadedBackbone, labels: tuple[str, ...]) -> ModelSpec:
    """The specification that is stored beside the weights (`processing` is filled in when it is saved)."""
    width: int | None = loaded.feature_dim
    if loaded.architecture["library"] == "dual":
        width = None if loaded.head is None else len(loaded.head["image.weight"])
    io = IOSpec(loaded.processing.inputs, task_of(task).outputs(labels, width))
    # A folder's path belongs to this machine, not to the artifact.
    backbone = replace(backbone, folder=None, parts=tuple(replace(part, folder=None) for part in backbone.parts))
    return ModelSpec(task, backbone, loaded.architecture, loaded.feature_dim, labels, {}, io)


def hold_batchnorm(model: nn.Module) -> None:
    """Keep batch norm on its running statistics, also after `model.train()`. Its scale and offset may still learn.

    An adapter does not carry those statistics: if training moved them, a reload would drift. And a head that was
    fitted on features under them fits no others: on images far from the pretrained ones a batch's own statistics give
    it other features at the first step (EfficientNet-Lite0 on Fashion-MNIST: .856 falls to .63 in an epoch, whatever
    the rate).
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            _hold_in_eval(module)


def lock(tower: nn.Module) -> None:
    """Keep it as it is: nothing in it learns, and it works as in evaluation, also after `model.train()` (Zhai et al.
    2022, LiT, arXiv 2111.07991)."""
    tower.requires_grad_(False)
    for module in tower.modules():
        _hold_in_eval(module)


def moving_batchnorms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms whose statistics training moves: those that are not held."""
    found = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [module for module in found if "train" not in module.__dict__]


def _hold_in_eval(module: nn.Module) -> None:
    module.eval()
    module.train = _stay_in_eval.__get__(module)  # type: ignore[method-assign]


def _stay_in_eval(self: nn.Module, mode: bool = True) -> nn.Module:
    return self
