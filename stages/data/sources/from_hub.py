"""Data sets of the Hugging Face hub, of its local cache, or of a local folder that `datasets` reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import ConfigError, DataError, MissingCapabilityError, Problem
from models.tasks import Task
from stages.data.config import DataConfig
from stages.data.sources.base import SPLIT_ALIASES, Row, Source, check_columns, check_slices, metadata_of, unusable
from stages.data.sources.from_table import NAMES, content_of, label_of, wanted_columns

if TYPE_CHECKING:
    from models.modalities import Single


def read_hub(name: str, config: DataConfig, modality: str, task: Task, slices: Sequence[str] = ()) -> Source:
    """A data set `<repository>[@<revision>]`, with its splits where it has more than one, and with the columns in
    `slices` as metadata.

    Raises:
        MissingCapabilityError: it cannot be reached from this machine and is not in its cache.
        DataError: it has not the columns, or cannot be read.
    """
    repository, _, revision = name.partition("@")
    if not repository:
        raise ConfigError([Problem("data.source", "names no data set", "expected hf:<org>/<name>@<revision>")])
    loaded = load_from_hub(repository, revision)
    notes = [] if revision else [f"hf:{repository} has no @<revision>: another run may get other data"]
    known = {str(split): SPLIT_ALIASES.get(str(split).lower()) for split in loaded}
    single = len(known) == 1
    rows: list[Row] = []
    for split, part in loaded.items():
        alias = known[str(split)]
        if alias is None and not single:
            notes.append(f"left out: the split {split} of hf:{repository}, which is no {', '.join(SPLIT_ALIASES)}")
            continue
        for row in rows_from_part(part, f"hf:{repository}/{split}", config, modality, task, slices):
            rows.append(row if single else replace(row, split=alias))
    if not rows:
        raise DataError(f"hf:{name} gives no examples; its splits are {', '.join(known)}")
    return Source(tuple(rows), tuple(notes))


def load_from_hub(repository: str, revision: str) -> Any:
    """The `DatasetDict`. No code of the repository is run: `datasets` 4 has no loading scripts."""
    import datasets

    try:
        return datasets.load_dataset(repository, revision=revision or None)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise MissingCapabilityError(
            f"the data set {repository!r} is neither on the hub, as far as this machine can see, nor in its cache "
            f"({error}); check its name and revision, connect this machine, or fill the cache elsewhere and set HF_HOME"
        ) from error
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"hf:{repository} cannot be read: {error}") from error
    except OSError as error:
        raise MissingCapabilityError(
            f"the data set {repository!r} could not be had ({error}); connect this machine, or fill the cache of "
            "another one and set HF_HOME"
        ) from error


def rows_from_part(
    part: Any, place: str, config: DataConfig, modality: str, task: Task, slices: Sequence[str]
) -> Iterator[Row]:
    """The rows of one split, images and recordings still encoded. Raises `DataError` for a missing column."""
    import datasets

    options = wanted_columns(config, modality)
    options.pop("split_column", None)  # the data set's own splits are used
    check_columns(place, part.column_names, options)
    check_slices(place, part.column_names, slices)
    columns = [options[f"{one}_column"] for one in modality.split("-")]
    names = part.features[options["label_column"]]
    for column, kind in product(columns, (datasets.Image, datasets.Audio)):
        if isinstance(part.features[column], kind):
            part = part.cast_column(column, kind(decode=False))
    classes = {column: part.features[column] for column in slices}
    part = part.select_columns(list(dict.fromkeys([*options.values(), *slices])))
    for number, record in enumerate(part):
        origin = f"{place}[{number}]"
        try:
            label = label_of(named(record[options["label_column"]], names), options["label_column"], task)
            content, *second = (
                hub_content(record[column], column, one)
                for column, one in zip(columns, modality.split("-"), strict=True)
            )
            if pair := options.get("text_pair_column"):
                second = [hub_content(record[pair], pair, modality)]
            values = {column: named(record[column], feature) for column, feature in classes.items()}
            whole = (content, str(second[0])) if second else content
            yield Row(whole, label, origin, metadata=metadata_of(values, slices))
        except DataError as error:
            yield unusable(origin, str(error))


def named(value: Any, feature: Any) -> Any:
    """A label, or a list of them, by name where the data set has them as numbers of classes. Raises `DataError`."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return value if value is None else class_name(feature, int(value))
    inner = getattr(feature, "feature", None)
    return [named(one, inner) for one in value] if inner is not None and isinstance(value, list) else value


def class_name(names: Any, index: int) -> str:
    """The name of a class. Raises `DataError` for -1, by which hub data sets hide the labels of a test split."""
    if not 0 <= index < names.num_classes:
        raise DataError(f"has no label ({index})")
    return str(names.int2str(index))


def hub_content(value: Any, column: str, modality: str) -> Single:
    """A text, encoded bytes, or the file that `datasets` itself put an example into."""
    if modality != "text" and isinstance(value, dict) and not value.get("bytes") and value.get("path"):
        return Path(value["path"])
    if modality != "text" and not isinstance(value, dict | bytes | None):
        kind = modality.capitalize()
        raise DataError(
            f"{column!r} holds {type(value).__name__}; expected {NAMES[modality]} (a feature of the kind {kind})"
        )
    return content_of(value, column, modality, Path())
