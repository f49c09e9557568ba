"""LoRA: where it goes, that it comes back from disk, that it folds."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from models.adapters import (
    METHODS,
    AdapterSettings,
    Method,
    adapter_weights,
    fold,
    inject_adapters,
    load_adapted,
    save_adapter,
    target_modules,
    untrained_adapters,
)
from models.backbones.build import LoadedBackbone, build_backbone
from models.backbones.packaged import find_packaged
from models.checkpoint import load_checkpoint
from models.classifier import Classifier, hold_batchnorm
from models.errors import MergeError, ModelError
from tests.models.tiny import (
    BERT,
    GPT2,
    RESNET,
    SQUEEZEBERT,
    TIMM,
    VIT,
    classifier_of,
    image_backbone,
    inputs_of,
    logits_of,
    saved_checkpoint,
    text_backbone,
)

SETTINGS = AdapterSettings(method="lora", rank=4, alpha=8, dropout=0.1)
NORMALISED = {"mean": [0.5] * 3, "std": [0.5] * 3}
BACKBONES: dict[str, Any] = {
    "timm-cnn": TIMM,
    "timm-vit": {"library": "timm", "name": "test_vit", "arguments": {"img_size": 32}, **NORMALISED},
    "hf-resnet": {"library": "hf", "modality": "image", "config": RESNET, **NORMALISED},
    "hf-vit": {"library": "hf", "modality": "image", "config": VIT, **NORMALISED},
    "hf-bert": BERT,
    "hf-gpt2": GPT2,
    "hf-squeezebert": SQUEEZEBERT,
}


def backbone(name: str) -> LoadedBackbone:
    chosen = BACKBONES[name]
    return image_backbone(chosen) if "library" in chosen else text_backbone(chosen)


def train(model: nn.Module, inputs: tuple[torch.Tensor, ...], steps: int = 4, rate: float = 0.02) -> None:
    """A few steps of AdamW on made-up labels."""
    torch.manual_seed(0)
    labels = torch.arange(len(inputs[0])) % 3
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=rate)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(*inputs), labels).backward()
        optimizer.step()
    model.eval()


def trained_adapter(
    name: str, folder: Path, method: Method = "lora"
) -> tuple[PeftModel, tuple[torch.Tensor, ...], torch.Tensor]:
    """Base and adapter on disk, the live adapted network, inputs, and the base's logits on them."""
    loaded = backbone(name)
    model = saved_checkpoint(folder / "base", loaded)
    inputs = inputs_of(loaded)
    base_logits = logits_of(model, inputs)
    adapted = inject_adapters(model, replace(SETTINGS, method=method))
    hold_batchnorm(adapted)
    before = adapter_weights(adapted)
    train(adapted, inputs)
    assert not untrained_adapters(adapted, before)
    save_adapter(adapted, folder / "adapter")
    return adapted, inputs, base_logits


@pytest.mark.parametrize("name", BACKBONES)
def test_reload_from_disk_is_exact(name: str, tmp_path: Path) -> None:
    adapted, inputs, base_logits = trained_adapter(name, tmp_path)
    again = load_adapted(tmp_path / "base", tmp_path / "adapter")
    assert not again.training
    assert torch.equal(logits_of(again, inputs), logits_of(adapted, inputs))
    assert (logits_of(again, inputs) - base_logits).abs().max() > 1e-2


