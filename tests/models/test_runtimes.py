"""Runtimes: named arrays in and out, copies, and no silent fallback to another provider."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import models.runtimes.onnxruntime_session as module
from models.errors import MissingCapabilityError, RuntimeInferenceError
from models.runtimes.onnxruntime_session import CPU, CUDA, TENSORRT_RTX, OnnxRuntimeSession, foreign_nodes
from models.runtimes.torch_eager import TorchEager
from tests.models.tiny import classifier_of, image_backbone, inputs_of


@pytest.fixture
def doubler(tmp_path: Path) -> Path:
    """y = x + x: float32 (batch, 2)."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "doubler", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "doubler.onnx")
    return tmp_path / "doubler.onnx"


def test_onnxruntime_computes_by_name(doubler: Path) -> None:
    with OnnxRuntimeSession(doubler, threads=1) as session:
        found = session.infer({"x": np.array([[1, 2]], np.float32)})
    assert list(found) == ["y"]
    np.testing.assert_array_equal(found["y"], [[2, 4]])


def test_outputs_stay_valid_after_the_next_call(doubler: Path) -> None:
    with OnnxRuntimeSession(doubler) as session:
        first = session.infer({"x": np.ones((3, 2), np.float32)})["y"]
        session.infer({"x": np.full((3, 2), 7, np.float32)})
    np.testing.assert_array_equal(first, np.full((3, 2), 2))
    assert first.flags.owndata


def test_a_missing_provider_says_what_there_is(doubler: Path) -> None:
    with pytest.raises(MissingCapabilityError, match=r"no CoreMLExecutionProvider, only .*CPUExecutionProvider"):
        OnnxRuntimeSession(doubler, provider="CoreMLExecutionProvider").__enter__()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine whose CUDA provider cannot start")
def test_no_silent_fallback_to_the_cpu(doubler: Path) -> None:
    with pytest.raises((MissingCapabilityError, RuntimeInferenceError)):
        OnnxRuntimeSession(doubler, provider="CUDAExecutionProvider").__enter__()


def test_a_fallback_of_some_nodes_is_seen_and_arithmetic_on_shapes_is_none(tmp_path: Path) -> None:
    """What ONNX Runtime says of a session on the CPU, read as if another provider had been asked for."""
    import onnxruntime

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in "xy")
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], "size"),
        helper.make_node("MatMul", ["x", "w"], ["product"], "multiply"),
        helper.make_node("Gelu", ["product"], ["bent"], "bend"),
        helper.make_node("Reshape", ["bent", "shape"], ["y"], "form"),
    ]
    weight = helper.make_tensor("w", TensorProto.FLOAT, (2, 2), [1.0, 2.0, 3.0, 4.0])
    graph = helper.make_graph(nodes, "some", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[CPU])
    assert foreign_nodes(session, CPU) == []
    assert foreign_nodes(session, CUDA) == ["MatMul multiply", "Gelu bend"]


def test_a_session_with_nodes_elsewhere_is_refused(doubler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is made, of every provider but the CPU's: here of one that ONNX Runtime calls by the CPU's name."""
    monkeypatch.setattr(module, "CPU", "another")
    monkeypatch.setattr(module, "foreign_nodes", lambda session, provider: [f"Gelu {index}" for index in range(7)])
    with pytest.raises(RuntimeInferenceError, match=r"does not run all of doubler.onnx: .*Gelu 4 and 2 more"):
        OnnxRuntimeSession(doubler, provider=CPU).__enter__()


@pytest.mark.parametrize(
    ("installed", "message"),
    [(False, "in a package that is not here: pip install onnxruntime-ep"), (True, "does not load here: .*nothing.so")],
)
def test_a_plugin_that_is_missing_or_does_not_load_is_a_missing_capability(
    doubler: Path, monkeypatch: pytest.MonkeyPatch, installed: bool, message: str
) -> None:
    plugin = SimpleNamespace(get_library_path=lambda: str(doubler.with_name("nothing.so")))
    monkeypatch.setattr(module, "find_spec", lambda name: plugin if installed else None)
    monkeypatch.setattr(module, "import_module", lambda name: plugin)
    with pytest.raises(MissingCapabilityError, match=message):
        OnnxRuntimeSession(doubler, provider=TENSORRT_RTX).__enter__()


def test_a_plugin_without_a_device_of_this_machine_is_a_missing_capability(
    doubler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "register_plugin", lambda provider: None)
    with pytest.raises(MissingCapabilityError, match=r"runs on no device.*8\.6, 8\.9 and 12\.0"):
        OnnxRuntimeSession(doubler, provider=TENSORRT_RTX).__enter__()


def test_a_plugin_runs_on_its_device_by_the_calls_of_onnx_runtime(
    doubler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's own provider, taken by its device as a plugin's is."""
    monkeypatch.setattr(module, "PLUGINS", {CPU: "a plugin"})
    monkeypatch.setattr(module, "register_plugin", lambda provider: None)
    with OnnxRuntimeSession(doubler, provider=CPU) as session:
        np.testing.assert_array_equal(session.infer({"x": np.ones((1, 2), np.float32)})["y"], [[2, 2]])


@pytest.mark.parametrize("content", [b"", b"{}", b"\x08\x0a garbage"])
def test_a_file_that_is_no_onnx_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.onnx").write_bytes(content)
    with pytest.raises(RuntimeInferenceError, match=r"cannot load broken\.onnx"):
        OnnxRuntimeSession(tmp_path / "broken.onnx").__enter__()


@pytest.mark.parametrize(
    "inputs",
    [
        {"z": np.ones((1, 2), np.float32)},
        {"x": np.ones((1, 2), np.int64)},
        {"x": np.ones((1, 3), np.float32)},
        {},
    ],
    ids=["wrong name", "wrong dtype", "wrong shape", "nothing"],
)
def test_wrong_inputs_are_described(doubler: Path, inputs: dict[str, np.ndarray]) -> None:
    with OnnxRuntimeSession(doubler) as session, pytest.raises(RuntimeInferenceError, match=r"doubler\.onnx"):
        session.infer(inputs)


def test_torch_eager_is_the_network_and_restores_the_threads() -> None:
    loaded = image_backbone()
    model, spec = classifier_of(loaded)
    inputs = inputs_of(loaded)
    with torch.inference_mode():
        wanted = model(*inputs).numpy()
    before = torch.get_num_threads()
    arrays = {tensor.name: value.numpy() for tensor, value in zip(spec.io.inputs, inputs, strict=True)}
    with TorchEager(model.train(), spec.io, "cpu", 1) as runtime:
        assert torch.get_num_threads() == 1
        found = runtime.infer(arrays)
    assert torch.get_num_threads() == before
    assert not model.training  # the reference is in eval mode whatever it was before
    np.testing.assert_allclose(found["logits"], wanted, atol=1e-5)
    assert found["logits"].dtype == np.float32
