"""finetune: what each strategy writes, what its numbers mean, and what stops it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from models.adapters import load_adapted
from models.checkpoint import load_checkpoint
from models.errors import MissingCapabilityError, TrainingError
from models.modalities import Processing
from stages.artifact import digest_files
from stages.data.splits import DataSplits
from stages.finetune import Finetune, FinetuneConfig
from stages.finetune.stage import check
from stages.inputs import batches
from tests.stages.small_run import images, made_up_data, make_context, split_of

EPOCHS = {"epochs": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def data() -> DataSplits:
    return made_up_data("image")


def accuracy_of(model: nn.Module, processing: Processing, data: DataSplits) -> float:
    """On the validation split."""
    chosen = []
    with torch.inference_mode():
        for arrays, _ in batches(processing, data["validation"], 5):
            logits = model(*(torch.from_numpy(arrays[tensor.name]) for tensor in processing.inputs))
            chosen.append(logits.argmax(1).numpy())
    return float((np.concatenate(chosen) == [one.label for one in data["validation"]]).mean())


def test_feature_extraction_ships_the_accuracy_it_reports(tmp_path: Path, data: DataSplits) -> None:
    context = make_context(tmp_path, "out", data)
    result = Finetune().run(context, FinetuneConfig(strategy="feature-extraction"))
    stored = load_checkpoint(context.output / "checkpoint")
    assert accuracy_of(stored.model, stored.processing, data) == result.measurements["validation_metric"]
    assert result.measurements["validation_metric"] > result.measurements["constant_baseline"] + 0.2
    assert result.measurements["trainable_parameters"] == sum(
        one.numel() for one in stored.model.task_head.parameters()
    )
    before = load_file(tmp_path / "backbone-image" / "model.safetensors")
    after = load_file(context.output / "checkpoint" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("backbone."))
    assert not torch.equal(before["task_head.weight"], after["task_head.weight"])


@pytest.mark.parametrize("kind", ["image", "text", "audio"])
def test_lora_writes_a_base_and_an_adapter_that_differs(tmp_path: Path, kind: str) -> None:
    data = made_up_data(kind)
    context = make_context(tmp_path, "out", data, kind)
    result = Finetune().run(context, FinetuneConfig(strategy="lora", **EPOCHS))
    base = load_checkpoint(context.output / "base")
    adapted = load_adapted(context.output / "base", context.output / "adapter")
    assert accuracy_of(adapted, base.processing, data) == result.measurements["validation_metric"]
    assert accuracy_of(base.model, base.processing, data) == result.measurements["probe_validation_metric"]
    weights = load_file(context.output / "adapter" / "adapter_model.safetensors")
    assert all(bool(tensor.count_nonzero()) for name, tensor in weights.items() if "lora_B" in name)
    assert any("task_head" in name for name in weights)
    assert 1 <= result.measurements["best_epoch"] <= 2
    assert [entry["epoch"] for entry in result.measurements["history"]] == [1, 2]
    share = result.measurements["trainable_parameters"] / result.measurements["total_parameters"]
    assert 0 < share < 1
    assert not (context.output / "checkpoint").exists()


@pytest.mark.parametrize("strategy", ["full", "lp-ft"])
def test_lower_layers_move_more_slowly_than_the_head(tmp_path: Path, data: DataSplits, strategy: Any) -> None:
    context = make_context(tmp_path, "out", data)
    result = Finetune().run(context, FinetuneConfig(strategy=strategy, layer_rate_ratio=50, **EPOCHS))
    stored = load_checkpoint(context.output / "checkpoint")
    assert accuracy_of(stored.model, stored.processing, data) == result.measurements["validation_metric"]
    low, high = result.measurements["backbone_learning_rates"]
    assert low == pytest.approx(result.measurements["head_learning_rate"] / 50) and low < high
    rates = [row["rate"] for row in result.measurements["layer_rates"]]
    assert rates == sorted(rates, reverse=True) and result.measurements["layer_rates"][0]["layer"] == "head"
    assert result.measurements["trainable_parameters"] == result.measurements["total_parameters"]
    before = load_file(tmp_path / "backbone-image" / "model.safetensors")
    after = load_file(context.output / "checkpoint" / "model.safetensors")
    convolution = "backbone.network.conv_stem.weight"
    moved = float((before[convolution] - after[convolution]).abs().max())
    steps = 2 * 3
    assert 0 < moved < 2 * steps * low


def test_the_same_run_gives_the_same_bytes(tmp_path: Path, data: DataSplits) -> None:
    config = FinetuneConfig(strategy="lora", **EPOCHS)
    digests = []
    for name in ("one", "two"):
        context = make_context(tmp_path, name, data)
        Finetune().run(context, config)
        digests.append(digest_files(context.output))
    assert digests[0] == digests[1]
    history = json.loads((tmp_path / "one" / "history.json").read_text(encoding="utf-8"))
    assert len(history["epochs"]) == 2
    assert all("validation_metric" in epoch and "seconds" not in epoch for epoch in history["epochs"])


def test_from_scratch_is_full_at_one_rate_without_a_probe(tmp_path: Path, data: DataSplits) -> None:
    result = Finetune().run(
        make_context(tmp_path, "scratch", data), FinetuneConfig(from_scratch=True, epochs=1, batch_size=8)
    )
    assert result.measurements["strategy"] == "full"
    assert result.measurements["probe_validation_metric"] is None
    assert result.measurements["backbone_learning_rates"] == [result.measurements["head_learning_rate"]] * 2
    before = load_file(tmp_path / "backbone-image" / "model.safetensors")
    after = load_file(tmp_path / "scratch" / "checkpoint" / "model.safetensors")
    name = "backbone.network.conv_stem.weight"
    assert float((before[name] - after[name]).abs().max()) > 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "lora", "from_scratch": True}, "write strategy: full"),
        ({"strategy": "lp-ft", "from_scratch": True}, "write strategy: full"),
        ({"backbone_learning_rate": 1e-3, "layer_rate_ratio": 10}, "write one of them"),
        ({"strategy": "auto", "head_learning_rate": 1e-3}, "to set rates name the strategy"),
        ({"strategy": "lp-ft", "initial_head": "random"}, "starts from the probe"),
        ({"strategy": "gradual-unfreezing", "epochs": 2, "phases": 3}, "fewer epochs than phases"),
        ({"strategy": "feature-extraction", "wise_ft": True}, "feature-extraction trains none"),
        ({"strategy": "lora", "wise_ft": True, "lora": {"method": "dora"}}, "lora and rslora only"),
        ({"strategy": "lora", "locked_tower": "text"}, "is for strategy: full or lp-ft, not lora"),
        ({"strategy": "full", "from_scratch": True, "locked_tower": "text"}, "nothing to keep in random weights"),
        ({"lora": {"method": "prefix-tuning"}}, "cannot be folded: it adds made-up inputs"),
        ({"lora": {"method": "PiSSA"}}, "cannot be folded: it changes the base weights"),
    ],
)
def test_contradictions_are_refused_before_anything_is_trained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FinetuneConfig.model_validate(settings)


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_divergence_fails_a_gate_is_said_aloud_and_leaves_no_weights(
    tmp_path: Path, data: DataSplits, strategy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = FinetuneConfig(strategy=strategy, backbone_learning_rate=1e30, head_learning_rate=1e30, **EPOCHS)
    result = Finetune().run(make_context(tmp_path, "out", data), config)
    gates = {gate.name: gate for gate in result.gates}
    assert not gates["training stays finite"].passed and "1e+30 (backbone)" in gates["training stays finite"].message
    assert not gates["beats the majority class"].passed  # nothing was measured, which is no evidence
    assert "training diverged" in caplog.text
    assert not (tmp_path / "out/adapter").exists() and not (tmp_path / "out/checkpoint").exists()


def test_divergence_keeps_the_epochs_before_it(
    tmp_path: Path, data: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.finetune.training import Recorder

    real = Recorder.see_loss
    monkeypatch.setattr(
        Recorder, "see_loss", lambda self, loss, step: real(self, float("nan") if step >= 4 else loss, step)
    )
    result = Finetune().run(make_context(tmp_path, "out", data), FinetuneConfig(strategy="lora", **EPOCHS))
    assert result.measurements["diverged"] and len(result.measurements["history"]) == 1
    assert result.measurements["validation_metric"] is None


def test_a_perfect_network_passes_where_the_majority_is_nearly_all() -> None:
    measured = {
        "strategy": "feature-extraction", "validation_metric": 1.0, "probe_validation_metric": 1.0,
        "constant_baseline": 0.995, "constant": "majority class", "metric": "accuracy",
        "samples": {"validation": 400}, "diverged": None, "quantization_aware": None,
    }  # fmt: skip
    assert all(gate.passed for gate in check(measured, FinetuneConfig()))
    assert not all(gate.passed for gate in check({**measured, "validation_metric": 0.995}, FinetuneConfig()))


def test_texts_that_are_cut_are_counted(tmp_path: Path) -> None:
    config = FinetuneConfig(strategy="feature-extraction", max_length=5)
    result = Finetune().run(make_context(tmp_path, "out", made_up_data("text"), "text"), config)
    assert result.measurements["truncated"] == 24  # five words and two framing tokens each
    assert any("24 of 24 training examples are longer than the network is shown" in note for note in result.notes)


def test_adapters_that_never_move_are_an_error(tmp_path: Path, data: DataSplits) -> None:
    config = FinetuneConfig(strategy="lora", backbone_learning_rate=1e-60, epochs=1, batch_size=8)
    with pytest.raises(TrainingError, match="never trained"):
        Finetune().run(make_context(tmp_path, "out", data), config)


def test_never_beating_the_majority_fails_a_gate(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    made = {}
    for name, count in (("train", 30), ("validation", 30)):
        labels = [int(index % 10 == 0) for index in range(count)]
        made[name] = split_of(images([2] * count, random), labels)  # every image alike, whatever its label
    data = DataSplits(("a", "b"), made, {})
    result = Finetune().run(make_context(tmp_path, "out", data), FinetuneConfig(strategy="feature-extraction"))
    gate = {one.name: one for one in result.gates}["beats the majority class"]
    assert result.measurements["constant_baseline"] == 0.9
    assert not gate.passed
    assert "the majority class alone gives 0.900" in gate.message


def test_ending_below_the_probe_fails_a_gate(tmp_path: Path, data: DataSplits) -> None:
    wrecking = FinetuneConfig(
        strategy="full", epochs=1, batch_size=8, backbone_learning_rate=1.0, head_learning_rate=1.0, warmup_fraction=0
    )
    result = Finetune().run(make_context(tmp_path, "out", data), wrecking)
    gate = {one.name: one for one in result.gates}["not below its linear probe"]
    assert result.measurements["validation_metric"] < result.measurements["probe_validation_metric"] - 0.01
    assert not gate.passed


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_needs_a_gpu(tmp_path: Path, data: DataSplits, precision: str) -> None:
    config = FinetuneConfig(strategy="lora", precision=precision, epochs=1)  # type: ignore[arg-type]
    with pytest.raises(MissingCapabilityError, match="precision: auto"):
        Finetune().run(make_context(tmp_path, "out", data), config)


def test_a_last_batch_of_one_does_not_stop_batch_norm(tmp_path: Path) -> None:
    data = made_up_data("image", counts={"train": 9, "validation": 9})
    config = FinetuneConfig(strategy="full", epochs=1, batch_size=8)
    result = Finetune().run(make_context(tmp_path, "out", data), config)
    assert (result.measurements["validation_metric"] * 9) % 1 < 1e-9  # all nine were judged
    one_by_one = config.model_copy(update={"batch_size": 1})
    with pytest.raises(TrainingError, match="batch norm cannot train on one value"):
        Finetune().run(make_context(tmp_path, "again", data), one_by_one)


def test_two_classes_of_which_validation_has_one(tmp_path: Path) -> None:
    data = made_up_data("image", classes=2)
    only = tuple(one for one in data["validation"] if one.label == 1)
    data = replace(data, splits={**data.splits, "validation": only})
    result = Finetune().run(make_context(tmp_path, "out", data), FinetuneConfig(strategy="feature-extraction"))
    stored = load_checkpoint(tmp_path / "out" / "checkpoint")
    assert accuracy_of(stored.model, stored.processing, data) == result.measurements["validation_metric"]
