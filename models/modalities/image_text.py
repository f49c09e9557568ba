"""Pairs of an image and a text: each is prepared as it would be alone."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from models.errors import DataError
from models.modalities.text import TextProcessing
from models.modalities.vision import ImageProcessing

if TYPE_CHECKING:
    import numpy as np

    from models.modalities import Content
    from models.spec import TensorSpec


@dataclass(frozen=True)
class PairProcessing:
    """See the module's docstring. A content is (image, text)."""

    image: ImageProcessing
    text: TextProcessing
    kind: ClassVar[str] = "image-text"

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """`image`, then those of the text."""
        return (*self.image.inputs, *self.text.inputs)

    def arrays(self, contents: Sequence[Content]) -> dict[str, np.ndarray]:
        """uint8 images and int64 tokens. Raises `DataError` for what is no pair, no image or no text."""
        images, texts = parts_of(contents)
        return self.image.arrays(images) | self.text.arrays(texts)

    def count_truncated(self, contents: Sequence[Content]) -> int:
        """Of how many pairs the text is longer than its limit."""
        return self.text.count_truncated(parts_of(contents)[1])

    def examples(self) -> list[Content]:
        """Two made-up contents."""
        return pairs_of(self.image.examples(), self.text.examples())

    def extremes(self, contents: Sequence[Content]) -> list[list[Content]]:
        """Those of the text, each beside an image."""
        images, texts = parts_of(contents)
        return [pairs_of(images, batch) for batch in self.text.extremes(texts)]

    def to_file(self, content: Content) -> tuple[str, bytes]:
        """The ending and the bytes of a JSON file with the text, and the image in base 64."""
        images, texts = parts_of([content])
        image = base64.b64encode(self.image.to_file(images[0])[1]).decode()
        return ".json", json.dumps({"text": texts[0], "image": image}, ensure_ascii=False).encode("utf-8")

    def from_file(self, data: bytes) -> Content:
        """The content of such a file. Raises `ValueError` where it is none."""
        value = json.loads(data.decode("utf-8"))
        return self.image.from_file(base64.b64decode(value["image"])), str(value["text"])  # type: ignore[return-value]

    def from_argument(self, argument: str) -> Content:
        """The path of an image and a text, with a tab between. Raises `DataError` for anything else."""
        path, tab, text = argument.partition("\t")
        if not tab:
            raise DataError(
                f"expected an image and a text with a tab between them, found {argument[:80]!r}; "
                "to choose from several texts give each with --text"
            )
        return Path(path), text

    def save(self, folder: Path) -> dict[str, Any]:
        """The declarative form, and the files of the text."""
        return {"kind": self.kind, "image": self.image.save(folder), "text": self.text.save(folder)}

    @classmethod
    def from_dict(cls, value: dict[str, Any], folder: Path) -> PairProcessing:
        """The inverse of `save`. Raises `ModelError` where the tokenizer is missing."""
        text = TextProcessing.from_dict(value["text"], folder)
        return cls(ImageProcessing.from_dict(value["image"], folder), text)


def parts_of(contents: Sequence[Content]) -> tuple[list[Content], list[Content]]:
    """The images and the texts of pairs. Raises `DataError` for what is no pair."""
    pairs = [content for content in contents if isinstance(content, tuple)]
    if len(pairs) < len(contents):
        raise DataError("expected an image and a text, found one of both or neither")
    return [image for image, _ in pairs], [text for _, text in pairs]


def pairs_of(images: Sequence[Content], texts: Sequence[Content]) -> list[Content]:
    """Each text with an image, the images again and again."""
    return [(images[index % len(images)], text) for index, text in enumerate(texts)]  # type: ignore[misc]
