"""Demo data: sets embedded in this repository (`stages/data/demo`, with their licences), one in a Debian package."""

from __future__ import annotations

import gzip
import struct
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import ConfigError, DataError, MissingCapabilityError, Problem
from models.tasks import Task
from stages.data.sources.base import PLURALS, Row, Source, nearest, unusable
from stages.data.splits import SPLITS, SplitName

if TYPE_CHECKING:
    import numpy as np

DEMO_FOLDER = Path(__file__).parents[1] / "demo"
DEMOS = {
    "fashion-mnist": "image",
    "fashion-mnist-grids": "image",
    "wordnet-topics": "text",
    "wordnet-senses": "text",
    "wordnet-relations": "text",
    "wordnet-similarity": "text",
    "asterisk-prompts": "audio",
    "emoji": "image-text",
}
"""Name → modality."""
FASHION_LABELS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
PROMPTS_PACKAGE = "asterisk-core-sounds-en-wav"
PROMPTS_FOLDERS = tuple(
    Path(root) / "share/asterisk/sounds/en_US_f_Allison" for root in (sys.prefix, "/usr/local", "/usr")
)
"""Where the package's recordings are looked for: `make prompts` unpacks it into the environment."""
PROMPT_KINDS = {
    "conf": "conference",
    "digits": "digits",
    "letters": "letters",
    "phonetic": "phonetic",
    "vm": "voicemail",
}
"""How a recording's path begins → its label: the five beginnings with the most recordings (87, 94, 61, 27 and 114 in
version 1.6.1)."""


def check_demo(name: str, modality: str) -> None:
    """Raises `ConfigError` for an unknown name or another modality."""
    if name not in DEMOS:
        near = nearest(name, DEMOS)
        hint = f"did you mean demo:{near}?" if near else f"there are {', '.join(f'demo:{one}' for one in DEMOS)}"
        raise ConfigError([Problem("data.source", f"there is no demo:{name}", hint)])
    if DEMOS[name] != modality:
        fitting = ", ".join(f"demo:{one}" for one, kind in DEMOS.items() if kind == modality)
        message = f"demo:{name} holds {PLURALS[DEMOS[name]]}, the task wants {PLURALS[modality]}"
        raise ConfigError([Problem("data.source", message, f"take {fitting}, or change the task")])


def read_demo(name: str, task: Task) -> Source:
    """A demo data set, with its own splits where it has any. The name is one that `check_demo` passed."""
    readers = {"text": demo_texts, "audio": demo_prompts, "image": demo_images, "image-text": demo_pairs}
    read = demo_grids if name == "fashion-mnist-grids" else readers[DEMOS[name]]
    return Source(tuple(labelled(row, task) for row in read(name)))


def labelled(row: Row, task: Task) -> Row:
    """The row with its label as the task reads it."""
    try:
        return replace(row, label=task.read(row.label))
    except DataError as error:
        return unusable(row.origin, f"the label {error}")


def demo_prompts(name: str) -> Iterator[Row]:
    """Recordings of the prompts of a telephone exchange, by what they are for; the package has no splits.

    Raises:
        MissingCapabilityError: the package is not installed.
    """
    folder = next((one for one in PROMPTS_FOLDERS if one.is_dir()), None)
    if folder is None:
        raise MissingCapabilityError(
            f"the recordings of demo:asterisk-prompts are in Debian's package {PROMPTS_PACKAGE}, which is not in "
            f"{' or '.join(map(str, PROMPTS_FOLDERS))}. Install it: apt-get install {PROMPTS_PACKAGE}; without root, "
            "in a clone: make prompts"
        )
    for path in sorted(folder.rglob("*.wav")):
        prompt = path.relative_to(folder).as_posix()
        label = next((label for start, label in PROMPT_KINDS.items() if prompt.startswith(start)), None)
        if label is not None:
            yield Row(path, label, f"{name}/{prompt}")


def demo_texts(name: str) -> Iterator[Row]:
    """Rows of the gzipped TSV files: label, tab, text; or label and two texts."""
    for split in SPLITS:
        lines = gzip.decompress((DEMO_FOLDER / f"{name}.{split}.tsv.gz").read_bytes()).decode().split("\n")
        for number, line in enumerate(lines[:-1], 1):
            label, text, *second = line.split("\t")
            yield Row((text, second[0]) if second else text, label, f"{name}/{split}:{number}", split)


def demo_pairs(name: str) -> Iterator[Row]:
    """Rows of the zip files: PNGs by number, and their texts, one a line; the label is the text."""
    for split in SPLITS:
        with zipfile.ZipFile(DEMO_FOLDER / f"{name}.{split}.zip") as archive:
            texts = archive.read("names.txt").decode().split("\n")[:-1]
            for number, text in enumerate(texts, 1):
                yield Row((archive.read(f"{number:04}.png"), text), text, f"{name}/{split}:{number}", split)


def demo_images(name: str) -> Iterator[Row]:
    """Rows of the gzipped IDX files; contents are uint8 (height, width)."""
    for split in SPLITS:
        images = read_idx(DEMO_FOLDER / f"{name}.{split}.images.idx.gz")
        labels = read_idx(DEMO_FOLDER / f"{name}.{split}.labels.idx.gz")
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield Row(image, FASHION_LABELS[int(label)], f"{name}/{split}[{number}]", split)


def demo_grids(name: str) -> Iterator[Row]:
    """Pictures of one to three garments in the cells of a two by two grid, with all their labels: uint8 (56, 56). Made
    of the images of fashion-mnist, as MultiMNIST is of MNIST's (Sabour et al. 2017, arXiv 1710.09829); each garment is
    in one picture only, so that none is in two splits."""
    import numpy as np

    random = np.random.default_rng(0)
    garments: dict[SplitName, list[Row]] = {split: [] for split in SPLITS}
    for row in demo_images("fashion-mnist"):
        garments[row.split or "train"].append(row)
    for split, rows in garments.items():
        left = [rows[index] for index in random.permutation(len(rows))]
        number = 0
        while left:
            some = [left.pop() for _ in range(min(int(random.integers(1, 4)), len(left)))]
            grid = np.zeros((2, 28, 2, 28), np.uint8)
            for cell, garment in zip(random.permutation(4), some, strict=False):
                grid[cell // 2, :, cell % 2] = np.asarray(garment.content)
            labels = tuple(sorted({str(one.label) for one in some}))
            yield Row(grid.reshape(56, 56), labels, f"{name}/{split}[{number}]", split)
            number += 1


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of bytes: uint8, of the shape in its header."""
    import numpy as np

    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)
