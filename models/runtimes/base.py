"""What runs a network. Named arrays in, named arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np


class Runtime(Protocol):
    """A context manager. `infer` copies its outputs: they stay valid after the next call."""

    def __enter__(self) -> Runtime: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once. Raises `RuntimeInferenceError`."""
        ...
