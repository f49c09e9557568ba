"""The layers of a backbone from the input to the features, and which of them a parameter belongs to."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from models.classifier import Classifier

STEM = "stem"
NUMBERED = re.compile(r"(.*?\.\d+)(?:\.|$)")
"""A block of a list: the path up to its first number (`encoder.layer.3`, `encoder.stages.0`)."""


@dataclass(frozen=True)
class Layer:
    """Parameters that stand at one depth. `parameters` are their full names in the network."""

    name: str
    parameters: tuple[str, ...]


def backbone_layers(model: Classifier, inputs: Sequence[torch.Tensor]) -> list[Layer]:
    """The backbone's layers, the lowest first; each of its parameters is in exactly one.

    timm's networks say themselves how their parameters are grouped (`group_matcher`). For others a layer is a
    numbered block, the blocks in the order in which a forward pass on `inputs` (positional, batch first) calls them:
    what is called before the first block is the stem, what is called between two blocks belongs to the one that
    follows, and what is called behind the last one belongs to it. A block that runs many times (albert) is one layer.

    Of two towers side by side the layers are in the order of their height, as a share of their tower's.
    """
    import torch

    both = model.backbone.get_submodule("network")
    towers = [f"network.{name}." for name in both] if isinstance(both, torch.nn.ModuleDict) else [""]
    placed = []
    for tower in towers:
        network = model.backbone.get_submodule(f"{tower}network")
        matcher = getattr(network, "group_matcher", None)
        found = timm_groups(network, matcher, tower) if callable(matcher) else called_groups(model, inputs, tower)
        placed += [((index + 1) / len(found), names) for index, names in enumerate(found)]
    groups = [names for _, names in sorted(placed, key=lambda one: one[0])]
    layers = [Layer(name_of(names), tuple(names)) for names in groups if names]
    return [Layer(STEM, layers[0].parameters), *layers[1:]] if len(layers) > 1 else layers


def timm_groups(network: nn.Module, matcher: Callable[..., Any], tower: str) -> list[list[str]]:
    """Parameter names by timm's own depth. Its last group is norms and projections behind the blocks."""
    from timm.models import group_parameters

    groups = group_parameters(network, matcher(coarse=False))
    return [[f"backbone.{tower}network.{name}" for name in groups[index]] for index in sorted(groups)]


def called_groups(model: Classifier, inputs: Sequence[torch.Tensor], tower: str) -> list[list[str]]:
    """Parameter names of a tower by numbered block, in the order of the first call."""
    order = call_order(model, inputs)
    names = [name for name, _ in model.backbone.named_parameters() if name.startswith(tower)]
    owners = sorted({name.rpartition(".")[0] for name in names}, key=lambda owner: position_of(owner, order))
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(name.rpartition(".")[0], []).append(f"backbone.{name}")
    groups: dict[str, list[str]] = {STEM: []}
    waiting: list[str] = []
    for owner in owners:
        match = NUMBERED.match(owner)
        if match is None:
            waiting += members[owner]
        elif match[1] in groups:
            groups[match[1]] += members[owner]
        else:
            before = STEM if len(groups) == 1 else match[1]
            groups[match[1]] = list(members[owner])
            groups[before] = waiting + groups[before]
            waiting = []
    groups[list(groups)[-1]] += waiting
    return list(groups.values())


def call_order(model: Classifier, inputs: Sequence[torch.Tensor]) -> dict[str, int]:
    """Module path in the backbone → when its forward is first called."""
    order: dict[str, int] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: object) -> None:
            order.setdefault(name, len(order))

        return hook

    run_hooked(
        model,
        inputs,
        [module.register_forward_pre_hook(remember(name)) for name, module in model.backbone.named_modules()],
    )
    return order


def run_hooked(model: Classifier, inputs: Sequence[torch.Tensor], hooks: Sequence[RemovableHandle]) -> None:
    """One forward pass in eval mode without gradients; then the hooks are removed and the mode is put back."""
    import torch

    training = model.training
    try:
        with torch.no_grad():
            model.eval()(*inputs)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


def position_of(owner: str, order: dict[str, int]) -> tuple[int, int]:
    """When a module is called; one whose parameters are read from outside counts with what holds it."""
    name = owner
    while name and name not in order:
        name = name.rpartition(".")[0]
    return order.get(name, 0), int(name != owner)


def name_of(parameters: Sequence[str]) -> str:
    """What the paths of a layer's parameters have in common; the first and the last path where that says little."""
    paths = [name.removeprefix("backbone.").removeprefix("network.").split(".")[:-1] for name in parameters]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    name = ".".join(common)
    return name if any(digit in name for digit in "0123456789") else f"{'.'.join(paths[0])} … {'.'.join(paths[-1])}"


def layer_of(parameter: str, modules: dict[str, int]) -> int | None:
    """The index of the layer of a parameter, also of one that peft has put into or around a module.

    `modules` maps the paths of modules to layers (see `layers_by_module`). peft prefixes every name with
    `base_model.model.` and appends `.base_layer`, `.lora_A.default` and the like: the longest known path decides.
    None for what is in no layer.
    """
    name = parameter.removeprefix("base_model.model.")
    while name:
        if name in modules:
            return modules[name]
        name = name.rpartition(".")[0]
    return None


def layers_by_module(layers: Sequence[Layer]) -> dict[str, int]:
    """Path of each parameter, and of the module that owns it, → index of its layer.

    Where a module owns parameters of two layers (position and class tokens beside blocks) the lower one counts.
    """
    found: dict[str, int] = {}
    for index, layer in enumerate(layers):
        for parameter in layer.parameters:
            found[parameter] = index
            found.setdefault(parameter.rpartition(".")[0], index)
    return found
