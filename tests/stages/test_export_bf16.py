"""BF16: converted by graph, compared by a stand-in where it does not run, and never shipped without evidence."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.errors import ExportError
from models.runtimes.onnxruntime_session import OnnxRuntimeSession
from models.spec import TaskName
from stages.artifact import Artifact
from stages.candidates import read_candidates
from stages.engines import read_engines
from stages.export import Export, ExportConfig
from stages.export.precisions import bf16_from_fp32, rounded_in_fp32, types_of
from stages.validate import Validate, ValidateConfig
from tests.stages.chain import context_of, made
from tests.stages.small_run import artifact_of

TASKS: tuple[TaskName, ...] = ("image-classification", "text-classification", "audio-classification")


def network() -> onnx.ModelProto:
    """x: float32 (batch, 8) → product → layer norm → product → softmax → y: float32 (batch, 8). Its second matrix holds
    numbers that FP16 cannot."""
    random = np.random.default_rng(0)
    matrices = [random.standard_normal((8, 8)).astype(np.float32) for _ in range(2)]
    matrices[1][0, 0], matrices[1][1, 1] = 1e6, 1e-12
    constants = {"one": matrices[0], "two": matrices[1], "gain": np.ones(8, np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "one"], ["a"], "first"),
        helper.make_node("LayerNormalization", ["a", "gain"], ["b"], "norm"),
        helper.make_node("MatMul", ["b", "two"], ["c"], "second"),
        helper.make_node("Softmax", ["c"], ["y"], "softmax"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "network", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def exported(tmp_path: Path, task: TaskName, **settings: object) -> tuple[Artifact, object]:
    """export's artifact with BF16, and its result."""
    inputs = {"merge-lora": made(task)["merge-lora"]}
    config = ExportConfig.model_validate({"precisions": ["fp32", "bf16"], **settings})
    result = Export().run(context_of(tmp_path / "export", inputs, task), config)
    assert all(gate.passed for gate in result.gates), [gate.message for gate in result.gates]
    return artifact_of("export", tmp_path / "export"), result


def test_products_are_bf16_and_norms_and_softmax_stay() -> None:
    converted = bf16_from_fp32(network())
    onnx.checker.check_model(converted, full_check=True)
    assert converted.opset_import[0].version == 22
    types = types_of(converted)
    makers = {node.op_type: types[node.output[0]] for node in converted.graph.node}
    assert makers["MatMul"] == TensorProto.BFLOAT16
    assert makers["LayerNormalization"] == makers["Softmax"] == TensorProto.FLOAT
    stored = {tensor.name: tensor for tensor in converted.graph.initializer}
    for original in network().graph.initializer[:2]:
        tensor = stored[original.name]
        assert tensor.data_type == TensorProto.BFLOAT16
        wanted = numpy_helper.to_array(original).astype(ml_dtypes.bfloat16)  # 1e6 and 1e-12 as well
        np.testing.assert_array_equal(numpy_helper.to_array(tensor).view(np.uint16), wanted.view(np.uint16))


def test_the_stand_in_rounds_as_bf16_does(tmp_path: Path) -> None:
    model = network()
    del model.graph.node[1:]
    model.graph.node[0].output[0] = "y"
    onnx.save(rounded_in_fp32(bf16_from_fp32(model)), tmp_path / "rounded.onnx")
    x = np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32)
    with OnnxRuntimeSession(tmp_path / "rounded.onnx", threads=1) as session:
        found = session.infer({"x": x})["y"]

    def rounded(values: np.ndarray) -> np.ndarray:
        return values.astype(ml_dtypes.bfloat16).astype(np.float32)

    weight = rounded(numpy_helper.to_array(model.graph.initializer[0]))
    exact = rounded(x).astype("f8") @ weight.astype("f8")
    assert np.array_equal(found, rounded(found))  # every result is a BF16 number
    assert np.abs(found - exact).max() <= 2**-8 * np.abs(exact).max()
    assert np.abs(found - x @ numpy_helper.to_array(model.graph.initializer[0])).max() > 0