@pytest.mark.parametrize("name", BACKBONES)
def test_fold_of_a_reloaded_adapter_equals_it(name: str, tmp_path: Path) -> None:
    _, inputs, base_logits = trained_adapter(name, tmp_path)
    adapted = load_adapted(tmp_path / "base", tmp_path / "adapter")
    expected = logits_of(adapted, inputs)
    merged = fold(adapted)
    assert isinstance(merged, Classifier) and not merged.training
    assert not [key for key in merged.state_dict() if "lora" in key or "base_layer" in key or "modules_to_save" in key]
    assert {weight.dtype for weight in merged.parameters()} == {torch.float32}
    # fp32 sums in another order: 1e-6 of the logit scale by the probes on Linear and Conv2d.
    assert (logits_of(merged, inputs) - expected).abs().max() <= 1e-5
    assert (logits_of(merged, inputs) - base_logits).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["timm-cnn", "hf-bert"])
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"lora"}))
def test_every_method_reloads_and_folds_exactly(name: str, method: Method, tmp_path: Path) -> None:
    adapted, inputs, _ = trained_adapter(name, tmp_path, method)
    again = load_adapted(tmp_path / "base", tmp_path / "adapter")
    expected = logits_of(again, inputs)
    assert (expected - logits_of(adapted, inputs)).abs().max() <= 1e-6
    head = copy.deepcopy(again.get_submodule("base_model.model.task_head.modules_to_save.default"))
    with torch.inference_mode():
        effect = (expected - head(load_checkpoint(tmp_path / "base").model.backbone(*inputs))).abs().max()
    merged = fold(again)
    error = (logits_of(merged, inputs) - expected).abs().max()
    assert error <= 1e-5 and error <= 0.01 * effect  # OFT on 3×3 convolutions is off by the whole effect
    assert {type(part).__module__ for part in merged.modules() if "peft" in type(part).__module__} == set()


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_itself_is_adapted_not_the_head_alone(name: str, tmp_path: Path) -> None:
    trained_adapter(name, tmp_path)
    base = load_adapted(tmp_path / "base", tmp_path / "adapter")
    merged = fold(base).state_dict()
    before = load_file(tmp_path / "base" / "model.safetensors")
    moved = {key for key, tensor in before.items() if not torch.equal(tensor, merged[key])}
    assert {"task_head.weight", "task_head.bias"} < moved
    model, _ = classifier_of(backbone(name))
    assert moved == {f"{path}.weight" for path in target_modules(model)} | {"task_head.weight", "task_head.bias"}


@pytest.mark.parametrize("name", BACKBONES)
def test_every_target_is_a_layer_that_is_called(name: str) -> None:
    loaded = backbone(name)
    model, _ = classifier_of(loaded)
    assert target_modules(model, inputs_of(loaded)) == target_modules(model)


def test_targets_of_a_convolutional_network() -> None:
    model, _ = classifier_of(image_backbone())
    targets = target_modules(model)
    modules = dict(model.named_modules())
    assert "backbone.network.conv_stem" in modules
    assert "backbone.network.conv_stem" not in targets and "task_head" not in targets
    assert "backbone.network.conv_head" in targets
    grouped = [name for name, part in modules.items() if isinstance(part, nn.Conv2d) and part.groups > 1]
    assert grouped and not set(grouped) & set(targets)


def test_head_is_matched_by_its_own_name_only() -> None:
    """peft compares suffixes: "head" would take timm's conv_head whole into the adapter."""
    adapted = inject_adapters(classifier_of(image_backbone())[0], SETTINGS)
    whole = [name for name, _ in adapted.named_modules() if name.endswith("modules_to_save")]
    assert whole == ["base_model.model.task_head.modules_to_save"]
    trainable = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert trainable and all("lora_" in name or "task_head" in name for name in trainable)


def test_layers_that_are_passed_by_take_no_adapter() -> None:
    class Passed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.read, self.dead = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.attention = nn.MultiheadAttention(4, 1)

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            mixed, _ = self.attention(values, values, values)
            return nn.functional.linear(self.used(mixed), self.read.weight)

    model = Classifier(Passed(), nn.Linear(4, 2)).train()
    assert target_modules(model) == ["backbone.used", "backbone.read", "backbone.dead"]
    assert target_modules(model, [torch.ones(3, 4)]) == ["backbone.used"]
    assert model.training and model.backbone.training


def test_convolutions_that_pad_on_their_own_take_no_adapter() -> None:
    """A low-rank branch beside timm's Conv2dSame has another output size; only folding it shows."""
    architecture = {"library": "timm", "name": "tf_efficientnet_es", "arguments": {}, **NORMALISED}
    model = Classifier(build_backbone(architecture), nn.Linear(1280, 2)).eval()
    modules = dict(model.named_modules())
    targets = target_modules(model)
    assert any(type(part).__name__ == "Conv2dSame" and part.groups == 1 for part in modules.values())
    assert {type(modules[name]) for name in targets} == {nn.Conv2d}
    image = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    assert logits_of(inject_adapters(model, SETTINGS).eval(), (image,)).shape == (2, 2)


