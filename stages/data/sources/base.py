"""What a source gives, and the small helpers that its readers share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.errors import DataError
from models.tasks import Label
from stages.data.splits import SplitName

if TYPE_CHECKING:
    from models.modalities import Content

SPLIT_ALIASES: dict[str, SplitName] = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "calibration": "calibration", "test": "test",
}  # fmt: skip
"""Names of splits in the wild → ours."""

PLURALS = {"image": "images", "text": "texts", "audio": "recordings", "image-text": "images with their texts"}
"""Modality → its examples, in words."""


@dataclass(frozen=True)
class Row:
    """One example as the source gives it.

    `split` is None where the source has no splits; `origin` names the row for a person. A row with a
    `problem` cannot be used, and its other fields say nothing.
    """

    content: Content
    label: Label
    origin: str
    split: SplitName | None = None
    problem: str = ""
    metadata: tuple[tuple[str, str], ...] = ()
    """(column, value) of the columns that were asked for beside content and label."""


@dataclass(frozen=True)
class Source:
    """All rows of a source, and what a person should know about it."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def unusable(origin: str, problem: str) -> Row:
    """A row that only says why it cannot be used."""
    return Row("", "", origin, None, f"{origin}: {problem}")


def text_from_bytes(data: bytes) -> str:
    """UTF-8 text without its byte order mark. Bytes that are no UTF-8 survive for `unicode_problem` to find."""
    return data.decode("utf-8-sig", errors="surrogateescape")


def unicode_problem(text: str) -> str:
    """Why a text is not valid Unicode, with its line; or nothing."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code, line = ord(text[error.start]), text.count("\n", 0, error.start) + 1
        place = f"line {line}, " if "\n" in text else ""
        if 0xDC80 <= code <= 0xDCFF:  # a byte that surrogateescape kept
            return f"{place}byte 0x{code - 0xDC00:02x} is not UTF-8; convert it, e.g. iconv -f latin1 -t utf-8"
        return f"{place}\\u{code:04x} is half a character (a lone surrogate)"
    return ""


def printable(text: str) -> str:
    """The text with what no terminal or JSON file can hold written as an escape."""
    return text.encode(errors="backslashreplace").decode()


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like `name`, or nothing."""
    return next(iter(difflib.get_close_matches(name, list(known), 1, 0.4)), "")


def check_columns(place: str, found: Sequence[str], options: dict[str, str]) -> None:
    """Raises `DataError` for the first column that is not there. `options`: configuration key → column."""
    for option, column in options.items():
        if column not in found:
            near = nearest(column, found)
            meant = f"did you mean {printable(near)!r}? Set" if near else "set"
            columns = printable(", ".join(found)) or "none"
            raise DataError(f"{place} has no column {column!r}; found {columns}; {meant} data.{option}")


def check_slices(place: str, found: Sequence[str], slices: Sequence[str]) -> None:
    """Raises `DataError` for the first column of `validate.slices` that is not there."""
    for column in slices:
        if column not in found:
            meant = f"did you mean {printable(near)!r}?" if (near := nearest(column, found)) else "leave it out"
            columns = printable(", ".join(found)) or "none"
            raise DataError(f"{place} has no column {column!r}, which validate.slices names; found {columns}; {meant}")


def metadata_of(record: Mapping[str, Any], slices: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """(column, value) of the columns of `validate.slices`; what says nothing is `(none)`, and long texts are cut."""
    values = ((column, record.get(column)) for column in slices)
    return tuple(
        (column, "(none)" if value is None or value == "" else printable(str(value))[:80]) for column, value in values
    )


def split_of(name: object, place: str) -> SplitName:
    """A split by its name in the source. Raises `DataError`."""
    split = SPLIT_ALIASES.get(str(name).strip().lower())
    if split is None:
        raise DataError(f"{place}: {name!r} names no split; expected one of {', '.join(SPLIT_ALIASES)}")
    return split


def shortened(items: Sequence[str], limit: int = 5) -> str:
    """The first items, and how many more there are."""
    return "; ".join(items[:limit]) + (f"; and {len(items) - limit} more" if len(items) > limit else "")
