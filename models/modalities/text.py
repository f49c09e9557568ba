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
    """Tokenize, truncate to `max_length` tokens, pad on the right to the longest of the batch.

    With `pairs` a content is two texts that the network compares: they are joined as the tokenizer joins them, the
    longer one is cut first, and with `types` the network is told which token is of which text. With `fixed` every text
    is padded to `max_length`, and the network reads the padding too (SigLIP).
    """

    tokenizer_json: str = field(repr=False)
    max_length: int
    pad_id: int = 0
    pad_token: str = "[PAD]"
    pairs: bool = False
    types: bool = False
    fixed: bool = False
    kind: ClassVar[str] = "text"

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """`input_ids`, `attention_mask` and with `types` `token_type_ids`: int64 (batch, sequence); with `fixed`
        `input_ids` only, of `max_length` tokens."""
        if self.fixed:
            return (TensorSpec("input_ids", "int64", ("batch", self.max_length)),)
        names = ("input_ids", "attention_mask", *(["token_type_ids"] if self.types else []))
        return tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in names)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer with truncation and padding set."""
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(self.tokenizer_json)
        except Exception as error:  # tokenizers raises plain Exception only
            raise ModelError(f"{TOKENIZER_FILE} cannot be read by tokenizers: {error}") from error
        tokenizer.enable_truncation(self.max_length)
        length = self.max_length if self.fixed else None
        tokenizer.enable_padding(pad_id=self.pad_id, pad_token=self.pad_token, length=length)
        return tokenizer

    def arrays(self, contents: Sequence[Content]) -> dict[str, np.ndarray]:
        """The inputs: int64 (batch, sequence). Raises `DataError` for what is no text, or not as many as expected."""
        import numpy as np

        for content in contents:
            pair = isinstance(content, tuple) and len(content) == 2 and all(isinstance(one, str) for one in content)
            if self.pairs and not pair:
                raise DataError(f"expected two texts, found {type(content).__name__}")
            if not self.pairs and not isinstance(content, str):
                raise DataError(f"expected a text, found {type(content).__name__}")
        try:
            encodings = self.tokenizer.encode_batch(list(contents))
        except (TypeError, UnicodeEncodeError) as error:  # half of a surrogate pair: not a text in UTF-8
            raise DataError(f"a text among {len(contents)} is no valid Unicode: {error}") from error
        arrays = {
            "input_ids": np.array([encoding.ids for encoding in encodings], dtype=np.int64),
            "attention_mask": np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64),
            "token_type_ids": np.array([encoding.type_ids for encoding in encodings], dtype=np.int64),
        }
        return {tensor.name: arrays[tensor.name] for tensor in self.inputs}

    def count_truncated(self, contents: Sequence[Content]) -> int:
        """How many of the texts are longer than `max_length` tokens."""
        return sum(bool(encoding.overflowing) for encoding in self.tokenizer.encode_batch(list(contents)))

    def examples(self) -> list[Content]:
        """Two made-up contents."""
        return [("a text", "another"), ("one", "two texts")] if self.pairs else ["a text", "another"]

    def extremes(self, contents: Sequence[Content]) -> list[list[Content]]:
        """Batches at the limits: a single letter, and a text of full length beside a word."""
        texts = [text for one in contents for text in (one if isinstance(one, tuple) else (one,))]
        long, short = " ".join(map(str, texts * 64)), "short"
        if self.pairs:
            return [[("a", "b")], [(long, long), (short, "shorter")], [(short, long)]]
        return [["a"], [long, short]]

    def to_file(self, content: Content) -> tuple[str, bytes]:
        """The ending and the bytes of a file that holds the text."""
        if self.pairs:
            return ".json", json.dumps(content, ensure_ascii=False).encode("utf-8")
        return ".txt", str(content).encode("utf-8")

    def from_file(self, data: bytes) -> Content:
        """The text in such a file, or the two. Raises `ValueError` where it is no UTF-8."""
        if not self.pairs:
            return data.decode("utf-8")
        first, second = json.loads(data.decode("utf-8"))
        return str(first), str(second)

    def from_argument(self, argument: str) -> Content:
        """The text itself; two of them with a tab between. Raises `DataError` for another number."""
        if not self.pairs:
            return argument
        texts = argument.split("\t")
        if len(texts) != 2:
            raise DataError(f"expected two texts with a tab between them, found {len(texts)}: {argument[:80]!r}")
        return texts[0], texts[1]

    def save(self, folder: Path) -> dict[str, Any]:
        """Write `tokenizer.json`; the declarative form names it."""
        (folder / TOKENIZER_FILE).write_text(self.tokenizer_json, encoding="utf-8")
        return {
            "kind": self.kind,
            "tokenizer": TOKENIZER_FILE,
            "max_length": self.max_length,
            "pad_id": self.pad_id,
            "pad_token": self.pad_token,
            "pairs": self.pairs,
            "types": self.types,
            "fixed": self.fixed,
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any], folder: Path) -> TextProcessing:
        """The inverse of `save`. Raises `ModelError` where the tokenizer is missing."""
        try:
            text = (folder / TOKENIZER_FILE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{folder / TOKENIZER_FILE} cannot be read: {error}") from error
        limit, pad = int(value["max_length"]), int(value["pad_id"])
        pairs, types, fixed = (bool(value.get(name)) for name in ("pairs", "types", "fixed"))
        return cls(text, limit, pad, str(value["pad_token"]), pairs, types, fixed)


def tokenizer_json_of(text: str) -> str:
    """A tokenizer file without its own truncation and padding, in a canonical form."""
    value = json.loads(text)
    value["truncation"] = value["padding"] = None
    return json.dumps(value, ensure_ascii=False)
