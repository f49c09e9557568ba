"""The classifier: features, logits, frozen batch norm."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models.backbones.build import LoadedBackbone
from models.classifier import hold_batchnorm, moving_batchnorms, new_classifier
from tests.models.tiny import classifier_of, image_backbone, inputs_of, text_backbone


@pytest.mark.parametrize("make", [image_backbone, text_backbone])
def test_logits_are_the_head_on_the_features(make: type) -> None:
    loaded: LoadedBackbone = make()
    model, spec = classifier_of(loaded)
    inputs = inputs_of(loaded)
    with torch.inference_mode():
        features, logits = model.features(*inputs), model(*inputs)
        assert torch.equal(model.task_head(features), logits)
    assert features.shape == (5, loaded.feature_dim)
    assert logits.shape == (5, 3)
    assert features.dtype == logits.dtype == torch.float32
    assert spec.io.inputs == loaded.processing.inputs
    assert spec.io.outputs[0].dims == ("batch", 3)
    assert spec.backbone.folder is None


def test_new_head_starts_undecided() -> None:
    loaded = image_backbone()
    model = new_classifier(loaded, 4).eval()
    with torch.inference_mode():
        probabilities = model(*inputs_of(loaded)).softmax(1)
    assert torch.allclose(probabilities, torch.full((5, 4), 0.25), atol=0.1)
    assert not model.task_head.bias.any()


def norms_of(model: nn.Module) -> list[torch.Tensor]:
    return [part.running_mean.clone() for part in model.modules() if isinstance(part, nn.BatchNorm2d)]


@pytest.mark.parametrize("held", [True, False])
def test_held_batchnorm_keeps_its_statistics_in_training(held: bool) -> None:
    loaded = image_backbone()
    model, _ = classifier_of(loaded)
    if held:
        hold_batchnorm(model)
    assert len(moving_batchnorms(model)) == (0 if held else len(norms_of(model)))
    before = norms_of(model)
    model.train()
    assert model.training and model.backbone.training
    model(*inputs_of(loaded))
    same = [torch.equal(one, other) for one, other in zip(before, norms_of(model), strict=True)]
    assert before and (all(same) if held else not any(same))


def test_held_batchnorm_still_learns_its_scale_and_can_be_copied() -> None:
    loaded = image_backbone()
    model, _ = classifier_of(loaded)
    hold_batchnorm(model)
    twin = copy.deepcopy(model)
    twin.train()
    twin(*inputs_of(loaded)).sum().backward()
    norms = [part for part in twin.modules() if isinstance(part, nn.BatchNorm2d)]
    assert all(not part.training and part.weight.grad is not None for part in norms)
    assert all(part.weight.grad is None for part in model.modules() if isinstance(part, nn.BatchNorm2d))
