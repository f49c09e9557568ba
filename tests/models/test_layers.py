"""Depth: every parameter in exactly one layer, from the stem up; also inside peft's wrapper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from models.adapters import AdapterSettings, inject_adapters
from models.classifier import Classifier
from models.layers import backbone_layers, call_order, layer_of, layers_by_module
from tests.models.tiny import classifier_of, image_backbone, inputs_of, text_backbone

SMALL = {"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 40}


class Wrapped(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden.mean(1)


def encoder(model_type: str, **values: Any) -> Classifier:
    from transformers import AutoConfig, AutoModel, T5Config, T5EncoderModel

    if model_type == "t5":
        network: nn.Module = T5EncoderModel(
            T5Config(num_layers=2, d_model=16, d_ff=16, d_kv=8, num_heads=2, vocab_size=40)
        )
    else:
        network = AutoModel.from_config(AutoConfig.for_model(model_type, **values))
    return Classifier(Wrapped(network), nn.Linear(16, 2))


TOKENS = (torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64))
DISENTANGLED = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}


@pytest.mark.parametrize(
    ("model", "blocks"),
    [
        (lambda: encoder("bert", **SMALL), ["stem", "encoder.layer.0", "encoder.layer.1", "encoder.layer.2"]),
        (lambda: encoder("deberta-v2", **SMALL, **DISENTANGLED),
         ["stem", "encoder.layer.0", "encoder.layer.1", "encoder.layer.2"]),
        (lambda: encoder("albert", embedding_size=16, **SMALL), ["stem", "encoder.albert_layer_groups.0"]),
        (lambda: encoder("t5"), ["stem", "encoder.block.0", "encoder.block.1"]),
    ],
    ids=["bert", "deberta-v2", "albert", "t5"],
)  # fmt: skip
def test_blocks_of_encoders_in_their_order(model: Any, blocks: list[str]) -> None:
    made = model()
    layers = backbone_layers(made, TOKENS)
    assert [layer.name.startswith(block) for layer, block in zip(layers, blocks, strict=True)] == [True] * len(blocks)
    named = [name for layer in layers for name in layer.parameters]
    assert sorted(named) == sorted(name for name, _ in made.backbone.named_parameters(prefix="backbone"))


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "test_convnext", "resnet18", "densenet121"])
def test_blocks_of_timm(name: str) -> None:
    import timm

    made = Classifier(nn.Module(), nn.Linear(4, 2))
    made.backbone.network = timm.create_model(name, num_classes=0)
    layers = backbone_layers(made, ())
    assert layers[0].name == "stem" and len(layers) > 3
    assert len({layer.name for layer in layers}) == len(layers)
    named = [name for layer in layers for name in layer.parameters]
    assert sorted(named) == sorted(name for name, _ in made.named_parameters() if name.startswith("backbone."))
    first = next(name for name, _ in made.backbone.named_parameters(prefix="backbone"))
    assert first in layers[0].parameters


@pytest.mark.parametrize("method", ["lora", "loha", "ia3", "oft"])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_adapters_belong_to_the_layer_that_they_adapt(method: Any, kind: str) -> None:
    loaded = image_backbone() if kind == "image" else text_backbone()
    model, _ = classifier_of(loaded)
    layers = backbone_layers(model, inputs_of(loaded))
    modules = layers_by_module(layers)
    owner = {name: index for index, layer in enumerate(layers) for name in layer.parameters}
    adapted = inject_adapters(model, AdapterSettings(method, 2, 2, 0.0))
    checked = 0
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "task_head" not in name:
            plain = name.removeprefix("base_model.model.")
            layer = next(plain.split(cut)[0] for cut in (".lora_", ".hada_", ".ia3_", ".oft_") if cut in plain)
            assert layer_of(name, modules) == owner[f"{layer}.weight"], name
            checked += 1
    assert checked
    assert layer_of("base_model.model.task_head.modules_to_save.default.weight", modules) is None


def test_looking_changes_neither_the_mode_nor_the_result() -> None:
    loaded = text_backbone()
    model, _ = classifier_of(loaded)
    inputs = inputs_of(loaded)
    wanted = model.eval()(*inputs)
    model.train()
    order = call_order(model, inputs)
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model.eval()(*inputs), wanted)
    assert order[""] == 0 and sorted(order.values()) == list(range(len(order)))
