"""Dual encoders with both towers in the stages: exported, tried without training, their label names as a head."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from models.checkpoint import load_checkpoint, save_checkpoint
from models.classifier import make_spec, new_classifier
from models.errors import ConfigError
from models.registry import load_backbone, resolve
from models.runtimes.onnxruntime_session import OnnxRuntimeSession
from models.spec import side_by_side
from models.tasks import of_length_one, task_of
from stages.base import StageContext
from stages.data.splits import DataSplits, Example
from stages.export import Export, ExportConfig
from stages.features.label_map import LabelMap, embed_labels, fit_label_map
from stages.finetune import Finetune, FinetuneConfig
from stages.finetune.label_names import paired, with_tuned_names
from stages.finetune.notes import notes_of
from stages.finetune.setup import build, count, with_frozen_result
from stages.finetune.stage import given_head_of
from tests.models.test_hf_dual import KINDS, contents, reference
from tests.models.tiny import WORDS, hf_dual_folder, hf_text_folder
from tests.stages.chain import context_of
from tests.stages.small_run import artifact_of, image_folder, made_up_data, make_context, split_of


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_embeddings_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    expected = reference(hf_dual_folder(tmp_path / "hf", kind))
    spec = resolve(str(tmp_path / "hf"))
    loaded = load_backbone(spec, "image-text", None, None)
    described = make_spec("image-text", spec, loaded, ())
    model = new_classifier(loaded, described.io.width).eval()
    save_checkpoint(tmp_path / "merge-lora/checkpoint", model, described, loaded.processing)
    pairs = contents()
    examples = split_of(pairs, [text for _, text in pairs])
    inputs = {"merge-lora": artifact_of("merge-lora", tmp_path / "merge-lora")}
    result = Export().run(context_of(tmp_path / "export", inputs, "image-text", examples), ExportConfig())
    assert all(gate.passed for gate in result.gates), [gate.message for gate in result.gates]
    with OnnxRuntimeSession(tmp_path / "export/onnx-fp32.onnx") as session:
        found = side_by_side(session.infer(loaded.processing.arrays(pairs)))
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-4)


def pair_context(root: Path, name: str, backbone: str, count: int = 24) -> StageContext:
    """Random images with random texts, all different: nothing can be learnt."""
    random = np.random.default_rng(0)
    pairs = [
        (random.integers(0, 256, (32, 32, 3), dtype=np.uint8), " ".join(random.choice(WORDS[4:], 5)))
        for _ in range(2 * count)
    ]
    parts = {"train": pairs[:count], "validation": pairs[count:]}
    splits = {part: split_of(some, [text for _, text in some]) for part, some in parts.items()}
    data = DataSplits((), splits, {part: part for part in parts})  # type: ignore[arg-type]
    return replace(make_context(root, name, data, backbone=backbone), task="image-text")


@pytest.mark.parametrize("aligned", [True, False])
def test_the_start_is_the_own_head_where_the_probe_is_no_better(
    aligned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = pair_context(tmp_path, "out", str(hf_dual_folder(tmp_path / "hf")))
    random = np.random.default_rng(1)
    turned = np.linalg.qr(random.standard_normal((12, 12)))[0]

    def features(model: object, processing: object, examples: list[Example], *rest: object) -> np.ndarray:
        images = random.standard_normal((len(examples), 12))
        texts = images + 0.3 * random.standard_normal(images.shape)
        return np.concatenate([images, texts if aligned else texts @ turned], axis=1).astype(np.float32)

    monkeypatch.setattr("stages.features.compute.compute_features", features)
    setup = with_frozen_result(build(context, FinetuneConfig()))
    frozen = setup.frozen
    assert frozen is not None and frozen.given is not None
    assert frozen.given.kind == "zero-shot" and frozen.keeps_head is aligned
    assert bool(frozen.given.scores.mean() > 0.6) is aligned
    started = setup.start("lora").task_head.get_parameter("image.weight")
    assert torch.equal(started, torch.eye(12)) is aligned
    asked = with_frozen_result(build(context, FinetuneConfig(initial_head="probe"))).frozen
    assert asked is not None and asked.given is not None and not asked.given.starts


def test_a_dual_encoder_is_tried_without_training_and_then_trained(tmp_path: Path) -> None:
    folder = hf_dual_folder(tmp_path / "hf")
    context = pair_context(tmp_path, "out", str(folder))
    found = Finetune().run(context, FinetuneConfig(strategy="lora", epochs=1, batch_size=8)).measurements
    given = found["given_head"]
    assert given["kind"] == "zero-shot" and 0 <= given["validation_metric"] <= 1
    assert found["trainable_parameters"] > 0 and len(found["history"]) == 1
    assert any("zero-shot" in note for note in notes_of(found))


NAMES = ("bird", "stone", "tree")
TEMPLATES = ("a red {}", "good {}")


def image_context(root: Path, name: str, backbone: str) -> StageContext:
    """Images whose colour tells the label, one of `NAMES`."""
    data = made_up_data("image")
    return make_context(root, name, replace(data, labels=NAMES), backbone=backbone)


def named(strategy: str, **settings: object) -> FinetuneConfig:
    """A configuration whose head is made of the names."""
    values = {"initial_head": "label-names", "label_templates": TEMPLATES, "batch_size": 8, "epochs": 1, **settings}
    return FinetuneConfig.model_validate({"strategy": strategy, **values})


def zero_shot_logits(folder: Path, images: list[np.ndarray]) -> torch.Tensor:
    """What transformers makes of images and names: its logits, of the mean over the templates."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    network, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    pixels = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    normalize = torch.nn.functional.normalize
    rows = []
    with torch.inference_mode():
        for name in NAMES:
            given = tokenizer([one.format(name) for one in TEMPLATES], padding="max_length", max_length=12,
                              return_tensors="pt")  # fmt: skip
            tokens = {"input_ids": given.input_ids}
            if network.config.model_type != "siglip":
                tokens["attention_mask"] = given.attention_mask
            rows.append(normalize(network.get_text_features(**tokens).pooler_output, dim=1).mean(0))
        found = normalize(network.get_image_features(pixels).pooler_output, dim=1)
        cosines = found @ normalize(torch.stack(rows), dim=1).T
        return cosines * network.logit_scale.exp() + getattr(network, "logit_bias", 0.0)


