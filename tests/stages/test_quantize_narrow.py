"""INT4 and FP8: really quantized, as near as their bits allow, and taken by the targets that the table names."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.engines.build import build_engine
from models.engines.check import check_graph_for
from models.engines.targets import runtime_of, target_of
from models.errors import QuantizeError
from models.graph import MODULE, products_of, shares_of
from models.runtimes.onnxruntime_session import OnnxRuntimeSession
from models.spec import TaskName
from stages.quantize import Quantize, QuantizeConfig
from stages.quantize.calibration import calibrate_ranges
from stages.quantize.fp8 import LARGEST_FP8, fp8_from_int8
from stages.quantize.int4 import blockwise_nodes, quantize_blocks
from stages.quantize.qdq import Form, quantize_graph
from stages.validate.stage import GatesConfig
from tests.stages.chain import made
from tests.stages.test_quantize import LOOSE, bench_of, candidate_of, context_for

RANDOM = np.random.default_rng(0)
LOOSEST: dict[str, Any] = {**LOOSE, "min_int4_share": 0.2, "min_fp8_share": 0.2}


def products_network(shared: bool = False) -> onnx.ModelProto:
    """ids: int64 (batch, 4) → a table of 32 vectors → two products, of one matrix where `shared` → y (batch, 4, 32)."""
    table, one, two = (RANDOM.standard_normal((32, 32)).astype(np.float32) for _ in range(3))
    constants = {"table": table, "one": one} | ({} if shared else {"two": two})
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["a"], "look-up"),
        helper.make_node("MatMul", ["a", "one"], ["b"], "first"),
        helper.make_node("Relu", ["b"], ["c"], "relu"),
        helper.make_node("MatMul", ["c", "one" if shared else "two"], ["y"], "second"),
    ]
    nodes[1].metadata_props.add(key=MODULE, value="network.first")
    x = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 32])
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "products", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


IDS = {"ids": RANDOM.integers(0, 32, (3, 4))}


def answer(model: onnx.ModelProto, path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    onnx.save(model, path)
    with OnnxRuntimeSession(path, threads=1) as session:
        return next(iter(session.infer(inputs).values()))


def fp8_of(model: onnx.ModelProto, folder: Path, inputs: dict[str, np.ndarray]) -> onnx.ModelProto:
    """FP8 with the ranges of these inputs."""
    onnx.save(model, folder / "source.onnx")
    ranges = calibrate_ranges(folder / "source.onnx", folder, iter([inputs]), lambda: None, symmetric=True)
    return fp8_from_int8(quantize_graph(model, ranges, Form("tensorrt")), model)


@pytest.mark.parametrize(
    ("task", "scheme", "stored"),
    [
        ("text-classification", "int4-weights", "MatMulNBits"),
        ("text-classification", "int4-blocks", TensorProto.INT4),
        ("text-classification", "fp8", TensorProto.FLOAT8E4M3FN),
        ("image-classification", "fp8", TensorProto.FLOAT8E4M3FN),
    ],
)
def test_a_scheme_gives_what_it_says(tmp_path: Path, task: TaskName, scheme: Any, stored: Any) -> None:
    context = context_for(tmp_path, task)
    result = Quantize().run(context, QuantizeConfig(schemes=(scheme,), block_size=16, **LOOSEST))
    assert [gate.verdict for gate in result.gates] == ["pass"], result.gates[0].message
    (candidate,) = json.loads((context.output / "candidates.json").read_text())
    measured = candidate["measurements"]
    assert candidate["accepted"] and candidate["precision"] == scheme.partition("-")[0]
    assert measured["narrow_share"] == max(measured["mac_shares"].values()) > 0.5
    path = context.output / f"onnx-{scheme}.onnx"
    fp32 = made(task)["export"].file("onnx-fp32.onnx").stat().st_size
    assert candidate["size_bytes"] == path.stat().st_size < fp32
    graph = onnx.load(path).graph
    found = {node.op_type for node in graph.node} | {tensor.data_type for tensor in graph.initializer}
    assert stored in found
    assert f"in {measured['narrow']}" in result.notes[0]


@pytest.mark.parametrize("scheme", ["int4-weights", "int4-blocks"])
def test_a_network_of_convolutions_has_nothing_for_int4(tmp_path: Path, scheme: Any) -> None:
    result = Quantize().run(context_for(tmp_path, "image-classification"), QuantizeConfig(schemes=(scheme,), **LOOSEST))
    assert [gate.verdict for gate in result.gates] == ["fail"]
    assert "the graph has no MatMul with constant weights" in result.gates[0].message


def test_too_small_a_share_is_told_by_its_own_name(tmp_path: Path) -> None:
    """The budget takes a node out of FP8, and what is left is too little."""
    config = QuantizeConfig(min_agreement=1.0, max_metric_drop=0.0, min_fp8_share=0.9, min_int8_share=0.0)
    candidate = candidate_of(bench_of(tmp_path, config), "fp8")
    assert len(candidate.measurements["tried"]) == 2 and candidate.measurements["float_modules"]
    assert not candidate.accepted and candidate.reason.startswith("only 63.6% of the arithmetic is in FP8")


@pytest.mark.parametrize(
    ("scheme", "quantizer"), [("fp8", "fp8_from_int8"), ("fp8", "quantize_graph"), ("int8-static", "quantize_graph")]
)
def test_what_a_quantizer_raises_names_the_scheme(
    scheme: Any, quantizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while a repair is tried, before the search begins."""

    def refuse(*_: Any, **__: Any) -> onnx.ModelProto:
        raise RuntimeError("no such axis")

    monkeypatch.setattr(f"stages.quantize.onnxruntime_backend.{quantizer}", refuse)
    with pytest.raises(QuantizeError, match=rf"^{scheme}: no such axis; take {scheme} out of quantize\.schemes"):
        candidate_of(bench_of(tmp_path, QuantizeConfig()), scheme)


