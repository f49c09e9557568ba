"""Hugging Face encoders as feature extractors: tokens or uint8 images in, pooled features out. Audio has a room of
its own (hf_audio)."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
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

PADDING_EFFECT = 0.1
"""Largest change of a text's features by padding, as a share of the change by another text. Measured on the 42 small
architectures of docs/coverage.md: ≤ 2.5e-6 on 38 of them, .003 nystromformer, .02 convbert, .3 funnel, .8 fnet."""

VISION_TOWER = "vision_model"
"""Where dual encoders keep the one for images."""


def make_text_module(config: dict[str, Any]) -> torch.nn.Module:
    """An encoder with masked mean pooling (Reimers & Gurevych 2019, Sentence-BERT), or a decoder with the state of the
    last real token, the only one that has seen the whole text (as in transformers' classifiers).

    `forward` takes `input_ids` and `attention_mask`, and `token_type_ids` where two texts are compared: int64 (batch,
    sequence), padded on the right; gives float32 (batch, features).
    """
    import torch

    causal = only_looks_back(config)

    class TextBackbone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network_from_config({**config, "use_cache": False})

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
        ) -> torch.Tensor:
            types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            hidden = self.network(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
            if causal:
                last = attention_mask.sum(1).clamp(min=1) - 1
                state: torch.Tensor = hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
                return state
            weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled: torch.Tensor = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)
            return pooled

    return TextBackbone()


def only_looks_back(config: dict[str, Any]) -> bool:
    """Whether it is a decoder: a kind that transformers can have write a text, but not fill a gap in one."""
    from transformers.models.auto import modeling_auto as auto

    kind = config.get("model_type")
    writes = kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return writes and not config.get("is_encoder_decoder")


def make_image_module(
    config: dict[str, Any], mean: list[float], std: list[float], bgr: bool, tower: bool = False
) -> torch.nn.Module:
    """A vision encoder that normalises its input itself, and swaps the channels where it was trained on BGR.

    Its features are those that its own pooling gives (resnet, swin, convnext, dinov2, …), or the mean of
    the tokens where there is none; of the `tower` of a dual encoder its embeddings, of length 1. `forward` takes
    `image`: uint8 (batch, height, width, 3) and gives float32 (batch, features).
    """
    import torch

    from models.backbones.hf_dual import tower_from_config

    class ImageBackbone(torch.nn.Module):
        mean: torch.Tensor
        std: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.network: Any = (
                tower_from_config(config, "image") if tower else network_from_config(config, VISION_TOWER)
            )
            self.register_buffer("mean", torch.tensor(mean).mul(255).view(1, 3, 1, 1), persistent=False)
            self.register_buffer("std", torch.tensor(std).mul(255).view(1, 3, 1, 1), persistent=False)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            pixels = image.to(self.mean.dtype).permute(0, 3, 1, 2)  # TensorRT casts bytes, but moves none
            if bgr:
                pixels = pixels.flip(1)
            pixels = (pixels - self.mean) / self.std
            if tower:
                embedding = self.network.get_image_features(pixel_values=pixels).pooler_output
                return torch.nn.functional.normalize(embedding, dim=1)
            output = self.network(pixel_values=pixels)
            pooled: torch.Tensor | None = getattr(output, "pooler_output", None)
            if pooled is not None and not isinstance(getattr(self.network, "pooler", None), torch.nn.Identity):
                return pooled.flatten(1)
            maps: Any = getattr(output, "feature_maps", None)  # of kinds that are known as part of a detector only
            hidden: torch.Tensor = maps[-1] if maps else output.last_hidden_state
            return hidden.mean(dim=(2, 3)) if hidden.dim() == 4 else hidden.mean(dim=1)

    return ImageBackbone()


def network_from_config(config: dict[str, Any], tower: str = "") -> torch.nn.Module:
    """An encoder with random weights from the JSON form of its configuration; of a dual encoder its `tower`.

    Raises:
        ModelError: transformers does not know the type, or it wants code of its own.
    """
    network = encoder_of(whole_network(config), tower)
    drop_dense_pooler(network)
    widen_pooler(network)
    return network.float()


def whole_network(config: dict[str, Any]) -> torch.nn.Module:
    """What transformers' AutoModel makes of a configuration. Raises `ModelError` as `network_from_config`."""
    from transformers import AutoConfig, AutoModel

    refuse_own_code(config, config.get("model_type", "the configuration"))
    # A stored half precision would be taken for the type to build in; everything here starts in fp32.
    values = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    model_type = values.pop("model_type", None)
    values["architectures"] = values.get("architectures") or []  # None is an error for kinds with two (deit, funnel)
    try:
        network: torch.nn.Module = AutoModel.from_config(AutoConfig.for_model(model_type, **values))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"transformers cannot build an encoder of type {model_type!r}: {error}") from error
    return network


