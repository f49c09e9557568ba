"""INT8 rounding inside a PyTorch network: what goes in comes out, and gradients pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from models.fake_quantization import AVERAGING, RoundedInput, insert_rounding, observing, remove_rounding
from tests.models.tiny import GPT2, classifier_of, image_backbone, inputs_of, text_backbone


@pytest.mark.parametrize("kind", ["image", "bert", "gpt2"])
def test_what_was_put_in_is_taken_out_whole(kind: str) -> None:
    loaded = {"image": image_backbone, "bert": text_backbone, "gpt2": lambda: text_backbone(GPT2)}[kind]()
    network, _ = classifier_of(loaded)
    network.eval()
    inputs = inputs_of(loaded)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        plain = network(*inputs)
        layers = insert_rounding(network)
        with observing(network):
            observed = network(*inputs)
        rounded = network(*inputs)
    remove_rounding(network)
    assert layers >= 9
    assert torch.equal(plain, observed)
    assert 0 < float((rounded - plain).abs().max()) < 0.5 * float(plain.max() - plain.min())
    assert {name: one.shape for name, one in network.state_dict().items()} == {n: t.shape for n, t in before.items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    with torch.no_grad():
        assert torch.equal(network(*inputs), plain)


def test_every_output_of_a_weight_has_its_own_127_steps() -> None:
    layer = nn.Sequential(nn.Linear(64, 3, bias=False))
    with torch.no_grad():
        layer[0].weight.mul_(torch.tensor([[1.0], [100.0], [0.0]]))
    wanted = layer[0].weight.detach().clone()
    insert_rounding(layer)
    step = wanted.abs().amax(1, keepdim=True) / 127
    steps = layer[0].weight / step.clamp(min=1e-30)
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    assert bool(((layer[0].weight - wanted).abs() <= step / 2 + 1e-9).all())


@pytest.mark.parametrize(("symmetric", "smallest"), [(False, 0.0), (True, -1.27)])
def test_inputs_are_rounded_to_a_range_that_holds_zero_and_clipped(symmetric: bool, smallest: float) -> None:
    rounding = RoundedInput(symmetric).eval()
    with observing(nn.Sequential(rounding)):
        rounding(torch.tensor([0.5, 1.27]))
    found = rounding(torch.tensor([-5.0, 0.0, 5.0]))
    assert found.tolist() == pytest.approx([smallest, 0.0, 1.27])
    half = rounding(torch.tensor([0.5], dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16


def test_gradients_pass_where_nothing_is_clipped_and_ranges_follow_in_training() -> None:
    rounding = RoundedInput(symmetric=False).eval()
    with observing(nn.Sequential(rounding)):
        rounding(torch.tensor([0.0, 1.0]))
    values = torch.tensor([0.3, 0.7, 9.0], requires_grad=True)
    rounding(values).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [1.0, 1.0, 0.0]
    rounding.train()(torch.tensor([-3.0, 2.0]))
    assert (float(rounding.low), float(rounding.high)) == pytest.approx((-3 * AVERAGING, 1 + AVERAGING))


def test_a_trained_weight_is_what_is_left() -> None:
    network = nn.Sequential(nn.Linear(4, 2))
    insert_rounding(network)
    with observing(network):
        network(torch.eye(4))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    before = network[0].weight.detach().clone()
    network(torch.eye(4)).square().sum().backward()
    optimizer.step()
    stored = network[0].parametrizations.weight.original.detach().clone()  # type: ignore[union-attr]
    remove_rounding(network)
    assert torch.equal(network[0].weight, stored)
    assert type(network[0]) is nn.Linear
    assert not torch.equal(network[0].weight, before)
    assert sorted(network.state_dict()) == ["0.bias", "0.weight"]


def test_a_layer_that_is_parametrized_already_keeps_its_own() -> None:
    """As the positional convolution of wav2vec 2.0, HuBERT and WavLM."""
    network = nn.Sequential(weight_norm(nn.Conv1d(4, 4, 3, padding=1), dim=2), nn.Conv1d(4, 2, 1))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    inputs = torch.randn(2, 4, 8)
    with torch.no_grad():
        wanted = network(inputs)
        assert insert_rounding(network) == 1
        with observing(network):
            network(inputs)
        assert not torch.equal(network(inputs), wanted)
        remove_rounding(network)
        assert torch.equal(network(inputs), wanted)
    assert {name: tensor.tolist() for name, tensor in network.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in before.items()
    }
