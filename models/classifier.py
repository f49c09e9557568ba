"""The adapted network: a backbone that gives features, and one linear head."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from models.spec import BackboneSpec, IOSpec, ModelSpec, TaskName
from models.tasks import task_of

if TYPE_CHECKING:
    from models.backbones.build import LoadedBackbone


class Classifier(nn.Module):
    """`backbone(*inputs)` → features; `task_head(features)` → logits. Inputs come in the order of the I/O spec."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.task_head = head

    def features(self, *inputs: torch.Tensor) -> torch.Tensor:
        """float32 (batch, features)."""
        features: torch.Tensor = self.backbone(*inputs)
        return features

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Logits: float32 (batch, classes)."""
        logits: torch.Tensor = self.task_head(self.backbone(*inputs))
        return logits


def new_classifier(loaded: LoadedBackbone, classes: int) -> Classifier:
    """A loaded backbone with a new head of `classes` outputs: small random weights, zero bias."""
    head = nn.Linear(loaded.feature_dim, classes)
    nn.init.trunc_normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return Classifier(loaded.module, head)


def make_spec(task: TaskName, backbone: BackboneSpec, loaded: LoadedBackbone, labels: tuple[str, ...]) -> ModelSpec:
    """The specification that is stored beside the weights (`processing` is filled in when it is saved)."""
    io = IOSpec(loaded.processing.inputs, (task_of(task).output(labels),))
    # A folder's path belongs to this machine, not to the artifact.
    return ModelSpec(task, replace(backbone, folder=None), loaded.architecture, loaded.feature_dim, labels, {}, io)


def hold_batchnorm(model: nn.Module) -> None:
    """Keep batch norm on its running statistics, also after `model.train()`. Its scale and offset may still learn.

    An adapter does not carry those statistics: if training moved them, a reload would drift. And a head that was
    fitted on features under them fits no others: on images far from the pretrained ones a batch's own statistics give
    it other features at the first step (EfficientNet-Lite0 on Fashion-MNIST: .856 falls to .63 in an epoch, whatever
    the rate).
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.train = _stay_in_eval.__get__(module)  # type: ignore[method-assign]


def moving_batchnorms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms whose statistics training moves: those that are not held."""
    found = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [module for module in found if "train" not in module.__dict__]


def _stay_in_eval(self: nn.Module, mode: bool = True) -> nn.Module:
    return self
