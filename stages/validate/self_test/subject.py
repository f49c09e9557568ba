"""What defects are put into, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from models.errors import RuntimeInferenceError

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch

    from models.checkpoint import Checkpoint
    from models.modalities import Content, Processing
    from models.spec import IOSpec

Arrays = Mapping[str, "np.ndarray"]


@dataclass(frozen=True)
class Subject:
    """The FP32 graph, the network it comes from, and a few real samples.

    `inputs` are the arrays of those samples, `spread` is the standard deviation of the reference's outputs.
    """

    model: onnx.ModelProto
    checkpoint: Checkpoint
    inputs: dict[str, np.ndarray]
    spread: float
    threads: int

    @property
    def io(self) -> IOSpec:
        """The contract of inputs and outputs."""
        return self.checkpoint.spec.io

    @property
    def processing(self) -> Processing:
        """The preprocessing."""
        return self.checkpoint.processing

    @cached_property
    def products(self) -> tuple[onnx.NodeProto, ...]:
        """The nodes that multiply with a constant weight, in graph order. Not to be changed."""
        constants = {tensor.name for tensor in self.model.graph.initializer}
        nodes = self.model.graph.node
        return tuple(one for one in nodes if one.op_type in WEIGHTED and one.input[1] in constants)

    @cached_property
    def activations(self) -> dict[str, np.ndarray]:
        """What flows into and out of the products on those samples: tensor name → array."""
        from models.probe import tensor_values

        names = {name for node in self.products for name in (node.input[0], node.output[0])}
        return tensor_values(self.model, names, self.inputs, self.threads)


class NotLoadedError(RuntimeInferenceError):
    """ONNX Runtime refuses to load a mutant."""


OUTSIDE = ("preprocessing", "samples")
"""Places that the reference and every candidate share, so that no candidate of a run differs there. Defects of them
stand for a device that prepares its inputs otherwise: whether the gates would see it, were its outputs judged."""

WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm")


@dataclass(frozen=True)
class Mutant:
    """What is run in place of the FP32 graph with its own preprocessing; what is None stays as it was.

    `inputs` changes the arrays of a call, `content` a raw content; `shift` hands each sample's input to the one so many
    places before it.
    """

    model: onnx.ModelProto | None = None
    network: torch.nn.Module | None = None
    processing: Processing | None = None
    inputs: Callable[[Arrays], Arrays] | None = None
    content: Callable[[Content], Content] | None = None
    shift: int = 0
    optimization: Literal["none", "all"] = "all"
    halved_batch: bool = False


@dataclass(frozen=True)
class Defect:
    """One row of the table. `make` gives the mutant, or says in words why there is none of this model.

    `seen` is where somebody met it. A defect of one precision is judged as a candidate of that precision; the others as
    one of every precision that there is a candidate of. `refused`: a runtime that does not load it has caught it; where
    a runtime does not load any other mutant, the mutant is at fault.
    """

    name: str
    place: Literal["graph", "network", "preprocessing", "samples"]
    what: str
    seen: str
    make: Callable[[Subject], Mutant | str]
    precision: str | None = None
    refused: bool = False

    def summary(self) -> dict[str, Any]:
        """For the evidence."""
        return {"name": self.name, "place": self.place, "what": self.what, "seen": self.seen}
