"""The backend `modelopt`: really quantized, right in ONNX Runtime, and taken by TensorRT-RTX."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.errors import MissingCapabilityError, QuantizeError
from models.runtimes.onnxruntime_session import OnnxRuntimeSession
from models.spec import TaskName
from stages.quantize import Quantize, QuantizeConfig
from stages.quantize.modelopt_backend import plan_with_modelopt, restored
from stages.quantize.schemes import Scheme
from tests.stages.test_quantize import LOOSE, bench_of, context_for
from tests.stages.test_quantize_narrow import IDS, answer, fp8_of, products_network

BACKEND: dict[str, Any] = {"backend": "modelopt", "block_size": 16, **LOOSE}
needs_modelopt = pytest.mark.skipif(find_spec("modelopt") is None, reason="the quant extra is not installed")


@needs_modelopt
@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "schemes", "sm"),
    [
        ("text-classification", ("int4-blocks", "fp8"), "SM89"),
        ("image-classification", ("int8-symmetric",), "SM86"),
    ],
)
def test_its_schemes_are_quantized_run_and_build(
    tmp_path: Path, task: TaskName, schemes: tuple[Scheme, ...], sm: str
) -> None:
    context = context_for(tmp_path, task)
    result = Quantize().run(context, QuantizeConfig(schemes=schemes, **BACKEND))
    candidates = result.measurements["candidates"]
    assert [one["accepted"] for one in candidates] == [True] * len(schemes), [one["reason"] for one in candidates]
    for one in candidates:
        assert one["narrow_share"] > 0.5 and one["narrow_share"] == max(one["mac_shares"].values())
        if find_spec("tensorrt_rtx"):
            import tensorrt_rtx as trt

            logger = trt.Logger(trt.Logger.ERROR)
            network = trt.Builder(logger).create_network(0)
            parser = trt.OnnxParser(network, logger)
            parsed = parser.parse((context.output / one["file"]).read_bytes())
            assert parsed, [parser.get_error(index).desc() for index in range(parser.num_errors)]


def wide_network() -> onnx.ModelProto:
    """x: float32 (batch, 3, 4, 4) → two convolutions of 32 channels (ModelOpt leaves narrow ones alone) → y."""
    random = np.random.default_rng(0)
    weights = [random.standard_normal((32, width, 3, 3)).astype(np.float32) for width in (3, 32)]
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Conv", ["b", "w1"], ["y"], "second", pads=[1, 1, 1, 1]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 4, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 32, 4, 4])
    tensors = [numpy_helper.from_array(value, f"w{index}") for index, value in enumerate(weights)]
    graph = helper.make_graph(nodes, "wide", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@needs_modelopt
@pytest.mark.slow
def test_nodes_go_back_to_what_they_were(tmp_path: Path) -> None:
    bench = replace(bench_of(tmp_path, QuantizeConfig(schemes=("fp8",), **BACKEND)), model=wide_network())
    plan = plan_with_modelopt(bench, "int8-symmetric")
    assert {"first", "second"} <= set(plan.nodes)
    inputs = {"x": np.stack([one.content for one in bench.context.data["validation"][:8]])}
    wanted = answer(wide_network(), tmp_path / "fp32.onnx", inputs)
    quantized = answer(plan.variant([]), tmp_path / "int8.onnx", inputs)
    back = plan.variant(plan.nodes)
    assert {node.op_type for node in back.graph.node}.isdisjoint({"QuantizeLinear", "DequantizeLinear"})
    assert np.abs(answer(back, tmp_path / "back.onnx", inputs) - wanted).max() < 1e-5 * np.ptp(wanted)
    assert 1e-3 < np.abs(quantized - wanted).max() / np.ptp(wanted) < 0.1


def test_a_node_that_is_taken_back_reads_what_it_read(tmp_path: Path) -> None:
    """Without ModelOpt: on pairs of our own, one node of two."""
    model = products_network()
    variant = restored(model, fp8_of(model, tmp_path, IDS), ["second"])
    nodes = {node.name: node for node in variant.graph.node}
    assert nodes["second"].input[1] == "two_float" and "Dequantize" in nodes["first"].input[1]
    assert "two_quantized" not in {tensor.name for tensor in variant.graph.initializer}
    onnx.save(variant, tmp_path / "variant.onnx")
    onnx.checker.check_model(str(tmp_path / "variant.onnx"), full_check=True)
    with OnnxRuntimeSession(tmp_path / "variant.onnx", threads=1) as session:
        assert session.infer(IDS)["y"].shape == (3, 4, 32)


def test_without_it_the_line_that_installs_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.quantize.modelopt_backend.find_spec", lambda name: None)
    with pytest.raises(MissingCapabilityError, match=r"needs modelopt, .*pip install 'nvidia-modelopt"):
        plan_with_modelopt(bench_of(tmp_path, QuantizeConfig(schemes=("fp8",), **BACKEND)), "fp8")


def test_what_it_says_last_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.quantize.modelopt_backend.require_modelopt", lambda: None)
    monkeypatch.setattr("stages.quantize.modelopt_backend.REQUEST", "elsewhere.json")
    with pytest.raises(QuantizeError, match=r"ModelOpt: .*; take fp8 out of quantize\.schemes"):
        plan_with_modelopt(bench_of(tmp_path, QuantizeConfig(schemes=("fp8",), **BACKEND)), "fp8")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"schemes": ["int8-static", "fp8"]}, "the backend modelopt has no int8-static; it has int8-symmetric"),
        ({"schemes": ["fp8"], "calibration": "mse"}, "the backend modelopt has no calibration mse; it has minmax"),
        ({"schemes": ["fp8"], "repairs": ["smooth"], "reduce_range": True}, "has no repairs, reduce_range; take"),
        ({"schemes": ["fp8"], "calibration_percentile": 99.9}, "the backend modelopt has no calibration_percentile"),
    ],
)
def test_what_it_has_not_is_an_error_of_the_configuration(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        QuantizeConfig.model_validate({"backend": "modelopt", **settings})


def test_what_is_set_to_nothing_is_not_asked_of_it() -> None:
    settings = {"backend": "modelopt", "schemes": ["fp8"], "repairs": [], "reduce_range": False}
    assert QuantizeConfig.model_validate(settings).backend == "modelopt"