def encoder_of(network: Any, tower: str) -> torch.nn.Module:
    """The encoder alone of a network that has a decoder behind it (T5, BART), or the one named `tower` of a dual
    encoder (CLIP, SigLIP)."""
    encoder: torch.nn.Module = network.get_encoder() if network.config.is_encoder_decoder else network
    part: torch.nn.Module | None = getattr(encoder, tower, None) if hasattr(network.config, "text_config") else None
    return encoder if part is None else part


def drop_dense_pooler(network: torch.nn.Module) -> None:
    """Put an identity in the place of a dense layer on the first token (bert, vit).

    Many checkpoints do not hold it, so that it would be random; the mean of the tokens does not pass
    through it either, so that an adapter on it would never train.
    """
    from torch import nn

    pooler = getattr(network, "pooler", None)
    if isinstance(pooler, nn.Module) and any(isinstance(module, nn.Linear) for module in pooler.modules()):
        network.pooler = nn.Identity()


def widen_pooler(network: Any) -> None:
    """Take the mean over the whole map where the pooler's window is larger than any map (efficientnet: `hidden_dim`
    pixels), which TensorRT refuses."""
    from torch import nn

    if isinstance(getattr(network, "pooler", None), nn.AvgPool2d):
        network.pooler = nn.AdaptiveAvgPool2d(1)


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
        if modality == "image-text":
            from models.backbones.hf_dual import load_towers

            return load_towers(spec, source, revision, config, image_size, max_length, pretrained)
        processing: Processing
        architecture: dict[str, Any]
        if modality == "text":
            architecture = {"library": "hf", "modality": "text", "config": values}
            module = build_hf(architecture)
            longest = positions_of(module.get_submodule("network"))
            if max_length and max_length > longest:
                raise ModelError(f"{spec.id} takes {longest} tokens at most, finetune.max_length is {max_length}")
            limit = max_length or min(MAX_LENGTH, longest)
            processing = text_processing(source, revision, limit, values.get("vocab_size"))
        else:
            prepared = image_preparation(source, revision, image_size, values.get("image_size"))
            processing = prepared.processing
            architecture = {"library": "hf", "modality": "image", "config": values, "mean": prepared.mean,
                            "std": prepared.std, "bgr": prepared.bgr}  # fmt: skip
            module = build_hf(architecture)
        if pretrained:
            load_weights(module, source, revision, config, VISION_TOWER if modality == "image" else "")
        if isinstance(processing, TextProcessing):
            check_padding(module, processing, spec.id)
            if pairs:
                processing = replace(processing, pairs=True, types=takes_types(module, values))
                check_pairs(processing, spec.id)
    except OSError as error:
        if spec.folder:
            raise ModelError(f"{source}: {error}; expected config.json, safetensors and tokenizer.json") from error
        raise weights_error(spec.id, error) from error
    except (ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"transformers cannot load {spec.id} as an encoder of {modality}s: {error}") from error
    return module, architecture, processing


def check_pairs(processing: TextProcessing, name: str) -> None:
    """Raises `ModelError` where the network cannot see which word belongs to which of two texts."""
    one, other = (processing.arrays([pair]) for pair in (("a text", "b"), ("a", "text b")))
    if all((one[key].shape == other[key].shape and (one[key] == other[key]).all()) for key in one):
        raise ModelError(
            f"the tokenizer of {name} puts nothing between two texts, so that the network cannot tell them apart; take "
            "an encoder that was made for pairs (bert, roberta, deberta, …), or join the texts in one column yourself"
        )


def takes_types(module: torch.nn.Module, config: dict[str, Any]) -> bool:
    """Whether the encoder is told which token is of which text; where it is not (RoBERTa, with one row of token types)
    it sees the tokens between them only."""
    named = inspect.signature(module.get_submodule("network").forward).parameters
    return "token_type_ids" in named and int(config.get("type_vocab_size") or 0) > 1


def load_weights(module: torch.nn.Module, source: str, revision: str | None, config: Any, tower: str = "") -> None:
    """Copy the pretrained weights into `module.network`; `tower` as in `network_from_config`.

    Raises:
        ModelError: the file lacks weights of the encoder (transformers would make them up with a log line).
    """
    pretrained, report = pretrained_network(source, revision, config)
    copy_weights(module.get_submodule("network"), pretrained, encoder_of(pretrained, tower), report, source)


