"""Repairs of what INT8 harms: function-preserving where they say so, and kept only where they help."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import stages.quantize.repairs as repairs
from models.runtimes.onnxruntime_session import OnnxRuntimeSession
from stages.candidates import Candidate
from stages.quantize import Quantize, QuantizeConfig
from stages.quantize.advice import advice_of
from stages.quantize.calibration import calibrate_ranges
from stages.quantize.qdq import Form, compute_nodes, quantize_graph
from stages.quantize.repairs import Variant, mean_errors, repaired, smoothed, with_corrected_biases
from stages.quantize.search import outputs_of
from tests.stages.chain import made
from tests.stages.test_quantize import context_for

WIDTH = 16


class Ground:
    """Calibration examples (float32 `x`), and what runs and quantizes a graph on them."""

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self.folder = folder
        self.examples = np.random.default_rng(3).normal(0.4, 1, (48, *shape)).astype(np.float32)

    def run(self, model: onnx.ModelProto) -> Iterator[dict[str, np.ndarray]]:
        onnx.save(model, self.folder / "run.onnx")
        with OnnxRuntimeSession(self.folder / "run.onnx", threads=1) as session:
            yield from (session.infer({"x": one[None]}) for one in self.examples)

    def quantized(self, model: onnx.ModelProto) -> Variant:
        onnx.save(model, self.folder / "source.onnx")
        batches = iter([{"x": self.examples}])
        ranges = calibrate_ranges(self.folder / "source.onnx", self.folder, batches, lambda: None)
        return lambda floats: quantize_graph(model, ranges, Form(), floats)

    def error(self, model: onnx.ModelProto, other: onnx.ModelProto) -> float:
        return float(np.square(outputs_of(self.run(model)) - outputs_of(self.run(other))).mean())


def graph_of(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], shape: list[int], out: list[Any]
) -> onnx.ModelProto:
    """A model of opset 20 from `x` to `y`."""
    tensors = [numpy_helper.from_array(one.astype(np.float32), name) for name, one in weights.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, out)
    graph = helper.make_graph(nodes, "graph", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def normed(outlier: float, residual: bool = True) -> onnx.ModelProto:
    """x (batch, 5, 16) → layer norm with one large channel → MatMul and bias, (plus the norm itself,) → y."""
    random = np.random.default_rng(0)
    scale = random.uniform(0.5, 1.5, WIDTH)
    scale[3] = outlier
    weight = random.normal(0, 0.3, (WIDTH, WIDTH))
    weight[3] /= outlier
    constants = {"scale": scale, "offset": random.normal(0, 0.2, WIDTH), "w": weight, "b": random.normal(0, 0.1, WIDTH)}
    nodes = [
        helper.make_node("LayerNormalization", ["x", "scale", "offset"], ["n"], "norm", axis=-1),
        helper.make_node("MatMul", ["n", "w"], ["m"], "product"),
        helper.make_node("Add", ["m", "b"], ["p"], "bias"),
        helper.make_node("Add" if residual else "Relu", ["p", "n"] if residual else ["p"], ["s"], "last"),
        helper.make_node("ReduceMean", ["s", "axes"], ["y"], "mean", keepdims=0),
    ]
    model = graph_of(nodes, constants, [5, WIDTH], ["batch", WIDTH])
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axes"))
    return model


@pytest.mark.parametrize("residual", [True, False])
def test_smoothing_changes_nothing_but_what_int8_does(tmp_path: Path, residual: bool) -> None:
    ground = Ground(tmp_path, (5, WIDTH))
    model = normed(60.0, residual)
    graph, places = smoothed(model, ground.run)
    assert places == 1
    before, after = (outputs_of(ground.run(one)) for one in (model, graph))
    assert np.abs(before - after).max() < 1e-6 * np.ptp(before) * 10
    restored = [node.name for node in graph.graph.node if node.op_type == "Mul"]
    assert restored == (["norm_restored"] if residual else [])
    names = {tensor.name for tensor in graph.graph.initializer}
    assert "scale" not in names and "w" in names
    harm = [ground.error(model, ground.quantized(one)(())) for one in (model, graph)]
    assert harm[1] < 0.5 * harm[0]


def test_smoothing_takes_a_transposed_weight_and_leaves_a_shared_one() -> None:
    random = np.random.default_rng(0)
    scale = np.ones(WIDTH)
    scale[0] = 40
    weights = {"scale": scale, "w": random.normal(size=(3, WIDTH)), "shared": random.normal(size=(WIDTH, WIDTH))}
    nodes = [
        helper.make_node("LayerNormalization", ["x", "scale"], ["n"], "norm", axis=-1),
        helper.make_node("Gemm", ["n", "w"], ["y"], "head", transB=1),
    ]
    model = graph_of(nodes, weights, [WIDTH], ["batch", 3])
    shared = copy.deepcopy(model)
    for index in range(2):
        shared.graph.node.append(helper.make_node("MatMul", ["n", "shared"], [f"m{index}"], f"m{index}"))
    del shared.graph.node[1]
    shared.graph.output[0].name = "m0"
    examples = random.normal(size=(20, WIDTH)).astype(np.float32)

    def run(one: onnx.ModelProto) -> Iterator[dict[str, np.ndarray]]:
        from onnx.reference import ReferenceEvaluator

        names = [output.name for output in one.graph.output]
        yield dict(zip(names, ReferenceEvaluator(one).run(names, {"x": examples}), strict=True))

    graph, places = smoothed(model, run)
    assert places == 1
    assert np.allclose(outputs_of(run(graph)), outputs_of(run(model)), rtol=1e-4, atol=1e-4)
    assert smoothed(shared, run)[1] == 0


def test_smoothing_that_changes_the_function_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ground = Ground(tmp_path, (5, WIDTH))
    monkeypatch.setattr(repairs, "is_transposed", lambda node: True)  # rows and columns taken for each other
    monkeypatch.setattr(repairs, "axis_of_inputs", lambda node, weight: weight)
    model = normed(60.0)
    variant, (smooth, bias) = repaired(model, ("smooth", "bias-correction"), ground.quantized, ground.run)
    assert smooth["repair"] == "smooth" and not smooth["kept"] and smooth["error_after"] is None
    assert "smooth is left out: it changed the outputs" in repairs.outcome_in_words(smooth)
    assert bias["repair"] == "bias-correction" and bias["error_before"] == smooth["error_before"]
    plain = ground.error(model, ground.quantized(model)(()))
    assert ground.error(model, variant(())) == pytest.approx(bias["error_after"] if bias["kept"] else plain)


def biased(kind: str) -> onnx.ModelProto:
    """One product of each kind with few values in its weight, so that rounding shifts the mean of what it gives."""
    random = np.random.default_rng(5)
    matrix = random.choice([0.0, 0.005, 1.0], (WIDTH, WIDTH), p=[0.1, 0.8, 0.1])
    matrix[0] = 1.3
    if kind.startswith("conv"):
        kernel = np.broadcast_to(matrix.T[:, :, None, None], (WIDTH, WIDTH, 3, 3)) * random.uniform(0.5, 1, (3, 3))
        inputs = ["x", "w", "b"] if kind == "conv" else ["x", "w"]
        nodes = [helper.make_node("Conv", inputs, ["c"], "product", kernel_shape=[3, 3], pads=[1, 1, 1, 1])]
        nodes.append(helper.make_node("GlobalAveragePool", ["c"], ["g"], "pool"))
        nodes.append(helper.make_node("Flatten", ["g"], ["y"], "flat"))
        return graph_of(nodes, {"w": kernel, "b": np.ones(WIDTH)}, [WIDTH, 6, 6], ["batch", WIDTH])
    if kind == "gemm":
        nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "product", transB=1)]
        return graph_of(nodes, {"w": matrix.T, "b": np.ones(WIDTH)}, [WIDTH], ["batch", WIDTH])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m" if kind == "matmul-add" else "y"], "product")]
    if kind == "matmul-add":
        nodes.append(helper.make_node("Add", ["b", "m"], ["y"], "bias"))
    return graph_of(nodes, {"w": matrix, "b": np.ones(WIDTH)}, [WIDTH], ["batch", WIDTH])


@pytest.mark.parametrize("kind", ["conv", "conv-without-bias", "gemm", "matmul-add", "matmul"])
def test_the_mean_of_what_a_node_gives_is_put_right(kind: str, tmp_path: Path) -> None:
    ground = Ground(tmp_path, (WIDTH, 6, 6) if kind.startswith("conv") else (WIDTH,))
    model = biased(kind)
    variant = ground.quantized(model)
    shifts = mean_errors(model, variant(()), ground.run)
    wanted = (outputs_of(ground.run(model)) - outputs_of(ground.run(variant(())))).mean(0)
    assert shifts["product"] == pytest.approx(wanted, abs=1e-4)
    assert np.abs(wanted).max() > 0.01
    corrected = with_corrected_biases(variant, shifts)
    left = (outputs_of(ground.run(model)) - outputs_of(ground.run(corrected(())))).mean(0)
    assert np.abs(left).max() < 1e-4
    assert ground.error(model, corrected(())) < 0.7 * ground.error(model, variant(()))
    kept = corrected(["product"])  # in floating point there is nothing to correct
    assert ground.error(model, kept) < 1e-10
    nodes = len(variant(()).graph.node)
    assert len(corrected(()).graph.node) == nodes + (kind == "matmul")


def test_repairs_are_kept_where_they_help_and_reported(tmp_path: Path) -> None:
    ground = Ground(tmp_path, (5, WIDTH))
    model = normed(60.0)
    variant, rows = repaired(model, ("bias-correction", "smooth"), ground.quantized, ground.run)
    assert [row["repair"] for row in rows] == ["smooth", "bias-correction"]
    assert rows[0]["kept"] and rows[0]["error_after"] < 0.5 * rows[0]["error_before"]
    assert rows[0]["error_after"] == rows[1]["error_before"]
    final = rows[1]["error_after"] if rows[1]["kept"] else rows[1]["error_before"]
    assert ground.error(model, variant(())) == pytest.approx(final)
    none, nothing = repaired(model, (), ground.quantized, ground.run)
    assert nothing == [] and none(()).SerializeToString() == ground.quantized(model)(()).SerializeToString()


def test_a_repair_that_harms_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ground = Ground(tmp_path, (WIDTH,))
    model = biased("gemm")

    def wrong(*arguments: Any) -> dict[str, np.ndarray]:
        return {name: -3 * one for name, one in mean_errors(*arguments).items()}

    monkeypatch.setattr(repairs, "mean_errors", wrong)
    variant, (row,) = repaired(model, ("bias-correction",), ground.quantized, ground.run)
    assert not row["kept"] and row["error_after"] > row["error_before"]
    assert variant(()).SerializeToString() == ground.quantized(model)(()).SerializeToString()
    assert "is left out" in repairs.outcome_in_words(row)


@pytest.mark.parametrize("task", ["image-classification", "text-classification"])
def test_the_stage_repairs_a_real_graph(task: Any, tmp_path: Path) -> None:
    context = context_for(tmp_path, task)
    config = QuantizeConfig(schemes=("int8-static",), repairs=("smooth", "bias-correction"), keep_float="none",
                            max_metric_drop=0.5, min_agreement=0.2, min_int8_share=0.2)  # fmt: skip
    (candidate,) = Quantize().run(context, config).measurements["candidates"]
    assert candidate["accepted"], candidate["reason"]
    smooth, bias = candidate["repairs"]
    products = compute_nodes(onnx.load(made(task)["export"].file("onnx-fp32.onnx")))
    assert bias["places"] >= len(products) - 1
    # BERT's embedding and two norms a block, but the last, which only the pooled token reads; a CNN has none.
    assert smooth["places"] == (0 if task == "image-classification" else 4)
    if not smooth["places"]:
        assert not smooth["kept"] and "nothing to repair" in repairs.outcome_in_words(smooth)


def candidate_of(accepted: bool, floats: int, more: dict[str, Any]) -> Candidate:
    """A static candidate with so many of twenty nodes in floating point."""
    measured = {"tried": [{}], "float_modules": ["m"] * floats, "sensitivity": [{}] * (20 if floats else 0), **more}
    return Candidate("onnx-int8-static", "f", "int8", 1, accepted=accepted, reason="over", measurements=measured)


def test_where_int8_costs_too_much_the_way_out_is_named() -> None:
    assert advice_of([candidate_of(True, 0, {}), candidate_of(True, 2, {})], repairs=True) == ()
    (kept,) = advice_of([candidate_of(True, 5, {})], repairs=True)
    assert "keeps 25% of its nodes in floating point" in kept
    assert "quantize.repairs" in kept and "finetune.quantization_aware.epochs: 1" in kept
    (without,) = advice_of([candidate_of(True, 5, {})], repairs=False)
    assert "quantize.repairs" not in without and "finetune.quantization_aware.epochs: 1" in without
    (outside,) = advice_of([candidate_of(False, 0, {"repairs": [{}]})], repairs=True)
    assert "outside its budget" in outside and "quantize.repairs" not in outside
    dynamic = Candidate("onnx-int8-dynamic", "f", "int8", 0, accepted=False, reason="nothing")
    assert advice_of([dynamic], repairs=True) == ()
