"""A backbone with a linear map behind it, to where a text encoder has the names of the labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from models.backbones.build import LoadedBackbone


def make_mapped_module(backbone: torch.nn.Module, features: int, width: int) -> torch.nn.Module:
    """`forward` takes what the backbone takes, and gives float32 (batch, width): its features (batch, features) mapped,
    each of length 1, so that a linear head gives cosines."""
    import torch

    class MappedBackbone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = backbone
            self.projection = torch.nn.Linear(features, width)

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.normalize(self.projection(self.network(*inputs)), dim=1)

    return MappedBackbone()


def with_map(loaded: LoadedBackbone, weight: torch.Tensor, bias: torch.Tensor) -> LoadedBackbone:
    """A loaded backbone with the map `weight` (width, features), `bias` (width,) behind it."""
    import torch

    from models.backbones.build import LoadedBackbone

    width = len(weight)
    module = make_mapped_module(loaded.module, loaded.feature_dim, width)
    projection = module.get_submodule("projection")
    assert isinstance(projection, torch.nn.Linear)
    with torch.no_grad():
        projection.weight.copy_(weight)
        projection.bias.copy_(bias)
    architecture = {
        "library": "mapped", "backbone": loaded.architecture, "features": loaded.feature_dim, "width": width,
    }  # fmt: skip
    return LoadedBackbone(module, width, architecture, loaded.processing)


def build_mapped(architecture: dict[str, Any]) -> torch.nn.Module:
    """The module with random weights."""
    from models.backbones.build import build_backbone

    inner = build_backbone(architecture["backbone"])
    return make_mapped_module(inner, architecture["features"], architecture["width"])
