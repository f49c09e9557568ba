"""The runtime of engines, without a GPU: a stand-in for the library that reads and writes the addresses it is given.

The stand-in has no method that the real library's class of the same name lacks, so that what is called exists there.
"""

from __future__ import annotations

import ctypes
import hashlib
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import models.runtimes.tensorrt_engine as module
from models.engines.targets import runtime_of, target_of
from models.errors import IntegrityError, MissingCapabilityError, RuntimeInferenceError
from models.runtimes.gpu import Gpu
from models.runtimes.tensorrt_engine import TensorRtEngine

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="the rtx extra is not installed")
CONTENT = b"an engine that doubles"
LARGEST = 4


class Context:
    """y = 2 · x: float32 (batch, 3), of batches up to `LARGEST`."""

    def __init__(self) -> None:
        self.shape, self.addresses, self.streams = (0, 3), {}, []  # type: ignore[var-annotated]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if len(shape) != 2 or shape[1] != 3 or not 1 <= shape[0] <= LARGEST:
            return False
        self.shape = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        self.streams.append(stream_handle)
        count = self.shape[0] * self.shape[1]
        x, y = ((ctypes.c_float * count).from_address(self.addresses[name]) for name in "xy")
        for index in range(count):
            y[index] = 2 * x[index]
        return True


class Engine:
    num_io_tensors = 2

    def get_tensor_name(self, index: int) -> str:
        return "xy"[index]

    def get_tensor_mode(self, name: str) -> str:
        return {"x": "input", "y": "output"}[name]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="FLOAT")

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [(1, 3), (2, 3), (LARGEST, 3)]

    def create_execution_context(self) -> Context:
        return Context()


class Runtime:
    engine_host_code_allowed = True

    def __init__(self, logger: object) -> None:
        self.loaded: list[bytes] = []
        runtimes.append(self)

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
        self.loaded.append(serialized_engine)
        return Engine() if serialized_engine == CONTENT else None


runtimes: list[Runtime] = []
LIBRARY = SimpleNamespace(
    Runtime=Runtime,
    Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None}),
    TensorIOMode=SimpleNamespace(INPUT="input"),
    __version__="1.7.1.116",
)
RTX = runtime_of(target_of("sm86"))


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine file, on a machine that looks as if it had a GPU."""
    (tmp_path / "double.rtx.engine").write_bytes(CONTENT)
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "gpu_here", lambda: Gpu("a GPU", "8.6", 10**9))
    monkeypatch.setattr(module, "import_module", lambda name: LIBRARY)
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    runtimes.clear()
    return tmp_path / "double.rtx.engine"


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_an_engine_computes_by_name_and_its_outputs_stay_valid(engine: Path) -> None:
    with TensorRtEngine(engine, digest_of(CONTENT), RTX) as runtime:
        assert not runtimes[0].engine_host_code_allowed
        assert runtime.library_version == "1.7.1.116"
        x = np.arange(12, dtype=np.float32).reshape(4, 3)
        first = runtime.infer({"x": x})["y"]
        second = runtime.infer({"x": np.asfortranarray(x[:2] + 100)})["y"]  # another shape, and not contiguous
        assert runtime.context.streams == [7, 7]
    np.testing.assert_array_equal(first, 2 * x)
    np.testing.assert_array_equal(second, 2 * (x[:2] + 100))


def test_another_file_than_the_one_that_was_built_is_never_loaded(engine: Path) -> None:
    engine.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(IntegrityError, match="SHA-256 differs"):
        TensorRtEngine(engine, digest_of(CONTENT), RTX).__enter__()
    assert not runtimes


def test_an_engine_that_the_library_does_not_load_is_named_with_version_and_gpu(engine: Path) -> None:
    engine.write_bytes(b"of another release")
    with pytest.raises(RuntimeInferenceError, match=r"1\.7\.1\.116 does not load double.*a GPU"):
        TensorRtEngine(engine, digest_of(b"of another release"), RTX).__enter__()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": np.ones((LARGEST + 1, 3), np.float32)}, r"\(1, 3\) to \(4, 3\), not \(5, 3\); widen export\.profile"),
        ({"x": np.ones((1, 3), np.float64)}, r"as torch\.float32, not float64"),
        ({"z": np.ones((1, 3), np.float32)}, "takes x, not z"),
        ({}, "takes x, not"),
    ],
    ids=["outside of the profile", "dtype", "name", "nothing"],
)
def test_wrong_inputs_are_described(engine: Path, inputs: dict[str, np.ndarray], message: str) -> None:
    with (
        TensorRtEngine(engine, digest_of(CONTENT), RTX) as runtime,
        pytest.raises(RuntimeInferenceError, match=message),
    ):
        runtime.infer(inputs)


def test_without_a_gpu_or_a_library_the_message_says_which(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingCapabilityError, match="pip install tensorrt-rtx-cu13"):
        TensorRtEngine(engine, digest_of(CONTENT), RTX).__enter__()
    monkeypatch.setattr(module, "gpu_here", lambda: None)
    with pytest.raises(MissingCapabilityError, match="PyTorch sees none"):
        TensorRtEngine(engine, digest_of(CONTENT), RTX).__enter__()


@needs_rtx
def test_everything_that_is_called_exists_in_the_real_library() -> None:
    import tensorrt_rtx as trt

    pairs = [(Context, trt.IExecutionContext), (Engine, trt.ICudaEngine), (Runtime, trt.Runtime)]
    for ours, real in pairs:
        assert [name for name in vars(ours) if not name.startswith("_") and not hasattr(real, name)] == []
    assert trt.TensorIOMode.INPUT and trt.Logger(trt.Logger.ERROR)
    assert set(module.TORCH_DTYPES) <= set(trt.DataType.__members__)
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in module.TORCH_DTYPES.values())
    assert trt.DataType.HALF.name == "HALF"