def test_a_result_of_unknown_type_is_an_error() -> None:
    model = network()
    model.graph.node[0].domain = "somebody.else"
    model.opset_import.append(helper.make_opsetid("somebody.else", 1))
    with pytest.raises(ExportError, match="the type of a is unknown"):
        types_of(model)


@pytest.mark.parametrize("defect", ["operator", "input", "attribute"])
def test_what_onnx_refuses_is_told_with_the_way_out(defect: str) -> None:
    """Each is another exception of onnx: of its converter two, and of its checker."""
    model, convert = network(), bf16_from_fp32 if defect != "attribute" else rounded_in_fp32
    if defect == "operator":
        model.graph.node[0].op_type = "Unheard"
    elif defect == "input":
        model.graph.node[0].input[0] = "nowhere"
    else:
        model.graph.node[0].attribute.append(helper.make_attribute("nonsense", 1))
    with pytest.raises(ExportError, match=r"not converted to BF16: .*take bf16 out of export\.precisions"):
        convert(model)


@pytest.mark.parametrize("task", TASKS)
def test_bf16_is_compared_and_not_accepted(tmp_path: Path, task: TaskName) -> None:
    artifact, result = exported(tmp_path, task)
    fp32, bf16 = read_candidates(artifact)
    assert fp32.accepted and fp32.runs_here
    assert not bf16.accepted and not bf16.runs_here and "does not run BF16 here" in bf16.reason
    assert any("onnx-bf16" in note and "left out" in note for note in result.notes)  # type: ignore[attr-defined]
    subjects = [gate.subject for gate in result.gates]  # type: ignore[attr-defined]
    assert sum(one.startswith("onnx-bf16 at") for one in subjects) == len(bf16.measurements["shapes_tried"]) > 2
    # As far from PyTorch as BF16 is: more than FP32, and not nothing.
    assert bf16.measurements["max_abs_error"] > 10 * fp32.measurements["max_abs_error"] > 0
    assert bf16.measurements["mac_shares"]["bf16"] > 0.9
    assert bf16.size_bytes == bf16.path(artifact).stat().st_size < fp32.size_bytes


def test_a_wrong_bf16_graph_fails_by_its_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
        converted = bf16_from_fp32(model, folder)
        tensor = next(one for one in converted.graph.initializer if "task_head.weight" in one.name)
        values = np.roll(numpy_helper.to_array(tensor), 1, axis=0)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        return converted

    from stages.export import stage

    monkeypatch.setattr(stage, "CONVERTERS", {**stage.CONVERTERS, "bf16": broken})
    inputs = {"merge-lora": made()["merge-lora"]}
    result = Export().run(context_of(tmp_path / "export", inputs), ExportConfig(precisions=("fp32", "bf16")))
    verdicts = {(gate.subject.partition(" ")[0], gate.passed) for gate in result.gates}
    assert verdicts == {("onnx-fp32", True), ("onnx-bf16", False)}


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="the rtx extra is not installed")
def test_its_engines_are_built_and_not_shipped(tmp_path: Path) -> None:
    settings = {"formats": ["onnx", "tensorrt-rtx"], "targets": ["sm75", "sm86"]}
    artifact, result = exported(tmp_path, "image-classification", **settings)
    engines = {one.name: one for one in read_engines(artifact)}
    assert "onnx-bf16.sm86" in engines and "onnx-bf16.sm75" not in engines
    left = next(one for one in result.measurements["engines_left_out"] if one["candidate"] == "onnx-bf16")  # type: ignore[attr-defined]
    assert left["targets"] == ("sm75",) and "bfloat16" in left["reason"]
    config = ValidateConfig.model_validate(
        {
            "latency_calls": 20,
            "objective": "size",
            "gates": {"min_samples": 24, "metric_drop": "observed", "engines": "allow-unproven"},
        }
    )
    inputs = {**made(), "export": artifact}
    evidence = Validate().run(context_of(tmp_path / "validate", inputs), config).measurements
    assert [one["name"] for one in evidence["candidates"] if one["stage"] == "export"] == ["onnx-fp32"]
    shipped = {one["name"]: one["ships_for"] for one in evidence["engines"]}
    assert shipped["onnx-bf16.sm86"] == [] and shipped["onnx-fp32.sm86"] == ["sm86"]
