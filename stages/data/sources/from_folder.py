"""A folder with one folder per label, or with one per split and one per label inside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from models.errors import DataError
from models.tasks import Task
from stages.data.sources.base import (
    PLURALS,
    SPLIT_ALIASES,
    Row,
    Source,
    printable,
    text_from_bytes,
    unicode_problem,
    unusable,
)
from stages.data.splits import SplitName

SUFFIXES = {
    "image": (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    "text": (".txt",),
    "audio": (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au"),
}
"""Modality → endings of the files that are examples."""


def read_folder(folder: Path, modality: str, task: Task) -> Source:
    """All examples below a folder, with the folder's name as the label; what is left out is in the notes.

    Raises:
        DataError: no examples, splits without train, or split folders beside others.
    """
    if modality not in SUFFIXES:
        raise DataError(
            f"{folder} is a folder; {PLURALS[modality]} stand in a table (CSV, JSONL or Parquet), a pair a row"
        )
    inside = folders_in(folder)
    splits = [path for path in inside if path.name.lower() in SPLIT_ALIASES and folders_in(path)]
    parts: list[tuple[Path, SplitName | None]] = [(folder, None)]
    if splits:
        check_split_folders(folder, inside, splits)
        parts = [(path, SPLIT_ALIASES[path.name.lower()]) for path in splits]
    rows: list[Row] = []
    notes: list[str] = []
    for part, split in parts:
        found = list(rows_in(part, modality, split, task))
        if not found:
            raise DataError(
                f"{part} holds no {modality} files in folders named by label; expected "
                f"{part.name}/<label>/<name>{'|'.join(SUFFIXES[modality])}, found {describe(part)}"
            )
        rows += found
        notes += notes_on(part, modality)
    return Source(tuple(rows), tuple(notes))


def modality_of_folder(folder: Path) -> str | None:
    """What the files below a folder are by their endings; None where they are of several modalities, or of none."""
    suffixes = {path.suffix.lower() for path in files_below(folder)}
    found = [modality for modality, endings in SUFFIXES.items() if suffixes & set(endings)]
    return found[0] if len(found) == 1 else None


def check_split_folders(folder: Path, inside: list[Path], splits: list[Path]) -> None:
    """Raises `DataError` where it would have to be guessed whether a folder is a split or a label."""
    others = [path.name for path in inside if path not in splits]
    names = ", ".join(path.name for path in splits)
    if others:
        raise DataError(
            f"{folder} holds folders of splits ({names}) beside others ({printable(', '.join(others[:5]))}); expected "
            "one folder per label, or only train, validation, calibration and test with the labels inside"
        )
    if not any(SPLIT_ALIASES[path.name.lower()] == "train" for path in splits):
        raise DataError(f"{folder} has no train folder; found {names}")


def rows_in(folder: Path, modality: str, split: SplitName | None, task: Task) -> Iterator[Row]:
    """The examples in `folder/<label>/`, however deep, in the order of their paths."""
    for label in folders_in(folder):
        for path in files_below(label):
            if path.suffix.lower() in SUFFIXES[modality]:
                yield row_from_file(path, label.name, modality, split, task)


def row_from_file(path: Path, folder: str, modality: str, split: SplitName | None, task: Task) -> Row:
    """One file as a row; a text is read here, the others only when they are checked."""
    origin = printable(str(path))
    if problem := unicode_problem(str(path)):
        return unusable(origin, f"its name holds what no report can: {problem}; rename it")
    try:
        label = task.read(folder)
    except DataError as error:
        return unusable(origin, f"the name of its folder {error}; tables take labels of every kind")
    if modality != "text":
        return Row(path, label, origin, split)
    try:
        text = text_from_bytes(path.read_bytes())
    except OSError as error:
        return unusable(origin, f"cannot be read: {error.strerror}")
    return Row(text, label, origin, split)


def notes_on(folder: Path, modality: str) -> Iterator[str]:
    """What `rows_in` leaves out: files outside of label folders, other kinds of files, empty label folders."""
    loose = [path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in SUFFIXES[modality]]
    if loose:
        yield f"left out: {len(loose)} files directly in {folder}, which have no label"
    others: Counter[str] = Counter()
    for label in folders_in(folder):
        suffixes = Counter(path.suffix.lower() for path in files_below(label))
        kinds = {suffix: count for suffix, count in suffixes.items() if suffix not in SUFFIXES[modality]}
        others.update(kinds)
        if len(kinds) == len(suffixes):
            yield f"left out: the label folder {printable(str(label))} holds no {modality} files"
    if others:
        kinds_found = ", ".join(f"{count} × {printable(suffix) or 'no ending'}" for suffix, count in others.items())
        yield f"left out: files in {folder} that are no {PLURALS[modality]} by their endings ({kinds_found})"


def folders_in(folder: Path) -> list[Path]:
    """The folders directly inside, without hidden ones, by name."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def files_below(folder: Path) -> list[Path]:
    """The files at any depth by path, without hidden ones and what lies in hidden folders (editors' copies)."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def describe(folder: Path) -> str:
    """The first names in a folder."""
    names = sorted(printable(path.name) + "/" * path.is_dir() for path in folder.iterdir())
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "") if names else "nothing (it is empty)"
