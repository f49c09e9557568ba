"""What is counted, against closed forms; what is measured, on a clock of our own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from models.classifier import Classifier, new_classifier
from stages.transferability import cost
from stages.transferability.cost import (
    count_flops,
    inputs_of,
    loss_and_saved_bytes,
    measure_cost,
    measure_training,
    typical_example,
)
from tests.models.tiny import BERT, image_backbone, text_backbone
from tests.stages.small_run import made_up_data, split_of


def test_flops_of_convolution_and_linear_layers() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 5))
    convolution, linear = 2 * 4 * 4 * 8 * 3 * 9, 2 * 128 * 5
    assert count_flops(module.eval(), [torch.zeros(1, 3, 8, 8)]) == convolution + linear


def test_flops_of_a_transformer_hold_its_attention() -> None:
    """Four projections and two layers of the feed-forward part a token; QKᵀ and AV a pair of tokens."""
    loaded, tokens = text_backbone(), 7
    hidden, inner, layers = BERT["hidden_size"], BERT["intermediate_size"], BERT["num_hidden_layers"]
    assert isinstance(hidden, int) and isinstance(inner, int) and isinstance(layers, int)
    expected = layers * (2 * tokens * (4 * hidden**2 + 2 * hidden * inner) + 2 * 2 * tokens**2 * hidden)
    ids = torch.ones(1, tokens, dtype=torch.int64)
    assert count_flops(loaded.module.eval(), [ids, ids]) == expected


def test_what_autograd_keeps_is_counted_once_and_without_the_weights() -> None:
    """x for the first layer, the ReLU's result for itself and for the head, log-softmax, labels, one sum of weights."""
    batch, inputs, hidden, classes = 6, 10, 4, 3
    model = Classifier(nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU()), nn.Linear(hidden, classes))
    labels = torch.tensor([0, 1, 2] * 2)
    loss, saved = loss_and_saved_bytes(model, [torch.randn(batch, inputs)], labels)
    assert saved == 4 * batch * (inputs + hidden + classes) + 8 * batch + 4
    loss.backward()
    assert model.task_head.weight.grad is not None


def test_memory_of_training_is_four_copies_and_the_activations() -> None:
    data, loaded = made_up_data("image"), image_backbone()
    model = new_classifier(loaded, 3)
    examples = data["train"]
    epoch_s, memory, problem = measure_training(model, loaded.processing, examples, 8, "cpu")
    labels = torch.tensor([one.label for one in examples[:8]])
    _, saved = loss_and_saved_bytes(model.train(), inputs_of(loaded.processing, examples[:8], "cpu"), labels)
    parameters = sum(one.numel() for one in model.parameters())
    assert memory == 4 * 4 * parameters + saved
    assert epoch_s is not None and epoch_s > 0 and not problem
    _, twice, _ = measure_training(model, loaded.processing, examples, 16, "cpu")
    assert twice is not None and twice - 16 * parameters == pytest.approx(2 * saved, rel=0.01)


def test_seconds_are_those_of_the_batches_scaled_to_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves by two seconds between start and end of a step, and by none between steps."""

    class Clock:
        asked = 0

        def perf_counter(self) -> float:
            self.asked += 1
            return 2.0 * (self.asked // 2)

    monkeypatch.setattr(cost, "time", Clock())
    data, loaded = made_up_data("image", counts={"train": 21}), image_backbone()
    model = new_classifier(loaded, 3)
    assert measure_training(model, loaded.processing, data["train"], 8, "cpu")[0] == 2.0 * 3
    assert cost.measure_feature_pass(model, loaded.processing, data["train"], "cpu") == 2.0


@pytest.mark.parametrize("kind", ["image", "text"])
def test_the_whole_cost_leaves_the_weights_alone(kind: str) -> None:
    data, loaded = made_up_data(kind), image_backbone() if kind == "image" else text_backbone()
    model = new_classifier(loaded, 3)
    before = {name: one.clone() for name, one in model.named_parameters()}
    found = measure_cost(model, loaded.processing, data["train"], 500, "cpu", 1)
    assert found.batch_size == 24 and found.problem == ""
    assert found.parameters == sum(one.numel() for one in loaded.module.parameters())
    assert found.flops > 0 and found.latency_ms_p50 > 0 and found.feature_pass_s > 0
    assert found.epoch_s is not None and found.epoch_s > 0
    assert all(torch.equal(one, before[name]) for name, one in model.named_parameters())
    assert not model.training and all(one.grad is None for one in model.parameters())


def test_a_backbone_that_cannot_be_trained_keeps_its_other_costs() -> None:
    loaded = image_backbone()
    found = measure_cost(new_classifier(loaded, 3), loaded.processing, made_up_data("image")["train"], 1, "cpu", 1)
    assert found.epoch_s is None and found.training_memory_bytes is None
    assert "more than 1 value per channel" in found.problem
    assert found.latency_ms_p50 > 0


def test_running_out_of_memory_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(cost, "loss_and_saved_bytes", refuse)
    loaded = image_backbone()
    _, _, problem = measure_training(
        new_classifier(loaded, 3), loaded.processing, made_up_data("image")["train"], 8, "cpu"
    )
    assert problem == "training runs out of memory at batch size 8; try a smaller finetune.batch_size"


def test_the_typical_example_has_inputs_of_median_size() -> None:
    texts = ["red", "red bird", "red bird runs", "red bird runs a tree", "good"]
    examples = split_of(texts, [0] * 5)
    assert typical_example(text_backbone().processing, examples).content == "red bird"


def test_batches_go_round() -> None:
    examples = split_of([np.zeros(1)] * 3, [0, 1, 2])
    assert [one.label for one in cost.take(examples, 2, 5)] == [2, 0, 1, 2, 0]
