"""CSV, JSONL and Parquet files: one example a row, in named columns."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import DataError
from models.tasks import Label, Task
from stages.data.config import DataConfig
from stages.data.sources.base import (
    Row,
    Source,
    check_columns,
    check_slices,
    metadata_of,
    printable,
    split_of,
    text_from_bytes,
    unicode_problem,
    unusable,
)

if TYPE_CHECKING:
    from models.modalities import Content, Single

TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")
NAMES = {"text": "a text", "image": "an image", "audio": "a recording"}
"""Modality → what one content is."""


@dataclass(frozen=True)
class Table:
    """Column names, and for each row its place and its values, or in words why it has none."""

    columns: list[str]
    records: Iterable[tuple[str, dict[str, Any] | str]]


def read_table(path: Path, config: DataConfig, modality: str, task: Task, slices: Sequence[str] = ()) -> Source:
    """All rows of a file, with the columns in `slices` as metadata.

    Raises:
        DataError: it is not of its kind, a column is not there, or it has no rows.
    """
    options = wanted_columns(config, modality)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        table = parquet_table(path, [*options.values(), *slices])
    else:
        text = text_from_bytes(path.read_bytes())
        table = csv_table(text, path) if suffix == ".csv" else jsonl_table(text, path)
    check_columns(str(path), table.columns, options)
    check_slices(str(path), table.columns, slices)
    rows = tuple(rows_from_table(table, path, config, modality, task, slices))
    if not rows:
        raise DataError(f"{path} holds no rows; expected one example a row with {', '.join(options.values())}")
    return Source(rows)


def columns_of(path: Path) -> list[str]:
    """The names of the columns; of JSONL those of its first row.

    Raises:
        DataError: it is not of its kind.
        OSError: it cannot be read.
    """
    if path.suffix.lower() == ".parquet":
        return parquet_columns(path)
    with path.open("rb") as stream:
        head = text_from_bytes(next((line for line in stream if line.strip()), b""))
    return csv_table(head, path).columns if path.suffix.lower() == ".csv" else jsonl_table(head, path).columns


def wanted_columns(config: DataConfig, modality: str) -> dict[str, str]:
    """Configuration key → column that must be there."""
    keys = [f"{part}_column" for part in modality.split("-")]
    wanted = {key: str(getattr(config, key)) for key in keys} | {"label_column": label_column_of(config, modality)}
    if modality == "text" and config.text_pair_column:
        wanted["text_pair_column"] = config.text_pair_column
    return wanted | ({"split_column": config.split_column} if config.split_column else {})


def label_column_of(config: DataConfig, modality: str) -> str:
    """Where the label stands: what belongs to an image of a pair is its text."""
    return config.text_column if modality == "image-text" else config.label_column


def csv_table(text: str, path: Path) -> Table:
    """A CSV file with a header. Raises `DataError` for a header that cannot be used."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        columns = list(reader.fieldnames or ())
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    if problem := unicode_problem("".join(columns)):
        raise DataError(f"{path}, line 1: {problem}")
    twice = next((column for column in columns if columns.count(column) > 1), None)
    if twice is not None:
        raise DataError(f"{path}, line 1: the column {twice!r} stands twice; rename one")
    return Table(columns, csv_records(reader, path))


