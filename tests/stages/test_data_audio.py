"""Recordings as data: from folders, tables, the hub's format and Debian's package; copies are found by their sound."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import soundfile
from pyarrow import parquet

from models.errors import ConfigError, DataError, MissingCapabilityError
from stages.data.config import DataConfig
from stages.data.load import load_data
from stages.data.sources import from_demo
from stages.data.splits import SPLITS, DataSplits
from tests.prompts import needs_prompts

ROOT = Path(__file__).parents[2]
AUDIO = "audio-classification"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The memory of decoded recordings stays inside the test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def load(source: Path | str, task: Any = AUDIO, **options: Any) -> DataSplits:
    return load_data(DataConfig(source=str(source), **options), task)


def write_sound(path: Path, number: int, rate: int = 8_000) -> Path:
    """A short recording whose content is given by `number`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(number).integers(-9000, 9000, 400, dtype=np.int16)
    soundfile.write(path, samples, rate, subtype="PCM_16")
    return path


def sound_folder(root: Path, labels: dict[str, int]) -> Path:
    """`root/<label>/<n>.wav`, each with its own content."""
    places = [root / label / f"{number}.wav" for label, count in labels.items() for number in range(count)]
    for number, path in enumerate(places):
        write_sound(path, number)
    return root


def total(data: DataSplits) -> int:
    return sum(len(data[name]) for name in SPLITS)


def test_a_folder_of_labels(tmp_path: Path, cache: Path) -> None:
    write_sound(sound_folder(tmp_path, {"a": 10, "b": 10}) / "b/deep/10.flac", 99)
    (tmp_path / "a/notes.txt").write_text("not a recording")
    data = load(tmp_path)
    assert data.labels == ("a", "b") and total(data) == 21
    assert any("no recordings by their endings (1 × .txt)" in note for note in data.notes)
    assert load(tmp_path).fingerprints == data.fingerprints
    (memory,) = (cache / "adapt-to-edge").iterdir()
    assert memory.name.startswith("audio-digests-libsndfile-")


def test_a_corrupt_recording_among_good_ones_is_named(tmp_path: Path) -> None:
    sound_folder(tmp_path, {"a": 6, "b": 6})
    (tmp_path / "a/3.wav").write_bytes((tmp_path / "a/3.wav").read_bytes()[:300])
    (tmp_path / "b/bad.ogg").write_bytes(b"no recording")
    with pytest.raises(DataError, match="2 of 13 examples cannot be read") as caught:
        load(tmp_path)
    assert "a/3.wav: is cut off" in str(caught.value) and "b/bad.ogg" in str(caught.value)
    data = load(tmp_path, on_error="skip")
    assert total(data) == 11
    assert sum(note.startswith("skipped: ") for note in data.notes) == 2


def test_a_recording_saved_again_in_another_format_is_the_same(tmp_path: Path) -> None:
    """A leak: the same samples in train as WAV and in test as FLAC."""
    for split, first in (("train", 0), ("test", 100)):
        for number in range(12):
            write_sound(tmp_path / split / "ab"[number % 2] / f"{number}.wav", first + number)
    write_sound(tmp_path / "test/a/copy.flac", 0)
    with pytest.raises(DataError, match=r"1 examples are in two splits by content: .*0\.wav \(train\) = .*copy\.flac"):
        load(tmp_path)
    assert total(load(tmp_path, on_error="skip")) == 24
    # The same samples at another rate are another sound.
    write_sound(tmp_path / "test/a/copy.flac", 0, rate=16_000)
    assert total(load(tmp_path)) == 25


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_recordings_by_path_relative_to_the_table(tmp_path: Path, suffix: str) -> None:
    sound_folder(tmp_path / "s", {"a": 6, "b": 6})
    rows = [{"clip": f"s/{label}/{number}.wav", "kind": label} for label in "ab" for number in range(6)]
    file = tmp_path / f"t{suffix}"
    if suffix == ".csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["clip", "kind"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert total(load(file, audio_column="clip", label_column="kind")) == 12
    with pytest.raises(DataError, match=r"no column 'audio'; found clip, kind; .*set data\.audio_column"):
        load(file, label_column="kind")


