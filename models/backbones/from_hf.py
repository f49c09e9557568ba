"""Hugging Face encoders as feature extractors: tokens or uint8 images in, pooled features out. Audio has a room of
its own (hf_audio)."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.backbones.from_timm import weights_error
from models.errors import ModelError
from models.modalities.text import TextProcessing, tokenizer_json_of
from models.modalities.vision import ImageProcessing, Interpolation

if TYPE_CHECKING:
    import torch

    from models.modalities import Processing
    from models.spec import BackboneSpec

MAX_LENGTH = 128
"""Default length limit of a text, in tokens."""


def make_text_module(config: dict[str, Any]) -> torch.nn.Module:
    """An encoder with masked mean pooling (Reimers & Gurevych 2019, Sentence-BERT).

    `forward` takes `input_ids` and `attention_mask`, and `token_type_ids` where two texts are compared: int64 (batch,
    sequence); gives float32 (batch, features).
    """
    import torch

    class TextBackbone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network_from_config(config)

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
        ) -> torch.Tensor:
            types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            hidden = self.network(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
            weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled: torch.Tensor = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)
            return pooled

    return TextBackbone()


def make_image_module(config: dict[str, Any], mean: list[float], std: list[float], bgr: bool) -> torch.nn.Module:
    """A vision encoder that normalises its input itself, and swaps the channels where it was trained on BGR.

    Its features are those that its own pooling gives (resnet, swin, convnext, dinov2, …), or the mean of
    the tokens where there is none. `forward` takes `image`: uint8 (batch, height, width, 3) and gives
    float32 (batch, features).
    """
    import torch

    class ImageBackbone(torch.nn.Module):
        mean: torch.Tensor
        std: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.network = network_from_config(config)
            self.register_buffer("mean", torch.tensor(mean).mul(255).view(1, 3, 1, 1), persistent=False)
            self.register_buffer("std", torch.tensor(std).mul(255).view(1, 3, 1, 1), persistent=False)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            pixels = image.permute(0, 3, 1, 2).to(self.mean.dtype)
            if bgr:
                pixels = pixels.flip(1)
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
    spec: BackboneSpec,
    modality: str,
    image_size: int | None,
    max_length: int | None,
    max_seconds: float | None,
    pretrained: bool,
    pairs: bool,
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
        if modality == "audio":
            from models.backbones.hf_audio import load_audio

            return load_audio(spec, source, revision, max_seconds, pretrained)
        if spec.weights.startswith("package ") and spec.folder is None:
            raise ModelError(f"the {spec.weights} holds an audio encoder, no encoder of {modality}s")
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        values = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
        if modality == "image" and image_size and isinstance(values.get("image_size"), int):
            config.image_size = values["image_size"] = image_size
        refuse_own_code(values, spec.id)
        processing: Processing
        architecture: dict[str, Any]
        if modality == "text":
            longest = positions_of(values)
            if max_length and max_length > longest:
                raise ModelError(f"{spec.id} takes {longest} tokens at most, finetune.max_length is {max_length}")
            limit = max_length or min(MAX_LENGTH, longest)
            processing = text_processing(source, revision, limit, values.get("vocab_size"))
            architecture = {"library": "hf", "modality": "text", "config": values}
        else:
            prepared = image_preparation(source, revision, image_size, values.get("image_size"))
            processing = prepared.processing
            architecture = {"library": "hf", "modality": "image", "config": values, "mean": prepared.mean,
                            "std": prepared.std, "bgr": prepared.bgr}  # fmt: skip
        module = build_hf(architecture)
        if pairs and isinstance(processing, TextProcessing):
            processing = replace(processing, pairs=True, types=takes_types(module, values))
        if pretrained:
            load_weights(module, source, revision, config)
    except OSError as error:
        if spec.folder:
            raise ModelError(f"{source}: {error}; expected config.json, safetensors and tokenizer.json") from error
        raise weights_error(spec.id, error) from error
    except (ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"transformers cannot load {spec.id} as an encoder of {modality}s: {error}") from error
    return module, architecture, processing


def takes_types(module: torch.nn.Module, config: dict[str, Any]) -> bool:
    """Whether the encoder is told which token is of which text; where it is not (RoBERTa, with one row of token types)
    it sees the tokens between them only."""
    named = inspect.signature(module.get_submodule("network").forward).parameters
    return "token_type_ids" in named and int(config.get("type_vocab_size") or 0) > 1


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
    wanted = module.get_submodule("network").state_dict()
    check_complete(source, set(wanted), report)
    state = {name: tensor for name, tensor in pretrained.state_dict().items() if name in wanted}
    module.get_submodule("network").load_state_dict(state, strict=True)


def check_complete(source: str, wanted: set[str], report: Any) -> None:
    """Raises `ModelError` where the file lacks weights that are `wanted`, by transformers' report of loading it."""
    missing = sorted(wanted & set(report["missing_keys"]))
    if missing:
        raise ModelError(
            f"{source} lacks {len(missing)} of the encoder's {len(wanted)} weights, the first is {missing[0]}; "
            "expected the complete encoder that config.json describes"
        )