def csv_records(reader: csv.DictReader[str], path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Rows by line. Raises `DataError` where the file is no CSV from there on."""
    try:
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            extra = row.pop(None, [])  # csv keeps surplus fields under None
            columns = len(row)
            yield place, f"found {columns + len(extra)} fields, expected {columns}; quote commas" if extra else row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error


def jsonl_table(text: str, path: Path) -> Table:
    """One JSON object a line; the columns are the keys of all of them."""
    columns: dict[str, None] = {}
    records: list[tuple[str, dict[str, Any] | str]] = []
    # Only \n ends a line: JSON strings may hold the other characters that str.splitlines cuts at.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = record_from_json(line)
        if isinstance(row, dict):
            columns.update(dict.fromkeys(row))
        records.append((f"{path}, line {number}", row))
    if records and not columns:
        place, problem = records[0]
        raise DataError(f"{place}: {problem}")
    return Table(list(columns), records)


def record_from_json(line: str) -> dict[str, Any] | str:
    """One object, or in words what stands there instead."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"is no JSON ({error})"
    return row if isinstance(row, dict) else f"expected an object with named values, found {line.strip()[:40]}"


def parquet_table(path: Path, wanted: Sequence[str]) -> Table:
    """A Parquet file; only the wanted columns are read. Raises `DataError` where it is none."""
    import pyarrow
    from pyarrow import parquet

    columns = parquet_columns(path)
    try:
        there = all(column in columns for column in wanted)
        rows = parquet.read_table(path, columns=list(dict.fromkeys(wanted))).to_pylist() if there else []
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    return Table(columns, [(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)])


def parquet_columns(path: Path) -> list[str]:
    """The names of a Parquet file's columns. Raises `DataError` where it is none."""
    import pyarrow
    from pyarrow import parquet

    try:
        return list(parquet.read_schema(path).names)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def rows_from_table(
    table: Table, path: Path, config: DataConfig, modality: str, task: Task, slices: Sequence[str]
) -> Iterator[Row]:
    """Each record as a row, or as what is wrong with it."""
    root = path.parent.resolve()
    for place, record in table.records:
        if isinstance(record, str):
            yield unusable(place, printable(record))
            continue
        try:
            column = label_column_of(config, modality)
            label = label_of(record.get(column), column, task)
            content = contents_of(record, config, modality, root)
        except DataError as error:
            yield unusable(place, str(error))
            continue
        split = split_of(record.get(config.split_column), place) if config.split_column else None
        image = content[0] if isinstance(content, tuple) else content
        origin = printable(str(image)) if isinstance(image, Path) else place
        yield Row(content, label, origin, split, metadata=metadata_of(record, slices))


def label_of(value: Any, column: str, task: Task) -> Label:
    """A label of the task's kind. Raises `DataError` for none."""
    try:
        label = task.read(None if value != value else value)  # NaN is how some tools write "no label"
    except DataError as error:
        raise DataError(f"{column!r} {error}") from error
    if problem := unicode_problem("".join(map(str, label if isinstance(label, tuple) else (label,)))):
        raise DataError(f"{column!r}: {problem}")
    return label


def contents_of(record: Mapping[str, Any], config: DataConfig, modality: str, root: Path) -> Content:
    """What the network is to be shown of a record: one column, two texts, or an image and its text. Raises
    `DataError`."""
    if modality == "image-text":
        image = content_of(record.get(config.image_column), config.image_column, "image", root)
        return image, str(content_of(record.get(config.text_column), config.text_column, "text", root))
    column: str = getattr(config, f"{modality}_column")
    content = content_of(record.get(column), column, modality, root)
    if modality != "text" or config.text_pair_column is None:
        return content
    second = content_of(record.get(config.text_pair_column), config.text_pair_column, modality, root)
    return str(content), str(second)


def content_of(value: Any, column: str, modality: str, root: Path) -> Single:
    """A text, the bytes of an image or recording, or its path inside `root`. Raises `DataError` for anything else."""
    if value is None or value == "":
        raise DataError(f"{column!r} is empty")
    if modality == "text":
        if not isinstance(value, str):
            raise DataError(f"{column!r} holds {type(value).__name__}; expected a text")
        return value
    if isinstance(value, dict):  # the form in which `datasets` writes images and audio to Parquet
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise DataError(f"{column!r} holds {type(value).__name__}; expected {NAMES[modality]} or its path")
    return path_inside(root, value)


def path_inside(root: Path, name: str) -> Path:
    """`root/name`, links followed. Raises `DataError` where that is no file or leaves `root`."""
    try:
        path = (root / name).resolve()
        inside, there = path.is_relative_to(root), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, a NUL byte, a loop of links
        raise DataError(f"{printable(name)[:80]!r} is no usable path ({error})") from error
    if not inside:
        raise DataError(f"the path {printable(name)!r} leaves {root}; paths are relative to the table's folder")
    if not there:
        raise DataError(f"there is no file {printable(name)!r} in {root}; paths are relative to the table's folder")
    return path