# Not align: what its image tower gives with random weights does not tell the labels apart, not even for a probe.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "align"])
def test_label_names_alone_are_the_zero_shot_classifier_of_transformers(kind: str, tmp_path: Path) -> None:
    folder = hf_dual_folder(tmp_path / "hf", kind)
    context = image_context(tmp_path, "out", str(folder))
    result = Finetune().run(context, named("feature-extraction"))
    validation = context.data["validation"]
    expected = zero_shot_logits(folder, [one.content for one in validation])
    checkpoint = load_checkpoint(context.output / "checkpoint")
    assert checkpoint.spec.labels == NAMES and checkpoint.spec.task == "image-classification"
    assert not any("text" in name for name, _ in checkpoint.model.named_parameters())
    inputs = torch.from_numpy(checkpoint.processing.arrays([one.content for one in validation])["image"])
    with torch.inference_mode():
        torch.testing.assert_close(checkpoint.model(inputs), expected, atol=1e-4, rtol=1e-4)
    found = result.measurements
    accuracy = float((expected.argmax(1).numpy() == [one.label for one in validation]).mean())
    assert found["validation_metric"] == found["given_head"]["validation_metric"] == pytest.approx(accuracy)
    assert found["given_head"]["kind"] == "zero-shot" and found["trainable_parameters"] == 0
    assert found["probe_validation_metric"] > accuracy  # of random weights names say nothing, and a probe learns


def test_the_zero_shot_classifier_is_exported(tmp_path: Path) -> None:
    folder = hf_dual_folder(tmp_path / "hf")
    context = image_context(tmp_path, "merge-lora", str(folder))
    Finetune().run(context, named("feature-extraction"))
    examples = context.data["validation"]
    inputs = {"merge-lora": artifact_of("merge-lora", context.output)}
    result = Export().run(context_of(tmp_path / "export", inputs, examples=examples), ExportConfig())
    assert all(gate.passed for gate in result.gates), [gate.message for gate in result.gates]
    contents = [one.content for one in examples]
    arrays = load_checkpoint(context.output / "checkpoint").processing.arrays(contents)
    with OnnxRuntimeSession(tmp_path / "export/onnx-fp32.onnx") as session:
        found = torch.from_numpy(session.infer(arrays)["logits"])
    torch.testing.assert_close(found, zero_shot_logits(folder, contents), atol=1e-4, rtol=1e-4)


