"""The strategies beside each other: where they start, what they move, how fast, and when auto goes on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import stages.finetune.ladder as ladder
from models.checkpoint import load_checkpoint
from models.classifier import Classifier
from models.layers import Layer, backbone_layers
from stages.artifact import digest_files
from stages.data.splits import DataSplits, Example
from stages.finetune import Finetune, FinetuneConfig
from stages.finetune.ladder import climb
from stages.finetune.rates import decaying_rates, one_rate, parameter_groups, rate_table, rates_in_words, unfreeze
from stages.finetune.setup import Setup, build, with_frozen_result
from stages.finetune.strategies import Attempt, epochs_of_phase
from stages.finetune.wise import ALPHAS
from stages.merge_lora import MergeLora, MergeLoraConfig
from stages.statistics import gain_of
from tests.models.tiny import classifier_of, image_backbone, inputs_of
from tests.stages.small_run import QuietProgress, StoppingProgress, artifact_of, made_up_data, make_context

FEW: dict[str, Any] = {"epochs": 1, "batch_size": 8}


@pytest.fixture(scope="module")
def data() -> DataSplits:
    return made_up_data("image")


def test_the_decay_is_solved_from_the_depth() -> None:
    for depth in (1, 2, 13, 60):
        rates = decaying_rates([Layer(str(index), ()) for index in range(depth)], 1e-3, 50)
        assert rates.by_layer[0] == pytest.approx(1e-3 / 50)
        steps = np.diff(np.log([*rates.by_layer, rates.head]))
        assert np.allclose(steps, np.log(50) / depth)
    # Twelve blocks and a stem at the decay of 0.75 that BEiT uses.
    beit = decaying_rates([Layer(str(index), ()) for index in range(13)], 1.0, 0.75**-13)
    assert beit.by_layer[-1] == pytest.approx(0.75)


def test_every_parameter_gets_its_layers_rate_and_norms_do_not_decay() -> None:
    model = cast(Classifier, nn.ModuleDict({
        "backbone": nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), "task_head": nn.Linear(3, 2)
    }))  # fmt: skip
    model["backbone"][0].bias.requires_grad = False  # type: ignore[index]
    layers = [
        Layer("low", ("backbone.0.weight", "backbone.0.bias")),
        Layer("high", ("backbone.1.weight", "backbone.1.bias")),
    ]
    groups = parameter_groups(model, decaying_rates(layers, 1e-3, 100), 0.01)
    found = {id(one): (group["lr"], group["weight_decay"]) for group in groups for one in group["params"]}
    linear, norm, head = model["backbone"][0], model["backbone"][1], model["task_head"]  # type: ignore[index]
    assert found == {
        id(linear.weight): (pytest.approx(1e-5), 0.01),
        id(norm.weight): (pytest.approx(1e-4), 0.0),
        id(norm.bias): (pytest.approx(1e-4), 0.0),
        id(head.weight): (1e-3, 0.01),
        id(head.bias): (1e-3, 0.0),
    }
    table = rate_table(model, one_rate(layers, 1e-3, 1e-4))
    assert [(row["layer"], row["trained"], row["parameters"]) for row in table] == [
        ("head", 8, 8), ("high", 6, 6), ("low", 9, 12)
    ]  # fmt: skip
    assert rates_in_words(table)[0].split() == ["head", "rate", "1.00e-03", "8", "of", "8", "learn"]
    assert [line.split()[0] for line in rates_in_words(table * 2, most=4)] == ["head", "high", "…", "high", "low"]
    with pytest.raises(AssertionError, match=r"backbone\.1\.weight is in no layer"):
        parameter_groups(model, one_rate(layers[:1], 1e-3, 1e-4), 0.01)


def test_the_rates_reach_the_optimizer_and_survive_the_schedule(
    tmp_path: Path, data: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm's own layer decay leaves every rate equal outside timm's schedulers."""
    from transformers import Trainer

    seen: list[list[float]] = []
    real = Trainer.training_step

    def step(self: Any, *rest: Any, **more: Any) -> Any:
        seen.append([group["lr"] for group in self.optimizer.param_groups])
        return real(self, *rest, **more)

    monkeypatch.setattr(Trainer, "training_step", step)
    config = FinetuneConfig(strategy="full", layer_rate_ratio=100, warmup_fraction=0.0, **FEW)
    Finetune().run(make_context(tmp_path, "out", data), config)
    assert len(seen) == 3
    for rates in seen:
        assert max(rates) / min(rates) == pytest.approx(100)
    assert seen[-1][0] < seen[0][0]