# --- the graphs ---------------------------------------------------------------------------------------


def test_fp8_scales_spread_the_largest_magnitude_over_448(tmp_path: Path) -> None:
    model = products_network()
    graph = fp8_of(model, tmp_path, IDS).graph
    onnx.checker.check_model(onnx.load(tmp_path / "source.onnx"), full_check=True)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weight = numpy_helper.to_array(next(one for one in model.graph.initializer if one.name == "two"))
    largest = np.abs(weight).max(0)
    np.testing.assert_allclose(tensors["two_scale"], largest / LARGEST_FP8, rtol=1e-6)
    back = tensors["two_quantized"].astype(np.float32) * tensors["two_scale"]
    # Three bits of mantissa: half a step is 2⁻⁴ of the number; below 2⁻⁶ of E4M3 steps are even, 2⁻⁹ wide.
    assert np.all(np.abs(back - weight) <= np.maximum(np.abs(weight) * 2**-4, tensors["two_scale"] * 2**-10) * 1.001)
    wanted = answer(model, tmp_path / "fp32.onnx", IDS)
    found = answer(fp8_of(model, tmp_path, IDS), tmp_path / "fp8.onnx", IDS)
    assert 0 < np.abs(found - wanted).max() < 0.1 * np.ptp(wanted)


def test_fp8_convolutions_with_clip_and_relu_between_are_right(tmp_path: Path) -> None:
    """ONNX Runtime's fusions with QuantizeLinear do not know FP8: that of Clip fails on loading, that of Relu drops
    it (the error was a third of the range)."""
    weights = RANDOM.standard_normal((2, 4, 4, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], "one"),
        helper.make_node("Clip", ["a", "low", "high"], ["b"], "clip"),
        helper.make_node("Conv", ["b", "w1"], ["c"], "two"),
        helper.make_node("Relu", ["c"], ["d"], "relu"),
        helper.make_node("Conv", ["d", "w0"], ["y"], "three"),
    ]
    constants = {"w0": weights[0], "w1": weights[1], "low": np.float32(0), "high": np.float32(6)}
    graph = helper.make_graph(
        nodes,
        "clipped",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 9, 9])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    inputs = {"x": RANDOM.standard_normal((2, 4, 9, 9)).astype(np.float32)}
    wanted = answer(model, tmp_path / "fp32.onnx", inputs)
    found = answer(fp8_of(model, tmp_path, inputs), tmp_path / "fp8.onnx", inputs)
    assert 0 < np.abs(found - wanted).max() < 0.1 * np.ptp(wanted)
    shares = shares_of(products_of(tmp_path / "fp8.onnx", inputs))
    assert shares == {"fp8": 1.0}