def test_training_starts_from_the_names_and_wise_ft_looks_between(tmp_path: Path) -> None:
    folder = hf_dual_folder(tmp_path / "hf")
    context = image_context(tmp_path, "out", str(folder))
    config = named("full", epochs=2, wise_ft=True, head_learning_rate=1e-3)
    setup = with_frozen_result(build(context, config))
    arrays = setup.processing.arrays([one.content for one in context.data["validation"]])
    with torch.inference_mode():
        start = setup.start("full").eval()(torch.from_numpy(arrays["image"]))
    expected = zero_shot_logits(folder, [one.content for one in context.data["validation"]])
    torch.testing.assert_close(start, expected, atol=1e-4, rtol=1e-4)
    found = Finetune().run(context, config).measurements
    assert [row["alpha"] for row in found["wise_ft"]] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert found["forgetting"] and found["history"][-1]["train_loss"] < found["history"][0]["train_loss"]


def joined_backbone(root: Path) -> str:
    """A tiny image backbone and a tiny language model put together."""
    return f"{image_folder(root / 'image')}+{hf_text_folder(root / 'text')}"


def test_a_language_model_reads_the_names_for_an_image_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = image_context(tmp_path, "out", joined_backbone(tmp_path))
    config = named("feature-extraction", unseen_labels=("red",), label_templates=("a {}",))
    result = Finetune().run(context, config)
    found, checkpoint = result.measurements, load_checkpoint(context.output / "checkpoint")
    assert found["given_head"]["kind"] == "label names" and found["validation_metric"] > 0.6
    fitted = count(checkpoint.model.task_head) + count(checkpoint.model.backbone.get_submodule("projection"))
    assert found["trainable_parameters"] == fitted
    assert checkpoint.spec.labels == (*NAMES, "red") and checkpoint.spec.architecture["library"] == "mapped"
    assert checkpoint.spec.backbone.library == "timm"
    clock = time.monotonic

    def slowly(*arguments: Any) -> LabelMap:
        monkeypatch.setattr("time.monotonic", lambda: clock() + 1000)
        return fit_label_map(*arguments)

    monkeypatch.setattr("stages.features.label_map.fit_label_map", slowly)
    setup = with_frozen_result(build(context, config))
    monkeypatch.undo()
    assert setup.frozen is not None and setup.frozen.seconds > 1000  # the map is part of what it costs
    validation = context.data["validation"]
    inputs = torch.from_numpy(setup.processing.arrays([one.content for one in validation])["image"])
    with torch.inference_mode():
        logits = checkpoint.model(inputs)
        features = checkpoint.model.features(inputs)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)))
    assert setup.named is not None and setup.named.scale is not None
    mistaken = float((logits.argmax(1) == 3).float().mean())
    assert found["given_head"]["mistaken_for_unseen"] == pytest.approx(mistaken)
    assert sum(f"{mistaken:.1%} of the validation examples an unseen label" in note for note in result.notes) == 1
    # The text tower, mapped, has the names where the head has its rows.
    text = embed_labels(setup.named.text, checkpoint.spec.labels, ("a {}",), "cpu")
    cosines = features @ torch.from_numpy(of_length_one(text)).T
    offset = checkpoint.model.task_head.get_parameter("bias")
    torch.testing.assert_close(logits, setup.named.scale * cosines + offset, atol=1e-4, rtol=1e-4)
    assert found["given_head"]["played_unseen"] is None and not any("played unseen" in note for note in result.notes)
    assert setup.frozen.given is not None
    played = replace(setup.frozen, given=replace(setup.frozen.given, played=(0.5, 0.25)))
    found["given_head"] = given_head_of(played)
    assert any("25.0% of the unseen ones and 50.0% of the others" in note for note in notes_of(found))
    assert not offset.any()  # three labels say nothing of how far unseen ones lag behind


@pytest.mark.parametrize("native", [True, False])
def test_flyp_trains_both_towers_and_ships_one(native: bool, tmp_path: Path) -> None:
    backbone = str(hf_dual_folder(tmp_path / "hf")) if native else joined_backbone(tmp_path)
    context = image_context(tmp_path, "out", backbone)
    config = named("flyp", initial_head=None, epochs=3, wise_ft=True, backbone_learning_rate=3e-4)
    found = Finetune().run(context, config).measurements
    assert found["history"][2]["validation_loss"] < found["history"][0]["validation_loss"]
    towers = count(load_backbone(context.backbone, "image-text", None, None).module)
    learnt, whole = found["trainable_parameters"], found["total_parameters"]
    if native:
        assert towers + 1 == learnt < whole  # and the temperature; the projections of the head are none
    else:
        assert towers < learnt < whole  # and the maps behind them
    assert found["metric"] == "accuracy" and found["history_metric"] == task_of("image-text").metric
    assert len(found["wise_ft"]) == 5 and all(row["movement"] > 0 for row in found["forgetting"])
    checkpoint, validation = load_checkpoint(context.output / "checkpoint"), context.data["validation"]
    assert checkpoint.spec.task == "image-classification" and checkpoint.spec.labels == NAMES
    assert [one.name for one in checkpoint.spec.io.inputs] == ["image"]
    inputs = torch.from_numpy(checkpoint.processing.arrays([one.content for one in validation])["image"])
    with torch.inference_mode():
        answers = checkpoint.model(inputs).argmax(1).numpy()
    right = float((answers == [one.label for one in validation]).mean())
    assert found["validation_metric"] == pytest.approx(right)