def test_linear_layers_by_another_name_are_adapted() -> None:
    gpt2, squeezebert = (classifier_of(text_backbone(config))[0] for config in (GPT2, SQUEEZEBERT))
    assert {path.rpartition(".")[2] for path in target_modules(gpt2)} == {"c_attn", "c_proj", "c_fc"}
    modules = dict(squeezebert.named_modules())
    found = [modules[path] for path in target_modules(squeezebert)]
    assert found and all(isinstance(one, nn.Conv1d) and one.groups == 1 for one in found)


class Prying(nn.Module):
    """As timm's davit (reads `kernel_size` of a layer) and dla (a layer is called `base_layer`)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.base_layer = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        maps = self.stem(image.permute(0, 3, 1, 2) / 255)
        shift = self.base_layer.kernel_size[0] // 2
        features: torch.Tensor = self.base_layer(maps).roll(shift, 2)[:, :, 1:].mean((2, 3))
        return features


def test_networks_that_read_their_layers_or_share_names_with_peft() -> None:
    torch.manual_seed(0)
    model = Classifier(Prying(), nn.Linear(8, 3)).eval()
    image = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    adapted = inject_adapters(model, SETTINGS, (image,))
    train(adapted, (image,))
    expected = logits_of(adapted, (image,))
    merged = fold(adapted)
    assert (logits_of(merged, (image,)) - expected).abs().max() <= 1e-5
    assert isinstance(merged.get_submodule("backbone.base_layer"), nn.Conv2d)


def test_dilated_convolutions_take_no_adapter() -> None:
    """peft's branch beside them is not dilated: of another size, or a merge that is another network."""
    layers = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.Conv2d(4, 4, 3)
    assert target_modules(Classifier(nn.Sequential(*layers), nn.Linear(4, 2))) == ["backbone.2"]


def test_backbone_without_a_layer_for_lora_says_what_to_do() -> None:
    model = Classifier(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4)), nn.Linear(4, 2))
    with pytest.raises(ModelError, match="strategy: lp-ft"):
        target_modules(model)


def test_untrained_adapters_are_found(tmp_path: Path) -> None:
    loaded = text_backbone()
    adapted = inject_adapters(classifier_of(loaded)[0], SETTINGS)
    before = adapter_weights(adapted)
    assert len(untrained_adapters(adapted, before)) == len(adapted.targeted_module_names)
    for name, weight in adapted.named_parameters():  # what weight decay does to an adapter that B switches off
        if ".lora_A." in name:
            weight.data *= 0.99
    assert len(untrained_adapters(adapted, before)) == len(adapted.targeted_module_names)
    train(adapted, inputs_of(loaded), steps=1)
    assert untrained_adapters(adapted, before) == []


def test_saved_adapter_is_the_same_twice_and_names_no_path(tmp_path: Path) -> None:
    adapted, *_ = trained_adapter("timm-cnn", tmp_path)
    save_adapter(adapted, tmp_path / "again")
    names = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    assert all((tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes() for name in names)
    assert str(tmp_path) not in (tmp_path / "again" / "adapter_config.json").read_text()


def test_moved_batchnorm_statistics_drift_on_reload(tmp_path: Path) -> None:
    """Why training must call `hold_batchnorm`: the adapter does not hold the statistics."""
    loaded = image_backbone()
    model = saved_checkpoint(tmp_path / "base", loaded)
    adapted = inject_adapters(model, SETTINGS)
    train(adapted, inputs_of(loaded))
    save_adapter(adapted, tmp_path / "adapter")
    again = load_adapted(tmp_path / "base", tmp_path / "adapter")
    assert (logits_of(again, inputs_of(loaded)) - logits_of(adapted, inputs_of(loaded))).abs().max() > 1e-3


def edited(folder: Path, edit: str) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    state = load_file(file)
    first = next(key for key in state if "lora_B" in key)
    if edit == "nan":
        state[first][0] = float("nan")
    elif edit == "missing":
        del state[first]
    elif edit == "headless":
        state = {key: tensor for key, tensor in state.items() if "task_head" not in key}
    elif edit == "extra":
        state["base_model.model.backbone.network.surplus.lora_A.weight"] = torch.zeros(1, 1)
    elif edit == "shape":
        state[first] = state[first][:1].contiguous()
    save_file(state, file, metadata={"format": "pt"})


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("nan", "holds NaN"),
        ("missing", "lacks 1 weights"),
        ("headless", "cannot be loaded.*task_head"),
        ("extra", "has 1 others .*surplus"),
        ("shape", "cannot be loaded.*size mismatch"),
    ],
)
def test_damaged_adapter_is_refused(edit: str, message: str, tmp_path: Path) -> None:
    trained_adapter("hf-bert", tmp_path)
    edited(tmp_path, edit)
    with pytest.raises(ModelError, match=f"(?s){message}"):
        load_adapted(tmp_path / "base", tmp_path / "adapter")


