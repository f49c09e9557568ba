"""Read a source, name every problem, and split by content. Light: every plan calls it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from models.errors import ConfigError, DataError, Problem
from models.spec import TaskName
from models.tasks import MODALITY_OF_TASK, Label, Task, classes_of, has_classes, task_of
from stages.data.config import DataConfig
from stages.data.content_digests import ContentDigests
from stages.data.sources import read_source
from stages.data.sources.base import Row, nearest, shortened, unicode_problem
from stages.data.splits import SPLITS, DataSplits, Example, digest_of_text, fingerprint_of
from stages.data.splitting import Placed, Splits, check_labels_in_train, given_splits, limit, own_splits, shuffled

SMALLEST_CLASS = 2
"""A class needs an example to learn from and one to be judged by."""
MAX_NOTES = 20
"""Notes about single examples; more of them are counted only."""


@dataclass(frozen=True)
class Checked:
    """A row that can be read, and the SHA-256 of its content."""

    row: Row
    digest: str
    image: str = ""
    """Of a pair of an image and a text: the SHA-256 of the image alone."""


def load_data(config: DataConfig, task: TaskName, slices: Sequence[str] = ()) -> DataSplits:
    """The data of a run; its test examples carry the values of the columns in `slices`.

    Raises:
        ConfigError: the source is not there, of no known kind, or has no columns and `slices` names some; names for
            labels that the task does not have.
        DataError: an example cannot be read, a class is too small, a label is not in train, the same content is in
            two splits, or a label that has a name is not there. The message names what and where.
        MissingCapabilityError: a hub data set cannot be had here.
    """
    kind, modality = task_of(task), MODALITY_OF_TASK[task]
    check_named(config, task)
    source = read_source(config, modality, kind, slices)
    checked, notes = drop_unreadable(with_names(source.rows, config), config, modality)
    checked, more = drop_contradictions(checked, config)
    checked, captions = drop_other_captions(checked, config)
    more += captions
    labels = kind.labels(one.row.label for one in checked)
    indices = {label: index for index, label in enumerate(labels)}
    placed = [
        Placed(
            Example(one.row.content, kind.target(one.row.label, indices), one.digest, one.row.origin, one.row.metadata),
            one.row.split,
        )
        for one in checked
    ]
    check_labels(labels, [one.example for one in placed], kind, config)
    if any(one.split for one in placed):
        splits, split_notes = given_splits(placed, labels, config)
    else:
        splits, split_notes = own_splits(placed, config)
    splits = limited(splits, labels, config)
    for name in SPLITS:
        if name != "test":  # or what validate is to look at would make every stage before it stale
            splits[name] = [replace(one, metadata=()) for one in splits[name]]
    frozen = {name: tuple(shuffled(splits[name], config.seed)) for name in SPLITS}
    return DataSplits(
        labels=labels,
        splits=frozen,
        fingerprints={name: fingerprint_of(labels, frozen[name]) for name in SPLITS},
        notes=(*source.notes, *capped([*notes, *more, *split_notes])),
    )


def check_named(config: DataConfig, task: TaskName) -> None:
    """Raises `ConfigError` for names of labels (data.label_names) where a task has no labels to name."""
    if config.label_names and not has_classes(task):
        problem = f"labels of {task} are numbers or texts, which have no other name"
        raise ConfigError([Problem("data.label_names", problem, "leave data.label_names out")])


def with_names(rows: Sequence[Row], config: DataConfig) -> list[Row]:
    """The rows with the names of `data.label_names` for labels.

    Raises:
        DataError: a label that has a name is in no row, or its name is another label's.
    """
    names = config.label_names
    if not names:
        return list(rows)
    known = {label for row in rows if not row.problem for label in labels_of(row)}
    if missing := [label for label in names if label not in known]:
        near = [
            f"{label!r}" + f" (did you mean {nearest(label, known)!r}?)" * bool(nearest(label, known))
            for label in missing
        ]
        found = ", ".join(repr(label) for label in sorted(known)[:10]) + ", …" * (len(known) > 10)
        raise DataError(f"data.label_names names labels that {config.source} has not: {shortened(near)}; found {found}")
    if taken := [label for label, name in names.items() if name in known and name not in names]:
        raise DataError(
            f"data.label_names gives {taken[0]!r} the name {names[taken[0]]!r}, which another label of {config.source} "
            "has already; expected a name of its own for each"
        )
    return [row if row.problem else replace(row, label=named(row.label, names)) for row in rows]


def labels_of(row: Row) -> tuple[str, ...]:
    """The classes of a row."""
    return row.label if isinstance(row.label, tuple) else (str(row.label),)


def named(label: Label, names: Mapping[str, str]) -> Label:
    """A label, or several, by the names that they are to have."""
    if isinstance(label, tuple):
        return tuple(sorted(names.get(one, one) for one in label))
    return names.get(str(label), label)


def drop_unreadable(rows: Sequence[Row], config: DataConfig, modality: str) -> tuple[list[Checked], list[str]]:
    """The rows that can be read. With `on_error: fail` any that cannot are an error that names them."""
    checked, problems = check_rows(rows, modality)
    if problems and config.on_error == "fail":
        raise DataError(
            f"{len(problems)} of {len(rows)} examples cannot be read: {shortened(problems)}. "
            "Mend or remove them, or set data.on_error: skip"
        )
    if not checked:
        raise DataError(f"{config.source}: none of its {len(rows)} examples can be read: {shortened(problems, 3)}")
    return checked, [f"skipped: {problem}" for problem in problems]


def check_rows(rows: Sequence[Row], modality: str) -> tuple[list[Checked], list[str]]:
    """Each row with its digest, and what is wrong with the others."""
    checked: list[Checked] = []
    problems: list[str] = []
    digests = None if modality == "text" else ContentDigests(modality)
    for row in rows:
        try:
            if row.problem:
                raise DataError(row.problem)
            image = digests.digest(row.content[0]) if digests and isinstance(row.content, tuple) else ""
            checked.append(Checked(row, digest_of_row(row, digests), image))
        except DataError as error:
            problems.append(str(error))
    if digests is not None:
        digests.save()
    return checked, problems


def digest_of_row(row: Row, digests: ContentDigests | None) -> str:
    """SHA-256 of a text, of an image's pixels or a recording's samples, or of an image and its text.

    Raises:
        DataError: it cannot be read; the message names the row.
    """
    if digests is None:
        texts = tuple(map(str, row.content)) if isinstance(row.content, tuple) else (str(row.content),)
        for text in texts:
            if problem := unicode_problem(text) or ("" if text.strip() else "the text is empty"):
                raise DataError(f"{row.origin}: {problem}")
        return digest_of_text(texts[0] if len(texts) == 1 else (texts[0], texts[1]))
    try:
        return digests.digest(row.content)
    except OSError as error:
        raise DataError(f"{row.origin}: cannot be read: {error.strerror}") from error
    except DataError as error:
        if isinstance(row.content, Path):
            raise
        raise DataError(f"{row.origin}: {error}") from error


def drop_contradictions(checked: Sequence[Checked], config: DataConfig) -> tuple[list[Checked], list[str]]:
    """Rows whose content has one label only; with `on_error: fail` any other is an error."""
    by_digest: dict[str, list[Row]] = defaultdict(list)
    for one in checked:
        by_digest[one.digest].append(one.row)
    torn = {digest: rows for digest, rows in by_digest.items() if len({row.label for row in rows}) > 1}
    if not torn:
        return list(checked), []
    found = [" and ".join(f"{row.origin} is {row.label!r}" for row in rows[:3]) for rows in torn.values()]
    if config.on_error == "fail":
        raise DataError(
            f"{len(torn)} contents have two labels: {shortened(found, 3)}. "
            "Mend the labels, or set data.on_error: skip to leave these examples out"
        )
    return [one for one in checked if one.digest not in torn], [f"skipped: the same content, {one}" for one in found]


def drop_other_captions(checked: Sequence[Checked], config: DataConfig) -> tuple[list[Checked], list[str]]:
    """Pairs whose image stands once; with `on_error: fail` any other is an error. A picture that is in train under one
    caption and in test under another would be found again, not retrieved."""
    first: dict[str, Checked] = {}
    kept, found = [], []
    for one in checked:
        other = first.setdefault(one.image, one) if one.image else one
        if other is one or other.digest == one.digest:  # copies are left to those who know the splits
            kept.append(one)
        else:
            found.append(f"{one.row.origin} with {one.row.label!r} and {other.row.origin} with {other.row.label!r}")
    if found and config.on_error == "fail":
        raise DataError(
            f"{len(found)} pairs have an image that another pair has: {shortened(found, 3)}. The same picture must not "
            "be in two splits: keep one text for each, or set data.on_error: skip to keep the first"
        )
    return kept, [f"left out: {one}" for one in found]


def check_labels(labels: tuple[str, ...], examples: Sequence[Example], task: Task, config: DataConfig) -> None:
    """Enough labels, each with enough different examples. Raises `DataError`."""
    if not examples:
        raise DataError(f"{config.source} has no examples left")
    if len(labels) < task.fewest_labels:
        found = f"one class only ({labels[0]!r})" if labels else "no labels"
        raise DataError(f"{config.source} has {found}; expected {task.fewest_labels} or more")
    if len({one.label for one in examples}) < 2:
        what = task.describe(examples[0].label, labels)
        raise DataError(f"{config.source}: every example has the same label ({what}); there is nothing to learn")
    check_numbers([one.label for one in examples if isinstance(one.label, float)], config)
    by_content = {one.digest: one.label for one in examples}
    counts = Counter(label for target in by_content.values() for label in classes_of(target))
    small = [
        f"{label!r} has {counts[index]}" for index, label in enumerate(labels) if 0 < counts[index] < SMALLEST_CLASS
    ]
    if small:
        raise DataError(
            f"too few examples: {shortened(small, 10)}. Each class needs {SMALLEST_CLASS} different ones at least, "
            "one to train and one to test; add examples or remove the class"
        )


LARGEST_NUMBER, SMALLEST_SPREAD = 1000.0, 0.01
"""Numbers to be predicted: a head that starts near 0 does not get to larger ones at the usual learning rates, and fp16
has three digits of them; a smaller spread drowns in the rounding of half precision."""


def check_numbers(numbers: Sequence[float], config: DataConfig) -> None:
    """Raises `DataError` for numbers to be predicted that a network does not learn, or fp16 does not hold."""
    if not numbers:
        return
    mean = sum(numbers) / len(numbers)
    spread = (sum((one - mean) ** 2 for one in numbers) / len(numbers)) ** 0.5
    if max(map(abs, numbers)) > LARGEST_NUMBER or spread < SMALLEST_SPREAD:
        raise DataError(
            f"the numbers in {config.source} go from {min(numbers):g} to {max(numbers):g} (mean {mean:g}, standard "
            f"deviation {spread:g}); expected at most {LARGEST_NUMBER:g} either way, with a deviation of "
            f"{SMALLEST_SPREAD:g} or more. Subtract the mean and divide by the deviation, or take another unit"
        )


def limited(splits: Splits, labels: tuple[str, ...], config: DataConfig) -> Splits:
    """At most `data.max_<split>_samples` of each split. Raises `DataError` where a split or a class is left empty."""
    cut: Splits = {}
    for name in SPLITS:
        maximum: int | None = getattr(config, f"max_{name}_samples")
        if name == "train" and maximum is not None and maximum < len(labels) and classes_of(splits[name][0].label):
            raise DataError(f"data.max_train_samples is {maximum}, fewer than the {len(labels)} classes; raise it")
        cut[name] = limit(splits[name], maximum, config.seed)
        if not cut[name]:
            way = "add examples" if name == "train" else f"add examples or raise data.{name}_fraction"
            raise DataError(f"no examples are left for {name}; {way}")
    check_labels_in_train(cut, labels)
    return cut


def capped(notes: list[str]) -> list[str]:
    """The first notes, and the number of the others."""
    more = len(notes) - MAX_NOTES
    return [*notes[:MAX_NOTES], f"and {more} notes more of this kind"] if more > 1 else notes
