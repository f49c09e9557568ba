"""A small context for the tests of the training stages: tiny backbones in folders, made-up data, no network."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from models.registry import resolve
from models.tasks import Target
from pipeline.progress import QuietProgress
from stages.artifact import SCHEMA_VERSION, Artifact, digest_files
from stages.base import Progress, StageContext
from stages.data.splits import DataSplits, Example, SplitName
from tests.models.tiny import WORDS, hf_audio_folder, hf_text_folder, image_backbone, recording, saved_checkpoint

COUNTS: Mapping[SplitName, int] = {"train": 24, "validation": 12}


class StoppingProgress:
    """Interrupts the run, as Ctrl-C would, after so many steps of the bar with this description."""

    def __init__(self, description: str, after: int) -> None:
        self.description = description
        self.after = after

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Any]:
        """See `stages.base.Progress`."""
        done = 0

        def advance(steps: int = 1) -> None:
            nonlocal done
            done += steps
            if description == self.description and done >= self.after:
                raise KeyboardInterrupt

        yield advance


def images(labels: Sequence[int], random: np.random.Generator) -> list[Any]:
    """Noise with one colour channel raised by the label: uint8 (32, 32, 3)."""
    made = []
    for label in labels:
        pixels = random.integers(0, 160, (32, 32, 3))
        pixels[:, :, label] += 60
        made.append(pixels.astype(np.uint8))
    return made


def texts(labels: Sequence[int], random: np.random.Generator) -> list[Any]:
    """Words at random, one of which tells the label."""
    return [f"{WORDS[7 + label]} {' '.join(random.choice(WORDS[4:7], 4))}" for label in labels]


def recordings(labels: Sequence[int], random: np.random.Generator) -> list[Any]:
    """Tones, whose pitch tells the label."""
    return [recording(label, random) for label in labels]


def split_of(contents: Sequence[Any], labels: Sequence[Target]) -> tuple[Example, ...]:
    """Examples with a digest each."""
    return tuple(
        Example(content, label, hashlib.sha256(f"{index} {content!r}".encode()).hexdigest(), f"made up {index}")
        for index, (content, label) in enumerate(zip(contents, labels, strict=True))
    )


def made_up_data(kind: str, classes: int = 3, counts: Mapping[SplitName, int] = COUNTS) -> DataSplits:
    """Balanced splits that a linear probe can learn."""
    random = np.random.default_rng(0)
    splits = {}
    for name, count in counts.items():
        labels = [index % classes for index in range(count)]
        splits[name] = split_of({"image": images, "text": texts, "audio": recordings}[kind](labels, random), labels)
    return DataSplits(tuple("abc"[:classes]), splits, {name: name for name in splits})


def image_folder(folder: Path) -> Path:
    """A backbone with random weights, as a checkpoint of this project."""
    saved_checkpoint(folder, image_backbone())
    return folder


def make_context(
    root: Path,
    name: str,
    data: DataSplits,
    kind: str = "image",
    inputs: Mapping[str, Artifact] | None = None,
    progress: Progress | None = None,
    backbone: str | None = None,
) -> StageContext:
    """A context whose output is a new `root/name`, and whose resume folder stays from call to call."""
    if backbone is None:
        folder = root / f"backbone-{kind}"
        if not folder.is_dir():
            {"image": image_folder, "text": hf_text_folder, "audio": hf_audio_folder}[kind](folder)
        backbone = str(folder)
    output, resume = root / name, root / f"{name}-resume"
    output.mkdir()
    resume.mkdir(exist_ok=True)
    return StageContext(
        output=output,
        resume=resume,
        inputs=inputs or {},
        task=f"{kind}-classification",  # type: ignore[arg-type]
        backbone=resolve(backbone),
        data=data,
        seed=0,
        device="cpu",
        threads=1,
        log=logging.getLogger("test"),
        progress=progress or QuietProgress(),
    )


def artifact_of(stage: str, folder: Path) -> Artifact:
    """A folder as the runner would have committed it."""
    return Artifact(stage, folder, {"schema_version": SCHEMA_VERSION, "stage": stage, "files": digest_files(folder)})
