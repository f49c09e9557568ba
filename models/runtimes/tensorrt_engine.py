"""An engine of TensorRT or TensorRT-RTX on the GPU of this machine.

Both libraries have one Python API under two names (models/engines/worker.py builds with it). Device memory and the
stream are PyTorch's: where engines are measured PyTorch is there, and its wheels bring CUDA.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from models.errors import IntegrityError, MissingCapabilityError, RuntimeInferenceError
from models.runtimes.gpu import gpu_here
from models.runtimes.onnxruntime_session import describe

if TYPE_CHECKING:
    import numpy as np

    from models.engines.targets import EngineRuntime

DEVICE = "cuda"


class TensorRtEngine:
    """A serialized engine, loaded on entry.

    Loading an engine is running native code: the bytes that are loaded are those whose SHA-256 was compared, and code
    for the host inside an engine (TensorRT's lean runtime) stays forbidden, which is the library's own default.

    On entry it raises `MissingCapabilityError` (no GPU, or no library), `IntegrityError` (another file than the one
    whose digest was given) or `RuntimeInferenceError` (the library does not load it).
    """

    def __init__(self, engine: Path, sha256: str, runtime: EngineRuntime) -> None:
        self.engine = engine
        self.sha256 = sha256
        self.runtime = runtime
        self.library: Any = None
        self.loaded: Any = None
        self.context: Any = None
        self.stream: Any = None

    def __enter__(self) -> TensorRtEngine:
        content = self.engine.read_bytes()
        if not hmac.compare_digest(hashlib.sha256(content).hexdigest(), self.sha256):
            raise IntegrityError(f"{self.engine.name} is not the engine that was built: its SHA-256 differs")
        gpu = gpu_here()
        if gpu is None:
            raise MissingCapabilityError("an engine runs on a GPU only, and PyTorch sees none here")
        if find_spec(self.runtime.library) is None:
            raise MissingCapabilityError(
                f"engines are run with {self.runtime.library}, which is not here: {self.runtime.install}"
            )
        import torch

        self.library = trt = import_module(self.runtime.library)
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        runtime.engine_host_code_allowed = False
        self.loaded = runtime.deserialize_cuda_engine(content)
        if self.loaded is None:
            raise RuntimeInferenceError(
                f"{self.runtime.library} {trt.__version__} does not load {self.engine.name} on {gpu}; an engine fits "
                "the release that has built it and the GPUs that it was built for"
            )
        self.context = self.loaded.create_execution_context()
        if self.context is None:
            raise RuntimeInferenceError(f"{self.engine.name} leaves no memory to run in on {gpu}")
        # On the default stream the library waits for the whole device again and again.
        cuda: Any = torch.cuda
        self.stream = cuda.Stream(torch.device(DEVICE))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.context = self.loaded = self.stream = None

    @property
    def library_version(self) -> str:
        """Of the library that has loaded the engine."""
        return str(self.library.__version__)

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once, copies to and from the device included; names as in the engine.

        Raises:
            RuntimeInferenceError: an input is missing, of another dtype or outside of the profile, or the run failed.
        """
        import torch

        trt = self.library
        names = [self.loaded.get_tensor_name(index) for index in range(self.loaded.num_io_tensors)]
        wanted = [name for name in names if self.loaded.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        if set(wanted) != set(inputs):
            raise RuntimeInferenceError(f"{self.engine.name} takes {', '.join(wanted)}, not {describe(inputs)}")
        outputs: dict[str, torch.Tensor] = {}
        try:
            with torch.cuda.stream(self.stream):
                held = {name: self.placed(name, array) for name, array in inputs.items()}
                for name in names:
                    if name in held:
                        continue
                    shape, dtype = tuple(self.context.get_tensor_shape(name)), self.torch_dtype(name)
                    outputs[name] = torch.empty(shape, dtype=dtype, device=DEVICE)
                    if not self.context.set_tensor_address(name, outputs[name].data_ptr()):
                        raise RuntimeInferenceError(f"{self.engine.name} takes no buffer for its output {name}")
                if not self.context.execute_async_v3(self.stream.cuda_stream):
                    raise RuntimeInferenceError(f"{self.engine.name} failed on {describe(inputs)}")
                found = {name: tensor.cpu().numpy() for name, tensor in outputs.items()}  # waits for the stream
        except RuntimeError as error:  # PyTorch's own, of which running out of memory is one
            raise RuntimeInferenceError(f"{self.engine.name} failed on {describe(inputs)}: {error}") from error
        return found

    def placed(self, name: str, array: np.ndarray) -> Any:
        """An input on the device, given to the engine: a tensor that must live until the run has ended."""
        import numpy as np
        import torch

        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if tensor.dtype != self.torch_dtype(name):
            wanted = self.torch_dtype(name)
            raise RuntimeInferenceError(f"{self.engine.name} takes {name} as {wanted}, not {array.dtype}")
        if not self.context.set_input_shape(name, array.shape):
            profile = " to ".join(
                str(tuple(shape))
                for index, shape in enumerate(self.loaded.get_tensor_profile_shape(name, 0))
                if index != 1  # smallest, usual, largest
            )
            raise RuntimeInferenceError(
                f"{self.engine.name} takes {name} of {profile}, not {array.shape}; widen export.profile"
            )
        tensor = tensor.to(DEVICE)
        if not self.context.set_tensor_address(name, tensor.data_ptr()):
            raise RuntimeInferenceError(f"{self.engine.name} takes no buffer for its input {name}")
        return tensor

    def torch_dtype(self, name: str) -> Any:
        """PyTorch's dtype of a tensor of the engine. Raises `RuntimeInferenceError` where it has none."""
        import torch

        kind = self.loaded.get_tensor_dtype(name).name
        if kind not in TORCH_DTYPES:
            raise RuntimeInferenceError(f"{name} of {self.engine.name} is {kind}, which no input or output here is")
        return getattr(torch, TORCH_DTYPES[kind])


TORCH_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32", "INT64": "int64",
    "BOOL": "bool",
}  # fmt: skip
"""TensorRT's `DataType` → PyTorch's dtype, for what an input or an output may be."""
