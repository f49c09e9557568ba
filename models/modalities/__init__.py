"""What differs between images, text, audio and pairs lives here: one preprocessing, in training, validation and on the
edge.

Imports numpy and the standard library only (Pillow, tokenizers, soundfile and soxr inside the modules): the edge
runner reads this package without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

    from models.modalities.audio import Waveform
    from models.spec import TensorSpec

    Single = str | bytes | Path | np.ndarray | Waveform
    Content = Single | tuple[Single, str]
    """One raw example: a text or two; an encoded image or recording, or its path; uint8 pixels (height, width[, 3]);
    samples with their rate; an image and its text."""

PROCESSINGS = {
    "image": "models.modalities.vision:ImageProcessing",
    "text": "models.modalities.text:TextProcessing",
    "audio": "models.modalities.audio:AudioProcessing",
    "image-text": "models.modalities.image_text:PairProcessing",
}
"""Kind → "module:Class"."""


class Processing(Protocol):
    """Turns raw contents into the network's input arrays. `kind` names it in files."""

    @property
    def kind(self) -> str: ...

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The network's inputs, in order."""
        ...

    def arrays(self, contents: Sequence[Content]) -> dict[str, np.ndarray]:
        """One array per input, batch first.

        Raises:
            DataError: a content cannot be read; the message names it.
        """
        ...

    def count_truncated(self, contents: Sequence[Content]) -> int:
        """Of how many of `contents` the network is not shown all, for their length."""
        ...

    def examples(self) -> list[Content]:
        """Two made-up contents, to try a network on."""
        ...

    def extremes(self, contents: Sequence[Content]) -> list[list[Content]]:
        """Batches at the limits of what may come, made of real `contents` where it can be."""
        ...

    def to_file(self, content: Content) -> tuple[str, bytes]:
        """The ending and the bytes of a file that holds the content without loss."""
        ...

    def from_file(self, data: bytes) -> Content:
        """The content of a file that `to_file` made."""
        ...

    def from_argument(self, argument: str) -> Content:
        """The content that a word of the command line, or a line of standard input, stands for. Raises `DataError`."""
        ...

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the files it needs into `folder` and return its declarative form."""
        ...


def processing_from_dict(value: dict[str, Any], folder: Path) -> Processing:
    """The inverse of `Processing.save`; `folder` holds its files.

    Raises:
        ModelError: the kind is unknown.
    """
    from models.errors import ModelError

    if value.get("kind") not in PROCESSINGS:
        raise ModelError(f"unknown preprocessing {value.get('kind')!r}; this version knows {', '.join(PROCESSINGS)}")
    module, _, name = PROCESSINGS[value["kind"]].partition(":")
    processing: Processing = getattr(import_module(module), name).from_dict(value, folder)
    return processing
