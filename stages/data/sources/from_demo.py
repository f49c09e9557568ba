"""Demo data: sets embedded in this repository (`stages/data/demo`, with their licences), one in a Debian package."""

from __future__ import annotations

import gzip
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import ConfigError, MissingCapabilityError, Problem
from stages.data.sources.base import PLURALS, Row, Source, nearest
from stages.data.splits import SPLITS

if TYPE_CHECKING:
    import numpy as np

DEMO_FOLDER = Path(__file__).parents[1] / "demo"
DEMOS = {"fashion-mnist": "image", "wordnet-topics": "text", "asterisk-prompts": "audio"}
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


def read_demo(name: str, modality: str) -> Source:
    """A demo data set, with its own splits where it has any. The name is one that `check_demo` passed."""
    if modality == "audio":
        return Source(tuple(demo_prompts()))
    return Source(tuple(demo_texts(name) if modality == "text" else demo_images(name)))


def demo_prompts() -> Iterator[Row]:
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
        name = path.relative_to(folder).as_posix()
        label = next((label for start, label in PROMPT_KINDS.items() if name.startswith(start)), None)
        if label is not None:
            yield Row(path, label, f"asterisk-prompts/{name}")


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
