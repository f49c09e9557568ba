"""What goes into a network and what comes out: the one source of names, dtypes and shapes.

Export, quantize, validate, package and the edge runner all read `IOSpec`. Standard library only,
because the edge runner imports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

TaskName = Literal[
    "image-classification", "image-multilabel", "image-regression",
    "text-classification", "text-multilabel", "text-regression",
    "audio-classification", "audio-multilabel", "audio-regression",
    "image-text",
    "image-features", "text-features", "audio-features",
]  # fmt: skip
"""What a network does; `models/tasks` has a row for each."""

Dim = int | str
"""A size, or the name of a dynamic axis (`batch`, `sequence`)."""


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor. `dtype` is a numpy name (`uint8`, `int64`, `float32`)."""

    name: str
    dtype: str
    dims: tuple[Dim, ...]

    @property
    def dynamic_axes(self) -> dict[int, str]:
        """Axis index → axis name, for the axes that are not fixed."""
        return {index: dim for index, dim in enumerate(self.dims) if isinstance(dim, str)}


@dataclass(frozen=True)
class IOSpec:
    """Ordered inputs and outputs of one network."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def width(self) -> int:
        """Numbers an example in all outputs together."""
        return sum(int(output.dims[1]) for output in self.outputs)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> IOSpec:
        """The inverse of `to_dict`."""

        def tensors(items: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(item["name"], item["dtype"], tuple(item["dims"])) for item in items)

        return cls(tensors(value["inputs"]), tensors(value["outputs"]))


def side_by_side(outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """All outputs of a network as one array: float32 (batch, width), in their order."""
    import numpy as np

    arrays = list(outputs.values())
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)


@dataclass(frozen=True)
class BackboneSpec:
    """A resolved backbone id; nothing has been loaded yet.

    `weights` names where the weights come from (`package …==…`, `hub …@<commit>`, `folder …`), and
    `weights_digest` is the SHA-256 (or the hub commit) that the freshness key of `finetune` uses. A dual encoder that
    is put together (`dual`) has its image and its text backbone as `parts`.
    """

    id: str
    library: Literal["timm", "hf", "dual"]
    name: str
    revision: str | None
    folder: str | None
    weights: str
    weights_digest: str
    parts: tuple[BackboneSpec, ...] = ()

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> BackboneSpec:
        """The inverse of `asdict`."""
        return cls(**{**value, "parts": tuple(cls.from_dict(part) for part in value.get("parts", ()))})


@dataclass(frozen=True)
class ModelSpec:
    """Everything but the weights that rebuilds an adapted network: stored as `model.json` beside them.

    `architecture` is what the backbone loader needs to rebuild the module without its pretrained
    weights (timm: name and arguments; hf: the config). `processing` is the declarative preprocessing
    of the modality (see `models/modalities`), `labels` the class names in the order of the logits.
    """

    task: TaskName
    backbone: BackboneSpec
    architecture: dict[str, Any]
    feature_dim: int
    labels: tuple[str, ...]
    processing: dict[str, Any]
    io: IOSpec

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> ModelSpec:
        """The inverse of `to_dict`."""
        return cls(
            task=value["task"],
            backbone=BackboneSpec.from_dict(value["backbone"]),
            architecture=value["architecture"],
            feature_dim=value["feature_dim"],
            labels=tuple(value["labels"]),
            processing=value["processing"],
            io=IOSpec.from_dict(value["io"]),
        )