def test_flyp_moves_the_text_tower_that_the_head_comes_from(tmp_path: Path) -> None:
    context = image_context(tmp_path, "out", str(hf_dual_folder(tmp_path / "hf")))
    setup = with_frozen_result(build(context, named("flyp", initial_head=None)))
    pairs = paired(setup)
    assert pairs.processing.kind == "image-text" and pairs.context.task == "image-text"
    contents = [one.content[1] for one in pairs.context.data["train"][:4]]
    assert contents == ["a red bird", "good stone", "a red tree", "good bird"]
    same = with_tuned_names(pairs.model, setup)
    torch.testing.assert_close(same.task_head.weight, setup.model.task_head.weight, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for parameter in pairs.model.backbone.get_submodule("network.text").parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    moved = with_tuned_names(pairs.model, setup)
    assert (moved.task_head.weight - setup.model.task_head.weight).abs().max() > 0.1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"strategy": "flyp", "initial_head": "probe"}, "flyp starts from the names"),
        ({"initial_head": "label-names"}, "auto goes up from the probe"),
        ({"strategy": "flyp", "from_scratch": True}, "flyp needs pretrained weights"),
        ({"strategy": "full", "initial_head": "label-names", "from_scratch": True}, "need the pretrained towers"),
        ({"strategy": "lora", "initial_head": "label-names", "unseen_labels": ["x"]}, "training forgets them"),
        ({"strategy": "flyp", "unseen_labels": ["x"]}, "training forgets them"),
        ({"unseen_labels": ["x"]}, "write strategy: feature-extraction"),
        ({"strategy": "flyp", "unseen_labels": ["x", " "]}, "has an empty name"),
        ({"label_templates": ["a photo"]}, "has not one"),
    ],
)
def test_settings_that_label_names_exclude(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        FinetuneConfig.model_validate(settings)


@pytest.mark.parametrize("native", [True, False])
def test_a_trained_alignment_goes_on_from_a_checkpoint(native: bool, tmp_path: Path) -> None:
    spec = resolve(str(hf_dual_folder(tmp_path / "hf")) if native else joined_backbone(tmp_path))
    loaded = load_backbone(spec, "image-text", None, None)
    described = make_spec("image-text", spec, loaded, ())
    model = new_classifier(loaded, described.io.width).eval()
    torch.manual_seed(0)
    with torch.no_grad():  # as training would leave it
        for weight in model.task_head.parameters():
            weight.add_(0.3 * torch.rand_like(weight))
    save_checkpoint(tmp_path / "own", model, described, loaded.processing)
    again = load_backbone(resolve(str(tmp_path / "own")), "image-text", None, None)
    same = new_classifier(again, make_spec("image-text", spec, again, ()).io.width).eval()
    torch.testing.assert_close(same.task_head.state_dict(), model.task_head.state_dict())
    context = image_context(tmp_path, "out", str(tmp_path / "own"))
    setup = build(context, named("feature-extraction", label_templates=("a {}",)))
    assert setup.own_head
    images = [one.content for one in context.data["validation"][:3]]
    arrays = loaded.processing.arrays(list(zip(images, [f"a {name}" for name in NAMES], strict=True)))
    with torch.inference_mode():
        outputs = model(*(torch.from_numpy(arrays[one.name]) for one in loaded.processing.inputs))
        logits = setup.model.eval()(torch.from_numpy(setup.processing.arrays(images)["image"]))
    image, text = outputs.chunk(2, dim=1)
    scale = model.task_head.get_parameter("log_scale").exp().item()
    torch.testing.assert_close(logits, scale * image @ text.T, atol=1e-4, rtol=1e-4)


def test_an_unseen_label_is_no_known_one(tmp_path: Path) -> None:
    context = image_context(tmp_path, "out", str(hf_dual_folder(tmp_path / "hf")))
    with pytest.raises(ConfigError, match="'stone' is a label already"):
        build(context, named("feature-extraction", unseen_labels=("stone",)))
    other = make_context(tmp_path, "other", context.data)
    with pytest.raises(ConfigError, match="no text tower.*all-MiniLM"):
        build(other, named("feature-extraction"))