def test_unfreezing_takes_the_head_and_the_upper_layers() -> None:
    loaded = image_backbone()
    model, _ = classifier_of(loaded)
    layers = backbone_layers(model, inputs_of(loaded))
    unfreeze(model, layers[-2:])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {*layers[-1].parameters, *layers[-2].parameters, "task_head.weight", "task_head.bias"}


def test_epochs_are_shared_out_over_the_phases() -> None:
    assert [epochs_of_phase(7, 3, phase) for phase in (1, 2, 3)] == [2, 2, 3]
    assert [epochs_of_phase(3, 3, phase) for phase in (1, 2, 3)] == [1, 1, 1]


started: list[str] = []


class CountingProgress(QuietProgress):
    """Remembers in `started` which bars were begun."""

    def task(self, description: str, total: int) -> Any:
        """See `stages.base.Progress`."""
        started.append(description)
        return super().task(description, total)


class StopInSecondTraining(StoppingProgress):
    """Interrupts in the second training only."""

    def task(self, description: str, total: int) -> Any:
        """See `stages.base.Progress`."""
        started.append(description)
        second = started.count("training") > 1
        return super().task(description if second else f"first {description}", total)


def test_gradual_unfreezing_trains_by_phases_and_resumes_by_phase(
    tmp_path: Path, data: DataSplits, caplog: pytest.LogCaptureFixture
) -> None:
    config = FinetuneConfig(strategy="gradual-unfreezing", phases=3, epochs=3, batch_size=8)
    with caplog.at_level("INFO", logger="test"):
        result = Finetune().run(make_context(tmp_path, "whole", data), config)
    assert [entry["phase"] for entry in result.measurements["history"]] == [1, 2, 3]
    assert [entry["epoch"] for entry in result.measurements["history"]] == [1, 2, 3]
    opened = [int(line.split(": ")[1].split()[0]) for line in caplog.text.splitlines() if " phase " in line]
    layers = len(result.measurements["layer_rates"]) - 1
    assert opened == sorted(opened) and opened[0] < layers and opened[-1] == layers
    folder = tmp_path / "whole-resume"
    states = [set(load_file(folder / f"phase-{phase}" / "best.safetensors")) for phase in (1, 2, 3)]
    assert states[0] < states[1] < states[2]
    assert "backbone.network.conv_stem.weight" in states[2] - states[1]
    started.clear()
    # Interrupted in the second phase: the first is not trained again, and the result is the same.
    with pytest.raises(KeyboardInterrupt):
        Finetune().run(make_context(tmp_path, "cut", data, progress=StopInSecondTraining("training", 2)), config)
    shutil.rmtree(tmp_path / "cut")
    started.clear()
    context = make_context(tmp_path, "cut", data, progress=CountingProgress())
    Finetune().run(context, config)
    assert started.count("training") == 2
    assert digest_files(context.output) == digest_files(tmp_path / "whole")


