"""Dual encoders: an image backbone and a text backbone side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from models.modalities.image_text import PairProcessing
from models.modalities.text import TextProcessing
from models.modalities.vision import ImageProcessing

if TYPE_CHECKING:
    import torch

    from models.backbones.build import LoadedBackbone
    from models.spec import BackboneSpec


def make_dual_module(image: torch.nn.Module, text: torch.nn.Module, widths: tuple[int, int]) -> torch.nn.Module:
    """Two backbones, whose features have these widths, as one.

    `forward` takes the image's input and then the text's, and gives float32 (batch, 2 × the larger width): the features
    of the image, then those of the text, zeros behind the narrower ones.
    """
    import torch

    class DualBackbone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = torch.nn.ModuleDict({"image": image, "text": text})

        def forward(self, pixels: torch.Tensor, *tokens: torch.Tensor) -> torch.Tensor:
            features = self.network["image"](pixels), self.network["text"](*tokens)
            missing = [max(widths) - width for width in widths]
            halves = [
                torch.nn.functional.pad(one, (0, add)) if add else one
                for one, add in zip(features, missing, strict=True)
            ]
            return torch.cat(halves, dim=1)

    return DualBackbone()


def load_dual(
    spec: BackboneSpec, image_size: int | None, max_length: int | None, pretrained: bool
) -> tuple[torch.nn.Module, dict[str, Any], PairProcessing]:
    """The two backbones of a spec that is put together, each loaded as it would be alone.

    Raises:
        ModelError: the weights of one do not fit or hold NaN.
        MissingCapabilityError: the weights of one cannot be had on this machine.
    """
    from models.registry import load_backbone

    image = load_backbone(spec.parts[0], "image-classification", image_size, None, pretrained)
    text = load_backbone(spec.parts[1], "text-classification", None, max_length, pretrained)
    assert isinstance(image.processing, ImageProcessing) and isinstance(text.processing, TextProcessing)
    widths = image.feature_dim, text.feature_dim
    architecture = {"library": "dual", "image": image.architecture, "text": text.architecture, "widths": list(widths)}
    return (
        make_dual_module(image.module, text.module, widths),
        architecture,
        PairProcessing(image.processing, text.processing),
    )


def halves_of(loaded: LoadedBackbone) -> tuple[LoadedBackbone, LoadedBackbone]:
    """The image backbone and the text backbone of a dual encoder, each as it would be alone, or with its projection
    behind it where the encoder brings one that changes anything."""
    from models.backbones.build import LoadedBackbone

    processing = loaded.processing
    assert isinstance(processing, PairProcessing)
    image, text = (loaded.module.get_submodule(f"network.{side}") for side in ("image", "text"))
    widths, architecture = loaded.architecture["widths"], loaded.architecture
    return (
        projected(LoadedBackbone(image, widths[0], architecture["image"], processing.image), loaded.head, "image"),
        projected(LoadedBackbone(text, widths[1], architecture["text"], processing.text), loaded.head, "text"),
    )


def projected(half: LoadedBackbone, head: dict[str, torch.Tensor] | None, side: str) -> LoadedBackbone:
    """The backbone of a side with the projection that the state of a `PairHead` has for it; itself where there is no
    head, or where that keeps its embeddings as they are."""
    import torch

    from models.backbones.mapped import with_map

    if head is None:
        return half
    weight, bias = head[f"{side}.weight"], head[f"{side}.bias"]
    same = weight.shape == (half.feature_dim, half.feature_dim) and torch.equal(weight, torch.eye(half.feature_dim))
    return half if same and not bias.any() else with_map(half, weight, bias)


def build_dual(architecture: dict[str, Any]) -> torch.nn.Module:
    """The module with random weights."""
    from models.backbones.build import build_backbone

    image, text = build_backbone(architecture["image"]), build_backbone(architecture["text"])
    return make_dual_module(image, text, tuple(architecture["widths"]))
