"""ONNX Runtime. Raises where the provider in use is not the one asked for. Imported by the edge runner."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from models.errors import MissingCapabilityError, RuntimeInferenceError

if TYPE_CHECKING:
    import numpy as np

Optimization = Literal["none", "all"]
CPU, CUDA, TENSORRT_RTX = "CPUExecutionProvider", "CUDAExecutionProvider", "NvTensorRTRTXExecutionProvider"

PLUGINS = {TENSORRT_RTX: "onnxruntime_ep_nv_tensorrt_rtx"}
"""Providers that come in a package of their own, which is registered with ONNX Runtime when one is first asked for."""

INSTALL = {
    CUDA: "pip install onnxruntime-gpu",
    TENSORRT_RTX: "pip install onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0",
}
"""How a provider is had."""

PROVIDER_OPTIONS = {CUDA: {"use_tf32": "0"}}
"""What differs from a provider's defaults: FP32 is FP32, and not TF32, whose products have ten bits."""

SHAPE_ARITHMETIC = frozenset(
    (
        "Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Greater",
        "Identity", "Less", "Max", "Min", "Mod", "Mul", "Not", "Range", "ReduceProd", "Reshape", "Shape", "Size",
        "Slice", "Squeeze", "Sub", "Unsqueeze", "Where",
    )
)  # fmt: skip
"""Operators with which sizes are computed. ONNX Runtime puts those behind a Shape on the CPU on purpose, where sizes
are read (its GetCpuPreferredNodes), so they are no fallback; `session.disable_cpu_ep_fallback` would refuse them
(onnxruntime 16358). Every GPU provider has all of them for tensors, so that one on the CPU computes a size."""


class OnnxRuntimeSession:
    """An ONNX file, loaded on entry. `provider` by ONNX Runtime's name."""

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
        devices = plugin_devices(self.provider) if self.provider in PLUGINS else []
        if not devices and self.provider not in onnxruntime.get_available_providers():
            raise MissingCapabilityError(
                f"ONNX Runtime here has no {self.provider}, only {', '.join(onnxruntime.get_available_providers())}; "
                f"try: {INSTALL.get(self.provider, 'another provider')}"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what it would print it also raises
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = (
            levels.ORT_ENABLE_ALL if self.optimization == "all" else levels.ORT_DISABLE_ALL
        )
        providers: list[Any] = [(self.provider, PROVIDER_OPTIONS.get(self.provider, {}))]
        if self.provider != CPU:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            onnxruntime.preload_dlls(directory="")  # CUDA and cuDNN of the nvidia-* packages, as PyTorch finds them
        if devices:
            options.add_provider_for_devices(devices[:1], PROVIDER_OPTIONS.get(self.provider, {}))
            providers = []
        try:
            self.session = open_session(str(self.model), options, providers)
        except onnxruntime_errors() as error:
            raise RuntimeInferenceError(f"ONNX Runtime cannot load {self.model.name}: {error}") from error
        if self.session.get_providers()[0] != self.provider:
            raise RuntimeInferenceError(
                f"ONNX Runtime runs {self.model.name} on {self.session.get_providers()[0]}, not on {self.provider}"
            )
        if self.provider != CPU and (foreign := foreign_nodes(self.session, self.provider)):
            listed = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
            raise RuntimeInferenceError(
                f"{self.provider} does not run all of {self.model.name}: the CPU would run {listed}"
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


def open_session(path: str, options: Any, providers: list[Any]) -> Any:
    """ONNX Runtime's session; of a graph that one of its defects with FP8 breaks, without these optimizations."""
    import onnxruntime

    # Without enable_fallback=0 a provider that fails is replaced by the CPU's, and a line is printed.
    settings = {"providers": providers or None, "enable_fallback": 0}
    try:
        return onnxruntime.InferenceSession(path, options, **settings)
    except onnxruntime_errors() as error:
        if not any(name in str(error) for name in FP8_DEFECTS):
            raise
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(path, options, disabled_optimizers=["ClipQuantRewrite"], **settings)


@cache
def register_plugin(provider: str) -> None:
    """Make ONNX Runtime load the library of a plugin's package; once in a process.

    Raises:
        MissingCapabilityError: the package is not installed, or its library does not load here.
    """
    import onnxruntime

    if find_spec(PLUGINS[provider]) is None:
        raise MissingCapabilityError(f"{provider} is in a package that is not here: {INSTALL[provider]}")
    plugin = import_module(PLUGINS[provider])
    try:
        onnxruntime.register_execution_provider_library(provider, plugin.get_library_path())
    except onnxruntime_errors() as error:
        raise MissingCapabilityError(
            f"{provider} does not load here: {error}; it needs an NVIDIA driver, and {INSTALL[provider]}"
        ) from error


def plugin_devices(provider: str) -> list[Any]:
    """The devices that a plugin's provider runs on here, registered if it was not yet.

    Raises:
        MissingCapabilityError: it cannot be registered, or knows no device of this machine.
    """
    import onnxruntime

    register_plugin(provider)
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == provider]
    if not devices:
        raise MissingCapabilityError(
            f"{provider} runs on no device of this machine (TensorRT-RTX takes GPUs of compute capability 8.6, 8.9 and "
            "12.0 or later)"
        )
    return devices


def foreign_nodes(session: Any, provider: str) -> list[str]:
    """Nodes of a session that another provider than this one runs, `operator name`, arithmetic on shapes apart."""
    return [
        f"{node.op_type} {node.name}".strip()
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
        if node.domain or node.op_type not in SHAPE_ARITHMETIC
    ]


def onnxruntime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises, from its own code and from its bindings."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NotImplemented,
           state.RuntimeException, state.NoSuchFile, state.EPFail)  # fmt: skip
    return (RuntimeError, ValueError, *own)


def describe(inputs: Mapping[str, np.ndarray]) -> str:
    """Names, dtypes and shapes."""
    return ", ".join(f"{name}: {array.dtype} {array.shape}" for name, array in inputs.items())
