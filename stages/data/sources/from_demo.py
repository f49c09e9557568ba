"""The data sets embedded in this repository (`stages/data/demo`, with their licences)."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import ConfigError, Problem
from stages.data.sources.base import Row, Source, nearest
from stages.data.splits import SPLITS

if TYPE_CHECKING:
    import numpy as np

DEMO_FOLDER = Path(__file__).parents[1] / "demo"
DEMOS = {"fashion-mnist": "image", "wordnet-topics": "text"}
"""Name → modality."""
FASHION_LABELS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def check_demo(name: str, modality: str) -> None:
    """Raises `ConfigError` for an unknown name or another modality."""
    if name not in DEMOS:
        near = nearest(name, DEMOS)
        hint = f"did you mean demo:{near}?" if near else f"there are {', '.join(f'demo:{one}' for one in DEMOS)}"
        raise ConfigError([Problem("data.source", f"there is no demo:{name}", hint)])
    if DEMOS[name] != modality:
        fitting = ", ".join(f"demo:{one}" for one, kind in DEMOS.items() if kind == modality)
        message = f"demo:{name} holds {DEMOS[name]}s, the task wants {modality}s"
        raise ConfigError([Problem("data.source", message, f"take {fitting}, or change the task")])


def read_demo(name: str, modality: str) -> Source:
    """An embedded data set, with its own splits. The name is one that `check_demo` passed."""
    return Source(tuple(demo_texts(name) if modality == "text" else demo_images(name)))


def demo_texts(name: str) -> Iterator[Row]:
    """Rows of the gzipped TSV files: label, tab, text."""
    for split in SPLITS:
        lines = gzip.decompress((DEMO_FOLDER / f"{name}.{split}.tsv.gz").read_bytes()).decode().split("\n")
        for number, line in enumerate(lines[:-1], 1):
            label, _, text = line.partition("\t")
            yield Row(text, label, f"{name}/{split}:{number}", split)


def demo_images(name: str) -> Iterator[Row]:
    """Rows of the gzipped IDX files; contents are uint8 (height, width)."""
    for split in SPLITS:
        images = read_idx(DEMO_FOLDER / f"{name}.{split}.images.idx.gz")
        labels = read_idx(DEMO_FOLDER / f"{name}.{split}.labels.idx.gz")
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield Row(image, FASHION_LABELS[int(label)], f"{name}/{split}[{number}]", split)


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of bytes: uint8, of the shape in its header."""
    import numpy as np

    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)
