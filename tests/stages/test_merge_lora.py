"""merge-lora: what it proves, and that each of its gates can fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import models.adapters
import models.checkpoint
from models.adapters import load_adapted
from models.checkpoint import load_checkpoint
from models.errors import MergeError, ModelError
from stages.artifact import digest_files
from stages.base import StageResult
from stages.finetune import Finetune, FinetuneConfig
from stages.merge_lora import MergeLora, MergeLoraConfig, real_inputs
from tests.stages.small_run import artifact_of, made_up_data, make_context


@pytest.fixture(scope="module", params=["image", "text"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finetune artifact with an adapter."""
    return train(tmp_path_factory.mktemp("trained"), request.param), request.param


@pytest.fixture(scope="module")
def image_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("image"), "image")


NOT_NEEDED = "hf:org/not-needed"


def train(root: Path, kind: str) -> Path:
    context = make_context(root, "finetune", made_up_data(kind), kind)
    rate = {"backbone_learning_rate": 1e-2}
    Finetune().run(context, FinetuneConfig(strategy="lora", epochs=1, batch_size=8, **rate))
    return context.output


def merge(root: Path, source: Path, kind: str = "image") -> StageResult:
    """Run the stage; its output is `root/merged`."""
    inputs = {"finetune": artifact_of("finetune", source)}
    context = make_context(root, "merged", made_up_data(kind), kind, inputs, backbone=NOT_NEEDED)
    return MergeLora().run(context, MergeLoraConfig())


def failed(result: StageResult) -> set[str]:
    return {gate.name for gate in result.gates if not gate.passed}


def edited_copy(source: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """The artifact with changed adapter weights."""
    shutil.copytree(source, target)
    file = target / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, {"format": "pt"})
    return target


def test_the_merged_checkpoint_is_the_adapted_network(tmp_path: Path, trained: tuple[Path, str]) -> None:
    source, kind = trained
    before = digest_files(source)
    result = merge(tmp_path, source, kind)
    assert not failed(result)
    assert {gate.name for gate in result.gates} == {
        "merged equals adapted", "merge keeps the adapter's effect", "merging changed the backbone", "head kept",
        "reload equals merged",
    }  # fmt: skip
    assert digest_files(source) == before
    merged = load_checkpoint(tmp_path / "merged" / "checkpoint")
    adapted = load_adapted(source / "base", source / "adapter")
    context = make_context(tmp_path, "other", made_up_data(kind), kind, backbone=NOT_NEEDED)
    inputs = real_inputs(context, merged, 12)
    base = load_checkpoint(source / "base").model
    with torch.inference_mode():
        wanted, found, untouched = adapted(*inputs), merged.model(*inputs), base(*inputs)
    scale = float(wanted.max() - wanted.min())
    assert float((found - wanted).abs().max()) <= 1e-5 * scale
    assert float((untouched - wanted).abs().max()) > 1e-3 * scale  # the test above is not vacuous
    assert not any("lora" in name for name in load_file(tmp_path / "merged" / "checkpoint" / "model.safetensors"))
    measured = result.measurements
    assert measured["passed_through"] is False
    assert measured["delta_retained"] == pytest.approx(1.0, abs=1e-3)
    assert measured["max_weight_change"] > 0
    json.dumps(measured, allow_nan=False)


def test_a_plain_checkpoint_is_passed_through(tmp_path: Path) -> None:
    context = make_context(tmp_path, "finetune", made_up_data("image"))
    Finetune().run(context, FinetuneConfig(strategy="feature-extraction"))
    result = merge(tmp_path, context.output)
    assert result.measurements == {"passed_through": True}
    assert "no adapter" in result.notes[0]
    assert digest_files(tmp_path / "merged" / "checkpoint") == digest_files(context.output / "checkpoint")


def test_neither_adapter_nor_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "finetune").mkdir()
    with pytest.raises(MergeError, match="holds neither"):
        merge(tmp_path, tmp_path / "finetune")


def test_an_adapter_that_changes_nothing_fails(tmp_path: Path, image_artifact: Path) -> None:
    def silence(weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            if "lora_B" in name:
                tensor.zero_()

    result = merge(tmp_path, edited_copy(image_artifact, tmp_path / "silent", silence))
    assert "merging changed the backbone" in failed(result)


def test_nan_in_the_adapter_is_an_error(tmp_path: Path, image_artifact: Path) -> None:
    def poison(weights: dict[str, torch.Tensor]) -> None:
        next(tensor for name, tensor in weights.items() if "lora_A" in name).view(-1)[0] = float("nan")

    with pytest.raises(ModelError, match="NaN"):
        merge(tmp_path, edited_copy(image_artifact, tmp_path / "poisoned", poison))


def test_logits_that_overflow_are_an_error(tmp_path: Path, image_artifact: Path) -> None:
    def explode(weights: dict[str, torch.Tensor]) -> None:
        next(tensor for name, tensor in weights.items() if name.endswith("task_head.weight")).fill_(3e38)
        next(tensor for name, tensor in weights.items() if name.endswith("task_head.bias"))[:2] = torch.tensor(
            [3.4e38, -3.4e38]  # whichever sign the features have, one class overflows
        )

    with pytest.raises(MergeError, match="NaN or infinity on validation"):
        merge(tmp_path, edited_copy(image_artifact, tmp_path / "exploding", explode))


def break_fold(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Any, Any], None]) -> None:
    """Let the real fold be followed by `damage(merged, adapted before)`."""
    real = models.adapters.fold

    def broken(adapted: Any) -> Any:
        base = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
        merged = real(adapted)
        with torch.no_grad():
            damage(merged, base)
        return merged

    monkeypatch.setattr(models.adapters, "fold", broken)


def test_a_permuted_weight_fails(tmp_path: Path, image_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def permute(merged: Any, base: Any) -> None:
        weight = merged.backbone.get_submodule("network.conv_head").weight
        weight.copy_(weight.flip(0))

    break_fold(monkeypatch, permute)
    assert {"merged equals adapted", "merge keeps the adapter's effect"} <= failed(merge(tmp_path, image_artifact))


def test_a_fold_that_drops_one_adapter_fails(
    tmp_path: Path, image_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drop(merged: Any, base: Any) -> None:
        name = next(key for key in base if key.endswith("conv_pw.base_layer.weight"))
        path = name.removeprefix("base_model.model.").removesuffix(".base_layer.weight")
        merged.get_submodule(path).weight.copy_(base[name])

    break_fold(monkeypatch, drop)
    result = merge(tmp_path, image_artifact)
    assert failed(result)
    assert result.measurements["delta_retained"] < 0.999


def test_a_dropped_head_fails(tmp_path: Path, image_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drop(merged: Any, base: Any) -> None:
        merged.task_head.bias.add_(0.5)

    break_fold(monkeypatch, drop)
    assert "head kept" in failed(merge(tmp_path, image_artifact))


def test_a_checkpoint_stored_in_half_precision_fails(
    tmp_path: Path, image_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = models.checkpoint.save_checkpoint

    def rounding(folder: Path, model: Any, *rest: Any) -> None:
        import copy

        real(folder, copy.deepcopy(model).to(torch.bfloat16), *rest)

    monkeypatch.setattr(models.checkpoint, "save_checkpoint", rounding)
    result = merge(tmp_path, image_artifact)
    assert "reload equals merged" in failed(result)
    assert abs(result.measurements["delta_retained"] - 1) > 1e-6
