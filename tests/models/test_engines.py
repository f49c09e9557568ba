"""Engines: the table of targets, the check of a graph against it, its mends, and real builds with TensorRT-RTX."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.engines.build import Outcome, build_engine
from models.engines.check import check_graph_for, summary
from models.engines.mends import mend_for
from models.engines.targets import Target, runtime_of, table, target_of
from models.errors import EngineError, MissingCapabilityError

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.standard_normal((8, 8, 3, 3)).astype(np.float32)
MATRIX = RANDOM.standard_normal((16, 16)).astype(np.float32)
IMAGE = (1, 8, 16, 16)

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="the rtx extra is not installed")


def graph(nodes: list[onnx.NodeProto], constants: dict[str, Any], shape: tuple[int, ...] = IMAGE) -> onnx.ModelProto:
    """x → y."""
    values = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    made = helper.make_graph(nodes, "graph", inputs, outputs, values)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def quantized_convolution(kind: type[np.generic], zero: int, bias: bool = False) -> onnx.ModelProto:
    """x → QDQ → a convolution of INT8 weights, its bias in INT32 as ONNX Runtime writes it."""
    inputs = ["d", "wd", "b"] if bias else ["d", "wd"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "Q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "DQ"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], "weights", axis=0),
        helper.make_node("Conv", inputs, ["y"], "C"),
    ]
    constants: dict[str, Any] = {
        "s": np.float32(0.05), "z": kind(zero), "w": np.clip(WEIGHT * 40, -127, 127).astype(np.int8),
        "ws": np.full(8, 0.02, np.float32), "wz": np.zeros(8, np.int8),
    }  # fmt: skip
    if bias:
        nodes.insert(0, helper.make_node("DequantizeLinear", ["bq", "bs", "bz"], ["b"], "bias", axis=0))
        numbers = {"bq": np.arange(8, dtype=np.int32) * 900, "bs": np.linspace(0.001, 0.002, 8, dtype=np.float32)}
        constants |= {**numbers, "bz": np.zeros(8, np.int32)}
    return graph(nodes, constants)


def product(quantized: bool = False) -> onnx.ModelProto:
    """x → a matrix product in FP32, or one of INT8 with an FP32 side."""
    if not quantized:
        return graph([helper.make_node("MatMul", ["x", "m"], ["y"], "P")], {"m": MATRIX})
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "Q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "DQ"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], "weights", axis=1),
        helper.make_node("MatMul", ["d", "wd"], ["y"], "P"),
    ]
    constants = {
        "s": np.float32(0.05), "z": np.int8(0), "w": np.clip(MATRIX * 30, -127, 127).astype(np.int8),
        "ws": np.full(16, 0.03, np.float32), "wz": np.zeros(16, np.int8),
    }  # fmt: skip
    return graph(nodes, constants)


def resize(mode: str, size: tuple[int, int]) -> onnx.ModelProto:
    """x → an antialiased resize."""
    node = helper.make_node("Resize", ["x", "", "", "size"], ["y"], "R", mode=mode, antialias=1)
    return graph([node], {"size": np.array([1, 8, *size], np.int64)})


def answer(model: onnx.ModelProto, values: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": values})[0])


def build(model: onnx.ModelProto, folder: Path, *targets: Target, **limits: Any) -> Outcome:
    folder.mkdir(exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    settings = {"max_seconds": 120, "max_memory_bytes": 8 * 2**30} | limits
    capabilities = [one.sm for one in targets]
    runtime = runtime_of(targets[0])
    return build_engine(folder / "model.onnx", folder / "engine", runtime, capabilities, {}, folder, **settings)


# --- the table ----------------------------------------------------------------------------------------


def test_every_entry_says_where_it_is_known_from() -> None:
    known = table()
    assert {one.source for one in (*known.targets.values(), *known.rules.values())} <= known.sources.keys()
    assert {"sm75", "sm80", "sm86", "sm89", "sm120", "jetson-orin-jp6", "jetson-thor"} <= known.targets.keys()
    assert all(rule.reason and rule.fix for rule in known.rules.values())


@needs_rtx
def test_the_table_has_the_compute_capabilities_of_the_library() -> None:
    import tensorrt_rtx

    listed = {one.sm for one in table().targets.values() if one.runtime == "tensorrt-rtx"}
    assert listed == set(tensorrt_rtx.ComputeCapability.__members__) - {"NONE", "CURRENT"}
    versions = {one.versions for one in table().targets.values() if one.runtime == "tensorrt-rtx"}
    assert versions == {tensorrt_rtx.__version__}


def test_an_unknown_target_gets_the_nearest_names() -> None:
    with pytest.raises(ValueError, match="no target 'sm68'; did you mean .*sm86"):
        target_of("sm68")
    with pytest.raises(ValueError, match="TensorRT 8.5 has no strongly typed networks"):
        target_of("jetson-orin-jp5")


# --- check and mends ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "target", "rules"),
    [
        (quantized_convolution(np.int8, 0), "sm86", []),
        (quantized_convolution(np.uint8, 0), "sm86", []),
        (quantized_convolution(np.uint8, 0), "jetson-orin-jp6", ["unsigned", "unsigned"]),
        (quantized_convolution(np.uint8, 128), "sm86", ["zero-point", "zero-point"]),
        (quantized_convolution(np.int8, 0, bias=True), "sm86", ["bias-int32"]),
        (resize("linear", (7, 5)), "sm120", ["antialias"]),
        (product(), "sm75", ["fp32-products"]),
        (product(), "sm86", []),
        (product(quantized=True), "sm75", ["fp32-products"]),
    ],
)  # fmt: skip
def test_the_check_names_what_a_target_does_not_take(model: onnx.ModelProto, target: str, rules: list[str]) -> None:
    assert [one.rule for one in check_graph_for(model, target_of(target))] == rules


@pytest.mark.parametrize(
    ("model", "target", "tolerance"),
    [
        (quantized_convolution(np.uint8, 128), "sm86", 1e-6),
        (quantized_convolution(np.uint8, 0), "jetson-orin-jp6", 5e-2),
        (quantized_convolution(np.int8, 0, bias=True), "sm86", 1e-6),
        (resize("linear", (7, 5)), "sm86", 1e-6),
        (resize("cubic", (9, 21)), "sm86", 1e-6),
        (product(), "sm75", 1e-3),
        (product(quantized=True), "sm75", 1e-3),
    ],
)  # fmt: skip
def test_a_mended_graph_is_taken_and_answers_the_same(
    model: onnx.ModelProto, target: str, tolerance: float, tmp_path: Path
) -> None:
    before = model.SerializeToString()
    mended, done, left = mend_for(model, target_of(target))
    assert left == [] and [one.nodes for one in done] != [] and model.SerializeToString() == before
    values = np.abs(RANDOM.standard_normal(IMAGE)).astype(np.float32).clip(0, 6)
    wanted = answer(model, values)
    assert np.abs(answer(mended, values) - wanted).max() <= tolerance * np.ptp(wanted)
    if find_spec("tensorrt_rtx") and target.startswith("sm"):
        assert not build(model, tmp_path / "before", target_of(target)).built  # the rule is no superstition
        assert build(mended, tmp_path / "after", target_of(target)).built


def test_a_zero_point_off_the_middle_costs_steps_that_are_seen() -> None:
    """Mended by a wider range: the caller compares, and this is what it finds."""
    model = quantized_convolution(np.uint8, 37)
    mended, _, left = mend_for(model, target_of("sm86"))
    assert left == []
    values = RANDOM.standard_normal(IMAGE).astype(np.float32)
    assert np.abs(answer(mended, values) - answer(model, values)).max() > 1e-3


def test_what_cannot_be_mended_is_named_with_module_reason_and_fix() -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], "scales"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], "back"),
    ]
    model = graph(nodes, {})
    model.graph.node[0].metadata_props.add(key="module", value="backbone.stem")
    mended, done, left = mend_for(model, target_of("sm86"))
    assert mended is model and done == []
    assert [(one.node, one.module, one.rule) for one in left] == [("scales", "backbone.stem", "run-time-scales")]
    assert "scales of backbone.stem" in summary(left) and "int8-static" in summary(left)


def test_a_later_opset_and_an_unknown_dtype_are_findings() -> None:
    model = product()
    model.opset_import[0].version = 21
    assert [one.rule for one in check_graph_for(model, target_of("jetson-orin-jp6"))] == ["opset"]
    halves = [
        helper.make_node("Cast", ["x"], ["b"], "cast", to=TensorProto.BFLOAT16),
        helper.make_node("Cast", ["b"], ["y"], "back", to=TensorProto.FLOAT),
    ]
    findings = check_graph_for(graph(halves, {}), target_of("sm75"))
    assert findings[0].rule == "dtype" and "bfloat16" in findings[0].reason
    assert check_graph_for(graph(halves, {}), target_of("sm86")) == []


# --- building -----------------------------------------------------------------------------------------


@needs_rtx
def test_building_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    targets = [target_of(name) for name in ("sm80", "sm86", "sm89", "sm120")]
    model = quantized_convolution(np.int8, 0)
    assert build(model, tmp_path / "one", *targets).built and build(model, tmp_path / "two", *targets).built
    assert (tmp_path / "one/engine").read_bytes() == (tmp_path / "two/engine").read_bytes()


@needs_rtx
def test_the_library_names_every_node_that_it_does_not_know(tmp_path: Path) -> None:
    nodes = [helper.make_node("Det", ["x"], ["y"], "volume")]
    outcome = build(graph(nodes, {}, (2, 4, 4)), tmp_path, target_of("sm86"))
    assert [(one.node, one.operator) for one in outcome.refusals] == [("volume", "Det")]
    assert "does not know" in outcome.refusals[0].reason and not (tmp_path / "engine").exists()


@needs_rtx
def test_the_builder_says_why_it_gives_nothing(tmp_path: Path) -> None:
    outcome = build(product(), tmp_path, target_of("sm75"))
    assert "FP32 GEMM is not supported" in outcome.refusals[0].reason


@needs_rtx
def test_a_limit_that_is_hit_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"not built in 0\.05 s.*export\.engine_build\.max_seconds"):
        build(product(), tmp_path / "time", target_of("sm86"), max_seconds=0.05)
    with pytest.raises(EngineError, match=r"memory.*export\.engine_build\.max_memory_bytes"):
        build(product(), tmp_path / "memory", target_of("sm86"), max_memory_bytes=2 * 10**8)


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_a_missing_library_is_named_with_the_line_that_installs_it(tmp_path: Path) -> None:
    with pytest.raises(MissingCapabilityError, match="pip install tensorrt"):
        build(product(), tmp_path, target_of("jetson-orin-jp6"))
