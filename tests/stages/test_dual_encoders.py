"""Dual encoders with both towers in the stages: exported, tried without training, their label names as a head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.checkpoint import save_checkpoint
from models.classifier import make_spec, new_classifier
from models.registry import load_backbone, resolve
from models.runtimes.onnxruntime_session import OnnxRuntimeSession
from models.spec import side_by_side
from stages.base import StageContext
from stages.data.splits import DataSplits, Example
from stages.export import Export, ExportConfig
from stages.finetune import Finetune, FinetuneConfig
from stages.finetune.notes import notes_of
from stages.finetune.setup import build, with_frozen_result
from tests.models.test_hf_dual import KINDS, contents, reference
from tests.models.tiny import WORDS, hf_dual_folder
from tests.stages.chain import context_of
from tests.stages.small_run import artifact_of, make_context, split_of


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