def test_missing_adapter_is_named_and_no_pickle_is_read(tmp_path: Path) -> None:
    trained_adapter("hf-bert", tmp_path)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is missing"):
        load_adapted(tmp_path / "base", tmp_path / "adapter")


def test_fold_of_nan_is_a_merge_error() -> None:
    adapted = inject_adapters(classifier_of(text_backbone())[0], SETTINGS)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.constant_(weight, float("inf"))
    with pytest.raises(MergeError, match="broken weight"):
        fold(adapted)


def test_small_updates_survive_because_the_fold_is_fp32() -> None:
    """At ‖ΔW‖/‖W‖ of 0.1 % a bf16 merge leaves most entries as they were."""
    loaded = text_backbone()
    base = classifier_of(loaded)[0]
    path = target_modules(base)[0]
    weight = dict(base.named_modules())[path].weight.detach().clone()
    adapted = inject_adapters(copy.deepcopy(base), SETTINGS)
    layer = adapted.get_submodule(f"base_model.model.{path}")
    nn.init.normal_(layer.lora_B["default"].weight, std=1.0)
    scale = 0.001 * weight.norm() / layer.get_delta_weight("default").norm()
    layer.lora_B["default"].weight.data *= scale
    merged = dict(fold(adapted).named_modules())[path].weight.detach()
    changed = (merged != weight).float().mean()
    assert changed > 0.99
    assert (merged.bfloat16() != weight.bfloat16()).float().mean() < 0.6


def test_config_on_disk_is_plain_lora(tmp_path: Path) -> None:
    trained_adapter("timm-cnn", tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert config["modules_to_save"] == ["task_head"]
    assert config["target_modules"] == sorted(config["target_modules"])


@pytest.mark.slow
@pytest.mark.skipif(find_packaged("timm:tf_efficientnet_lite0") is None, reason="the weights are not installed")
def test_real_lite0_adapts_reloads_and_folds(tmp_path: Path) -> None:
    from models.checkpoint import save_checkpoint
    from models.classifier import make_spec, new_classifier
    from models.registry import load_backbone, resolve

    spec = resolve("timm:tf_efficientnet_lite0")
    loaded = load_backbone(spec, "image-classification", 64, None)
    model = new_classifier(loaded, 3).eval()
    description = make_spec("image-classification", spec, loaded, ("a", "b", "c"))
    save_checkpoint(tmp_path / "base", model, description, loaded.processing)
    inputs = inputs_of(loaded)
    base_logits = logits_of(model, inputs)
    adapted = inject_adapters(model, SETTINGS, inputs)
    hold_batchnorm(adapted)
    before = adapter_weights(adapted)
    train(adapted, inputs, steps=3, rate=1e-3)
    assert not untrained_adapters(adapted, before)
    save_adapter(adapted, tmp_path / "adapter")
    again = load_adapted(tmp_path / "base", tmp_path / "adapter")
    expected = logits_of(again, inputs)
    assert torch.equal(expected, logits_of(adapted, inputs))
    merged = fold(again)
    assert (logits_of(merged, inputs) - expected).abs().max() <= 1e-5
    assert (logits_of(merged, inputs) - base_logits).abs().max() > 1e-3
