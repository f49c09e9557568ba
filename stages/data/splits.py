"""Labelled examples in disjoint splits, identified by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from models.tasks import Target

if TYPE_CHECKING:
    from models.modalities import Content

SplitName = Literal["train", "validation", "calibration", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "calibration", "test")


@dataclass(frozen=True)
class Example:
    """One example. `label` is its target (the index of its label in `DataSplits.labels`, those of its labels, or a
    number), `origin` names it for a person.

    `digest` is the SHA-256 of a text, or of an image's decoded pixels or a recording's decoded samples.
    """

    content: Content
    label: Target
    digest: str
    origin: str
    metadata: tuple[tuple[str, str], ...] = ()
    """(column, value) of the columns that validate parts the test split by; only examples of that have any."""


@dataclass(frozen=True)
class DataSplits:
    """All splits of a data set. `fingerprints` change with any content, label or order of a split."""

    labels: tuple[str, ...]
    splits: Mapping[SplitName, tuple[Example, ...]]
    fingerprints: Mapping[SplitName, str]
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: SplitName) -> tuple[Example, ...]:
        return self.splits[name]


def digest_of_text(text: str | tuple[str, str]) -> str:
    """SHA-256 of a text in UTF-8; of two texts with a character between them that no text holds."""
    return hashlib.sha256((text if isinstance(text, str) else "\0".join(text)).encode()).hexdigest()


def fingerprint_of(labels: tuple[str, ...], examples: tuple[Example, ...]) -> str:
    """SHA-256 over the label list and each example's label, content and metadata, in order."""
    digest = hashlib.sha256(json.dumps(labels).encode())
    for example in examples:
        digest.update(f"\n{example.label} {example.digest}".encode())
        if example.metadata:
            digest.update(json.dumps(example.metadata).encode())
    return digest.hexdigest()
