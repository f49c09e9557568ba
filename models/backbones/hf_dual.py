"""Hugging Face's dual encoders with both towers, CLIP, SigLIP, VisionTextDualEncoder and their kin: an image and a text
as embeddings of one space, as the model's own `get_image_features` and `get_text_features` give them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from models.backbones.dual import make_dual_module
from models.errors import ModelError
from models.modalities.image_text import PairProcessing
from models.modalities.text import TextProcessing
from models.tasks.retrieval import TEMPERATURE

if TYPE_CHECKING:
    import torch

    from models.spec import BackboneSpec

Side = Literal["image", "text"]

PARTS: dict[Side, str] = {"image": "vis", "text": "text"}
"""How the names of a tower's modules begin: vision_model and visual_projection, text_model and text_projection."""

SCALES = {"logit_scale", "temperature"}
"""What a dual encoder has that scales its cosines."""

UNREAD_POOLER = "align"
"""The kind whose text tower has a dense pooler and reads the first token before it: nothing in there would learn."""

READS_PADDING = "siglip"
"""The kind whose texts all have one length, and whose text tower takes the state of the last token, padding or not
(Zhai et al. 2023, arXiv 2303.15343). SigLIP 2 at a fixed resolution is of it too, but transformers' Siglip2Tokenizer
pads on the left unless its configuration says otherwise, which is refused."""