def test_a_phase_that_makes_it_worse_is_taken_back(
    tmp_path: Path, data: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    import stages.finetune.strategies as strategies

    real = strategies.train_once

    def worse_in_the_end(strategy: Any, network: Any, setup: Any, rates: Any, folder: Path, epochs: Any = None) -> Any:
        trained = real(strategy, network, setup, rates, folder, epochs)
        if folder.name == "phase-2":
            for entry in trained.history:
                entry["validation_metric"] = 0.0
            network.task_head.weight.data.zero_()
        return trained

    monkeypatch.setattr(strategies, "train_once", worse_in_the_end)
    config = FinetuneConfig(strategy="gradual-unfreezing", phases=2, epochs=2, batch_size=8)
    result = Finetune().run(make_context(tmp_path, "out", data), config)
    assert result.measurements["best_epoch"] == 1 and len(result.measurements["history"]) == 2
    assert load_checkpoint(tmp_path / "out/checkpoint").model.task_head.weight.any()


@pytest.mark.parametrize(("strategy", "from_probe"), [("lp-ft", True), ("full", False), ("lora", True)])
def test_where_the_head_starts(tmp_path: Path, data: DataSplits, strategy: Any, from_probe: bool) -> None:
    context = make_context(tmp_path, "out", data)
    setup = with_frozen_result(build(context, FinetuneConfig(strategy=strategy)))
    assert setup.frozen is not None
    head = setup.start(strategy).task_head.weight
    assert torch.equal(head, torch.from_numpy(setup.frozen.probe.weight)) is from_probe
    assert torch.equal(head, setup.start(strategy).task_head.weight)  # always the same start


@pytest.mark.parametrize(
    ("strategy", "held"), [("lp-ft", True), ("gradual-unfreezing", True), ("lora", True), ("full", False)]
)
def test_a_probes_batch_norm_statistics_are_kept(tmp_path: Path, data: DataSplits, strategy: Any, held: bool) -> None:
    """A head that was fitted on features under the pretrained statistics fits no others."""
    config = FinetuneConfig(strategy=strategy, epochs=2, phases=2, batch_size=8)
    Finetune().run(make_context(tmp_path, "out", data), config)
    name = "backbone.network.bn1.running_mean"
    before = load_file(tmp_path / "backbone-image/model.safetensors")[name]
    folder = "base" if strategy == "lora" else "checkpoint"
    assert torch.equal(before, load_file(tmp_path / f"out/{folder}/model.safetensors")[name]) is held


@pytest.mark.parametrize("method", ["dora", "loha", "ia3", "oft"])
def test_other_adapters_go_through_merge_lora(tmp_path: Path, data: DataSplits, method: Any) -> None:
    config = FinetuneConfig.model_validate({"strategy": "lora", "lora": {"method": method}, **FEW})
    context = make_context(tmp_path, "finetune", data)
    Finetune().run(context, config)
    inputs = {"finetune": artifact_of("finetune", context.output)}
    result = MergeLora().run(make_context(tmp_path, "merged", data, inputs=inputs), MergeLoraConfig())
    assert all(gate.passed for gate in result.gates), [gate.message for gate in result.gates]
    assert result.measurements["max_weight_change"] > 0
    said = result.measurements["delta_retained"]
    assert said == pytest.approx(1, abs=1e-3) if method == "loha" else said is None
    assert 0 < result.measurements["delta_retained_bf16"] < 1.5


@pytest.mark.parametrize("strategy", ["lora", "lp-ft"])
def test_wise_ft_keeps_the_best_share_of_the_change(tmp_path: Path, data: DataSplits, strategy: Any) -> None:
    config = FinetuneConfig(strategy=strategy, wise_ft=True, **FEW)
    result = Finetune().run(make_context(tmp_path, "out", data), config)
    curve = result.measurements["wise_ft"]
    assert [row["alpha"] for row in curve] == list(ALPHAS)
    assert result.measurements["validation_metric"] == max(row["validation_metric"] for row in curve)
    assert curve[-1]["validation_metric"] == max(e["validation_metric"] for e in result.measurements["history"])


@pytest.mark.parametrize("strategy", ["lora", "lp-ft"])
def test_between_start_and_end_lie_both(tmp_path: Path, data: DataSplits, strategy: Any) -> None:
    """α = 1 is the trained network to the bit, α = 0 the start, and what is between is between."""
    from stages.finetune.strategies import make_attempt
    from stages.finetune.wise import put_between, starting_state

    context = make_context(tmp_path, "out", data)
    setup = with_frozen_result(build(context, FinetuneConfig(strategy=strategy, **FEW)))
    made = make_attempt(strategy, setup, context.resume)
    network: Any = made.network.eval()
    inputs = setup.example_inputs
    ends = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    starts = starting_state(made, setup, ends)
    with torch.inference_mode():
        trained, start = network(*inputs), setup.start(strategy).eval()(*inputs)
        put_between(network, starts, ends, 0.5, setup)
        middle = network(*inputs)
        put_between(network, starts, ends, 0.0, setup)
        if strategy == "lora":  # with all weights trained, batch norm's statistics are measured again
            assert torch.allclose(network(*inputs), start, atol=1e-6)
        put_between(network, starts, ends, 1.0, setup)
        assert torch.equal(network(*inputs), trained)
    assert not torch.allclose(middle, trained, atol=1e-5) and not torch.allclose(middle, start, atol=1e-5)


def attempt(strategy: Any, right: int, of: int = 400) -> Attempt:
    """An attempt that has the first `right` of the validation examples right; none where it diverged."""
    scores = (np.arange(of) < right).astype(float) if right else None
    return Attempt(strategy, cast(Classifier, nn.Module()), scores, 10.0, 1, diverged=None if right else "NaN")


@pytest.mark.parametrize(
    ("results", "kept", "tried", "said"),
    [
        ({"feature-extraction": 300, "lora": 340, "lp-ft": 341}, "lora", 3, "less than finetune.auto.min_gain"),
        ({"feature-extraction": 300, "lora": 340, "lp-ft": 380}, "lp-ft", 3, "+0.1000"),
        ({"feature-extraction": 300, "lora": 290}, "feature-extraction", 2, "-0.0250"),
        ({"feature-extraction": 300, "lora": 0}, "feature-extraction", 2, "training diverged"),
        ({"feature-extraction": 399}, "feature-extraction", 1, "no more than 0.0025 is left to gain"),
        ({"feature-extraction": 300, "lora": 399}, "lora", 2, "no more than 0.0025 is left to gain"),
    ],
)
def test_auto_goes_on_only_while_it_is_worth_it(
    tmp_path: Path, data: DataSplits, monkeypatch: pytest.MonkeyPatch,
    results: dict[str, int], kept: str, tried: int, said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(ladder, "make_attempt", lambda strategy, setup, folder: attempt(strategy, results[strategy]))
    setup: Setup = build(make_context(tmp_path, "out", data), FinetuneConfig())
    best, rungs = climb(setup, tmp_path)
    assert (best.strategy, len(rungs)) == (kept, tried)
    assert said in rungs[-1].reason
    assert [rung.strategy for rung in rungs if rung.kept][-1] == kept


def test_a_gain_that_few_examples_cannot_tell_from_none_is_not_worth_it(
    tmp_path: Path, data: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = {"feature-extraction": 15, "lora": 16}
    monkeypatch.setattr(ladder, "make_attempt", lambda strategy, *rest: attempt(strategy, results[strategy], of=20))
    best, rungs = climb(build(make_context(tmp_path, "out", data), FinetuneConfig()), tmp_path)
    assert best.strategy == "feature-extraction"
    assert "20 validation examples cannot tell it from none" in rungs[-1].reason


def test_gain_is_paired() -> None:
    one, other = np.array([1.0, 1, 0, 1] * 50), np.array([1.0, 0, 1, 0] * 50)
    gain = gain_of(one, other, 0.95)
    assert gain.difference == pytest.approx(0.25) and 0 < gain.low < 0.25 < gain.high
    assert gain_of(one, one, 0.95).difference == 0


def test_auto_end_to_end_says_how_it_got_there(tmp_path: Path) -> None:
    """A backbone with random weights on noise with a hint: the probe is not perfect, so a step is tried."""
    random = np.random.default_rng(3)
    clear = made_up_data("image", counts={"train": 48, "validation": 48})

    def noisy(one: Example) -> Example:
        pixels = np.asarray(one.content) * 0.2 + random.integers(0, 200, (32, 32, 3))
        return replace(one, content=pixels.clip(0, 255).astype(np.uint8))

    data = replace(clear, splits={name: tuple(noisy(one) for one in part) for name, part in clear.splits.items()})
    context = make_context(tmp_path, "out", data)
    result = Finetune().run(context, FinetuneConfig(**FEW))
    steps = result.measurements["ladder"]
    assert [step["strategy"] for step in steps[:2]] == ["feature-extraction", "lora"]
    assert steps[1]["gain"] is not None and steps[1]["reason"]
    kept = [step["strategy"] for step in steps if step["kept"]][-1]
    assert result.measurements["strategy"] == kept
    assert (context.output / ("adapter" if kept == "lora" else "checkpoint")).is_dir()
    assert any(note.startswith("auto: ") for note in result.notes)