def pretrained_network(source: str, revision: str | None, config: Any) -> tuple[torch.nn.Module, Any]:
    """What transformers' AutoModel loads, in fp32, and its report of missing weights."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # the stage has its own
    return AutoModel.from_pretrained(  # type: ignore[no-any-return]
        source,
        revision=revision,
        config=config,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
    )


def copy_weights(
    network: torch.nn.Module, pretrained: torch.nn.Module, encoder: torch.nn.Module, report: Any, source: str
) -> None:
    """Give `network` the weights of the `encoder` within `pretrained`; `report` is transformers' of loading it.

    Raises:
        ModelError: the file lacks some of them.
    """
    wanted = network.state_dict()
    prefix = next(f"{name}." if name else "" for name, part in pretrained.named_modules() if part is encoder)
    check_complete(source, {f"{prefix}{name}" for name in wanted}, report)
    network.load_state_dict({name: tensor for name, tensor in encoder.state_dict().items() if name in wanted})


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
    tower = bool(architecture.get("tower"))
    if architecture["modality"] == "text":
        if tower:
            from models.backbones.hf_dual import make_text_tower

            return make_text_tower(architecture["config"])
        return make_text_module(architecture["config"])
    if architecture["modality"] == "audio":
        from models.backbones.hf_audio import make_audio_module

        return make_audio_module(architecture["config"])
    return make_image_module(
        architecture["config"], architecture["mean"], architecture["std"], architecture.get("bgr", False), tower
    )


def check_padding(module: torch.nn.Module, processing: TextProcessing, name: str) -> None:
    """Raises `ModelError` where the features of a text depend on the padding that a longer one beside it brings.

    Its class would depend on the batch it comes in, in training and on the edge.
    """
    import torch

    def features(contents: Sequence[str]) -> torch.Tensor:
        arrays = processing.arrays(contents)
        found: torch.Tensor = module(*(torch.from_numpy(arrays[tensor.name]) for tensor in processing.inputs))
        return found

    short, long = "a text", " ".join(["a text, and another"] * 8)
    module.eval()
    with torch.inference_mode():
        alone, (beside, other) = features([short])[0], features([short, long])
    moved = float((alone - beside).abs().max() / (beside - other).abs().max().clamp(min=1e-12))
    if moved > PADDING_EFFECT:
        raise ModelError(
            f"{name}: the features of a text change with the padding beside it, by {moved:.0%} of what another text "
            "changes, so that its class would depend on its batch; take an encoder that masks its padding (bert, "
            "roberta, deberta, modernbert, …)"
        )


def positions_of(network: Any) -> int:
    """The longest text the encoder takes, in tokens. Kinds like RoBERTa count from behind the padding's position."""
    positions = int(getattr(network.config, "max_position_embeddings", None) or 0)
    positions = positions if positions > 0 else 512  # T5 and XLNet count distances, and take any length
    for name, part in network.named_modules():
        padding = getattr(part, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            positions = min(positions, part.num_embeddings - padding - 1)
    return positions


def text_processing(
    source: str, revision: str | None, max_length: int, rows: int | None, loader: Any = None, fixed: bool = False
) -> TextProcessing:
    """The fast tokenizer of a folder or repository, for an encoder with `rows` token embeddings. `loader`: the class
    of transformers that reads it, AutoTokenizer by default. `fixed` as in `TextProcessing`.

    Raises:
        ModelError: there is none, it does not belong to the encoder, or it puts padding that is read on the left.
    """
    from transformers import AutoTokenizer

    file = Path(source) / "tokenizer.json"
    loader = loader or AutoTokenizer
    tokenizer = loader.from_pretrained(source, revision=revision, use_fast=True, trust_remote_code=False)
    if not getattr(tokenizer, "is_fast", False) or tokenizer.pad_token_id is None:
        raise ModelError(f"{source} has no fast tokenizer with a padding token; the edge runner needs tokenizer.json")
    # Where there are no files at all, transformers makes a tokenizer up that knows its special tokens only.
    if not len(tokenizer.all_special_ids) < len(tokenizer) <= (rows or len(tokenizer)):
        raise ModelError(
            f"the tokenizer of {source} knows {len(tokenizer)} tokens, the encoder embeds {rows}; is tokenizer.json "
            "missing, or from another model?"
        )
    if fixed and tokenizer.padding_side != "right":
        raise ModelError(
            f"the tokenizer of {source} ({type(tokenizer).__name__}) pads on the {tokenizer.padding_side}, and the "
            "encoder reads its padding; only padding on the right is supported: take a SigLIP, whose tokenizer does "
            "so, or, where it was trained so, write padding_side: right in its tokenizer_config.json"
        )
    text = file.read_text(encoding="utf-8") if file.is_file() else tokenizer.backend_tokenizer.to_str()
    padding = tokenizer.pad_token_id, tokenizer.pad_token
    return TextProcessing(tokenizer_json_of(text), max_length, *padding, fixed=fixed)


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
