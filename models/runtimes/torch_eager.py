"""PyTorch without any compilation: the reference."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from models.errors import RuntimeInferenceError
from models.runtimes.onnxruntime_session import describe

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from models.spec import IOSpec


class TorchEager:
    """A network in eval mode. Sets the number of threads on entry and puts it back on exit."""

    def __init__(self, model: nn.Module, io: IOSpec, device: str = "cpu", threads: int = 2) -> None:
        self.model = model
        self.io = io
        self.device = device
        self.threads = threads
        self.threads_before = 0

    def __enter__(self) -> TorchEager:
        import torch

        self.threads_before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        self.model = self.model.to(self.device).eval()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import torch

        torch.set_num_threads(self.threads_before)

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; the I/O spec names the outputs, which the network gives side by side. Raises
        `RuntimeInferenceError`."""
        import torch

        try:
            with torch.inference_mode():
                tensors = [torch.from_numpy(inputs[tensor.name]).to(self.device) for tensor in self.io.inputs]
                output = self.model(*tensors)
        except (RuntimeError, KeyError, TypeError) as error:
            raise RuntimeInferenceError(f"the PyTorch network failed on {describe(inputs)}: {error}") from error
        parts = output.float().cpu().split([int(one.dims[1]) for one in self.io.outputs], dim=1)
        return {one.name: part.numpy().copy() for one, part in zip(self.io.outputs, parts, strict=True)}