def test_recordings_of_the_hub_stay_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchcodec, which `datasets` needs to decode."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    sound_folder(tmp_path / "s", {"a": 8, "b": 8})
    encoded = [(tmp_path / f"s/{label}/{number}.wav").read_bytes() for label in "ab" for number in range(8)]
    # As `datasets` writes it, by hand: its own encoder wants torchcodec as well.
    features = {"audio": {"_type": "Audio"}, "label": {"names": ["a", "b"], "_type": "ClassLabel"}}
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    sounds = pyarrow.array([{"bytes": one, "path": None} for one in encoded], kind)
    table = pyarrow.table({"audio": sounds, "label": [0] * 8 + [1] * 8})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    (tmp_path / "set").mkdir()
    parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "set/train.parquet")
    assert isinstance(datasets.load_dataset(str(tmp_path / "set"))["train"].features["audio"], datasets.Audio)
    data = load(f"hf:{tmp_path / 'set'}")
    assert total(data) == 16 and isinstance(data["train"][0].content, bytes)
    numbers = load(tmp_path / "set/train.parquet")  # the same file as a plain table, whose labels are numbers
    assert {one.digest for one in numbers["test"]} == {one.digest for one in data["test"]}


# --- the demo -----------------------------------------------------------------------------------------


def test_the_prompts_are_sorted_by_how_their_paths_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{start}{number}.wav" for start in ("digits/", "vm-", "letters/", "conf-", "confbridge-", "phonetic/")
             for number in range(4)]  # fmt: skip
    for number, name in enumerate([*names, "queue-thankyou.wav", "silence/1.wav"]):
        write_sound(tmp_path / "sounds" / name, number)
    monkeypatch.setattr(from_demo, "PROMPTS_FOLDERS", (tmp_path / "none", tmp_path / "sounds"))
    data = load("demo:asterisk-prompts")
    counts = Counter(data.labels[one.label] for name in SPLITS for one in data[name])
    assert counts == {"conference": 8, "digits": 4, "letters": 4, "phonetic": 4, "voicemail": 4}


def test_without_the_package_the_line_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_demo, "PROMPTS_FOLDERS", (tmp_path / "none",))
    with pytest.raises(MissingCapabilityError, match="apt-get install asterisk-core-sounds-en-wav.*make prompts"):
        load("demo:asterisk-prompts")
    with pytest.raises(ConfigError, match="holds recordings, the task wants images"):
        load("demo:asterisk-prompts", "image-classification")


@needs_prompts
def test_the_package_is_as_described() -> None:
    """`make prompts` put it here. Every recording can be read and none stands in two splits."""
    data = load("demo:asterisk-prompts")
    counts = Counter(data.labels[one.label] for name in SPLITS for one in data[name])
    assert counts.keys() == {"conference", "digits", "letters", "phonetic", "voicemail"}
    assert all(count >= 25 for count in counts.values()) and counts["voicemail"] > 100
    assert len({one.digest for name in SPLITS for one in data[name]}) == total(data)


def test_the_package_is_unpacked_without_root(tmp_path: Path) -> None:
    """With an `apt-get` that knows no lists: the first download fails, and one from lists of its own succeeds."""
    if not shutil.which("dpkg-deb"):
        pytest.fail("the script under test needs dpkg-deb")
    sounds = tmp_path / "pkg/usr/share/asterisk/sounds/en_US_f_Allison"
    write_sound(sounds / "vm-a.wav", 0)
    for place, text in (("DEBIAN/control", CONTROL), ("usr/share/doc/asterisk-core-sounds-en-wav/copyright", "CC")):
        (tmp_path / "pkg" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pkg" / place).write_text(text)
    subprocess.run(["dpkg-deb", "-b", tmp_path / "pkg", tmp_path / "made.deb"], check=True, capture_output=True)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "apt-get").write_text(APT.format(log=tmp_path / "log", deb=tmp_path / "made.deb"))
    (tools / "apt-get").chmod(0o755)
    (tmp_path / "venv").mkdir()
    command = [ROOT / "scripts/unpack_prompts.sh", tmp_path / "venv"]
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SYSTEM_SOUNDS": str(tmp_path / "none")}
    subprocess.run(command, check=True, env=environment)
    assert (tmp_path / "venv/share/asterisk/sounds/en_US_f_Allison/vm-a.wav").is_file()
    assert (tmp_path / "venv/share/asterisk/copyright").read_text() == "CC"
    assert [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()] == [
        "download",
        "update",
        "download",
    ]


CONTROL = """Package: asterisk-core-sounds-en-wav
Version: 1
Architecture: all
Maintainer: Nobody <nobody@example.org>
Description: made up
"""

APT = """#!/bin/bash
for word in "$@"; do
  case $word in download|update) echo "$word" >> {log} ;; esac
done
[[ $* == *Dir::State::Lists=* ]] || exit 100
[[ $* == *download* ]] && cp {deb} asterisk-core-sounds-en-wav_1_all.deb
exit 0
"""
