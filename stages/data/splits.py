"""Labelled examples in disjoint splits, identified by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.base import SplitName

if TYPE_CHECKING:
    from models.modalities import Content

SPLITS: tuple[SplitName, ...] = ("train", "validation", "calibration", "test")


@dataclass(frozen=True)
class Example:
    """One example. `label` indexes `DataSplits.labels`, `digest` is the SHA-256 of the content, `origin` names it."""

    content: Content
    label: int
    digest: str
    origin: str


@dataclass(frozen=True)
class DataSplits:
    """All splits of a data set. `fingerprints` change with any content, label or order of a split."""

    labels: tuple[str, ...]
    splits: Mapping[SplitName, tuple[Example, ...]]
    fingerprints: Mapping[SplitName, str]
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: SplitName) -> tuple[Example, ...]:
        return self.splits[name]


def digest_of_content(content: Content) -> str:
    """SHA-256 of a text, of encoded bytes, of a file's bytes, or of pixels with their shape."""
    if isinstance(content, str):
        data = content.encode()
    elif isinstance(content, Path):
        data = content.read_bytes()
    elif isinstance(content, bytes):
        data = content
    else:
        data = repr((content.shape, str(content.dtype))).encode() + content.tobytes()
    return hashlib.sha256(data).hexdigest()


def fingerprint_of(labels: tuple[str, ...], examples: tuple[Example, ...]) -> str:
    """SHA-256 over the label list and each example's label and content, in order."""
    digest = hashlib.sha256(json.dumps(labels).encode())
    for example in examples:
        digest.update(f"\n{example.label} {example.digest}".encode())
    return digest.hexdigest()
