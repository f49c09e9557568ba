"""Dual encoders with both towers: their embeddings are transformers' own, also saved, reloaded and merged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.adapters import AdapterSettings, fold, inject_adapters
from models.backbones.build import build_backbone
from models.backbones.hf_dual import own_head
from models.checkpoint import load_checkpoint, save_checkpoint
from models.classifier import Classifier, PairHead, make_spec, new_classifier
from models.errors import ModelError
from models.layers import backbone_layers
from models.modalities.image_text import PairProcessing
from models.registry import load_backbone, resolve
from models.tasks import task_of
from tests.models.tiny import DUAL, edit_json, hf_dual_folder, hf_text_folder, logits_of

KINDS = tuple(DUAL)
TEXTS = ("a red bird", "stone", "good good tree runs")


def contents() -> list[Any]:
    """An image of the network's own size with each text: resizing is not what is tested here."""
    random = np.random.default_rng(0)
    return [(random.integers(0, 256, (32, 32, 3), dtype=np.uint8), text) for text in TEXTS]


def reference(folder: Path) -> torch.Tensor:
    """What transformers itself makes of the contents: embeddings of length 1 side by side."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    network, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    images, texts = zip(*contents(), strict=True)
    pixels = AutoImageProcessor.from_pretrained(folder)(list(images), return_tensors="pt")["pixel_values"]
    if network.config.model_type == "siglip":
        given = tokenizer(list(texts), padding="max_length", max_length=12, return_tensors="pt")
        tokens = {"input_ids": given.input_ids}
    else:
        given = tokenizer(list(texts), padding=True, return_tensors="pt")
        tokens = {name: given[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        found = network.get_image_features(pixels).pooler_output, network.get_text_features(**tokens).pooler_output
    return torch.cat([torch.nn.functional.normalize(one, dim=1) for one in found], dim=1)


def loaded_network(folder: Path, saved: Path) -> tuple[Classifier, tuple[torch.Tensor, ...]]:
    """A network of that folder with its own head, saved as a checkpoint, and its inputs."""
    spec = resolve(str(folder))
    loaded = load_backbone(spec, "image-text", None, None)
    described = make_spec("image-text", spec, loaded, ())
    model = new_classifier(loaded, described.io.width).eval()
    save_checkpoint(saved, model, described, loaded.processing)
    arrays = loaded.processing.arrays(contents())
    return model, tuple(torch.from_numpy(arrays[one.name]) for one in loaded.processing.inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_those_of_transformers_through_reload_and_merge(kind: str, tmp_path: Path) -> None:
    expected = reference(hf_dual_folder(tmp_path / "hf", kind))
    assert (expected - expected[0]).abs().max() > 0.01  # of random weights, but not all alike
    model, inputs = loaded_network(tmp_path / "hf", tmp_path / "saved")
    torch.testing.assert_close(logits_of(model, inputs), expected)
    head = model.task_head
    assert isinstance(head, PairHead) and head.log_scale.item() == pytest.approx(3.0)
    reloaded = load_checkpoint(tmp_path / "saved")
    torch.testing.assert_close(logits_of(reloaded.model, inputs), expected)
    adapted = inject_adapters(model, AdapterSettings("lora", 2, 4.0, 0.0), inputs)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    changed = logits_of(adapted.eval(), inputs)
    assert (changed - expected).abs().max() > 0.01
    torch.testing.assert_close(logits_of(fold(adapted), inputs), changed)


@pytest.mark.parametrize("kind", KINDS)
def test_all_parameters_have_a_layer(kind: str, tmp_path: Path) -> None:
    model, inputs = loaded_network(hf_dual_folder(tmp_path / "hf", kind), tmp_path / "saved")
    names = [name for layer in backbone_layers(model, inputs) for name in layer.parameters]
    assert sorted(names) == sorted(f"backbone.{name}" for name, _ in model.backbone.named_parameters())
    assert not any("logit" in name for name in names)
    architecture = load_checkpoint(tmp_path / "saved").spec.architecture
    assert build_backbone(architecture).state_dict().keys() == model.backbone.state_dict().keys()


def test_siglip_reads_a_fixed_length_in_lower_case(tmp_path: Path) -> None:
    folder = hf_dual_folder(tmp_path / "hf", "siglip")
    edit_json(folder / "tokenizer_config.json", do_lower_case=True)
    loaded = load_backbone(resolve(str(folder)), "image-text", None, None)
    assert isinstance(loaded.processing, PairProcessing)
    texts = loaded.processing.text
    assert [(one.name, one.dims) for one in texts.inputs] == [("input_ids", ("batch", 12))]
    arrays = texts.arrays(["A RED bird", "a red bird"])["input_ids"]
    assert arrays.shape == (2, 12) and (arrays[0] == arrays[1]).all() and arrays[0, 1] == 4  # "a", not unknown
    edit_json(folder / "tokenizer_config.json", tokenizer_class="SiglipTokenizer")
    canonical = load_backbone(resolve(str(folder)), "image-text", None, None).processing
    assert isinstance(canonical, PairProcessing)
    same = canonical.text.arrays(["A  red, bird!"])["input_ids"]
    assert (same[0] == arrays[0]).all()
    with pytest.raises(ModelError, match="exactly 12 tokens, finetune.max_length is 8"):
        load_backbone(resolve(str(folder)), "image-text", None, 8)


def test_padding_on_the_left_is_refused_where_it_is_read(tmp_path: Path) -> None:
    siglip, clip = (hf_dual_folder(tmp_path / kind, kind) for kind in ("siglip", "clip"))
    for folder in (siglip, clip):
        edit_json(folder / "tokenizer_config.json", padding_side="left")
    with pytest.raises(ModelError, match="pads on the left, and the encoder reads its padding"):
        load_backbone(resolve(str(siglip)), "image-text", None, None)
    load_backbone(resolve(str(clip)), "image-text", None, None)  # it masks its padding


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_of_the_size_of_the_positions(kind: str, tmp_path: Path) -> None:
    spec = resolve(str(hf_dual_folder(tmp_path / "hf", kind)))
    with pytest.raises(ModelError, match="positions for images of 32 pixels, finetune.image_size is 64"):
        load_backbone(spec, "image-text", 64, None)
    processing = load_backbone(spec, "image-text", 32, None).processing
    assert isinstance(processing, PairProcessing) and processing.image.size == 32


def test_the_own_temperature_is_where_the_loss_starts(tmp_path: Path) -> None:
    model, inputs = loaded_network(hf_dual_folder(tmp_path / "hf"), tmp_path / "saved")
    head = model.task_head
    assert isinstance(head, PairHead)
    with torch.inference_mode():
        images, _ = head.lengthened(model(*inputs)).chunk(2, dim=1)
    torch.testing.assert_close(images.norm(dim=1), torch.full((3,), math.exp(3.0)))


@pytest.mark.parametrize("log_scale", [4.6052, 4.7653])  # of CLIP and SigLIP, above ln 100
def test_a_temperature_at_its_limit_still_learns(log_scale: float) -> None:
    head = PairHead((4, 4), 4, 1.0)
    with torch.no_grad():
        head.log_scale.fill_(log_scale)
    angles = 0.05 * torch.arange(6)
    rows = torch.stack([angles.cos(), angles.sin(), 0 * angles, 0 * angles], dim=1)
    for order, learns in ((torch.arange(6), False), (torch.arange(6).flip(0), True)):
        # Of alike but matching pairs the loss would fall beyond the limit, of mismatched ones it falls with the scale.
        outputs = head.lengthened(torch.cat([rows, rows[order]], dim=1))
        torch.testing.assert_close(outputs.chunk(2, dim=1)[0].norm(dim=1), torch.full((6,), 100.0))
        head.zero_grad()
        task_of("image-text").loss(outputs, torch.arange(6)).backward()
        gradient = head.log_scale.grad
        assert gradient is not None and (gradient.item() > 0.1 if learns else gradient.item() == 0)
    own = own_head({"scale": math.exp(log_scale), "widths": [4, 4]})
    assert own is not None and own["log_scale"].item() == pytest.approx(math.log(100))  # no steps are lost above it


def test_what_is_no_dual_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="bert is one encoder"):
        load_backbone(resolve(str(hf_text_folder(tmp_path / "text"))), "image-text", None, None)
    folder = hf_dual_folder(tmp_path / "hf", "siglip")
    values = json.loads((folder / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        values[part].pop("model_type", None)
    values["vision_config"].pop("image_size", None)
    edit_json(folder / "config.json", **{**values, "model_type": "siglip2"})
    with pytest.raises(ModelError, match="NaFlex"):
        load_backbone(resolve(str(folder)), "image-text", None, None)
