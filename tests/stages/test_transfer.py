"""Does transfer pay? Where it does not, the run says so; learning curves against raw inputs and against scratch."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from models.backbones.packaged import find_packaged
from models.checkpoint import load_checkpoint
from models.errors import ModelError
from stages.data.splits import DataSplits
from stages.finetune import Finetune, FinetuneConfig
from stages.finetune.config import Strategy
from stages.finetune.setup import build
from stages.finetune.transfer import (
    RawComparison,
    from_scratch,
    raw_pixels,
    raw_terms,
    scratch_config,
    with_examples,
)
from stages.statistics import Gain
from tests.stages.small_run import made_up_data, make_context, split_of

PROBE = FinetuneConfig(strategy="feature-extraction")


@pytest.fixture(scope="module")
def data() -> DataSplits:
    return made_up_data("image", counts={"train": 36, "validation": 24})


@pytest.mark.slow
@pytest.mark.skipif(find_packaged("timm:tf_efficientnet_lite0") is None, reason="the weights are not installed")
def test_imagenet_features_are_worth_less_than_the_pixels_of_digits(tmp_path: Path) -> None:
    """The known negative transfer: 8 × 8 pixels of scikit-learn's digits against EfficientNet-Lite0 at 64 px."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = np.random.default_rng(0).permutation(len(digits.target))[:900]
    contents = [(digits.images[index] * 15.9375).astype(np.uint8) for index in chosen]
    labels = [int(digits.target[index]) for index in chosen]
    splits = {"train": split_of(contents[:450], labels[:450]), "validation": split_of(contents[450:], labels[450:])}
    data = DataSplits(tuple("0123456789"), splits, {name: name for name in splits})
    context = make_context(tmp_path, "out", data, backbone="timm:tf_efficientnet_lite0")
    result = Finetune().run(context, PROBE.model_copy(update={"image_size": 64}))
    against = result.measurements["against_raw"]
    assert [point["examples"] for point in against["curve"]] == [50, 150, 450]
    assert all(point["raw"] > point["frozen"] for point in against["curve"])
    assert against["gain"]["high"] < 0
    warning = next(note for note in result.notes if note.startswith("transfer does not pay here"))
    assert "Unfreeze more (finetune.strategy: lp-ft or full)" in warning


def test_features_that_know_more_than_the_inputs_raise_no_warning(tmp_path: Path) -> None:
    result = Finetune().run(make_context(tmp_path, "out", made_up_data("text"), "text"), PROBE)
    against = result.measurements["against_raw"]
    assert against["warning"] == "" and against["gain"]["high"] >= 0
    note = next(note for note in result.notes if "raw inputs" in note)
    assert ("do not show that the features are better" in note) is (against["gain"]["low"] <= 0)


@pytest.mark.parametrize("high", [-0.01, 0.01])
def test_a_difference_that_may_be_noise_is_no_warning(high: float) -> None:
    curve = [{"examples": 50, "frozen": 0.5, "raw": 0.6}]
    assert bool(RawComparison(curve, Gain(-0.1, -0.2, high, 0.95)).warning) is (high < 0)


def test_whatever_the_strategy_needs_training_from_scratch_has_a_configuration() -> None:
    for strategy in get_args(Strategy):
        asked: dict[str, Any] = {"strategy": strategy, "scratch_fractions": (1.0,)}
        if strategy == "flyp":
            continue  # refuses scratch_fractions itself
        if strategy in ("full", "lp-ft"):
            asked |= {"locked_tower": "text"}
        if strategy != "feature-extraction":
            asked |= {"wise_ft": True}
        found = scratch_config(FinetuneConfig.model_validate(asked))
        assert found.from_scratch and found.strategy == "full" and found.scratch_fractions == ()


def test_raw_pixels_are_scaled_and_grey_ones_counted_once(data: DataSplits) -> None:
    colour, _ = raw_pixels(data["train"], data["validation"])
    grey = tuple(replace(one, content=np.asarray(one.content)[:, :, 0]) for one in data["train"])
    assert colour.shape == (36, 32 * 32 * 3) and raw_pixels(grey, grey[:2])[1].shape == (2, 32 * 32)


def test_terms_come_from_train_alone() -> None:
    text = made_up_data("text")
    train, validation = raw_terms(text["train"], text["validation"])
    assert train.shape[1] == validation.shape[1] and train.dtype == np.float32
    unseen = tuple(replace(one, content="word never seen") for one in text["validation"])
    assert not raw_terms(text["train"], unseen)[1].any()


