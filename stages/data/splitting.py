"""Disjoint splits by content: the same content, seed and fractions give the same splits on every machine."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.errors import DataError
from models.tasks import classes_of
from stages.data.config import DataConfig
from stages.data.sources.base import shortened
from stages.data.splits import SPLITS, Example, SplitName

Splits = dict[SplitName, list[Example]]


@dataclass(frozen=True)
class Placed:
    """An example and the split that its source put it into, if any."""

    example: Example
    split: SplitName | None


def given_splits(placed: Sequence[Placed], labels: tuple[str, ...], config: DataConfig) -> tuple[Splits, list[str]]:
    """The source's own splits; what it lacks is taken from train.

    Raises:
        DataError: there is no train, a label is not in train, or (with `on_error: fail`) the same content
            is in two splits.
    """
    splits: Splits = {name: [] for name in SPLITS}
    for one in placed:
        splits[one.split or "train"].append(one.example)
    if not splits["train"]:
        found = ", ".join(name for name in SPLITS if splits[name])
        raise DataError(f"{config.source} has no examples for train; found {found}")
    notes = remove_leaks(splits, config)
    check_labels_in_train(splits, labels)
    missing = {name: part for name, part in fractions_of(config).items() if not splits[name]}
    held_out = hold_out(splits["train"], missing, config.seed)
    for name in missing:
        notes.append(f"the source has no {name} split: {len(held_out[name])} examples of train were held out for it")
    return splits | held_out, notes


def own_splits(placed: Sequence[Placed], config: DataConfig) -> tuple[Splits, list[str]]:
    """Splits made here, stratified; of a content that stands more than once one copy is kept."""
    unique: dict[str, Example] = {}
    for one in placed:
        unique.setdefault(one.example.digest, one.example)
    copies = len(placed) - len(unique)
    notes = [f"left out: {copies} copies of other examples"] if copies else []
    return hold_out(list(unique.values()), fractions_of(config), config.seed), notes


def fractions_of(config: DataConfig) -> dict[SplitName, float]:
    """The share of all examples of each split but train, in the order in which they are taken."""
    return {
        "test": config.test_fraction,
        "validation": config.validation_fraction,
        "calibration": config.calibration_fraction,
    }


def hold_out(examples: Sequence[Example], fractions: Mapping[SplitName, float], seed: int) -> Splits:
    """The given share of each class for each split, and the rest as train."""
    splits: Splits = {}
    rest, left = list(examples), 1.0
    for name, fraction in fractions.items():
        splits[name], rest = take(rest, fraction / left, seed, name)
        left -= fraction
    splits["train"] = rest
    return splits


def take(examples: Sequence[Example], share: float, seed: int, purpose: str) -> tuple[list[Example], list[Example]]:
    """`share` of each class, and the rest, both in their order. Each class keeps one example in the rest.

    Chosen by the rank of a hash of content, seed and purpose, so an example that is added or removed
    moves few others; copies of a content stay together.
    """
    by_class: dict[int, dict[str, None]] = defaultdict(dict)
    for example, stratum in zip(examples, strata_of(examples), strict=True):
        by_class[stratum][example.digest] = None
    chosen: set[str] = set()
    for digests in by_class.values():
        count = min(max(1, round(len(digests) * share)), len(digests) - 1)
        chosen.update(sorted(digests, key=lambda digest: rank_of(digest, seed, purpose))[:count])
    taken = [example for example in examples if example.digest in chosen]
    return taken, [example for example in examples if example.digest not in chosen]


NO_LABEL = -1
"""The stratum of the examples that have no label, or a number."""


def strata_of(examples: Sequence[Example]) -> list[int]:
    """What each example counts for when shares are taken: its label, or the rarest of its labels, which has the most
    to lose."""
    counts = Counter(label for example in examples for label in classes_of(example.label))
    return [
        min(classes_of(example.label), key=lambda label: (counts[label], label), default=NO_LABEL)
        for example in examples
    ]


def rank_of(digest: str, seed: int, purpose: str) -> bytes:
    """A random but reproducible order of contents."""
    return hashlib.sha256(f"{seed} {purpose} {digest}".encode()).digest()


def shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    """The examples in a random but reproducible order.

    Sources come sorted by label (folders are read one after the other), and whoever takes the first few of a split,
    to calibrate or to compare, must see all classes.
    """
    return sorted(examples, key=lambda example: rank_of(example.digest, seed, "order"))


def limit(examples: Sequence[Example], maximum: int | None, seed: int) -> list[Example]:
    """At most `maximum` examples with the classes in proportion, each class at least once where it fits."""
    if maximum is None or len(examples) <= maximum:
        return list(examples)
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, stratum in enumerate(strata_of(examples)):
        by_class[stratum].append(index)
    order: list[tuple[float, int]] = []
    for indices in by_class.values():
        ranked = sorted(indices, key=lambda index: rank_of(examples[index].digest, seed, "limit"))
        order += [(rank / len(ranked), index) for rank, index in enumerate(ranked)]
    chosen = {index for _, index in sorted(order)[:maximum]}
    return [example for index, example in enumerate(examples) if index in chosen]


def remove_leaks(splits: Splits, config: DataConfig) -> list[str]:
    """Contents in two splits: an error, or with `on_error: skip` they stay in the later one (test last).

    Copies inside one split are left as they are.
    """
    home: dict[str, tuple[SplitName, str]] = {}
    leaks: list[str] = []
    for name in reversed(SPLITS):
        kept = []
        for example in splits[name]:
            other, origin = home.setdefault(example.digest, (name, example.origin))
            if other == name:
                kept.append(example)
            else:
                leaks.append(f"{example.origin} ({name}) = {origin} ({other})")
        splits[name] = kept
    if leaks and config.on_error == "fail":
        raise DataError(
            f"{len(leaks)} examples are in two splits by content: {shortened(leaks, 3)}. A test on what was trained "
            "on proves nothing: remove one of each pair, or set data.on_error: skip to leave out the first"
        )
    return [f"left out: {leak}, the same content" for leak in leaks]


def check_labels_in_train(splits: Splits, labels: tuple[str, ...]) -> None:
    """Raises `DataError` for labels that are in another split and not in train."""
    known = {label for example in splits["train"] for label in classes_of(example.label)}
    strange = {
        label: f"{labels[label]!r} in {name} ({example.origin})"
        for name in SPLITS
        for example in splits[name]
        for label in classes_of(example.label)
        if label not in known
    }
    if strange:
        raise DataError(
            f"labels that are not in train: {shortened(list(strange.values()))}. Train has "
            f"{', '.join(labels[index] for index in sorted(known)[:20])}; add examples to train or remove the label"
        )