@pytest.mark.parametrize("form", ["operators", "pairs"])
@pytest.mark.parametrize("shared", [False, True])
def test_int4_blocks_are_near_and_leave_out_what_is_named(tmp_path: Path, form: Any, shared: bool) -> None:
    model = products_network(shared)
    wanted = answer(model, tmp_path / "fp32.onnx", IDS)
    quantized = quantize_blocks(model, form, 16)
    error = np.abs(answer(quantized, tmp_path / "int4.onnx", IDS) - wanted)
    assert 0 < error.mean() < 0.1 * np.ptp(wanted)
    one = {"ids": IDS["ids"][:1]}
    products = products_of(tmp_path / "int4.onnx", one)
    assert shares_of(products) == {"int4-weights": 1.0} and products[0].module == "network.first"
    names = [node.name for node in blockwise_nodes(model, form)]
    assert names == (["look-up"] if form == "operators" else []) + ["first", "second"]
    partly = quantize_blocks(model, form, 16, ["second"])
    onnx.save(partly, tmp_path / "partly.onnx")
    kept = next(node for node in partly.graph.node if node.name == "second")
    assert kept.op_type == "MatMul" and kept.input[1] == ("one" if shared else "two")
    shares = shares_of(products_of(tmp_path / "partly.onnx", one))
    assert shares == {"fp32": 0.5, "int4-weights": 0.5}
    assert all(len(node.input) < 3 for node in quantized.graph.node if node.op_type == "DequantizeLinear")  # no zero


def test_larger_blocks_are_smaller_and_less_true(tmp_path: Path) -> None:
    model = products_network()
    wanted = answer(model, tmp_path / "fp32.onnx", IDS)
    found = {}
    for size in (16, 32):
        path = tmp_path / f"{size}.onnx"
        error = float(np.square(answer(quantize_blocks(model, "operators", size), path, IDS) - wanted).mean())
        found[size] = error, path.stat().st_size
    assert found[16][0] < found[32][0] and found[16][1] > found[32][1]


def test_the_quantizer_leaves_the_loggers_of_others_alone() -> None:
    """Its module calls logging.basicConfig when it is imported, and says something of every node."""
    code = (
        "import logging; from stages.quantize.int4 import import_quietly; import_quietly();"
        "root = logging.getLogger(); print(root.handlers, root.level)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"[] {logging.WARNING}"


# --- engines ------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="the rtx extra is not installed")
@pytest.mark.parametrize(("scheme", "takes", "refuses"), [("int4-blocks", "sm80", "sm75"), ("fp8", "sm89", "sm86")])
def test_the_table_is_right_about_who_takes_it(tmp_path: Path, scheme: str, takes: str, refuses: str) -> None:
    model = products_network()
    graph = quantize_blocks(model, "pairs", 16) if scheme == "int4-blocks" else fp8_of(model, tmp_path, IDS)
    onnx.save(graph, tmp_path / "model.onnx")
    for name, wanted in ((takes, True), (refuses, False)):
        target = target_of(name)
        findings = [one for one in check_graph_for(graph, target) if one.mend is None]
        assert (not findings) == wanted
        profile = {"ids": [[1, 4], [2, 4], [4, 4]]}
        engine = tmp_path / f"{name}.engine"
        outcome = build_engine(
            tmp_path / "model.onnx", engine, runtime_of(target), [target.sm], profile, tmp_path, 120, 2**33
        )
        assert outcome.built == wanted, outcome.refusals


def test_operators_of_onnx_runtime_are_refused_with_the_scheme_to_take() -> None:
    findings = check_graph_for(quantize_blocks(products_network(), "operators", 16), target_of("sm86"))
    assert {one.operator for one in findings if one.rule == "contributed"} == {"MatMulNBits", "GatherBlockQuantized"}
    assert all("int4-blocks" in one.fix for one in findings if one.rule == "contributed")


# --- validate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "int4", "fp8"])
def test_agreement_is_asked_for_by_precision(precision: str) -> None:
    assert GatesConfig().agreement_of(precision) == 0.94 < GatesConfig().agreement_of("fp16") == 0.99
    assert GatesConfig(min_agreement=0.98).agreement_of(precision) == 0.98
    own = GatesConfig.model_validate({"min_agreement": 0.98, f"min_agreement_{precision}": 0.9})
    assert own.agreement_of(precision) == 0.9
    assert [own.agreement_of(one) for one in ("int8", "int4", "fp8") if one != precision] == [0.98, 0.98]
