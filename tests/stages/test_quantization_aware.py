"""Quantization-aware training: it rounds as quantize does, and what it leaves is a plain network."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from pydantic import ValidationError

import stages.finetune.quantization as quantization
from models.checkpoint import load_checkpoint
from models.fake_quantization import INPUT, insert_rounding, observing
from models.runtimes.onnxruntime_session import OnnxRuntimeSession
from models.spec import TaskName
from stages.data.splits import DataSplits
from stages.finetune import Finetune, FinetuneConfig
from stages.finetune.training import Trained
from stages.merge_lora import MergeLora, MergeLoraConfig
from stages.quantize.calibration import calibrate_ranges
from stages.quantize.qdq import Form, Layout, compute_nodes, quantizable_nodes, quantize_graph
from stages.quantize.stage import prepare_graph
from tests.stages.chain import made, test_split
from tests.stages.small_run import StoppingProgress, artifact_of, made_up_data, make_context

FEW: dict[str, Any] = {"epochs": 1, "batch_size": 8, "quantization_aware": {"epochs": 2, "learning_rate": 1e-3}}


class Both:
    """A tiny network with INT8 rounding in PyTorch, and the graph of it that quantize makes, on the same ranges."""

    def __init__(self, task: TaskName, layout: Layout, folder: Path) -> None:
        checkpoint = load_checkpoint(made(task)["merge-lora"].folder / "checkpoint")
        self.arrays = checkpoint.processing.arrays([one.content for one in test_split(task, 16)])
        self.inputs = [torch.from_numpy(self.arrays[tensor.name]) for tensor in checkpoint.spec.io.inputs]
        self.plain, self.rounded = checkpoint.model, copy.deepcopy(checkpoint.model)
        insert_rounding(self.rounded, symmetric=layout == "tensorrt")
        with torch.no_grad(), observing(self.rounded):
            self.rounded(*self.inputs)
        self.model = prepare_graph(made(task)["export"].file("onnx-fp32.onnx"), folder)
        onnx.save(self.model, folder / "source.onnx")
        self.ranges = calibrate_ranges(folder / "source.onnx", folder, iter([self.arrays]), lambda: None)
        self.products = compute_nodes(self.model)
        names = {node.name for node in self.products}
        floats = [node.name for node in quantizable_nodes(self.model, layout) if node.name not in names]
        self.path = folder / "int8.onnx"
        self.int8 = quantize_graph(self.model, self.ranges, Form(layout), floats)
        onnx.save(self.int8, self.path)


@pytest.mark.parametrize("layout", ["onnxruntime", "tensorrt"])
def test_training_rounds_to_the_outputs_of_the_int8_graph(layout: Layout, tmp_path: Path) -> None:
    both = Both("text-classification", layout, tmp_path)
    with OnnxRuntimeSession(both.path, threads=1) as session:
        (wanted,) = session.infer(both.arrays).values()
    with torch.no_grad():
        found, plain = both.rounded(*both.inputs).numpy(), both.plain(*both.inputs).numpy()
    # Measured: 1e-6, where INT8 is off by 3e-2.
    assert np.abs(found - wanted).max() < 1e-3 * np.abs(plain - wanted).max()


def test_batch_norm_in_front_changes_no_integer_and_no_range(tmp_path: Path) -> None:
    """Here it is a module behind the convolution, there it is folded into it. Outputs would not compare: the INT8 graph
    differs from itself by as much between two levels of ONNX Runtime's optimizations, for single values that lie
    between two steps."""
    both = Both("image-classification", "onnxruntime", tmp_path)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in both.int8.graph.initializer}
    layers = [one for one in both.rounded.modules() if hasattr(one, INPUT)]
    assert len(layers) == len(both.products) == 18
    for layer, node in zip(layers, both.products, strict=True):
        low, high = (float(getattr(layer.get_submodule(INPUT), name)) for name in ("low", "high"))
        bounds = both.ranges[node.input[0]]
        assert (low, high) == pytest.approx((min(bounds.lowest.item(), 0), max(bounds.highest.item(), 0)), rel=1e-5)
        integers = np.abs(stored[f"{node.input[1]}_quantized"].astype(int))
        weight: Any = layer.weight
        values = weight.detach().numpy()
        largest = np.abs(values).max(tuple(range(1, values.ndim)), keepdims=True)
        assert np.array_equal(np.abs(np.round(values / largest * 127)).astype(int), integers)


@pytest.fixture(scope="module")
def data() -> DataSplits:
    return made_up_data("image")


@pytest.mark.parametrize("strategy", ["lora", "full", "feature-extraction"])
def test_it_leaves_a_plain_network(
    strategy: str, tmp_path: Path, data: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    better_after_training(monkeypatch)
    context = make_context(tmp_path, "finetune", data)
    result = Finetune().run(context, FinetuneConfig(strategy=strategy, **FEW))
    aware = result.measurements["quantization_aware"]
    assert aware["kept"] and aware["epochs"] == 2 and aware["layers"] == 18
    assert not (context.output / "adapter").exists()
    checkpoint = load_checkpoint(context.output / "checkpoint")  # key by key: a quantizer left in would be refused
    arrays = checkpoint.processing.arrays([one.content for one in data["validation"]])
    with torch.no_grad():
        outputs = checkpoint.model(torch.from_numpy(arrays["image"])).numpy()
    right = (outputs.argmax(1) == [one.label for one in data["validation"]]).mean()
    assert (
        right
        == pytest.approx(aware["float_metric"]["after"])
        == pytest.approx(result.measurements["validation_metric"])
    )
    assert any("quantization-aware training (epochs: 2)" in note for note in result.notes)
    assert any("INT8 training" in gate.name for gate in result.gates)
    merge = replace(make_context(tmp_path, "merge", data), inputs={"finetune": artifact_of("finetune", context.output)})
    assert MergeLora().run(merge, MergeLoraConfig()).measurements == {"passed_through": True}


def better_after_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is real; its INT8 metric is called better than before, which tiny noise may or may not bring."""
    real = quantization.train_once

    def train(*arguments: Any, **more: Any) -> Trained:
        trained = real(*arguments, **more)
        return replace(trained, scores=np.full(12, 2.0))

    monkeypatch.setattr(quantization, "train_once", train)