def build_hf(architecture: dict[str, Any]) -> torch.nn.Module:
    """The module with random weights."""
    if architecture["modality"] == "text":
        return make_text_module(architecture["config"])
    if architecture["modality"] == "audio":
        from models.backbones.hf_audio import make_audio_module

        return make_audio_module(architecture["config"])
    return make_image_module(
        architecture["config"], architecture["mean"], architecture["std"], architecture.get("bgr", False)
    )


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


PILLOW_FILTERS: dict[int, Interpolation] = {
    0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming",
}  # fmt: skip
"""Pillow's numbers, which `preprocessor_config.json` uses, as names."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImagePreparation:
    """How an image backbone wants its pixels. `mean` and `std` are for pixels from 0 to 1."""

    mean: list[float]
    std: list[float]
    bgr: bool
    processing: ImageProcessing


def image_preparation(
    source: str, revision: str | None, image_size: int | None, model_size: int | list[int] | None
) -> ImagePreparation:
    """What transformers' own image processor would do; ImageNet's values where a model has none.

    `image_size` is the user's choice, `model_size` what the network's configuration says.
    """
    values = processor_values(source, revision)
    crop = side_of(values.get("crop_size")) if values.get("do_center_crop") else None
    own = model_size[0] if isinstance(model_size, list | tuple) else model_size
    wanted = values.get("size")
    size = int(image_size or own or crop or side_of(wanted) or 224)
    squash = isinstance(wanted, dict) and "height" in wanted and not values.get("do_center_crop")
    resize = round(size / (values.get("crop_pct") or crop_fraction(values)))
    processing = ImageProcessing(
        size, resize, PILLOW_FILTERS.get(values.get("resample", 3), "bicubic"), "squash" if squash else "crop"
    )
    mean, std = normalisation(values)
    return ImagePreparation(mean, std, bool(values.get("do_flip_channel_order")), processing)


def processor_values(source: str, revision: str | None) -> dict[str, Any]:
    """`preprocessor_config.json` with the defaults that its class in transformers fills in; empty without one."""
    from transformers import AutoImageProcessor
    from transformers.utils.hub import cached_file

    file = "preprocessor_config.json"
    if Path(source).is_dir():
        found = (Path(source) / file).is_file()
    else:
        found = bool(cached_file(source, file, revision=revision, _raise_exceptions_for_missing_entries=False))
    if not found:
        return {}
    processor = AutoImageProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
    values: dict[str, Any] = json.loads(processor.to_json_string())
    return values


def normalisation(values: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation, for pixels from 0 to 1, of (pixels · rescale_factor − offset − mean) / std."""
    factor = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0
    offset = 1.0 if values.get("rescale_offset") else 0.0
    mean, std = [0.0] * 3, [1.0] * 3
    if values.get("do_normalize", True):
        mean = list(values.get("image_mean") or IMAGENET_MEAN)
        std = list(values.get("image_std") or IMAGENET_STD)
    if values.get("include_top"):  # transformers' EfficientNet divides by it twice
        std = [one * other for one, other in zip(std, values.get("image_std") or IMAGENET_STD, strict=True)]
    unit = factor * 255
    return [(one + offset) / unit for one in mean], [one / unit for one in std]


def side_of(value: Any) -> int | None:
    """The shorter side that a size in `preprocessor_config.json` names."""
    if isinstance(value, dict):
        value = value.get("shortest_edge") or value.get("height")
    return value if isinstance(value, int) else None


def crop_fraction(values: dict[str, Any]) -> float:
    """The side of the crop as a share of the resized shorter side, from a preprocessor's configuration."""
    crop, resized = side_of(values.get("crop_size")), side_of(values.get("size"))
    return min(1.0, crop / resized) if values.get("do_center_crop") and crop and resized else 1.0