CANONICAL: list[dict[str, Any]] = [
    {"type": "Lowercase"},
    {"type": "Replace", "pattern": {"Regex": r"[!-/:-@\[-`{-~]"}, "content": ""},
    {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
    {"type": "Strip", "strip_left": True, "strip_right": True},
]
"""What transformers' SiglipTokenizer does to a text in Python before its SentencePiece model sees it: lower case, no
ASCII punctuation, single spaces."""


def tower_from_config(config: dict[str, Any], side: Side) -> torch.nn.Module:
    """The network of transformers with what one tower needs, in random weights; the other tower is taken out.

    Raises:
        ModelError: it is no dual encoder, or one that needs more than pixels.
    """
    from models.backbones.from_hf import whole_network

    network = whole_network(config)
    check_dual(network, config)
    for name, _ in list(network.named_children()):
        if not name.startswith(PARTS[side]):
            delattr(network, name)
    for name, _ in list(network.named_parameters(recurse=False)):
        delattr(network, name)
    if side == "text" and config.get("model_type") == UNREAD_POOLER:
        texts: Any = network.text_model
        texts.pooler = None
    return network.float()


def check_dual(network: Any, config: dict[str, Any]) -> None:
    """Raises `ModelError` for what has not two towers that give embeddings of one space."""
    kind = config.get("model_type")
    if kind == "siglip2":
        raise ModelError(
            "SigLIP 2 with images of any shape (NaFlex) takes patches and masks, not pixels; take a checkpoint of a "
            "fixed resolution (google/siglip-base-patch16-224, …)"
        )
    towers = [any(name.startswith(part) for name, _ in network.named_children()) for part in PARTS.values()]
    if not (all(towers) and hasattr(network, "get_image_features") and (SCALES & set(dir(network)))):
        raise ModelError(
            f"{kind} is one encoder, no dual encoder with an image and a text tower; take a CLIP, SigLIP or "
            "VisionTextDualEncoder, or write <image backbone>+<text backbone>"
        )


def make_text_tower(config: dict[str, Any]) -> torch.nn.Module:
    """The text tower with its projection: `forward` takes `input_ids` and `attention_mask`, int64 (batch, sequence), or
    for SigLIP the first alone, and gives embeddings of length 1: float32 (batch, embedding)."""
    import torch

    class TextTower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network: Any = tower_from_config(config, "text")

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            output = self.network.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
            return torch.nn.functional.normalize(output.pooler_output, dim=1)

    return TextTower()


def load_towers(
    spec: BackboneSpec,
    source: str,
    revision: str | None,
    config: Any,
    image_size: int | None,
    max_length: int | None,
    pretrained: bool,
) -> tuple[torch.nn.Module, dict[str, Any], PairProcessing]:
    """Both towers side by side, as `load_dual` gives two backbones. The architecture has the `scale` and the `offset`
    that the model's own logits have of cosines, too.

    Raises:
        ModelError: it is no dual encoder, its files are not complete, or another size or length is asked for than it
            takes.
    """
    from models.backbones.build import measure_feature_dim
    from models.backbones.from_hf import build_hf, check_padding, copy_weights, image_preparation, pretrained_network

    values = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
    size = (values.get("vision_config") or {}).get("image_size")
    if image_size and size and image_size != (size if isinstance(size, int) else size[0]):
        raise ModelError(
            f"{spec.id} has positions for images of {size} pixels, finetune.image_size is {image_size}; leave it out, "
            "or take a checkpoint of that size"
        )
    prepared = image_preparation(source, revision, image_size, size)
    tower = {"library": "hf", "config": values, "tower": True}
    normalised = {"mean": prepared.mean, "std": prepared.std, "bgr": prepared.bgr}
    architectures: tuple[dict[str, Any], ...] = (
        {**tower, "modality": "image", **normalised},
        {**tower, "modality": "text"},
    )
    image, text = (build_hf(architecture) for architecture in architectures)
    texts = tower_texts(spec, source, revision, text, values, max_length)
    scale, offset = 1 / TEMPERATURE, 0.0
    if pretrained:
        network, report = pretrained_network(source, revision, config)
        for module in (image, text):
            copy_weights(module.get_submodule("network"), network, network, report, source)
        own = dict(network.named_parameters())
        # ALIGN has the temperature itself, the others the logarithm of its inverse.
        scale = math.exp(own["logit_scale"].item()) if "logit_scale" in own else 1 / own["temperature"].item()
        offset = own["logit_bias"].item() if "logit_bias" in own else 0.0
    if not texts.fixed:
        check_padding(text, texts, spec.id)
    width = measure_feature_dim(image, prepared.processing)
    architecture = {
        "library": "dual", "image": architectures[0], "text": architectures[1], "widths": [width, width],
        "scale": scale, "offset": offset,
    }  # fmt: skip
    return make_dual_module(image, text, (width, width)), architecture, PairProcessing(prepared.processing, texts)


def tower_texts(
    spec: BackboneSpec, source: str, revision: str | None, module: torch.nn.Module, config: dict[str, Any],
    max_length: int | None,
) -> TextProcessing:  # fmt: skip
    """The tokenizer of a text tower; texts are as long as the model was trained on.

    Raises:
        ModelError: there is no fast tokenizer, it pads on the left where padding is read, or `max_length` is more than
            the tower takes.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    from models.backbones.from_hf import MAX_LENGTH, positions_of, text_processing

    fixed = config.get("model_type") == READS_PADDING
    longest = positions_of(module.get_submodule("network.text_model"))
    if max_length and (max_length > longest or (fixed and max_length != longest)):
        takes = "exactly" if fixed else "at most"
        raise ModelError(f"{spec.id} takes {takes} {longest} tokens, finetune.max_length is {max_length}")
    declared = get_tokenizer_config(source, revision=revision)
    canonical = fixed and declared.get("tokenizer_class") == "SiglipTokenizer"  # a class without tokenizer.json
    loader = PreTrainedTokenizerFast if canonical else AutoTokenizer
    limit = longest if fixed else max_length or min(MAX_LENGTH, longest)
    rows = (config.get("text_config") or {}).get("vocab_size")
    found = text_processing(source, revision, limit, rows, loader, fixed)
    steps = CANONICAL if declared.get("do_lower_case", canonical) else []
    return with_normalizers(found, steps if canonical else steps[:1]) if fixed else found


def with_normalizers(processing: TextProcessing, steps: list[dict[str, Any]]) -> TextProcessing:
    """The same preprocessing with these steps of tokenizers' before its own."""
    value = json.loads(processing.tokenizer_json)
    own = [value["normalizer"]] if value.get("normalizer") else []
    value["normalizer"] = {"type": "Sequence", "normalizers": [*steps, *own]}
    return replace(processing, tokenizer_json=json.dumps(value, ensure_ascii=False)) if steps else processing


def own_head(architecture: dict[str, Any]) -> dict[str, torch.Tensor] | None:
    """The state of the `PairHead` that keeps the embeddings of a dual encoder as they are, at its own temperature,
    up to the limit of one that is learnt; None for two backbones that were put together."""
    import torch

    from models.classifier import LARGEST_SCALE

    if "scale" not in architecture:
        return None
    widths = zip(("image", "text"), architecture["widths"], strict=True)
    state = {"log_scale": torch.tensor(math.log(min(architecture["scale"], LARGEST_SCALE)))}
    for side, width in widths:
        state |= {f"{side}.weight": torch.eye(width), f"{side}.bias": torch.zeros(width)}
    return state
