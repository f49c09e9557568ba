"""Text: one fast tokenizer (`tokenizer.json`), the same file in training and on the edge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from models.errors import DataError, ModelError
from models.spec import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

    from models.modalities import Content

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class TextProcessing:
    """Tokenize, truncate to `max_length` tokens, pad on the right to the longest of the batch."""

    tokenizer_json: str = field(repr=False)
    max_length: int
    pad_id: int = 0
    pad_token: str = "[PAD]"
    kind: ClassVar[str] = "text"

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """`input_ids` and `attention_mask`: int64 (batch, sequence)."""
        dims = ("batch", "sequence")
        return (TensorSpec("input_ids", "int64", dims), TensorSpec("attention_mask", "int64", dims))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer with truncation and padding set."""
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(self.tokenizer_json)
        except Exception as error:  # tokenizers raises plain Exception only
            raise ModelError(f"{TOKENIZER_FILE} cannot be read by tokenizers: {error}") from error
        tokenizer.enable_truncation(self.max_length)
        tokenizer.enable_padding(pad_id=self.pad_id, pad_token=self.pad_token)
        return tokenizer

    def arrays(self, contents: Sequence[Content]) -> dict[str, np.ndarray]:
        """`input_ids`, `attention_mask`: int64 (batch, sequence). Raises `DataError` for what is no text."""
        import numpy as np

        for content in contents:
            if not isinstance(content, str):
                raise DataError(f"expected a text, found {type(content).__name__}")
        try:
            encodings = self.tokenizer.encode_batch(list(contents))
        except (TypeError, UnicodeEncodeError) as error:  # half of a surrogate pair: not a text in UTF-8
            raise DataError(f"a text among {len(contents)} is no valid Unicode: {error}") from error
        return {
            "input_ids": np.array([encoding.ids for encoding in encodings], dtype=np.int64),
            "attention_mask": np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64),
        }

    def count_truncated(self, contents: Sequence[Content]) -> int:
        """How many of the texts are longer than `max_length` tokens."""
        return sum(bool(encoding.overflowing) for encoding in self.tokenizer.encode_batch(list(contents)))

    def examples(self) -> list[Content]:
        """Two made-up contents."""
        return ["a text", "another"]

    def extremes(self, contents: Sequence[Content]) -> list[list[Content]]:
        """Batches at the limits: a single letter, and a text of full length beside a word."""
        return [["a"], [" ".join(str(one) for one in [*contents] * 64), "short"]]

    def to_file(self, content: Content) -> tuple[str, bytes]:
        """The ending and the bytes of a file that holds the text."""
        return ".txt", str(content).encode("utf-8")

    def from_file(self, data: bytes) -> Content:
        """The text in such a file. Raises `ValueError` where it is no UTF-8."""
        return data.decode("utf-8")

    def save(self, folder: Path) -> dict[str, Any]:
        """Write `tokenizer.json`; the declarative form names it."""
        (folder / TOKENIZER_FILE).write_text(self.tokenizer_json, encoding="utf-8")
        return {
            "kind": self.kind,
            "tokenizer": TOKENIZER_FILE,
            "max_length": self.max_length,
            "pad_id": self.pad_id,
            "pad_token": self.pad_token,
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any], folder: Path) -> TextProcessing:
        """The inverse of `save`. Raises `ModelError` where the tokenizer is missing."""
        try:
            text = (folder / TOKENIZER_FILE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{folder / TOKENIZER_FILE} cannot be read: {error}") from error
        return cls(text, int(value["max_length"]), int(value["pad_id"]), str(value["pad_token"]))


def tokenizer_json_of(text: str) -> str:
    """A tokenizer file without its own truncation and padding, in a canonical form."""
    value = json.loads(text)
    value["truncation"] = value["padding"] = None
    return json.dumps(value, ensure_ascii=False)
