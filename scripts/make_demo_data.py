"""Make the embedded demo data again from Debian's packages.

    apt-get download dataset-fashion-mnist wordnet-base
    python scripts/make_demo_data.py *.deb

Fashion-MNIST: class-balanced, seeded samples of the original train and test parts, as gzipped IDX.
WordNet: glosses of ten noun topics (the lexicographer file of the synset is the label), as gzipped TSV.
The licences come from the packages too. Made again from the same packages, every byte is the same.
"""

from __future__ import annotations

import argparse
import gzip
import random
import struct
import subprocess
import tempfile
from pathlib import Path

import numpy as np

DEMO_FOLDER = Path(__file__).parents[1] / "stages/data/demo"
SIZES = {"train": 1500, "validation": 500, "calibration": 300, "test": 2000}
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
TOPICS = {
    "04": "act", "05": "animal", "06": "artifact", "10": "communication", "13": "food", "14": "group",
    "15": "location", "18": "person", "20": "plant", "26": "state",
}  # fmt: skip


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, nargs="+", help=".deb files, or folders they were unpacked into")
    parser.add_argument("--output", type=Path, default=DEMO_FOLDER, help="default: stages/data/demo")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for package in arguments.packages:
            if not package.is_dir():
                subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        roots = [Path(folder), *(package for package in arguments.packages if package.is_dir())]
        (arguments.output / "licenses").mkdir(parents=True, exist_ok=True)
        make_fashion(find(roots, "train-images-idx3-ubyte*").parent, arguments.output)
        make_topics(find(roots, "data.noun"), arguments.output)
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


def make_topics(nouns: Path, output: Path) -> None:
    """Glosses without their examples, each text once."""
    lines = nouns.read_text(encoding="latin-1").splitlines()
    texts: dict[str, str] = {}
    for line in lines:
        if line.startswith("  ") or "|" not in line:
            continue
        fields, _, gloss = line.partition("|")
        topic = TOPICS.get(fields.split()[1])
        text = gloss.split('; "')[0].strip()
        if topic and len(text.split()) >= 3 and "\t" not in text:
            texts.setdefault(text, topic)
    generator = random.Random(0)
    queues: dict[str, list[str]] = {topic: [] for topic in TOPICS.values()}
    for text, topic in sorted(texts.items()):
        queues[topic].append(text)
    for queue in queues.values():
        generator.shuffle(queue)
    for split, size in SIZES.items():
        rows = [f"{topic}\t{queue.pop()}" for topic, queue in queues.items() for _ in range(size // len(queues))]
        generator.shuffle(rows)
        content = ("\n".join(rows) + "\n").encode()
        (output / f"wordnet-topics.{split}.tsv.gz").write_bytes(gzip.compress(content, 9, mtime=0))


if __name__ == "__main__":
    main()
