"""Make the embedded demo data again from packages of Debian and npm.

    apt-get download dataset-fashion-mnist wordnet-base
    npm pack emoji-datasource-google@16.0.0
    python scripts/make_demo_data.py *.deb *.tgz    # without the .tgz the emoji stay as they are

Fashion-MNIST: class-balanced, seeded samples of the original train and test parts, as gzipped IDX.
WordNet: glosses of ten noun topics (the lexicographer file of the synset is the label); of words with several senses,
with the topics of all of them; pairs of glosses with their relation, and with their similarity; as gzipped TSV.
Emoji: pictures with their names, near-duplicates in one split only, as zip files.
The licences come from the packages too. Made again from the same packages, every byte is the same.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import struct
import subprocess
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DEMO_FOLDER = Path(__file__).parents[1] / "stages/data/demo"
SIZES = {"train": 1500, "validation": 500, "calibration": 300, "test": 2000}
SMALL_SIZES = {"train": 1200, "validation": 400, "calibration": 200, "test": 1000}
PEOPLE = {"man", "men", "woman", "women", "person", "people"}
EMOJI_SIZES = {"test": 240, "validation": 120, "calibration": 60, "train": 640}
BINS = 10
SENSES = ((1, 0.5), (2, 0.45), (3, 0.05))
"""Number of topics and its share of the examples."""
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
TOPICS = {
    "04": "act", "05": "animal", "06": "artifact", "10": "communication", "13": "food", "14": "group",
    "15": "location", "18": "person", "20": "plant", "26": "state",
}  # fmt: skip


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "packages", type=Path, nargs="+", help=".deb and .tgz files, or folders they were unpacked into"
    )
    parser.add_argument("--output", type=Path, default=DEMO_FOLDER, help="default: stages/data/demo")
    parser.add_argument(
        "--wordnet", nargs="+", choices=WORDNET_SETS, default=list(WORDNET_SETS), help="which of its sets"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for package in arguments.packages:
            if package.suffix == ".tgz":
                with tarfile.open(package) as archive:
                    archive.extractall(folder, filter="data")
            elif not package.is_dir():
                subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        roots = [Path(folder), *(package for package in arguments.packages if package.is_dir())]
        (arguments.output / "licenses").mkdir(parents=True, exist_ok=True)
        make_fashion(find(roots, "train-images-idx3-ubyte*").parent, arguments.output)
        synsets = read_synsets(find(roots, "data.noun"))
        for name in arguments.wordnet:
            WORDNET_SETS[name](synsets, arguments.output)
        if any(package.suffix == ".tgz" for package in arguments.packages):
            make_emoji(find(roots, "emoji.json").parent, arguments.output)
        for package, name in {"dataset-fashion-mnist": "fashion-mnist", "wordnet-base": "wordnet"}.items():
            text = find(roots, f"doc/{package}/copyright").read_text(encoding="utf-8")
            (arguments.output / f"licenses/{name}.txt").write_text(text, encoding="utf-8")


def find(roots: list[Path], pattern: str) -> Path:
    """The one file that a package should hold."""
    for root in roots:
        for path in root.rglob(pattern):
            return path
    raise SystemExit(f"no {pattern} in the packages; both are needed: dataset-fashion-mnist and wordnet-base")


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes (http://yann.lecun.com/exdb/mnist): magic, sizes, values."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    dims = raw[3]
    shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def write_idx(path: Path, values: np.ndarray) -> None:
    """Gzipped IDX without a time stamp, so that making it again gives the same bytes."""
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes(), 9, mtime=0))


def make_fashion(folder: Path, output: Path) -> None:
    """Train, validation and calibration from the original train part; test from the original test part."""

    def part(name: str) -> tuple[np.ndarray, np.ndarray]:
        images = read_idx(next(folder.glob(f"{name}-images-idx3-ubyte*")))
        return images, read_idx(next(folder.glob(f"{name}-labels-idx1-ubyte*")))

    generator = np.random.default_rng(0)
    seen: set[bytes] = set()
    for source, splits in (("t10k", ("test",)), ("train", ("train", "validation", "calibration"))):
        images, labels = part(source)
        queues = {label: list(generator.permutation(np.flatnonzero(labels == label))) for label in range(10)}
        for split in splits:
            chosen: list[int] = []
            for label in range(10):
                wanted = SIZES[split] // 10
                while wanted:
                    index = int(queues[label].pop())
                    if images[index].tobytes() not in seen:  # the original has a few images twice
                        seen.add(images[index].tobytes())
                        chosen.append(index)
                        wanted -= 1
            order = generator.permutation(np.array(chosen))
            write_idx(output / f"fashion-mnist.{split}.images.idx.gz", images[order])
            write_idx(output / f"fashion-mnist.{split}.labels.idx.gz", labels[order])


@dataclass(frozen=True)
class Synset:
    """A noun of WordNet: its words, its definition without examples, and what it is a kind or a part of."""

    topic: str | None
    words: tuple[str, ...]
    gloss: str
    kinds: tuple[str, ...]
    wholes: tuple[str, ...]


def read_synsets(nouns: Path) -> dict[str, Synset]:
    """Offset → synset, of a data file of WordNet 3.0 (https://wordnet.princeton.edu/documentation/wndb5wn)."""
    synsets = {}
    for line in nouns.read_text(encoding="latin-1").splitlines():
        if line.startswith("  ") or "|" not in line:
            continue
        before, _, gloss = line.partition("|")
        fields = before.split()
        words = int(fields[3], 16)
        pointers = fields[4 + 2 * words + 1 :]
        targets = [(pointers[index], pointers[index + 1]) for index in range(0, len(pointers) - 3, 4)]
        synsets[fields[0]] = Synset(
            TOPICS.get(fields[1]),
            tuple(fields[4 : 4 + 2 * words : 2]),
            gloss.split('; "')[0].strip(),
            tuple(offset for symbol, offset in targets if symbol in ("@", "@i")),
            tuple(offset for symbol, offset in targets if symbol == "#p"),
        )
    return synsets


def usable(synset: Synset) -> bool:
    """Whether its definition can stand in a table and says something."""
    return len(synset.gloss.split()) >= 3 and "\t" not in synset.gloss


def make_topics(synsets: dict[str, Synset], output: Path) -> None:
    """Glosses without their examples, each text once."""
    texts: dict[str, str] = {}
    for synset in synsets.values():
        if synset.topic and usable(synset):
            texts.setdefault(synset.gloss, synset.topic)
    generator = random.Random(0)
    queues: dict[str, list[str]] = {topic: [] for topic in TOPICS.values()}
    for text, topic in sorted(texts.items()):
        queues[topic].append(text)
    for queue in queues.values():
        generator.shuffle(queue)
    for split, size in SIZES.items():
        rows = [f"{topic}\t{queue.pop()}" for topic, queue in queues.items() for _ in range(size // len(queues))]
        generator.shuffle(rows)
        write_table(output / f"wordnet-topics.{split}.tsv.gz", rows)


def write_table(path: Path, rows: list[str]) -> None:
    """Gzipped lines without a time stamp."""
    path.write_bytes(gzip.compress(("\n".join(rows) + "\n").encode(), 9, mtime=0))


def make_senses(synsets: dict[str, Synset], output: Path) -> None:
    """Words with up to four definitions, and the topics of all of them; no definition is there twice."""
    senses: dict[str, list[Synset]] = {}
    for synset in synsets.values():
        for word in synset.words:
            senses.setdefault(word, []).append(synset)
    generator, seen = random.Random(1), set[str]()
    rows: dict[int, list[str]] = {1: [], 2: [], 3: []}
    words = sorted(senses)
    generator.shuffle(words)
    words.sort(key=lambda word: -len({one.topic for one in senses[word]}))  # the rarer ones choose first
    for word in words:
        found, glosses = senses[word], [one.gloss for one in senses[word]]
        topics = sorted({one.topic for one in found if one.topic})
        known = all(one.topic and usable(one) for one in found)
        if not known or len(found) > 4 or len(topics) not in rows or seen & set(glosses):
            continue
        seen.update(glosses)
        rows[len(topics)].append(f"{';'.join(topics)}\t{' / '.join(glosses)}")
    for split, size in SMALL_SIZES.items():
        some = [rows[count].pop() for count, share in SENSES for _ in range(round(size * share))]
        generator.shuffle(some)
        write_table(output / f"wordnet-senses.{split}.tsv.gz", some)


def make_relations(synsets: dict[str, Synset], output: Path) -> None:
    """Two definitions and what the first is to the second: a kind of it, a part of it, a kind of the same, nothing. No
    definition is there twice."""
    generator, used = random.Random(2), set[str]()
    offsets = sorted(offset for offset, synset in synsets.items() if usable(synset))
    siblings: dict[str, list[str]] = {}
    for offset in offsets:
        for kind in synsets[offset].kinds:
            siblings.setdefault(kind, []).append(offset)
    pairs: dict[str, list[tuple[str, str]]] = {
        "part of": [(one, whole) for one in offsets for whole in synsets[one].wholes if usable(synsets[whole])],
        "kind of": [(one, kind) for one in offsets for kind in synsets[one].kinds if usable(synsets[kind])],
        "same kind": [(some[0], some[-1]) for some in siblings.values() if len(some) > 1],
        "unrelated": [(one, generator.choice(offsets)) for one in offsets],
    }
    rows: dict[str, list[str]] = {relation: [] for relation in pairs}
    for relation, found in pairs.items():
        for one, other in generator.sample(found, len(found)):
            if (
                one != other
                and not {one, other} & used
                and len(rows[relation]) < sum(SMALL_SIZES.values()) // len(pairs)
            ):
                used |= {one, other}
                rows[relation].append(f"{relation}\t{synsets[one].gloss}\t{synsets[other].gloss}")
    for split, size in SMALL_SIZES.items():
        some = [queue.pop() for queue in rows.values() for _ in range(size // len(rows))]
        generator.shuffle(some)
        write_table(output / f"wordnet-relations.{split}.tsv.gz", some)


def make_similarity(synsets: dict[str, Synset], output: Path) -> None:
    """Two definitions and how near they are in the hierarchy of kinds (Wu & Palmer 1994), in ten equal bins. No
    definition is there twice."""

    def way_up(offset: str) -> list[str]:
        path = [offset]
        while synsets[path[-1]].kinds:
            path.append(synsets[path[-1]].kinds[0])
        return path

    def similarity(one: list[str], other: list[str]) -> float:
        common = next((offset for offset in one if offset in set(other)), None)
        return 2 * len(way_up(common)) / (len(one) + len(other)) if common else 0.0

    generator, used = random.Random(3), set[str]()
    offsets = sorted(offset for offset, synset in synsets.items() if usable(synset))
    below: dict[str, list[str]] = {}
    for offset in offsets:
        for above in way_up(offset):
            below.setdefault(above, []).append(offset)
    rows: list[list[str]] = [[] for _ in range(BINS)]
    wanted = sum(SMALL_SIZES.values()) // BINS
    while any(len(one) < wanted for one in rows):
        first = generator.choice(offsets)
        second = generator.choice(below[generator.choice(way_up(first))])
        value = similarity(way_up(first), way_up(second))
        place = rows[min(int(value * BINS), BINS - 1)]
        if first != second and len(place) < wanted and not {first, second} & used:
            used |= {first, second}
            place.append(f"{value:.4f}\t{synsets[first].gloss}\t{synsets[second].gloss}")
    for split, size in SMALL_SIZES.items():
        some = [queue.pop() for queue in rows for _ in range(size // BINS)]
        generator.shuffle(some)
        write_table(output / f"wordnet-similarity.{split}.tsv.gz", some)


def make_emoji(package: Path, output: Path) -> None:
    """Pictures of 64 px with their names in small letters. Emoji whose names begin with the same word in the same
    subcategory are near-duplicates (the hours of a clock; a mage, a man and a woman mage) and stay together.

    Not flags: what a flag looks like says nothing of the name of a country that was not in train.
    """
    groups: dict[tuple[str, str], list[tuple[str, Path]]] = {}
    names = set[str]()
    for entry in json.loads((package / "emoji.json").read_text(encoding="utf-8")):
        name, picture = entry["name"].lower(), package / "img/google/64" / entry["image"]
        if entry["has_img_google"] and entry["category"] not in ("Flags", "Component") and name not in names:
            names.add(name)
            words = [word for word in name.split() if word not in PEOPLE] or [name]
            groups.setdefault((words[0], entry["subcategory"]), []).append((name, picture))
    generator = random.Random(0)
    queue = [groups[key] for key in sorted(groups)]
    generator.shuffle(queue)
    for split, size in EMOJI_SIZES.items():
        rows: list[tuple[str, Path]] = []
        while len(rows) < size:
            rows += queue.pop()[: size - len(rows)]
        generator.shuffle(rows)
        with zipfile.ZipFile(output / f"emoji.{split}.zip", "w", zipfile.ZIP_STORED) as archive:
            write_entry(archive, "names.txt", "".join(f"{name}\n" for name, _ in rows).encode())
            for number, (_, picture) in enumerate(rows, 1):
                write_entry(archive, f"{number:04}.png", picture.read_bytes())
    licence = (package / "LICENSE").read_text(encoding="utf-8")
    (output / "licenses/emoji.txt").write_text(EMOJI_NOTICE + licence, encoding="utf-8")


EMOJI_NOTICE = """The pictures are of Google's Noto Emoji (https://github.com/googlefonts/noto-emoji), (c) Google Inc.,
under the Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0). The names are of emoji-data
(https://github.com/iamcal/emoji-data), under the licence that follows.

"""


def write_entry(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """A file without a time stamp or rights of this machine."""
    archive.writestr(zipfile.ZipInfo(name), data)


WORDNET_SETS = {
    "topics": make_topics, "senses": make_senses, "relations": make_relations, "similarity": make_similarity
}  # fmt: skip


if __name__ == "__main__":
    main()
