"""Runtimes: named arrays in and out, copies, and no silent fallback to another provider."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from models.errors import MissingCapabilityError, RuntimeInferenceError
from models.runtimes.onnxruntime_session import OnnxRuntimeSession
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
