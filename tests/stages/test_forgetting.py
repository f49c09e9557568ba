"""What the backbone kept, and whether the rates are too high."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.data.splits import DataSplits
from stages.finetune import Finetune, FinetuneConfig
from stages.finetune.forgetting import layer_outputs, linear_cka, movement_of
from stages.finetune.range_test import HIGHEST, LOWEST, RangeTest, find_rates, has_risen, kept_random_state
from stages.finetune.setup import build, with_frozen_result
from tests.stages.small_run import made_up_data, make_context


@pytest.fixture(scope="module")
def data() -> DataSplits:
    return made_up_data("image")


def test_cka_is_blind_to_rotation_and_scale_and_not_fooled_by_wide_noise() -> None:
    torch.manual_seed(0)
    features = torch.randn(64, 40)
    rotation = torch.linalg.qr(torch.randn(40, 40))[0]
    assert linear_cka(features, features) == pytest.approx(1)
    assert linear_cka(features, 3 * features @ rotation) == pytest.approx(1)
    wide, other = torch.randn(64, 5000), torch.randn(64, 5000)
    centred = [values - values.mean(0) for values in (wide, other)]
    kernels = [values @ values.T for values in centred]
    biased = (kernels[0] * kernels[1]).sum() / (kernels[0].norm() * kernels[1].norm())
    assert biased > 0.9  # what the plain estimator says of two unrelated networks
    assert abs(linear_cka(wide, other) or 1.0) < 0.1


def test_cka_equals_the_sum_over_quadruples() -> None:
    """HSIC's unbiased estimator by its definition: a U-statistic over four different examples (Song et al. 2012)."""
    from itertools import permutations

    torch.manual_seed(1)
    one, other = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)

    def slow(left: torch.Tensor, right: torch.Tensor) -> float:
        k, m = left @ left.T, right @ right.T
        terms = [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in permutations(range(6), 4)]
        return float(torch.stack(terms).mean())

    wanted = slow(one, other) / (slow(one, one) * slow(other, other)) ** 0.5
    assert linear_cka(one, other) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("values", [torch.ones(8, 3), torch.randn(3, 3)])
def test_cka_of_nothing_is_none(values: torch.Tensor) -> None:
    assert linear_cka(values, values) is None


def test_movement_is_relative() -> None:
    before = [torch.full((2, 2), 2.0), torch.zeros(3)]
    assert movement_of(before, [torch.full((2, 2), 2.2), torch.zeros(3)]) == pytest.approx(0.1)
    assert movement_of([torch.zeros(2)], [torch.ones(2)]) == 0.0


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_layers_that_learn_faster_move_and_change_more(tmp_path: Path, data: DataSplits, strategy: Any) -> None:
    rate = {"backbone_learning_rate": 1e-2} if strategy == "lora" else {"layer_rate_ratio": 1000}
    config = FinetuneConfig(strategy=strategy, epochs=1, batch_size=8, **rate)  # type: ignore[arg-type]
    result = Finetune().run(make_context(tmp_path, "out", data), config)
    table = result.measurements["forgetting"]
    assert [row["layer"] for row in table] == [row["layer"] for row in result.measurements["layer_rates"][:0:-1]]
    assert table[-1]["movement"] > 1e-4 and table[-1]["cka"] < 1
    if strategy == "lora":
        assert table[0]["movement"] == 0 and table[0]["cka"] == pytest.approx(1, abs=1e-6)  # the stem is not adapted
    else:
        assert table[0]["movement"] < table[-1]["movement"] / 10


def test_a_frozen_backbone_forgets_nothing_and_says_nothing(tmp_path: Path, data: DataSplits) -> None:
    result = Finetune().run(make_context(tmp_path, "out", data), FinetuneConfig(strategy="feature-extraction"))
    assert result.measurements["forgetting"] == []


def test_every_layer_gives_an_output(tmp_path: Path) -> None:
    for kind in ("image", "text"):
        setup = build(make_context(tmp_path, kind, made_up_data(kind), kind), FinetuneConfig())
        outputs = layer_outputs(setup.model, setup.layers, setup.example_inputs)
        assert sorted(outputs) == list(range(len(setup.layers)))
        assert all(len(values) == 2 for values in outputs.values())


def test_the_range_test_changes_nothing(tmp_path: Path, data: DataSplits) -> None:
    setup = with_frozen_result(build(make_context(tmp_path, "out", data), FinetuneConfig(batch_size=8)))
    network = setup.start("full")
    before = copy.deepcopy(network.state_dict())
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    found = find_rates(network, setup.rates("full"), setup, False)
    assert len(found.curve) > 5 and found.curve[0][0] == pytest.approx(LOWEST)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert random.getstate() == states[0] and np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


def test_the_random_state_comes_back_also_after_an_error() -> None:
    torch.manual_seed(5)
    wanted = torch.get_rng_state()
    with pytest.raises(KeyError), kept_random_state():
        torch.rand(3)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), wanted)


def test_training_is_the_same_with_and_without_the_test(tmp_path: Path, data: DataSplits) -> None:
    weights = []
    for name, asked in (("without", False), ("with", True)):
        config = FinetuneConfig(strategy="lora", epochs=1, batch_size=8, learning_rate_test=asked)
        result = Finetune().run(make_context(tmp_path, name, data), config)
        assert (result.measurements["learning_rate_test"] is not None) is asked
        weights.append((tmp_path / name / "adapter/adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_rates_that_are_too_high_are_said_before_training(
    tmp_path: Path, data: DataSplits, caplog: pytest.LogCaptureFixture
) -> None:
    config = FinetuneConfig(
        strategy="full", epochs=1, batch_size=8, learning_rate_test=True,
        head_learning_rate=3.0, backbone_learning_rate=3.0,
    )  # fmt: skip
    result = Finetune().run(make_context(tmp_path, "out", data), config)
    found = result.measurements["learning_rate_test"]
    assert found["lowest"] < 1 and found["proposed"] == pytest.approx(found["lowest"] / 10)
    assert "the learning rates are too high" in caplog.text
    assert any("the learning rates are too high" in note for note in result.notes)


@pytest.mark.parametrize(
    ("losses", "risen"), [([1.0, 0.5, 0.7], False), ([1.0, 0.5, 0.8], True), ([1.0, float("nan")], True)]
)
def test_when_a_loss_has_risen(losses: list[float], risen: bool) -> None:
    assert has_risen([(float(index), loss) for index, loss in enumerate(losses)]) is risen


def test_a_rate_below_the_valley_is_no_warning() -> None:
    assert RangeTest([], None).warning == "" and RangeTest([], None).proposed is None
    assert RangeTest([], 5.0).warning == "" and RangeTest([], 5.0).proposed == pytest.approx(0.5)
    assert "multiply" in RangeTest([], 0.2).warning and HIGHEST > 1