def test_the_strategy_is_compared_with_training_from_scratch(tmp_path: Path, data: DataSplits) -> None:
    config = FinetuneConfig(strategy="lora", epochs=1, batch_size=8, scratch_fractions=(1.0, 0.5))
    result = Finetune().run(make_context(tmp_path, "out", data), config)
    half, whole = result.measurements["against_scratch"]
    assert (half["examples"], whole["examples"]) == (18, 36)
    assert whole["tuned"] == result.measurements["validation_metric"]
    assert whole["gain"]["difference"] == pytest.approx(whole["tuned"] - whole["scratch"])
    assert len([note for note in result.notes if "training from scratch" in note]) == 2
    # The same bytes as without the comparison: it is a measurement, not a part of the result.
    plain = Finetune().run(make_context(tmp_path, "plain", data), config.model_copy(update={"scratch_fractions": ()}))
    assert plain.measurements["against_scratch"] == []
    left, right = ((tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("out", "plain"))
    assert left == right


def test_from_scratch_has_other_weights_and_rates_of_its_own(tmp_path: Path, data: DataSplits) -> None:
    setup = build(make_context(tmp_path, "out", data), FinetuneConfig(strategy="lora", head_learning_rate=0.5))
    scratch = from_scratch(with_examples(setup, 12))
    assert len(scratch.context.data["train"]) == 12 and len(setup.context.data["train"]) == 36
    name = "backbone.network.conv_stem.weight"
    assert not np.allclose(scratch.model.state_dict()[name], setup.model.state_dict()[name])
    assert scratch.rates("full").head == 1e-3


def finished_run(root: Path, data: DataSplits) -> Path:
    """A run folder up to merge-lora, with the manifests that a runner writes."""
    import json

    from stages.artifact import SCHEMA_VERSION, Artifact, digest_files
    from stages.merge_lora import MergeLora, MergeLoraConfig

    run = root / "first"
    run.mkdir(parents=True)
    context = make_context(root, "first/finetune", data)
    Finetune().run(context, FinetuneConfig(strategy="lora", epochs=1, batch_size=8, backbone_learning_rate=0.01))
    inputs = {"finetune": Artifact("finetune", context.output, {"files": digest_files(context.output)})}
    merged = make_context(root, "first/merge-lora", data, inputs=inputs)
    result = MergeLora().run(merged, MergeLoraConfig())
    manifest = {"schema_version": SCHEMA_VERSION, "stage": "merge-lora", "files": digest_files(merged.output)}
    gates = [gate.to_dict() for gate in result.gates]
    (merged.output / "manifest.json").write_text(json.dumps({**manifest, "gates": gates, "inputs": {}}))
    return run


def test_a_run_starts_from_another_and_says_what_that_is_worth(tmp_path: Path, data: DataSplits) -> None:
    run = finished_run(tmp_path, data)
    config = FinetuneConfig(strategy="lora", epochs=1, batch_size=8, from_run=str(run), compare_direct=True)
    setup = build(make_context(tmp_path, "look", data), config)
    plain = build(make_context(tmp_path, "plain", data), FinetuneConfig())
    merged = load_checkpoint(run / "merge-lora/checkpoint").model
    name = "backbone.network.conv_head.weight"
    assert torch.equal(setup.model.state_dict()[name], merged.state_dict()[name])
    assert not torch.equal(setup.model.state_dict()[name], plain.model.state_dict()[name])
    assert not torch.equal(setup.model.task_head.weight, merged.task_head.weight)  # the head is new
    result = Finetune().run(make_context(tmp_path, "second", data), config)
    scratch = from_scratch(replace(setup, config=config.model_copy(update={"scratch_fractions": (0.5,)})))
    assert scratch.config.from_run is None and scratch.config.from_scratch
    direct = result.measurements["against_direct"]
    assert direct["run"] == "first"
    assert direct["probe"] == result.measurements["probe_validation_metric"]
    assert direct["probe_gain"]["difference"] == pytest.approx(direct["probe"] - direct["direct_probe"])
    assert direct["tuned_gain"]["difference"] == pytest.approx(direct["tuned"] - direct["direct_tuned"])
    assert len([note for note in result.notes if note.startswith("through first ")]) == 2
    base = load_checkpoint(tmp_path / "second/base").model
    assert torch.equal(base.state_dict()[name], merged.state_dict()[name])


def test_freshness_looks_at_the_other_network_not_at_its_path(tmp_path: Path, data: DataSplits) -> None:
    run = finished_run(tmp_path, data)
    before = FinetuneConfig(from_run=str(run)).outside()
    shutil.copytree(run, tmp_path / "moved")
    assert FinetuneConfig(from_run=str(tmp_path / "moved")).outside() == before
    manifest = tmp_path / "moved/merge-lora/manifest.json"
    weights = '"checkpoint/model.safetensors": "'
    manifest.write_text(manifest.read_text().replace(weights, f"{weights}0"))
    assert FinetuneConfig(from_run=str(tmp_path / "moved")).outside() != before
    with pytest.raises(ModelError, match="is not as it was written"):
        build(make_context(tmp_path, "out", data), FinetuneConfig(from_run=str(tmp_path / "moved")))


def test_a_start_that_cannot_be_one_is_refused(tmp_path: Path, data: DataSplits) -> None:
    with pytest.raises(ValidationError, match="holds no merged network"):
        FinetuneConfig(from_run=str(tmp_path / "nowhere"))
    run = finished_run(tmp_path, data)
    with pytest.raises(ModelError, match="both runs need the same backbone"):
        build(make_context(tmp_path, "text", made_up_data("text"), "text"), FinetuneConfig(from_run=str(run)))
    with pytest.raises(ValidationError, match="write one of them"):
        FinetuneConfig(from_run=str(run), from_scratch=True)
    with pytest.raises(ValidationError, match="which is not written"):
        FinetuneConfig(compare_direct=True)
    manifest = run / "merge-lora/manifest.json"
    manifest.write_text(manifest.read_text().replace('"verdict": "pass"', '"verdict": "fail"', 1))
    with pytest.raises(ValidationError, match="has a failed gate"):
        FinetuneConfig(from_run=str(run))
