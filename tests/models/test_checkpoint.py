"""Checkpoints on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.backbones.build import LoadedBackbone
from models.checkpoint import load_checkpoint, load_spec, save_checkpoint
from models.errors import ModelError
from tests.models.tiny import classifier_of, edit_json, image_backbone, inputs_of, logits_of, saved_checkpoint
from tests.models.tiny import text_backbone as text


@pytest.mark.parametrize("make", [image_backbone, text])
def test_reload_is_exact(make: type, tmp_path: Path) -> None:
    loaded: LoadedBackbone = make()
    model = saved_checkpoint(tmp_path / "new" / "checkpoint", loaded)
    checkpoint = load_checkpoint(tmp_path / "new" / "checkpoint")
    inputs = inputs_of(loaded)
    assert not checkpoint.model.training
    assert torch.equal(logits_of(checkpoint.model, inputs), logits_of(model, inputs))
    assert checkpoint.processing == loaded.processing
    assert checkpoint.spec.labels == ("a", "b", "c")
    assert checkpoint.spec.io.inputs == loaded.processing.inputs


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    loaded = text()
    for name in ("one", "two"):
        saved_checkpoint(tmp_path / name, loaded)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["model.json", "model.safetensors", "tokenizer.json"]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


def test_half_precision_weights_come_back_in_fp32(tmp_path: Path) -> None:
    loaded = image_backbone()
    model, spec = classifier_of(loaded)
    save_checkpoint(tmp_path, model.half(), spec, loaded.processing)
    weights = load_checkpoint(tmp_path).model.parameters()
    assert {weight.dtype for weight in weights} == {torch.float32}


def test_tied_weights_can_be_saved(tmp_path: Path) -> None:
    loaded = text()
    model, spec = classifier_of(loaded)
    layers = model.backbone.network.encoder.layer  # type: ignore[union-attr]
    layers[1].output.dense.weight = layers[0].output.dense.weight  # type: ignore[index, union-attr]
    save_checkpoint(tmp_path, model, spec, loaded.processing)
    inputs = inputs_of(loaded)
    assert torch.equal(logits_of(load_checkpoint(tmp_path).model, inputs), logits_of(model, inputs))


def change(file: Path, edit: str) -> None:
    """Damage the stored weights in one way."""
    state = load_file(file)
    if edit == "nan":
        state["task_head.weight"][0, 0] = float("nan")
    elif edit == "inf":
        state["task_head.bias"][0] = float("inf")
    elif edit == "missing":
        del state["task_head.bias"]
    elif edit == "extra":
        state["surplus"] = torch.zeros(1)
    elif edit == "shape":
        state["task_head.weight"] = state["task_head.weight"][:2].contiguous()
    save_file(state, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("nan", "task_head.weight holds NaN or infinity"),
        ("inf", "task_head.bias holds NaN or infinity"),
        ("missing", "does not fit.*task_head.bias"),
        ("extra", "does not fit.*surplus"),
        ("shape", "does not fit.*size mismatch"),
    ],
)
def test_damaged_weights_are_refused(edit: str, message: str, tmp_path: Path) -> None:
    saved_checkpoint(tmp_path, image_backbone())
    change(tmp_path / "model.safetensors", edit)
    with pytest.raises(ModelError, match=f"(?s){message}"):
        load_checkpoint(tmp_path)


def test_torn_and_missing_files_are_named(tmp_path: Path) -> None:
    saved_checkpoint(tmp_path, image_backbone())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        load_checkpoint(tmp_path)
    weights.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        load_checkpoint(tmp_path)
    (tmp_path / "model.json").write_text("[]")
    with pytest.raises(ModelError, match=r"model\.json is no readable model description"):
        load_checkpoint(tmp_path)
    with pytest.raises(ModelError, match="no readable model description"):
        load_spec(tmp_path / "nowhere")


def test_pickle_beside_the_weights_is_never_read(tmp_path: Path) -> None:
    saved_checkpoint(tmp_path, image_backbone())
    (tmp_path / "model.safetensors").rename(tmp_path / "model.bin")
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        load_checkpoint(tmp_path)


def test_labels_must_fit_the_head(tmp_path: Path) -> None:
    saved_checkpoint(tmp_path, image_backbone())
    labels = json.loads((tmp_path / "model.json").read_text())["labels"]
    edit_json(tmp_path / "model.json", labels=[*labels, "d"])
    with pytest.raises(ModelError, match="4 labels"):
        load_checkpoint(tmp_path)
