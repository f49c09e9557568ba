"""What training costs: counted right, told before and after, and without a trace in what is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import stages.finetune.cost as cost
from models.adapters import AdapterSettings, inject_adapters
from models.classifier import Classifier
from stages.artifact import digest_files
from stages.data.splits import DataSplits
from stages.finetune import Finetune, FinetuneConfig
from stages.finetune.config import Strategy
from stages.finetune.cost import Estimate, count_training_flops, estimate_cost, in_words
from stages.finetune.notes import cost_of
from stages.finetune.setup import Setup, build
from stages.training_cost import count_flops, inputs_of, take
from tests.stages.small_run import made_up_data, make_context

FEW: dict[str, Any] = {"epochs": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def data() -> DataSplits:
    return made_up_data("image")


def setup_of(root: Path, data: DataSplits, **settings: Any) -> Setup:
    return build(make_context(root, "out", data), FinetuneConfig(**{**FEW, "strategy": "full", **settings}))


def test_flops_of_a_step_are_three_forward_passes_less_what_needs_no_gradient(tmp_path: Path, data: DataSplits) -> None:
    setup = setup_of(tmp_path, data)
    model, batch = setup.model.eval(), take(data["train"], 0, 2)
    head = 2 * model.task_head.in_features * model.task_head.out_features
    forward = count_flops(model.backbone, inputs_of(setup.processing, batch[:1], "cpu"))
    whole = count_training_flops(model, setup, batch)
    # The image needs no gradient: the stem works twice only. Its output: 16 × 16.
    stem = next(one for one in model.modules() if isinstance(one, nn.Conv2d))
    assert whole == 3 * forward + 3 * head - 2 * 16 * 16 * stem.weight.numel()
    model.requires_grad_(False)
    model.task_head.requires_grad_(True)
    assert count_training_flops(model, setup, batch) == forward + 2 * head


@pytest.mark.parametrize("strategy", ["lora", "full", "lp-ft", "gradual-unfreezing"])
def test_the_cost_is_told_before_and_after(tmp_path: Path, data: DataSplits, strategy: Strategy) -> None:
    context = make_context(tmp_path, "out", data)
    config = FinetuneConfig(**FEW, strategy=strategy, phases=2)
    found = Finetune().run(context, config).measurements
    before, after = found["cost"]["estimated"], found["cost"]["actual"]
    assert before["problem"] == "" and before["epochs"] == after["epochs"] == 2
    assert before["trainable_parameters"] == after["trainable_parameters"] == found["trainable_parameters"]
    assert before["total_parameters"] == found["total_parameters"] + (
        found["trainable_parameters"] - sum(row["trained"] for row in found["layer_rates"][:1])
        if strategy == "lora"
        else 0
    )
    assert before["flops"] > 24 * 2 * 1e6  # 24 images twice through the smallest of EfficientNets
    # Orders of magnitude: other processes may want the cores, never a hundred times.
    assert after["seconds"] / 100 < before["seconds"] < after["seconds"] * 100
    assert after["peak_memory_bytes"] / 10 < before["peak_memory_bytes"] < after["peak_memory_bytes"] * 10
    assert "estimated were" in next(cost_of(found))


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_training_is_the_same_without_the_estimate(
    tmp_path: Path, data: DataSplits, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FinetuneConfig(**FEW, strategy=strategy)
    with_estimate, without = make_context(tmp_path, "with", data), make_context(tmp_path, "without", data)
    Finetune().run(with_estimate, config)
    none = Estimate(0, 0, None, None, None, None, 8, 2, 1, "cpu", "not measured")
    monkeypatch.setattr(cost, "measure", lambda *arguments: none)
    found = Finetune().run(without, config)
    assert found.measurements["cost"]["estimated"]["problem"] == "not measured"
    assert digest_files(with_estimate.output) == digest_files(without.output)


def test_an_estimate_leaves_the_network_and_the_generators_alone(tmp_path: Path, data: DataSplits) -> None:
    setup = setup_of(tmp_path, data)
    network = setup.start("full").train()
    before, random = {name: one.clone() for name, one in network.state_dict().items()}, torch.get_rng_state()
    estimate_cost(network, setup.rates("full"), setup, False, tmp_path)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(one, before[name]) for name, one in network.state_dict().items())
    assert all(one.grad is None for one in network.parameters())


def test_a_resumed_run_does_not_measure_again(
    tmp_path: Path, data: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = setup_of(tmp_path, data)
    network = setup.start("full")
    first = estimate_cost(network, setup.rates("full"), setup, False, tmp_path / "resume")
    monkeypatch.delattr(cost, "measure")
    assert estimate_cost(network, setup.rates("full"), setup, False, tmp_path / "resume") == first


def test_adapters_need_less_memory_than_all_weights(tmp_path: Path, data: DataSplits) -> None:
    setup = setup_of(tmp_path, data, strategy="lora")
    whole = cast(Classifier, setup.start("full"))
    few = inject_adapters(setup.start("lora"), AdapterSettings("lora", 2, 4.0, 0.0), setup.example_inputs)
    rates = setup.rates("full")
    trained = [sum(one.numel() for one in network.parameters() if one.requires_grad) for network in (few, whole)]
    assert trained[0] < trained[1]
    assert count_training_flops(few, setup, take(data["train"], 0, 2)) < count_training_flops(
        whole.train(), setup, take(data["train"], 0, 2)
    )
    assert cost.measure(few, setup.rates("lora"), setup, True).trainable_parameters == trained[0]
    assert cost.measure(whole, rates, setup, False).trainable_parameters == trained[1]


def test_a_step_that_cannot_be_measured_is_said_and_training_speaks_for_itself(
    tmp_path: Path, data: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*arguments: Any) -> Any:
        raise RuntimeError("can't allocate memory: you tried to allocate 9 bytes\nmore")

    setup = setup_of(tmp_path, data)
    monkeypatch.setattr(cost, "time_steps", no_memory)
    found = cost.measure(setup.start("full"), setup.rates("full"), setup, False)
    assert found.seconds is None and found.flops is None
    assert "can't allocate memory: you tried to allocate 9 bytes" in in_words(vars(found))
    measured = {"cost": {"estimated": vars(replace(found)), "actual": {}}}
    assert list(cost_of(measured)) == []
