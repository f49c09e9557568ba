"""Where examples come from. Every reader gives `Row`s; `stages/data/load.py` checks and splits them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from models.errors import ConfigError, DataError, Problem
from models.tasks import Task
from stages.data.config import DataConfig
from stages.data.sources.base import Source, nearest
from stages.data.sources.from_demo import DEMOS, check_demo, read_demo
from stages.data.sources.from_folder import modality_of_folder, read_folder
from stages.data.sources.from_hub import read_hub
from stages.data.sources.from_table import TABLE_SUFFIXES, columns_of, read_table


def read_source(config: DataConfig, modality: str, task: Task, slices: Sequence[str] = ()) -> Source:
    """All rows of a source. `modality`: `image`, `text` or `audio`; `slices`: columns to keep as metadata.

    Raises:
        ConfigError: the source is not there, or of no known kind, or has no columns and `slices` names some.
        DataError: it cannot be read as labelled examples.
        MissingCapabilityError: a hub data set cannot be had here.
    """
    check_source(config.source, modality)
    prefix, _, name = config.source.partition(":")
    path = Path(os.path.expanduser(config.source))
    if slices and (prefix == "demo" or (prefix != "hf" and path.is_dir())):
        problem = f"names the column {slices[0]!r}, and {config.source} has no columns"
        raise ConfigError([Problem("validate.slices", problem, "leave it out, or make a table of the data")])
    if prefix == "demo":
        return read_demo(name, task)
    if prefix == "hf":
        return read_hub(name, config, modality, task, slices)
    try:
        return read_folder(path, modality, task) if path.is_dir() else read_table(path, config, modality, task, slices)
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror}") from error


def modality_of(source: str, columns: Mapping[str, str]) -> str | None:
    """What the examples of a source are, from a look that reads no example and asks no hub: the demo's modality, the
    endings in a folder, or which of `columns` (modality → name) a table has. None where that says nothing, or several.

    Raises:
        DataError: the table cannot be read.
    """
    prefix, _, name = source.partition(":")
    if prefix == "demo":
        return DEMOS.get(name)
    path = Path(os.path.expanduser(source))
    try:
        if os.path.isdir(path):
            return modality_of_folder(path)
        if not os.path.isfile(path) or path.suffix.lower() not in TABLE_SUFFIXES:
            return None
        found = columns_of(path)
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    there = [modality for modality, column in columns.items() if column in found]
    return there[0] if len(there) == 1 else None


def check_source(source: str, modality: str) -> None:
    """Whether there is something of a known kind; a look that reads no example and asks no hub.

    Raises:
        ConfigError: the source is not there, or of no known kind.
    """
    prefix, _, name = source.partition(":")
    if prefix == "demo":
        check_demo(name, modality)
        return
    path = Path(os.path.expanduser(source))
    # os.path: a name that no file system takes is not there, where pathlib raises.
    table = os.path.isfile(path) and path.suffix.lower() in TABLE_SUFFIXES
    if prefix != "hf" and not os.path.isdir(path) and not table:
        raise ConfigError([unknown_source(source, path)])


def unknown_source(source: str, path: Path) -> Problem:
    """What a source is instead, and what was probably meant."""
    found = f"is a {path.suffix or 'plain'} file" if os.path.exists(path) else "is not there"
    expected = f"expected demo:<{'|'.join(DEMOS)}>, a folder, {', '.join(TABLE_SUFFIXES)} or hf:<dataset>@<revision>"
    beside = [one.name for one in path.parent.iterdir()] if os.path.isdir(path.parent) else []
    near = nearest(path.name, beside) if not os.path.exists(path) else ""
    demo = nearest(source.rpartition(":")[2], DEMOS)
    if near and source not in DEMOS:
        expected = f"did you mean {path.parent / near}? {expected}"
    elif demo:
        expected = f"did you mean demo:{demo}? {expected}"
    return Problem("data.source", f"{source!r} {found}", expected)
