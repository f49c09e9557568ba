"""ONNX Runtime. Raises where the provider in use is not the one asked for. Imported by the edge runner."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from models.errors import MissingCapabilityError, RuntimeInferenceError

if TYPE_CHECKING:
    import numpy as np

Optimization = Literal["none", "all"]
CPU = "CPUExecutionProvider"


class OnnxRuntimeSession:
    """An ONNX file, loaded on entry."""

    def __init__(self, model: Path, provider: str = CPU, threads: int = 2, optimization: Optimization = "all") -> None:
        self.model = model
        self.provider = provider
        self.threads = threads
        self.optimization = optimization
        self.session: Any = None

    def __enter__(self) -> OnnxRuntimeSession:
        import onnxruntime

        if not hasattr(onnxruntime, "InferenceSession"):
            raise MissingCapabilityError(
                "ONNX Runtime is installed without its files, as uninstalling one of its two builds leaves it; "
                "`pipeline doctor` has the line that mends it"
            )
        onnxruntime.disable_telemetry_events()  # a device reports to nobody
        if self.provider not in onnxruntime.get_available_providers():
            raise MissingCapabilityError(
                f"ONNX Runtime here has no {self.provider}, only {', '.join(onnxruntime.get_available_providers())}; "
                "the CUDA one comes with: pip install onnxruntime-gpu"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what it would print it also raises
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = (
            levels.ORT_ENABLE_ALL if self.optimization == "all" else levels.ORT_DISABLE_ALL
        )
        if self.provider != CPU:
            # Without this ONNX Runtime falls back to the CPU in silence.
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            onnxruntime.preload_dlls(directory="")  # CUDA and cuDNN of the nvidia-* packages, as PyTorch finds them
        try:
            self.session = open_session(str(self.model), options, self.provider)
        except onnxruntime_errors() as error:
            raise RuntimeInferenceError(f"ONNX Runtime cannot load {self.model.name}: {error}") from error
        if self.session.get_providers()[0] != self.provider:
            raise RuntimeInferenceError(
                f"ONNX Runtime runs {self.model.name} on {self.session.get_providers()[0]}, not on {self.provider}"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.session = None

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; names as in the file. Raises `RuntimeInferenceError`."""
        names = [output.name for output in self.session.get_outputs()]
        try:
            values = self.session.run(names, dict(inputs))
        except onnxruntime_errors() as error:
            raise RuntimeInferenceError(f"{self.model.name} failed on {describe(inputs)}: {error}") from error
        return {name: value.copy() for name, value in zip(names, values, strict=True)}


FP8_DEFECTS = ("tensor(float8e4m3fn)", "GetQConstantLowerUpper")
"""What ONNX Runtime (1.31) says where its fusions of matrix products and of Clip take FP8 for an integer, and fail."""


def open_session(path: str, options: Any, provider: str) -> Any:
    """ONNX Runtime's session; of a graph that one of its defects with FP8 breaks, without these optimizations."""
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(path, options, providers=[provider])
    except onnxruntime_errors() as error:
        if not any(name in str(error) for name in FP8_DEFECTS):
            raise
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(path, options, providers=[provider], disabled_optimizers=["ClipQuantRewrite"])


def onnxruntime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises, from its own code and from its bindings."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NotImplemented,
           state.RuntimeException, state.NoSuchFile)  # fmt: skip
    return (RuntimeError, ValueError, *own)


def describe(inputs: Mapping[str, np.ndarray]) -> str:
    """Names, dtypes and shapes."""
    return ", ".join(f"{name}: {array.dtype} {array.shape}" for name, array in inputs.items())
