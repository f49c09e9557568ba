"""Defects of the PyTorch network: of what is folded into other weights by the time there is a graph."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from stages.validate.self_test.subject import Mutant, Subject

if TYPE_CHECKING:
    import torch

NO_PIXELS = "no module normalises pixels"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet's pixels, as torchvision and timm have them."""


def normalisers(network: torch.nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(mean, standard deviation) of every module that normalises pixels: buffers over channels."""
    found = []
    for module in network.modules():
        mean, std = (dict(module.named_buffers(recurse=False)).get(name) for name in ("mean", "std"))
        if mean is not None and std is not None:
            found.append((mean, std))
    return found


def normalise_wrong(subject: Subject) -> Mutant | str:
    """Mean and standard deviation are 0.5, or ImageNet's where they are that."""
    import torch

    network = copy.deepcopy(subject.checkpoint.model)
    found = normalisers(network)
    for mean, std in found:
        half = bool(((mean - 127.5).abs() < 0.5).all())
        for buffer, wrong in zip((mean, std), IMAGENET if half else ((0.5,) * 3,) * 2, strict=True):
            buffer.copy_(torch.tensor(wrong).mul(255).view_as(buffer))
    return Mutant(network=network) if found else NO_PIXELS


def scale_twice(subject: Subject) -> Mutant | str:
    """Pixels are divided by 255 once more than they should be."""
    network = copy.deepcopy(subject.checkpoint.model)
    found = normalisers(network)
    for mean, std in found:
        mean.mul_(255)
        std.mul_(255)
    return Mutant(network=network) if found else NO_PIXELS


def forget_statistics(subject: Subject) -> Mutant | str:
    """A batch norm half-way through the network has the statistics of one that has seen nothing."""
    from torch import nn

    network = copy.deepcopy(subject.checkpoint.model)
    norms = [one for one in network.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    norms = [one for one in norms if one.running_mean is not None]
    if not norms:
        return "there is no batch norm"
    norms[len(norms) // 2].reset_running_stats()
    return Mutant(network=network)


def run_pytorch(subject: Subject) -> Mutant | str:
    """The reference itself."""
    return Mutant(network=copy.deepcopy(subject.checkpoint.model))
