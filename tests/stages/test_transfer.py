"""Does transfer pay? Where it does not, the run says so; learning curves against raw inputs and against scratch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.backbones.packaged import find_packaged
from stages.data.splits import DataSplits
from stages.finetune import Finetune, FinetuneConfig
from stages.finetune.setup import build
from stages.finetune.transfer import from_scratch, raw_pixels, raw_terms, with_examples
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
    assert (against["warning"] == "") is (against["gain"]["difference"] > 0)
    assert [note for note in result.notes if "raw inputs" in note]


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
    assert whole["tuned"] == result.measurements["validation_accuracy"]
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
