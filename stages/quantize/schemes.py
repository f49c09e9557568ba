"""The schemes by name, and what a backend makes of one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from stages.candidates import Precision

if TYPE_CHECKING:
    import onnx

    from stages.quantize.bench import Workbench

Scheme = Literal["int8-dynamic", "int8-static", "int8-symmetric", "int4-weights", "int4-blocks", "fp8"]

Variant = Callable[[Collection[str]], "onnx.ModelProto"]
"""Names of nodes → the graph in which these are not quantized, and all others of the plan are."""


@dataclass(frozen=True)
class Plan:
    """What a backend makes of a scheme: the nodes that it quantizes, in graph order, and the variants. `what` names
    what the scheme quantizes, for the case that there is none of it; `repairs` is what repairs did before."""

    nodes: Sequence[str]
    variant: Variant
    what: str
    repairs: Sequence[dict[str, Any]] = ()


Backend = Mapping[Scheme, Callable[["Workbench"], Plan]]
"""The schemes that a backend has. A plan calibrates once; each of its variants is made from the prepared graph."""


@dataclass(frozen=True)
class Kind:
    """What a scheme's candidate is called, which word of `models.graph.shares_of` its arithmetic has, and whether the
    most sensitive nodes may go back to floating point."""

    precision: Precision
    share: str
    searched: bool = True

    @property
    def words(self) -> str:
        """For a person: `INT4 weights`."""
        return self.share.replace("-", " ").replace(self.precision, self.precision.upper())


KINDS: Mapping[Scheme, Kind] = {
    "int8-dynamic": Kind("int8", "int8", searched=False),
    "int8-static": Kind("int8", "int8"),
    "int8-symmetric": Kind("int8", "int8"),
    "int4-weights": Kind("int4", "int4-weights"),
    "int4-blocks": Kind("int4", "int4-weights"),
    "fp8": Kind("fp8", "fp8"),
}