def test_where_int8_gains_nothing_the_network_stays_as_it_was(
    tmp_path: Path, data: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_better(*arguments: Any, **more: Any) -> Trained:
        return Trained(1, [{"epoch": 1, "seconds": 0.5}], np.zeros(12))

    without = make_context(tmp_path, "without", data)
    Finetune().run(without, FinetuneConfig(strategy="lora", **{**FEW, "quantization_aware": {}}))
    monkeypatch.setattr(quantization, "train_once", no_better)
    context = make_context(tmp_path, "with", data)
    result = Finetune().run(context, FinetuneConfig(strategy="lora", **FEW))
    assert not result.measurements["quantization_aware"]["kept"]
    assert any("gained nothing" in note for note in result.notes)
    for name in ("adapter/adapter_model.safetensors", "base/model.safetensors"):
        assert (context.output / name).read_bytes() == (without.output / name).read_bytes()


def test_divergence_fails_a_gate_and_keeps_the_network(tmp_path: Path, data: DataSplits) -> None:
    context = make_context(tmp_path, "finetune", data)
    config = FinetuneConfig(strategy="feature-extraction", batch_size=8,
                            quantization_aware={"epochs": 1, "learning_rate": 1e30})  # fmt: skip
    result = Finetune().run(context, config)
    assert result.measurements["quantization_aware"]["diverged"]
    failed = [gate.name for gate in result.gates if not gate.passed]
    assert failed == ["training stays finite"]
    load_checkpoint(context.output / "checkpoint")  # of finite weights


def test_an_interrupted_training_resumes_to_the_same_weights(tmp_path: Path, data: DataSplits) -> None:
    config = FinetuneConfig(strategy="feature-extraction", batch_size=8, quantization_aware={"epochs": 3})
    whole = make_context(tmp_path, "whole", data)
    wanted = Finetune().run(whole, config)
    broken = make_context(tmp_path, "broken", data, progress=StoppingProgress("training", 5))
    with pytest.raises(KeyboardInterrupt):
        Finetune().run(broken, config)
    assert (broken.resume / "int8/history.json").is_file()
    resumed = make_context(tmp_path, "again", data)
    resumed = replace(resumed, resume=broken.resume)
    found = Finetune().run(resumed, config)
    metrics = [
        [entry["validation_loss"] for entry in one.measurements["quantization_aware"]["history"]]
        for one in (wanted, found)
    ]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)
    assert (whole.output / "checkpoint/model.safetensors").read_bytes() == (
        resumed.output / "checkpoint/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"launch": {"processes": 2}}, "trains in one process"),
        ({"strategy": "feature-extraction", "initial_head": "label-names", "unseen_labels": ["d"]}, "forgets"),
    ],
)
def test_what_it_cannot_go_with_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FinetuneConfig.model_validate({**settings, "quantization_aware": {"epochs": 1}})
