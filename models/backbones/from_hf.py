"""Hugging Face encoders as feature extractors: tokens or uint8 images in, pooled features out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.backbones.from_timm import weights_error
from models.errors import ModelError
from models.modalities.text import TextProcessing, tokenizer_json_of
from models.modalities.vision import ImageProcessing

if TYPE_CHECKING:
    import torch

    from models.modalities import Processing
    from models.spec import BackboneSpec

MAX_LENGTH = 128
"""Default length limit of a text, in tokens."""


def make_text_module(config: dict[str, Any]) -> torch.nn.Module:
    """An encoder with masked mean pooling (Reimers & Gurevych 2019, Sentence-BERT).

    `forward` takes `input_ids` and `attention_mask`: int64 (batch, sequence); gives float32 (batch, features).
    """
    import torch

    class TextBackbone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network_from_config(config)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden = self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled: torch.Tensor = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)
            return pooled

    return TextBackbone()


def make_image_module(config: dict[str, Any], mean: list[float], std: list[float]) -> torch.nn.Module:
    """A vision encoder that normalises its input itself.

    Its features are those that its own pooling gives (resnet, swin, convnext, dinov2, …), or the mean of
    the tokens where there is none. `forward` takes `image`: uint8 (batch, height, width, 3) and gives
    float32 (batch, features).
    """
    import torch

    class ImageBackbone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network_from_config(config)
            self.register_buffer("mean", torch.tensor(mean).mul(255).view(1, 3, 1, 1), persistent=False)
            self.register_buffer("std", torch.tensor(std).mul(255).view(1, 3, 1, 1), persistent=False)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            pixels = image.permute(0, 3, 1, 2).to(self.mean.dtype)
            output = self.network(pixel_values=(pixels - self.mean) / self.std)
            pooled: torch.Tensor | None = getattr(output, "pooler_output", None)
            if pooled is not None and not isinstance(getattr(self.network, "pooler", None), torch.nn.Identity):
                return pooled.flatten(1)
            hidden: torch.Tensor = output.last_hidden_state
            return hidden.mean(dim=(2, 3)) if hidden.dim() == 4 else hidden.mean(dim=1)

    return ImageBackbone()


def network_from_config(config: dict[str, Any]) -> torch.nn.Module:
    """An encoder with random weights from the JSON form of its configuration.

    Raises:
        ModelError: transformers does not know the type, or it wants code of its own.
    """
    from transformers import AutoConfig, AutoModel

    refuse_own_code(config, config.get("model_type", "the configuration"))
    # A stored half precision would be taken for the type to build in; everything here starts in fp32.
    values = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    model_type = values.pop("model_type", None)
    try:
        network: torch.nn.Module = AutoModel.from_config(AutoConfig.for_model(model_type, **values))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"transformers cannot build an encoder of type {model_type!r}: {error}") from error
    drop_dense_pooler(network)
    return network.float()


def drop_dense_pooler(network: torch.nn.Module) -> None:
    """Put an identity in the place of a dense layer on the first token (bert, vit).

    Many checkpoints do not hold it, so that it would be random; the mean of the tokens does not pass
    through it either, so that an adapter on it would never train.
    """
    from torch import nn

    pooler = getattr(network, "pooler", None)
    if isinstance(pooler, nn.Module) and any(isinstance(module, nn.Linear) for module in pooler.modules()):
        network.pooler = nn.Identity()


def refuse_own_code(config: dict[str, Any], name: str) -> None:
    """Code that comes with a model is never run. Raises `ModelError`."""
    if "auto_map" in config:
        raise ModelError(
            f"{name} asks for code of its own (auto_map), which is never run here (trust_remote_code is off); "
            "use an architecture that transformers itself has"
        )


def load_hf(
    spec: BackboneSpec, modality: str, image_size: int | None, max_length: int | None, pretrained: bool
) -> tuple[torch.nn.Module, dict[str, Any], Processing]:
    """The module, the architecture that rebuilds it, and its preprocessing.

    Raises:
        ModelError: the repository cannot be used (no safetensors, code of its own, no fast tokenizer).
        MissingCapabilityError: the weights cannot be had here.
    """
    from transformers import AutoConfig

    source = spec.folder or spec.name
    revision = None if spec.folder else spec.revision
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        values = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
        if modality == "image" and image_size and isinstance(values.get("image_size"), int):
            config.image_size = values["image_size"] = image_size
        refuse_own_code(values, spec.id)
        processing: Processing
        if modality == "text":
            longest = min(max_length or MAX_LENGTH, positions_of(values))
            processing = text_processing(source, revision, longest, values.get("vocab_size"))
            architecture = {"library": "hf", "modality": "text", "config": values}
        else:
            mean, std, processing = image_processing(source, revision, image_size or values.get("image_size"))
            architecture = {"library": "hf", "modality": "image", "config": values, "mean": mean, "std": std}
        module = build_hf(architecture)
        if pretrained:
            load_weights(module, source, revision, config)
    except OSError as error:
        if spec.folder:
            raise ModelError(f"{source}: {error}; expected config.json, safetensors and tokenizer.json") from error
        raise weights_error(spec.id, error) from error
    except (ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"transformers cannot load {spec.id} as an encoder of {modality}s: {error}") from error
    return module, architecture, processing


def load_weights(module: torch.nn.Module, source: str, revision: str | None, config: Any) -> None:
    """Copy the pretrained weights into `module.network`.

    Raises:
        ModelError: the file lacks weights of the encoder (transformers would make them up with a log line).
    """
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # the stage has its own
    pretrained, report = AutoModel.from_pretrained(
        source,
        revision=revision,
        config=config,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    wanted = module.network.state_dict()
    missing = sorted(wanted.keys() & set(report["missing_keys"]))
    if missing:
        raise ModelError(
            f"{source} lacks {len(missing)} of the encoder's {len(wanted)} weights, the first is {missing[0]}; "
            "expected the complete encoder that config.json describes"
        )
    state = {name: tensor for name, tensor in pretrained.state_dict().items() if name in wanted}
    module.network.load_state_dict(state, strict=True)


def build_hf(architecture: dict[str, Any]) -> torch.nn.Module:
    """The module with random weights."""
    if architecture["modality"] == "text":
        return make_text_module(architecture["config"])
    return make_image_module(architecture["config"], architecture["mean"], architecture["std"])


def positions_of(config: dict[str, Any]) -> int:
    """The longest text the encoder takes, in tokens (RoBERTa keeps two positions for itself)."""
    positions = config.get("max_position_embeddings") or 512
    return int(positions) - (2 if config.get("model_type") in ("roberta", "xlm-roberta", "camembert") else 0)


def text_processing(source: str, revision: str | None, max_length: int, rows: int | None) -> TextProcessing:
    """The fast tokenizer of a folder or repository, for an encoder with `rows` token embeddings.

    Raises:
        ModelError: there is none, or it does not belong to the encoder.
    """
    from transformers import AutoTokenizer

    file = Path(source) / "tokenizer.json"
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, use_fast=True, trust_remote_code=False)
    if not getattr(tokenizer, "is_fast", False) or tokenizer.pad_token_id is None:
        raise ModelError(f"{source} has no fast tokenizer with a padding token; the edge runner needs tokenizer.json")
    # Where there are no files at all, transformers makes a tokenizer up that knows its special tokens only.
    if not len(tokenizer.all_special_ids) < len(tokenizer) <= (rows or len(tokenizer)):
        raise ModelError(
            f"the tokenizer of {source} knows {len(tokenizer)} tokens, the encoder embeds {rows}; is tokenizer.json "
            "missing, or from another model?"
        )
    text = file.read_text(encoding="utf-8") if file.is_file() else tokenizer.backend_tokenizer.to_str()
    return TextProcessing(tokenizer_json_of(text), max_length, tokenizer.pad_token_id, tokenizer.pad_token)


def image_processing(
    source: str, revision: str | None, size: int | list[int] | None
) -> tuple[list[float], list[float], ImageProcessing]:
    """Mean, standard deviation and resize from `preprocessor_config.json`; ImageNet's where there is none."""
    from transformers.utils import cached_file

    found = cached_file(
        source, "preprocessor_config.json", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    values: dict[str, Any] = json.loads(Path(found).read_text(encoding="utf-8")) if found else {}
    pixels = (size[0] if isinstance(size, list | tuple) else size) or 224
    mean = values.get("image_mean") or [0.485, 0.456, 0.406]
    std = values.get("image_std") or [0.229, 0.224, 0.225]
    crop = values.get("crop_pct") or crop_fraction(values)
    interpolation = "bilinear" if values.get("resample") == 2 else "bicubic"
    return list(mean), list(std), ImageProcessing(int(pixels), round(pixels / crop), interpolation)  # type: ignore[arg-type]


def crop_fraction(values: dict[str, Any]) -> float:
    """The side of the crop as a share of the resized shorter side, from a preprocessor's configuration."""

    def side(value: Any) -> int | None:
        if isinstance(value, dict):
            value = value.get("shortest_edge") or value.get("height")
        return value if isinstance(value, int) else None

    crop, resized = side(values.get("crop_size")), side(values.get("size"))
    return min(1.0, crop / resized) if values.get("do_center_crop") and crop and resized else 1.0
