"""quantize: the budget decides, the ladder finds what INT8 breaks, and the graphs are what they claim to be."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.errors import QuantizeError, StageError
from models.graph import MODULE, products_of
from models.runtimes.onnxruntime_session import OnnxRuntimeSession
from models.spec import TaskName
from stages.artifact import Artifact
from stages.base import StageContext
from stages.candidates import Candidate
from stages.data.splits import DataSplits, Example
from stages.quantize import Quantize, QuantizeConfig
from stages.quantize.bench import Workbench, rank_nodes
from stages.quantize.budget import outside_budget, search_precisions
from stages.quantize.calibration import BATCH_SIZES, Method, calibrate_ranges, least_error
from stages.quantize.onnxruntime_backend import PLANS, calibrate
from stages.quantize.qdq import Form, compute_nodes, quantizable_nodes, quantize_graph
from stages.quantize.schemes import Scheme
from stages.quantize.search import fewest, rungs_for
from stages.validate import ValidateConfig
from tests.stages.chain import artifact_of, context_of, made, test_split

TASKS: tuple[TaskName, ...] = ("image-classification", "text-classification", "audio-classification")
LOOSE: dict[str, Any] = {"max_metric_drop": 0.2, "min_agreement": 0.7, "min_int8_share": 0.2}


def context_for(tmp_path: Path, task: TaskName, inputs: dict[str, Artifact] | None = None) -> StageContext:
    """validation and calibration of made-up examples."""
    examples = test_split(task, 64)
    context = context_of(tmp_path / "out", inputs or made(task), task, examples[:48])
    splits = {"train": (), "validation": examples[:48], "calibration": examples[48:], "test": ()}
    resume = tmp_path / "resume"
    resume.mkdir()
    return replace(context, resume=resume, data=replace(context.data, splits=splits))


@pytest.mark.parametrize("task", TASKS)
def test_candidates_inside_the_budget_are_written(tmp_path: Path, task: TaskName) -> None:
    context = context_for(tmp_path, task)
    result = Quantize().run(context, QuantizeConfig(**LOOSE))
    assert [gate.verdict for gate in result.gates] == ["pass"]
    candidates = {one["name"]: one for one in json.loads((context.output / "candidates.json").read_text())}
    assert candidates["onnx-int8-static"]["accepted"]
    assert candidates["onnx-int8-dynamic"]["accepted"] == (task != "image-classification")
    written = sorted(path.stem for path in context.output.glob("*.onnx"))
    assert written == sorted(name for name, one in candidates.items() if one["accepted"])
    fp32 = made(task)["export"].file("onnx-fp32.onnx").stat().st_size
    static = candidates["onnx-int8-static"]
    assert static["size_bytes"] == (context.output / "onnx-int8-static.onnx").stat().st_size < fp32
    assert static["measurements"]["narrow_share"] > 0.5


def test_a_network_without_matrix_products_has_nothing_for_the_dynamic_scheme(tmp_path: Path) -> None:
    context = context_for(tmp_path, "image-classification")
    result = Quantize().run(context, QuantizeConfig(schemes=("int8-dynamic",), **LOOSE))
    assert [gate.verdict for gate in result.gates] == ["fail"]
    assert "nothing to quantize" in result.gates[0].message
    assert not list(context.output.glob("*.onnx"))


def test_no_scheme_is_no_gate_and_no_candidate(tmp_path: Path) -> None:
    context = context_for(tmp_path, "image-classification")
    result = Quantize().run(context, QuantizeConfig(schemes=()))
    assert result.gates == () and result.measurements["candidates"] == []


@pytest.mark.parametrize("task", TASKS)
def test_the_gate_fails_where_the_graph_is_not_the_reference(tmp_path: Path, task: TaskName) -> None:
    """Labels swapped in the ONNX file: judged against PyTorch, not against the file that was quantized."""
    folder = tmp_path / "export"
    folder.mkdir()
    model = onnx.load(made(task)["export"].file("onnx-fp32.onnx"))
    for tensor in model.graph.initializer:
        if tensor.name.endswith(("task_head.weight", "task_head.bias")):
            rolled = np.roll(numpy_helper.to_array(tensor), 1, axis=0)
            tensor.CopyFrom(numpy_helper.from_array(rolled, tensor.name))
    onnx.save(model, folder / "onnx-fp32.onnx")
    context = context_for(tmp_path, task, {**made(task), "export": artifact_of("export", folder)})
    result = Quantize().run(context, QuantizeConfig(min_agreement=0.9, max_metric_drop=1.0))
    assert [gate.verdict for gate in result.gates] == ["fail"]
    assert not list(context.output.glob("*.onnx"))
    assert all(not one["accepted"] and one["reason"] for one in result.measurements["candidates"])


def test_an_empty_calibration_split_is_an_error(tmp_path: Path) -> None:
    context = context_for(tmp_path, "image-classification")
    splits = {**context.data.splits, "calibration": ()}
    context = replace(context, data=replace(context.data, splits=splits))
    with pytest.raises(QuantizeError, match="calibration split is empty"):
        Quantize().run(context, QuantizeConfig(schemes=("int8-static",)))


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    content = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        context = context_for(tmp_path / name, "image-classification")
        Quantize().run(context, QuantizeConfig(schemes=("int8-static",), **LOOSE))
        content.append((context.output / "onnx-int8-static.onnx").read_bytes())
    assert content[0] == content[1]


# A network of three convolutions whose second has an input channel a thousand times larger than the others.


def fragile_network() -> onnx.ModelProto:
    """x: float32 (batch, 3, 4, 4) → 1×1 convolutions `plain`, `fragile`, `last` → mean → logits (batch, 4)."""
    random = np.random.default_rng(0)
    first, second, third = (random.normal(size=(4, size, 1, 1)).astype(np.float32) for size in (3, 4, 4))
    first[0] *= 1000
    second[:, 0] /= 1000
    initializers = [numpy_helper.from_array(one, f"w{index}") for index, one in enumerate((first, second, third))]
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], "plain"),
        helper.make_node("Conv", ["a", "w1"], ["b"], "fragile"),
        helper.make_node("Relu", ["b"], ["c"], "relu"),
        helper.make_node("Conv", ["c", "w2"], ["d"], "last"),
        helper.make_node("GlobalAveragePool", ["d"], ["e"], "mean"),
        helper.make_node("Flatten", ["e"], ["logits"], "flatten"),
    ]
    nodes[1].metadata_props.add(key=MODULE, value="network.second")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 4, 4])
    y = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])
    graph = helper.make_graph(nodes, "fragile", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


class Arrays:
    """Preprocessing of what is an array already."""

    kind = "image"

    def arrays(self, contents: list[np.ndarray]) -> dict[str, np.ndarray]:
        return {"x": np.stack(contents)}


def bench_of(tmp_path: Path, config: QuantizeConfig) -> Workbench:
    """A bench with the fragile network; the reference is the network itself in ONNX Runtime."""
    tmp_path.mkdir(exist_ok=True)
    random = np.random.default_rng(1)
    contents = random.normal(size=(128, 3, 4, 4)).astype(np.float32)
    examples = tuple(Example(one, 0, str(index), "") for index, one in enumerate(contents))
    splits = {"train": (), "validation": examples[:96], "calibration": examples[96:], "test": ()}
    context = context_of(tmp_path / "out", {}, examples=())
    context = replace(context, data=DataSplits(tuple("abcd"), splits, {}))  # type: ignore[arg-type]
    model = fragile_network()
    checkpoint: Any = SimpleNamespace(processing=Arrays(), spec=SimpleNamespace(task="image-classification"))
    onnx.save(model, tmp_path / "fp32.onnx")
    with OnnxRuntimeSession(tmp_path / "fp32.onnx") as session:
        logits = session.infer({"x": contents[:96]})["logits"]
    products = products_of(tmp_path / "fp32.onnx", {"x": contents[:1]})
    return Workbench(context, config, checkpoint, model, products, tmp_path, logits, logits.argmax(1))


def candidate_of(bench: Workbench, scheme: Scheme = "int8-static") -> Candidate:
    """What a scheme comes to on a bench."""
    return search_precisions(bench, scheme, PLANS[scheme](bench))


@pytest.mark.parametrize("layout", ["onnxruntime", "tensorrt"])
def test_the_node_that_int8_breaks_ranks_first(tmp_path: Path, layout: Any) -> None:
    bench = bench_of(tmp_path, QuantizeConfig())
    nodes = [node.name for node in quantizable_nodes(bench.model, layout)]
    ranges = calibrate(bench, layout)
    harm = rank_nodes(bench, nodes, lambda floats: quantize_graph(bench.model, ranges, Form(layout), floats))
    assert next(iter(harm)) == "fragile" and list(harm.values()) == sorted(harm.values(), reverse=True)


def test_the_search_keeps_that_node_in_float_and_stops(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, QuantizeConfig(min_agreement=0.9, max_metric_drop=0.1))
    candidate = candidate_of(bench)
    assert candidate.accepted, candidate.reason
    assert candidate.measurements["float_modules"] == ["network.second"]
    plain, mended = candidate.measurements["tried"]
    assert plain["agreement"] < 0.9 <= mended["agreement"]
    assert (plain["narrow_share"], plain["float_nodes"], mended["float_nodes"]) == (1.0, 0, 1)
    assert candidate.measurements["narrow_share"] == pytest.approx(28 / 44)  # 3·4 + 4·4 of 3·4 + 4·4 + 4·4
    assert candidate.measurements["mac_shares"] == pytest.approx({"int8": 28 / 44, "fp32": 16 / 44})
    ranked = candidate.measurements["sensitivity"]
    assert ranked[0]["module"] == "network.second" and ranked[0]["mac_share"] == pytest.approx(16 / 44)
    assert ranked[0]["harm"] > 10 * ranked[1]["harm"] > 0
    written = onnx.load(bench.context.output / candidate.file)
    inputs = {node.name: list(node.input) for node in written.graph.node}
    assert inputs["fragile"] == ["a", "w1"]  # the original weights, and the activation before any pair
    assert inputs["plain"] == ["x_DequantizeLinear_Output", "w0_DequantizeLinear_Output"]


def test_without_the_search_the_candidate_is_left_out(tmp_path: Path) -> None:
    candidate = candidate_of(bench_of(tmp_path, QuantizeConfig(keep_float="none")))
    assert not candidate.accepted and "the budget is" in candidate.reason
    assert len(candidate.measurements["tried"]) == 1
    assert not (tmp_path / "out" / candidate.file).exists()


def test_too_small_a_share_is_not_worth_shipping(tmp_path: Path) -> None:
    loose = QuantizeConfig(min_agreement=0, max_metric_drop=1, min_int8_share=1.0)
    assert candidate_of(bench_of(tmp_path / "loose", loose)).accepted
    strict = QuantizeConfig(min_agreement=0.9, max_metric_drop=0.1, min_int8_share=0.8)
    candidate = candidate_of(bench_of(tmp_path / "strict", strict))
    assert not candidate.accepted and "only 63.6% of the arithmetic is in INT8" in candidate.reason


def test_a_graph_that_the_quantizer_left_as_it_was_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "stages.quantize.onnxruntime_backend.quantize_graph", lambda model, *_, **__: copy.deepcopy(model)
    )
    config = QuantizeConfig(min_int8_share=0, max_metric_drop=1, min_agreement=0)
    with pytest.raises(StageError, match=r"onnx-int8-static is labelled int8, but its arithmetic is 100% fp32"):
        candidate_of(bench_of(tmp_path, config))


def test_the_rungs_double_up_to_half_of_the_nodes() -> None:
    assert rungs_for(1) == [0]
    assert rungs_for(9) == [0, 1, 2, 4]
    assert rungs_for(61) == [0, 1, 2, 4, 8, 16, 30]


@pytest.mark.parametrize("needed", range(32))
def test_the_search_finds_the_fewest_nodes(needed: int) -> None:
    asked: list[int] = []

    def inside(count: int) -> bool:
        asked.append(count)
        return count >= needed

    assert fewest(rungs_for(62), inside) == needed
    assert len(asked) == len(set(asked)) <= 11


def test_the_search_ends_where_nothing_is_inside_or_accuracy_is_not_monotonic() -> None:
    assert fewest(rungs_for(20), lambda count: False) is None
    good = {4, 7, 8}
    assert fewest([0, 1, 2, 4, 8], good.__contains__) == 4
    assert fewest([0, 1, 8], good.__contains__) in good


@pytest.mark.parametrize("layout", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("task", TASKS)
def test_the_graph_is_close_to_the_original(tmp_path: Path, task: TaskName, layout: Any) -> None:
    """Every compute node in INT8, on a real export: the error is that of eight bits, not of a wrong axis."""
    from stages.inputs import batches
    from stages.quantize.stage import prepare_graph

    context = context_for(tmp_path, task)
    from models.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(made(task)["merge-lora"].folder / "checkpoint")
    model = prepare_graph(made(task)["export"].file("onnx-fp32.onnx"), tmp_path)
    bench = Workbench(context, QuantizeConfig(), checkpoint, model, [], tmp_path, np.zeros(0), np.zeros(0))
    inputs = [arrays for arrays, _ in batches(checkpoint.processing, context.data["validation"], 16)]
    quantized = quantize_graph(model, calibrate(bench, layout), Form(layout))
    onnx.checker.check_model(quantized, full_check=True)

    def logits_of(graph: onnx.ModelProto) -> np.ndarray:
        return np.concatenate([outputs["logits"] for outputs in bench.run(graph, inputs)])

    wanted, found = logits_of(model), logits_of(quantized)
    noise = np.square(found - wanted).mean() / np.square(wanted - wanted.mean(0)).mean()
    assert 0 < noise < 0.2
    zeros = [tensor for tensor in quantized.graph.initializer if tensor.name.endswith("_zero_point")]
    if layout == "tensorrt":
        assert {tuple(np.unique(numpy_helper.to_array(tensor))) for tensor in zeros} == {(0,)}
        assert {tensor.data_type for tensor in zeros} == {TensorProto.INT8}
        pairs = [name for node in quantized.graph.node if node.op_type == "QuantizeLinear" for name in node.output]
        readers = [sum(name in node.input for node in quantized.graph.node) for name in pairs]
        assert set(readers) == {1}
    else:
        assert {tensor.data_type for tensor in zeros} == {TensorProto.INT8, TensorProto.UINT8}
        tables = {tensor.name for tensor in quantized.graph.initializer if tensor.data_type == TensorProto.FLOAT}
        assert not [node.name for node in quantized.graph.node if node.op_type == "Gather" and node.input[0] in tables]
    left = {node.name for node in compute_nodes(quantized)}
    assert not left  # no compute node reads a floating-point constant any more


def test_what_is_not_quantized_reads_what_it_read_before(tmp_path: Path) -> None:
    """The residual additions and layer norms of a transformer are not rounded to 8 bits on their way."""
    from models.checkpoint import load_checkpoint
    from stages.quantize.stage import prepare_graph

    artifacts = made("text-classification")
    context = context_for(tmp_path, "text-classification")
    checkpoint = load_checkpoint(artifacts["merge-lora"].folder / "checkpoint")
    model = prepare_graph(artifacts["export"].file("onnx-fp32.onnx"), tmp_path)
    bench = Workbench(context, QuantizeConfig(), checkpoint, model, [], tmp_path, np.zeros(0), np.zeros(0))
    targets = {node.name for node in quantizable_nodes(model, "onnxruntime")}
    embedded = {node.output[0] for node in model.graph.node if node.op_type == "Gather" and node.name in targets}
    before = {node.name: node for node in model.graph.node if node.name not in targets}
    after = {node.name: node for node in quantize_graph(model, calibrate(bench, "onnxruntime"), Form()).graph.node}
    assert len(embedded) == 3 and len(targets) == 3 + 2 * 6 + 1
    for name, node in before.items():
        for index, tensor in enumerate(node.input):
            assert after[name].input[index] == tensor or tensor in embedded


@pytest.mark.parametrize("transposed", [0, 1])
def test_matrix_products_are_scaled_along_their_output_channels(tmp_path: Path, transposed: int) -> None:
    weight = np.array([[1, 100], [2, 50], [-4, 25]], np.float32)  # (in, out): columns of very different size
    stored = weight.T.copy() if transposed else weight
    node = helper.make_node("Gemm", ["x", "w"], ["y"], "gemm", transB=transposed)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])
    graph = helper.make_graph([node], "one", [x], [y], [numpy_helper.from_array(stored, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "one.onnx")
    calibration = [{"x": np.array([[-1, 0, 1]], np.float32)}]
    ranges = calibrate_ranges(tmp_path / "one.onnx", tmp_path, iter(calibration), lambda: None)
    result = quantize_graph(model, ranges, Form("tensorrt"))
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in result.graph.initializer}
    np.testing.assert_allclose(tensors["w_scale"], [4 / 127, 100 / 127], rtol=1e-2)
    assert "w" not in tensors
    narrow = quantize_graph(model, ranges, Form("onnxruntime", reduce_range=True))
    integers = {tensor.name: numpy_helper.to_array(tensor) for tensor in narrow.graph.initializer}["w_quantized"]
    assert 60 <= np.abs(integers).max() <= 64


def test_a_product_with_a_constant_that_has_a_batch_axis_stays_in_float(tmp_path: Path) -> None:
    """The positions of wav2vec2-conformer: ONNX Runtime fails to run their INT8 form, dynamic and static."""
    random = np.random.default_rng(0)
    weights = {"w": random.standard_normal((16, 12)), "positions": random.standard_normal((1, 4, 12, 5))}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["projected"], "projection"),
            helper.make_node("MatMul", ["projected", "positions"], ["logits"], "places"),
        ],
        "conformer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 6, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4, 6, 5])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert [node.name for node in compute_nodes(model)] == ["projection"]
    onnx.save(model, tmp_path / "model.onnx")
    inputs = {"x": random.standard_normal((2, 4, 6, 16)).astype(np.float32)}
    ranges = calibrate_ranges(tmp_path / "model.onnx", tmp_path, iter([inputs]), lambda: None)
    onnx.save(quantize_graph(model, ranges, Form()), tmp_path / "int8.onnx")
    found = []
    for file in ("model.onnx", "int8.onnx"):
        with OnnxRuntimeSession(tmp_path / file, threads=1) as session:
            found.append(session.infer(inputs)["logits"])
    assert 0 < np.abs(found[1] - found[0]).max() < 0.05 * np.ptp(found[0])


def test_only_residual_additions_are_quantized() -> None:
    model = fragile_network()
    constant = numpy_helper.from_array(np.ones((1, 4, 1, 1), np.float32), "bias")
    model.graph.initializer.append(constant)
    model.graph.node.insert(4, helper.make_node("Add", ["d", "b"], ["sum"], "residual"))
    model.graph.node.insert(5, helper.make_node("Add", ["sum", "bias"], ["shifted"], "shift"))
    names = [node.name for node in quantizable_nodes(model, "onnxruntime")]
    assert names == ["plain", "fragile", "last", "residual"]
    assert [node.name for node in quantizable_nodes(model, "tensorrt")] == ["plain", "fragile", "last"]


def test_ranges_are_merged_over_batches_and_must_be_finite(tmp_path: Path) -> None:
    onnx.save(fragile_network(), tmp_path / "fp32.onnx")
    parts = [np.full((2, 3, 4, 4), value, np.float32) for value in (-3, 1, 2)]

    def ranges_of(*parts: np.ndarray) -> Any:
        return calibrate_ranges(tmp_path / "fp32.onnx", tmp_path, ({"x": part} for part in parts), lambda: None)

    found = ranges_of(*parts)["x"]
    assert (found.lowest.item(), found.highest.item()) == (-3.0, 2.0)
    with pytest.raises(QuantizeError, match="calibration met .*inf"):
        ranges_of(*parts, np.full((2, 3, 4, 4), np.inf, np.float32))
    with pytest.raises(QuantizeError, match="empty"):
        ranges_of()


def test_a_drop_that_equals_the_budget_is_inside() -> None:
    """0.868 − 0.858 is above 0.01 in floating point; counts are not."""
    measured = {"metric_drop": (434 - 429) / 500, "metric_name": "accuracy", "agreement": 1.0, "narrow_share": 1.0}
    assert outside_budget(QuantizeConfig(max_metric_drop=0.01), measured, "int8-static") == ""
    assert "drops by" in outside_budget(QuantizeConfig(max_metric_drop=0.0099), measured, "int8-static")


@pytest.mark.parametrize(
    ("name", "said"), [("metric_drop", "drops by nan"), ("agreement", "agrees"), ("narrow_share", "only nan")]
)
def test_what_is_no_number_is_outside_of_every_budget(name: str, said: str) -> None:
    config = QuantizeConfig(max_metric_drop=1.0, min_agreement=0.0, min_int8_share=0.0)
    measured = {"metric_drop": 0.0, "metric_name": "accuracy", "agreement": 1.0, "narrow_share": 1.0}
    assert outside_budget(config, measured, "int8-static") == ""
    assert said in outside_budget(config, measured | {name: float("nan")}, "int8-static")


@pytest.mark.parametrize(("cosine", "said"), [(0.96, ""), (0.959, "has the cosine 0.9590"), (None, "has no length")])
def test_embeddings_have_a_budget_for_their_cosine(cosine: float | None, said: str) -> None:
    measured = {"metric_drop": 0.0, "metric_name": "recall@1", "agreement": 1.0, "narrow_share": 1.0}
    assert outside_budget(QuantizeConfig(), measured, "fp8") == ""
    found = outside_budget(QuantizeConfig(), measured | {"cosine": cosine}, "fp8")
    assert said in found and bool(said) == bool(found)
    assert ValidateConfig().gates.min_cosine < QuantizeConfig().min_cosine


METHODS: tuple[Method, ...] = ("minmax", "entropy", "percentile", "mse")


@pytest.mark.parametrize("method", METHODS)
def test_a_lone_outlier_is_clipped_by_all_but_minmax(tmp_path: Path, method: Method) -> None:
    """30,720 normal values, one of them 100. Least squares clips it least: alone it weighs as much as 80,000 steps."""
    onnx.save(fragile_network(), tmp_path / "fp32.onnx")
    values = np.random.default_rng(0).normal(size=(20, 32, 3, 4, 4)).astype(np.float32)
    values[3, 0, 0, 0, 0] = 100.0
    batches = ({"x": one} for one in values)
    found = calibrate_ranges(tmp_path / "fp32.onnx", tmp_path, batches, lambda: None, method, 99.9)["x"]
    low, high = found.lowest.item(), found.highest.item()
    if method == "minmax":
        assert (low, high) == (values.min().item(), 100.0)
    elif method == "mse":
        assert values.min().item() < low < -4 and 90 < high < 100
    else:
        assert -6 < low < -2 and 2 < high < 60, (low, high)


def test_least_error_is_the_least_over_all_shares() -> None:
    """Against the error of the ranges themselves, on the values that the histogram was made of."""
    values = np.concatenate([np.random.default_rng(0).normal(size=100_000), [40.0]])

    def error_of(low: float, high: float) -> float:
        step = (high - low) / 255
        return float(np.square(np.clip(np.round(values / step), low / step, high / step) * step - values).mean())

    counts, edges = np.histogram(values, 4096, (-40, 40))
    low, high = least_error(counts, edges, float(values.min()), float(values.max()), symmetric=True)
    assert low == -high
    others = [error_of(-40 * share, 40 * share) for share in np.linspace(0.2, 1.0, 81)]
    assert error_of(low, high) == pytest.approx(min(others), rel=0.01) and error_of(low, high) < 0.7 * others[-1]
    assert least_error(counts[2048:], edges[2048:], 0.0, 40.0, symmetric=False)[0] == 0.0
    assert least_error(np.array([5]), np.array([0.0, 0.0]), 0.0, 0.0, symmetric=False) == (0.0, 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_calibration_holds_one_batch_however_many_there_are(tmp_path: Path, method: Method) -> None:
    onnx.save(fragile_network(), tmp_path / "fp32.onnx")
    alive: list[weakref.ref[np.ndarray]] = []
    held = []

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for seed in range(12):
            held.append(sum(one() is not None for one in alive))
            batch = np.random.default_rng(seed).normal(size=(BATCH_SIZES[method], 3, 4, 4)).astype(np.float32)
            alive.append(weakref.ref(batch))
            yield {"x": batch}

    calibrate_ranges(tmp_path / "fp32.onnx", tmp_path, batches(), lambda: None, method)
    assert len(held) == 12 and max(held) <= 2  # the one just handed over may still have a name in the caller's frame


def test_every_method_and_layout_gives_a_candidate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in METHODS:
        config = QuantizeConfig(schemes=("int8-static", "int8-symmetric"), calibration=method, **LOOSE)
        (tmp_path / method).mkdir()
        context = context_for(tmp_path / method, "text-classification")
        result = Quantize().run(context, config)
        assert [one["accepted"] for one in result.measurements["candidates"]] == [True, True], method
        assert [path.stem for path in sorted(context.output.glob("*.onnx"))] == [
            "onnx-int8-static",
            "onnx-int8-symmetric",
        ]
    assert capsys.readouterr().out == ""  # ONNX Runtime's calibrators print; stdout is that of --json


def test_tensorrt_parses_the_symmetric_scheme(tmp_path: Path) -> None:
    """No GPU is needed to parse. The form that ONNX Runtime runs fast is refused: zero points."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    for task in TASKS:
        (tmp_path / task).mkdir()
        context = context_for(tmp_path / task, task)
        Quantize().run(context, QuantizeConfig(schemes=("int8-static", "int8-symmetric"), **LOOSE))
        for name, wanted in (("onnx-int8-symmetric", True), ("onnx-int8-static", False)):
            network = trt.Builder(logger).create_network(0)
            parser = trt.OnnxParser(network, logger)
            parsed = parser.parse((context.output / f"{name}.onnx").read_bytes())
            errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
            assert parsed == wanted, (task, name, errors)
