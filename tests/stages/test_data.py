"""Data from every source, its splits, and what is said about data that cannot be used."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from models.errors import ConfigError, DataError, MissingCapabilityError
from stages.data.config import DataConfig
from stages.data.load import load_data
from stages.data.sources.base import nearest
from stages.data.splits import SPLITS, DataSplits, Example, SplitName, digest_of_text

IMAGES, TEXTS = "image-classification", "text-classification"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The memory of decoded images stays inside the test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def write_png(path: Path, shade: int) -> Path:
    """A small image whose content is given by `shade`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8, 3), (shade % 256, shade // 256, 7), np.uint8)).save(path)
    return path


def image_folder(root: Path, labels: dict[str, int], first: int = 0) -> Path:
    """`root/<label>/<n>.png`, each with its own content."""
    shade = first
    for label, count in labels.items():
        for number in range(count):
            write_png(root / label / f"{number}.png", shade)
            shade += 1
    return root


def write_csv(path: Path, rows: Sequence[Sequence[Any]], header: Sequence[str] = ("text", "label")) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def texts(labels: dict[str, int]) -> list[tuple[str, str]]:
    return [(f"{label} number {number}", label) for label, count in labels.items() for number in range(count)]


def load(source: Path | str, task: Any = TEXTS, **options: Any) -> DataSplits:
    return load_data(DataConfig(source=str(source), **options), task)


def sizes(data: DataSplits) -> dict[SplitName, int]:
    return {name: len(data[name]) for name in SPLITS}


def by_label(data: DataSplits, name: SplitName) -> dict[str, int]:
    return dict(Counter(data.labels[example.label] for example in data[name]))


def assert_disjoint(data: DataSplits) -> None:
    digests = [example.digest for name in SPLITS for example in data[name]]
    homes = [(example.digest, name) for name in SPLITS for example in data[name]]
    assert len(set(homes)) == len(set(digests))


# --- demo ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "task"), [("fashion-mnist", IMAGES), ("wordnet-topics", TEXTS)])
def test_demo_sets_are_balanced_and_disjoint(name: str, task: str) -> None:
    data = load(f"demo:{name}", task)
    assert sizes(data) == {"train": 1500, "validation": 500, "calibration": 300, "test": 2000}
    assert len(data.labels) == 10
    assert len({example.digest for split in SPLITS for example in data[split]}) == 4300
    for split in SPLITS:
        assert set(by_label(data, split).values()) == {len(data[split]) // 10}
    assert data.notes == ()


def test_demo_contents_are_what_a_modality_takes() -> None:
    image = load("demo:fashion-mnist", IMAGES)["test"][0].content
    assert isinstance(image, np.ndarray)
    assert (image.shape, image.dtype) == ((28, 28), np.uint8)
    assert image.max() > 100
    data = load("demo:wordnet-topics")
    assert all(isinstance(example.content, str) and len(example.content.split()) > 2 for example in data["train"])
    words = ("cooked", "sauce", "meat", "cheese", "bread")
    hits = Counter(
        data.labels[one.label] for one in data["test"] if any(word in str(one.content).split() for word in words)
    )
    assert hits["food"] > 0.5 * hits.total()  # a tenth of them, were the labels not those of the texts


def test_the_emoji_are_pairs_without_near_duplicates_in_two_splits() -> None:
    data = load("demo:emoji", "image-text")
    assert sizes(data) == {"train": 640, "validation": 120, "calibration": 60, "test": 240}
    texts: dict[str, SplitName] = {}
    for split in SPLITS:
        for one in data[split]:
            image, text = one.content  # type: ignore[misc]
            assert isinstance(image, bytes) and one.label == text and text not in texts
            texts[str(text)] = split
    hours = {split for text, split in texts.items() if text.startswith("clock face")}
    mages = {split for text, split in texts.items() if text in ("mage", "man mage", "woman mage")}
    assert len(hours) == 1 and len(mages) <= 1
    assert data.labels == () and data.notes == ()


def test_pairs_come_from_tables_and_are_identified_by_both(tmp_path: Path) -> None:
    for number in range(24):
        write_png(tmp_path / f"{number}.png", number)
    rows = [(f"{number}.png", f"title {min(number, 22)}") for number in range(24)]  # the last two share their title
    table = write_csv(tmp_path / "pairs.csv", rows, ("photo", "title"))
    config = DataConfig(source=str(table), image_column="photo", text_column="title")
    examples = [one for part in load_data(config, "image-text").splits.values() for one in part]
    assert len({one.digest for one in examples}) == 24
    assert all(one.content[1] == one.label for one in examples)  # type: ignore[index]
    write_png(tmp_path / "5.png", 6)  # the photo of another row, under its own title still
    with pytest.raises(DataError, match="1 pairs have an image that another pair has"):
        load_data(config, "image-text")
    with pytest.raises(DataError, match="has no column 'caption'.*set data.text_column"):
        load_data(config.model_copy(update={"text_column": "caption"}), "image-text")
    write_csv(table, [("0.png", "one"), ("gone.png", "two")], ("photo", "title"))
    with pytest.raises(DataError, match="there is no file 'gone.png'"):
        load_data(config, "image-text")
    with pytest.raises(DataError, match="stand in a table"):
        load_data(DataConfig(source=str(tmp_path)), "image-text")


def test_pairs_come_from_the_form_of_the_hub(tmp_path: Path) -> None:
    import datasets

    files = [write_png(tmp_path / f"{number}.png", number).read_bytes() for number in range(20)]
    rows = {"image": [{"bytes": data} for data in files], "text": [f"caption {number}" for number in range(20)]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    folder = tmp_path / "set"
    folder.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    data = load_data(DataConfig(source=f"hf:{folder}"), "image-text")
    found = {one.label: one.content[0] for part in data.splits.values() for one in part}  # type: ignore[index]
    assert len(found) == 20 and found["caption 3"] == files[3]


def test_demo_is_small_and_carries_its_licences() -> None:
    import stages.data

    folder = Path(str(stages.data.__file__)).parent / "demo"
    assert sum(path.stat().st_size for path in folder.glob("*.gz")) < 3_000_000
    assert sum(path.stat().st_size for path in folder.glob("*.zip")) < 4_000_000
    assert "Noto Emoji" in (folder / "licenses/emoji.txt").read_text()
    assert "Zalando" in (folder / "licenses/fashion-mnist.txt").read_text()
    assert "Princeton University" in (folder / "licenses/wordnet.txt").read_text()


def test_a_plan_of_a_demo_loads_no_heavy_library() -> None:
    code = (
        "import sys; from stages.data.config import DataConfig; from stages.data.load import load_data; "
        "load_data(DataConfig(source='demo:fashion-mnist'), 'image-classification'); "
        "print([name for name in ('torch', 'datasets', 'pyarrow', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_demo_is_answered_with_the_near_name() -> None:
    with pytest.raises(ConfigError, match="no demo:fashion-minst.*did you mean demo:fashion-mnist"):
        load("demo:fashion-minst", IMAGES)
    with pytest.raises(ConfigError, match="demo:fashion-mnist, .*demo:wordnet-topics"):
        load("demo:zzz", IMAGES)


def test_a_demo_of_another_modality_is_refused() -> None:
    with pytest.raises(ConfigError, match="holds images, the task wants texts.*take demo:wordnet-topics"):
        load("demo:fashion-mnist", TEXTS)


# --- where it is ----------------------------------------------------------------------------------------


def test_a_missing_file_is_named_with_what_is_near(tmp_path: Path) -> None:
    write_csv(tmp_path / "reviews.csv", texts({"a": 2, "b": 2}))
    with pytest.raises(ConfigError, match=r"review\.csv' is not there.*did you mean .*reviews\.csv"):
        load(tmp_path / "review.csv")
    with pytest.raises(ConfigError, match="did you mean demo:fashion-mnist"):
        load("fashion-mnist", IMAGES)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.xlsx").write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"is a \.xlsx file.*\.csv, \.jsonl, \.parquet"):
        load(tmp_path / "data.xlsx")


def test_fractions_must_leave_something_to_train_on() -> None:
    with pytest.raises(ValidationError, match="is 1.10; it must be below 1"):
        DataConfig(source="x", test_fraction=0.5, validation_fraction=0.5)


# --- folders ------------------------------------------------------------------------------------------------


def test_a_folder_of_labels_is_split_by_class(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "mes images ü", {"chat noir": 20, "Köter": 40})
    data = load(folder, IMAGES)
    assert data.labels == ("Köter", "chat noir")
    assert sizes(data) == {"train": 33, "validation": 9, "calibration": 6, "test": 12}
    assert by_label(data, "test") == {"Köter": 8, "chat noir": 4}
    assert by_label(data, "train") == {"Köter": 22, "chat noir": 11}
    assert_disjoint(data)
    assert all(isinstance(example.content, Path) for example in data["train"])


def test_predefined_folders_are_kept_and_the_missing_splits_taken_from_train(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", {"a": 10, "b": 10})
    image_folder(tmp_path / "test", {"a": 3, "b": 4}, first=100)
    data = load(tmp_path, IMAGES)
    assert by_label(data, "test") == {"a": 3, "b": 4}
    assert sizes(data) == {"train": 14, "validation": 4, "calibration": 2, "test": 7}
    assert {Path(example.origin).parts[-3] for example in data["validation"]} == {"train"}
    assert any("no validation split: 4 examples of train" in note for note in data.notes)
    assert_disjoint(data)


def test_split_folders_beside_others_are_not_guessed_at(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", {"a": 3, "b": 3})
    image_folder(tmp_path / "extra", {"a": 3}, first=50)
    with pytest.raises(DataError, match=r"folders of splits \(train\) beside others \(extra\)"):
        load(tmp_path, IMAGES)


def test_splits_without_train_are_refused(tmp_path: Path) -> None:
    image_folder(tmp_path / "test", {"a": 3, "b": 3})
    image_folder(tmp_path / "val", {"a": 3, "b": 3}, first=50)
    with pytest.raises(DataError, match="has no train folder; found test, val"):
        load(tmp_path, IMAGES)


def test_train_and_test_can_be_labels(tmp_path: Path) -> None:
    data = load(image_folder(tmp_path, {"bus": 6, "train": 6}), IMAGES)
    assert data.labels == ("bus", "train")


def test_an_empty_folder_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no image files.*<label>/<name>\.png.*nothing \(it is empty\)"):
        load(tmp_path, IMAGES)
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match="found notes.md"):
        load(tmp_path, IMAGES)


def test_what_a_folder_holds_besides_is_noted_not_used(tmp_path: Path) -> None:
    image_folder(tmp_path, {"a": 4, "b": 4})
    write_png(tmp_path / "loose.png", 900)
    write_png(tmp_path / "a/.ipynb_checkpoints/0-copy.png", 901)
    (tmp_path / "a/photo.heic").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    data = load(tmp_path, IMAGES)
    assert sum(sizes(data).values()) == 8
    notes = "\n".join(data.notes)
    assert "1 files directly in" in notes
    assert "1 × .heic" in notes
    assert "label folder" in notes
    assert "empty holds no image files" in notes


def test_a_corrupt_image_among_good_ones_is_named(tmp_path: Path) -> None:
    image_folder(tmp_path, {"a": 6, "b": 6})
    (tmp_path / "a/3.png").write_bytes((tmp_path / "a/3.png").read_bytes()[:40])
    (tmp_path / "b/bad.jpg").write_bytes(b"not a picture")
    with pytest.raises(DataError, match="2 of 13 examples cannot be read") as caught:
        load(tmp_path, IMAGES)
    assert str(tmp_path / "a/3.png") in str(caught.value)
    assert str(tmp_path / "b/bad.jpg") in str(caught.value)
    assert "data.on_error: skip" in str(caught.value)
    data = load(tmp_path, IMAGES, on_error="skip")
    assert sum(sizes(data).values()) == 11
    assert sum(note.startswith("skipped: ") and ("3.png" in note or "bad.jpg" in note) for note in data.notes) == 2


def test_nothing_but_corrupt_images_is_an_error_also_when_skipping(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of its 1 examples can be read.*x\.png"):
        load(tmp_path, IMAGES, on_error="skip")


def test_what_was_decoded_is_remembered_by_content_only(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.modalities import vision

    folder = image_folder(tmp_path / "images", {"a": 5, "b": 5})
    decode, calls = vision.decode_image, []
    monkeypatch.setattr(vision, "decode_image", lambda content: (calls.append(content), decode(content))[1])
    first = load(folder, IMAGES)
    assert len(calls) == 10
    assert load(folder, IMAGES).fingerprints == first.fingerprints
    assert len(calls) == 10
    # Same name, same size, another content: the memory does not vouch for it.
    damaged = folder / "a/0.png"
    data = bytearray(damaged.read_bytes())
    data[:4] = b"junk"
    damaged.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"a/0\.png"):
        load(folder, IMAGES)
    (memory,) = (cache / "adapt-to-edge").iterdir()
    memory.write_bytes(b"\xff\x00 torn")
    write_png(damaged, 700)
    assert sum(sizes(load(folder, IMAGES)).values()) == 10
    memory.unlink()
    memory.mkdir()  # a memory that cannot be read or written changes nothing
    assert sum(sizes(load(folder, IMAGES)).values()) == 10


def test_a_class_with_one_example_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'rare' has 1. Each class needs 2"):
        load(image_folder(tmp_path, {"a": 5, "rare": 1}), IMAGES)
    write_png(tmp_path / "rare/copy.png", 5)  # the same content as rare/0.png
    with pytest.raises(DataError, match="'rare' has 1. Each class needs 2 different ones"):
        load(tmp_path, IMAGES)


def test_one_class_is_no_classification(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one class only \\('a'\\)"):
        load(image_folder(tmp_path, {"a": 5}), IMAGES)


def test_a_label_of_test_that_is_not_in_train_is_named(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", {"a": 6, "b": 6})
    image_folder(tmp_path / "test", {"a": 2, "zebra": 2}, first=100)
    with pytest.raises(DataError, match=r"not in train: 'zebra' in test \(.*zebra.*\)\. Train has a, b"):
        load(tmp_path, IMAGES)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp"])
def test_a_picture_saved_again_in_another_format_is_the_same_picture(tmp_path: Path, suffix: str) -> None:
    image_folder(tmp_path / "train", {"a": 6, "b": 6})
    image_folder(tmp_path / "test", {"a": 3, "b": 3}, first=50)
    with Image.open(tmp_path / "train/a/2.png") as image:
        image.save(tmp_path / f"test/a/again{suffix}", lossless=True, compress_level=1)
    assert (tmp_path / f"test/a/again{suffix}").read_bytes() != (tmp_path / "train/a/2.png").read_bytes()
    with pytest.raises(DataError, match=r"in two splits by content: .*2\.png \(train\) = .*again"):
        load(tmp_path, IMAGES)


def test_the_first_few_of_a_sorted_source_are_of_all_classes(tmp_path: Path) -> None:
    """Calibration, merging and export take the first examples of a split; folders and tables come sorted by label."""
    rows = [(f"text {label} {index}", label) for label in "abcd" for index in range(200)]
    data = load(write_csv(tmp_path / "sorted.csv", rows), TEXTS)
    for name in SPLITS:
        assert {example.label for example in data[name][:32]} == {0, 1, 2, 3}
    assert load(tmp_path / "sorted.csv", TEXTS).fingerprints == data.fingerprints
    assert load(tmp_path / "sorted.csv", TEXTS, seed=1).fingerprints != data.fingerprints


def test_a_leak_is_found_by_content(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", {"a": 8, "b": 8})
    image_folder(tmp_path / "test", {"a": 2, "b": 2}, first=100)
    write_png(tmp_path / "test/a/other name.png", 3)  # train/a/3.png
    with pytest.raises(DataError, match=r"1 examples are in two splits by content: .*3\.png \(train\) = .*other name"):
        load(tmp_path, IMAGES)
    data = load(tmp_path, IMAGES, on_error="skip")
    assert_disjoint(data)
    assert by_label(data, "test") == {"a": 3, "b": 2}
    assert "train/a/3.png" not in {"/".join(Path(one.origin).parts[-3:]) for name in SPLITS for one in data[name]}
    assert any("other name.png (test), the same content" in note for note in data.notes)


def test_copies_never_cross_splits(tmp_path: Path) -> None:
    image_folder(tmp_path, {"a": 10, "b": 10})
    for number in range(10):
        write_png(tmp_path / "a" / f"copy {number}.png", number)
    data = load(tmp_path, IMAGES)
    assert_disjoint(data)
    assert sum(sizes(data).values()) == 20
    assert "left out: 10 copies of other examples" in data.notes


def test_copies_inside_train_stay_together_when_a_split_is_taken_from_it(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", {"a": 10, "b": 10})
    for number in range(10):
        write_png(tmp_path / "train/a" / f"copy {number}.png", number)
    image_folder(tmp_path / "test", {"a": 2, "b": 2}, first=100)
    data = load(tmp_path, IMAGES)
    assert_disjoint(data)
    assert sum(sizes(data).values()) == 34


def test_a_content_with_two_labels_is_named(tmp_path: Path) -> None:
    image_folder(tmp_path, {"a": 5, "b": 5})
    write_png(tmp_path / "b/same.png", 2)  # a/2.png
    with pytest.raises(DataError, match=r"1 contents have two labels: .*a/2\.png is 'a' and .*same\.png is 'b'"):
        load(tmp_path, IMAGES)
    data = load(tmp_path, IMAGES, on_error="skip")
    assert sum(sizes(data).values()) == 9
    assert any("same.png is 'b'" in note for note in data.notes)


# --- splits -----------------------------------------------------------------------------------------------


def test_splits_depend_on_content_and_seed_not_on_names_or_order(tmp_path: Path) -> None:
    rows = texts({"a": 40, "b": 40})
    one = load(write_csv(tmp_path / "one.csv", rows))
    two = load(write_csv(tmp_path / "two.csv", rows[::-1]))
    other = load(tmp_path / "one.csv", seed=1)
    for name in SPLITS:
        assert {example.digest for example in one[name]} == {example.digest for example in two[name]}
        assert {example.digest for example in one[name]} != {example.digest for example in other[name]}
    assert load(tmp_path / "one.csv").fingerprints == one.fingerprints


def test_an_added_example_moves_few_others(tmp_path: Path) -> None:
    rows = texts({"a": 100, "b": 100})

    def homes(data: DataSplits) -> dict[str, SplitName]:
        return {example.digest: name for name in SPLITS for example in data[name]}

    before = homes(load(write_csv(tmp_path / "x.csv", rows)))
    after = homes(load(write_csv(tmp_path / "x.csv", [("a new one", "a"), *rows])))
    assert len(after) == len(before) + 1
    assert sum(after[digest] != home for digest, home in before.items()) <= 4


def test_one_changed_label_changes_the_fingerprint_of_its_split_only(tmp_path: Path) -> None:
    header = ("text", "label", "split")
    rows = [(text, label, split) for split in SPLITS for text, label in texts({f"{split} a": 3, f"{split} b": 3})]
    rows = [(text, label[-1], split) for text, label, split in rows]
    before = load(write_csv(tmp_path / "x.csv", rows, header), split_column="split")
    index = next(number for number, row in enumerate(rows) if row[2] == "test")
    rows[index] = (rows[index][0], "b" if rows[index][1] == "a" else "a", "test")
    after = load(write_csv(tmp_path / "x.csv", rows, header), split_column="split")
    assert {name for name in SPLITS if before.fingerprints[name] != after.fingerprints[name]} == {"test"}


def test_limits_keep_the_classes_in_proportion(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "x.csv", texts({"a": 200, "b": 100, "c": 20}))
    data = load(file, max_train_samples=32, max_test_samples=16, max_validation_samples=3, max_calibration_samples=6)
    assert sizes(data) == {"train": 32, "validation": 3, "calibration": 6, "test": 16}
    assert by_label(data, "train") == {"a": 20, "b": 10, "c": 2}
    assert by_label(data, "validation") == {"a": 1, "b": 1, "c": 1}
    with pytest.raises(DataError, match="max_train_samples is 2, fewer than the 3 classes"):
        load(file, max_train_samples=2)


def test_classes_too_small_for_every_split_say_which_split_is_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no examples are left for validation.*data\.validation_fraction"):
        load(write_csv(tmp_path / "x.csv", texts({"a": 2, "b": 2})))


# --- tables ---------------------------------------------------------------------------------------------------


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The same rows as CSV, JSONL or Parquet."""
    if path.suffix == ".csv":
        write_csv(path, [list(row.values()) for row in rows], list(rows[0]))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_table_gives_the_same_data(tmp_path: Path, suffix: str) -> None:
    contents = ["plain", 'with "quotes", commas', "two\nlines", "ünïcödé ☃", "a\u2028separator", "tab\there"]
    rows = [{"id": n, "text": f"{text} {n}", "label": "ab"[n % 2]} for n, text in enumerate(contents * 4)]
    data = load(write_table(tmp_path / f"d ä{suffix}", rows))
    found = sorted((str(one.content), data.labels[one.label]) for name in SPLITS for one in data[name])
    assert found == sorted((row["text"], row["label"]) for row in rows)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_images_by_path_relative_to_the_table(tmp_path: Path, suffix: str) -> None:
    image_folder(tmp_path / "pic tures/é", {"a": 6, "b": 6})
    rows = [{"file": f"pic tures/é/{c}/{n}.png", "kind": c} for c in "ab" for n in range(6)]
    file = write_table(tmp_path / f"t{suffix}", rows)
    data = load(file, IMAGES, image_column="file", label_column="kind")
    assert sum(sizes(data).values()) == 12
    assert all(Path(str(one.content)).is_file() for one in data["train"])


def test_images_inside_parquet(tmp_path: Path) -> None:
    image_folder(tmp_path / "i", {"a": 6, "b": 6})
    encoded = [((tmp_path / f"i/{c}/{n}.png").read_bytes(), c) for c in "ab" for n in range(6)]
    plain = write_table(tmp_path / "bytes.parquet", [{"image": data, "label": c} for data, c in encoded])
    struct = [{"image": {"bytes": data, "path": None}, "label": c} for data, c in encoded]
    data = load(plain, IMAGES)
    assert sum(sizes(data).values()) == 12
    assert isinstance(data["train"][0].content, bytes)
    assert load(write_table(tmp_path / "hf.parquet", struct), IMAGES).fingerprints == data.fingerprints
    broken = [{"image": data if n else b"junk", "label": c} for n, (data, c) in enumerate(encoded)]
    with pytest.raises(DataError, match=r"1 of 12 examples.*x\.parquet, row 1"):
        load(write_table(tmp_path / "x.parquet", broken), IMAGES)


@pytest.mark.parametrize("way", ["dots", "absolute", "link"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, way: str) -> None:
    secret = write_png(tmp_path / "outside/secret.png", 999)
    image_folder(tmp_path / "set", {"a": 4, "b": 4})
    name = {"dots": "a/../../outside/secret.png", "absolute": str(secret), "link": "link.png"}[way]
    (tmp_path / "set/link.png").symlink_to(secret)
    rows = [(f"{c}/{n}.png", c) for c in "ab" for n in range(4)]
    file = write_csv(tmp_path / "set/t.csv", [*rows, (name, "a")], ("image", "label"))
    with pytest.raises(DataError, match=r"t\.csv, line 10: the path .* leaves"):
        load(file, IMAGES)
    data = load(file, IMAGES, on_error="skip")
    assert all("outside" not in one.origin for split in SPLITS for one in data[split])
    assert any("leaves" in note for note in data.notes)


def test_an_image_that_is_not_there_is_named_with_its_line(tmp_path: Path) -> None:
    image_folder(tmp_path, {"a": 4, "b": 4})
    rows = [(f"{c}/{n}.png", c) for c in "ab" for n in range(4)]
    file = write_csv(tmp_path / "t.csv", [*rows, ("a/9.png", "a"), ("x\0y.png", "b")], ("image", "label"))
    with pytest.raises(DataError, match=r"2 of 10 .*line 10: there is no file 'a/9\.png'.*line 11: .*no usable path"):
        load(file, IMAGES)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_missing_column_lists_what_is_there(tmp_path: Path, suffix: str) -> None:
    rows = [{"review": f"r {n}", "lable": "ab"[n % 2]} for n in range(8)]
    file = write_table(tmp_path / f"t{suffix}", rows)
    with pytest.raises(DataError, match="no column 'text'; found review, lable; .*data.text_column"):
        load(file)
    with pytest.raises(DataError, match="no column 'label'.*did you mean 'lable'\\? Set data.label_column"):
        load(file, text_column="review")
    assert sum(sizes(load(file, text_column="review", label_column="lable")).values()) == 8


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "t.csv", texts({"a": 8, "b": 8}))
    lines = file.read_bytes().split(b"\r\n")
    lines[4] = "café,a".encode("latin-1")
    file.write_bytes(b"\r\n".join(lines))
    with pytest.raises(DataError, match=r"1 of 16 .*t\.csv, line 5: byte 0xe9 is not UTF-8.*iconv"):
        load(file)
    data = load(file, on_error="skip")
    assert sum(sizes(data).values()) == 15
    assert any("line 5: byte 0xe9" in note for note in data.notes)
    file.write_bytes("text,label\n".encode("utf-16"))
    with pytest.raises(DataError, match="line 1: byte 0xff is not UTF-8"):
        load(file)


def test_a_text_file_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(5):
            (tmp_path / label / f"{number}.txt").write_text(f"text {label} {number}", encoding="utf-8")
    assert sum(sizes(load(tmp_path)).values()) == 10
    (tmp_path / "b/2.txt").write_bytes(b"first\nsecond \xe9\n")
    with pytest.raises(DataError, match=r"b/2\.txt: line 2, byte 0xe9 is not UTF-8"):
        load(tmp_path)
    assert sum(sizes(load(tmp_path, on_error="skip")).values()) == 9


def test_half_a_character_in_json_is_named(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "label": label}) for text, label in texts({"a": 6, "b": 6})]
    (tmp_path / "t.jsonl").write_text("\n".join([*lines, '{"text": "x \\ud83d", "label": "a"}']))
    with pytest.raises(DataError, match=r"line 13: \\ud83d is half a character"):
        load(tmp_path / "t.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "line 13: is no JSON"),
        ('["x", "a"]', "line 13: expected an object"),
        ('"x"', "line 13: expected an object"),
        ('{"text": "x"}', "line 13: 'label' is empty"),
        ('{"text": null, "label": "a"}', "line 13: 'text' is empty"),
        ('{"text": "  ", "label": "a"}', "line 13: the text is empty"),
        ('{"text": ["x"], "label": "a"}', "line 13: 'text' holds list; expected a text"),
        ('{"text": "x", "label": NaN}', "line 13: 'label' is empty"),
        ('{"text": "x", "label": {"k": 1}}', "line 13: 'label' holds dict"),
    ],
)
def test_a_bad_line_is_named_or_skipped(tmp_path: Path, line: str, message: str) -> None:
    lines = [json.dumps({"text": text, "label": label}) for text, label in texts({"a": 6, "b": 6})]
    (tmp_path / "t.jsonl").write_text("\n".join([*lines, line]))
    with pytest.raises(DataError, match=f"1 of 13 .*{message}"):
        load(tmp_path / "t.jsonl")
    assert sum(sizes(load(tmp_path / "t.jsonl", on_error="skip")).values()) == 12


def test_broken_csv_is_named_with_its_line(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "t.csv", texts({"a": 6, "b": 6}))
    with file.open("a") as stream:
        stream.write("one, two,a\n")
    with pytest.raises(DataError, match="line 14: found 3 fields, expected 2; quote commas"):
        load(file)
    file.write_text("label,text,label\n")
    with pytest.raises(DataError, match="the column 'label' stands twice"):
        load(file)
    file.write_text("text,label\n")
    with pytest.raises(DataError, match="holds no rows; expected one example a row with text, label"):
        load(file)
    file.write_text("")
    with pytest.raises(DataError, match="no column 'text'; found none"):
        load(file)


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"text,label\n")
    with pytest.raises(DataError, match=r"t\.parquet cannot be read as Parquet"):
        load(tmp_path / "t.parquet")


def test_numbers_can_be_labels_and_a_byte_order_mark_is_no_part_of_a_column(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "T.CSV", [(f"t {n}", n % 3) for n in range(30)])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load(file).labels == ("0", "1", "2")


def test_a_split_column_with_an_unknown_name_is_refused(tmp_path: Path) -> None:
    header = ("text", "label", "fold")
    rows = [(text, label, "training") for text, label in texts({"a": 8, "b": 8})]
    rows += [(f"held {label} {n}", label, "Test") for label in "ab" for n in range(3)]
    data = load(write_csv(tmp_path / "t.csv", rows, header), split_column="fold")
    assert by_label(data, "test") == {"a": 3, "b": 3}
    write_csv(tmp_path / "t.csv", [*rows, ("x", "a", "holdout")], header)
    with pytest.raises(DataError, match="line 24: 'holdout' names no split; expected one of train"):
        load(tmp_path / "t.csv", split_column="fold")


# --- hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` reads local folders here, and writes its cache into the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("hub_cache")
def test_hub_texts_keep_their_splits_and_class_names(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["neg", "pos"]))
    for split, count in (("train", 20), ("test", 6), ("unsupervised", 3)):
        rows = {"text": [f"{split} {n}" for n in range(count)], "label": [n % 2 for n in range(count)]}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / f"set/data/{split}.parquet")
    card = "".join(f"  - split: {one}\n    path: data/{one}.parquet\n" for one in ("train", "test", "unsupervised"))
    (tmp_path / "set/README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{card}---\n")
    data = load(f"hf:{tmp_path / 'set'}@main")
    assert data.labels == ("neg", "pos")
    assert by_label(data, "test") == {"neg": 3, "pos": 3}
    assert sum(sizes(data).values()) == 26
    assert any("unsupervised" in note for note in data.notes)
    with pytest.raises(DataError, match="no column 'content'; found text, label"):
        load(f"hf:{tmp_path / 'set'}@main", text_column="content")


@pytest.mark.usefixtures("hub_cache")
def test_hub_images_stay_encoded_and_a_corrupt_one_is_named(tmp_path: Path) -> None:
    import datasets

    image_folder(tmp_path / "i", {"a": 8, "b": 8})
    encoded = [(tmp_path / f"i/{c}/{n}.png").read_bytes() for c in "ab" for n in range(8)]
    encoded[2] = encoded[2][:30]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    rows = {"image": [{"bytes": one, "path": None} for one in encoded], "label": [0] * 8 + [1] * 8}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set/train.parquet")
    with pytest.raises(DataError, match=r"1 of 16 .*train\[2\]"):
        load(f"hf:{tmp_path / 'set'}", IMAGES)
    data = load(f"hf:{tmp_path / 'set'}", IMAGES, on_error="skip")
    assert isinstance(data["train"][0].content, bytes)
    assert sum(sizes(data).values()) == 15
    assert any("no @<revision>" in note for note in data.notes)


@pytest.mark.usefixtures("hub_cache")
def test_hub_hides_labels_behind_minus_one(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["x", "y"]))
    for split, labels in (("train", [0, 1] * 10), ("test", [-1] * 4)):
        rows = {"text": [f"{split} {n}" for n in range(len(labels))], "label": labels}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / f"set/{split}.parquet")
    with pytest.raises(DataError, match=r"4 of 24 .*test\[0\]: has no label \(-1\)"):
        load(f"hf:{tmp_path / 'set'}@main")
    data = load(f"hf:{tmp_path / 'set'}@main", on_error="skip")
    assert len(data["test"]) == 4
    assert any("no test split" in note for note in data.notes)


@pytest.mark.usefixtures("hub_cache")
def test_a_data_set_that_cannot_be_had_says_how_to_get_it() -> None:
    with pytest.raises(MissingCapabilityError, match="no-such-org/no-such-set.*HF_HOME"):
        load("hf:no-such-org/no-such-set@main")


# --- the script -----------------------------------------------------------------------------------------------------


def test_the_demo_script_makes_the_same_bytes_twice_and_says_what_it_lacks(tmp_path: Path) -> None:
    import gzip
    import struct

    script = Path(__file__).parents[2] / "scripts/make_demo_data.py"
    folder = tmp_path / "unpacked"
    folder.mkdir()
    run = [sys.executable, str(script), str(folder), "--wordnet", "topics", "--output"]
    lacking = subprocess.run([*run, str(tmp_path / "x")], capture_output=True, text=True, check=False)
    assert lacking.returncode == 1
    assert "both are needed: dataset-fashion-mnist and wordnet-base" in lacking.stderr
    generator = np.random.default_rng(0)
    for part, count in (("train", 2400), ("t10k", 2100)):
        images = generator.integers(0, 255, (count, 4, 4), dtype=np.uint8)
        header = struct.pack(">BBBB3I", 0, 0, 8, 3, count, 4, 4)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        values = (np.arange(count) % 10).astype(np.uint8)
        header = struct.pack(">BBBBI", 0, 0, 8, 1, count)
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    topics = ("04", "05", "06", "10", "13", "14", "15", "18", "20", "26", "03")
    lines = ["  1 a licence line | no gloss"]
    lines += [f'{n:08d} {topics[n % 11]} n 01 x 0 000 | the gloss {n} of it; "an example"  ' for n in range(4840)]
    (folder / "data.noun").write_text("\n".join(lines), encoding="latin-1")
    for package in ("dataset-fashion-mnist", "wordnet-base"):
        (folder / "doc" / package).mkdir(parents=True)
        (folder / "doc" / package / "copyright").write_text("terms", encoding="utf-8")
    for output in ("one", "two"):
        subprocess.run([*run, str(tmp_path / output)], check=True)
    one = {path.name: path.read_bytes() for path in (tmp_path / "one").rglob("*.*")}
    assert one == {path.name: path.read_bytes() for path in (tmp_path / "two").rglob("*.*")}
    rows = gzip.decompress(one["wordnet-topics.test.tsv.gz"]).decode().split("\n")[:-1]
    assert len(rows) == 2000
    assert not any("example" in row or "licence" in row for row in rows)


def test_nearest_gives_nothing_for_nothing_alike() -> None:
    assert nearest("lable", ["label", "text"]) == "label"
    assert nearest("qqq", ["label", "text"]) == ""


# --- labels of other kinds, two texts -----------------------------------------------------------------


def test_several_labels_from_a_table(tmp_path: Path) -> None:
    rows = [f"text {number},{('red;round', 'red', '', 'round')[number % 4]}" for number in range(60)]
    file = tmp_path / "many.csv"
    file.write_text("text,label\n" + "\n".join(rows), encoding="utf-8")
    data = load(file, "text-multilabel")
    assert data.labels == ("red", "round")
    found = {str(one.content): one.label for name in SPLITS for one in data[name]}
    assert len(found) == 60 and {found[f"text {number}"] for number in range(0, 60, 4)} == {(0, 1)}
    assert found["text 1"] == (0,) and found["text 2"] == () and found["text 3"] == (1,)
    # The rarest label of an example decides: every split has each label in proportion.
    for name in SPLITS:
        assert sum(0 in one.label for one in data[name]) / len(data[name]) == pytest.approx(0.5, abs=0.2)  # type: ignore[operator]


def test_several_labels_from_lists(tmp_path: Path) -> None:
    file = tmp_path / "many.jsonl"
    rows = [{"text": f"text {number}", "label": (["b", "a"], ["a"])[number % 2]} for number in range(40)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = load(file, "text-multilabel")
    assert {one.label for one in data["train"]} == {(0,), (0, 1)}
    with pytest.raises(DataError, match="'label' holds list; expected a name .* take a multilabel task"):
        load(file, TEXTS)


def test_numbers_from_a_table(tmp_path: Path) -> None:
    file = tmp_path / "numbers.csv"
    file.write_text("text,label\n" + "\n".join(f"text {n},{n / 4}" for n in range(40)), encoding="utf-8")
    data = load(file, "text-regression", validation_fraction=0.25)
    assert data.labels == ("value",) and sizes(data)["validation"] == 10
    assert {one.label for name in SPLITS for one in data[name]} == {n / 4 for n in range(40)}
    file.write_text("text,label\n" + "\n".join(f"text {n},{n}" for n in range(40)) + "\nlast,cheap", encoding="utf-8")
    with pytest.raises(DataError, match="line 42: 'label' holds 'cheap'; expected a number"):
        load(file, "text-regression")
    file.write_text("text,label\n" + "\n".join(f"text {n},1" for n in range(40)), encoding="utf-8")
    with pytest.raises(DataError, match=r"every example has the same label \(1\)"):
        load(file, "text-regression")


def test_the_name_of_a_folder_can_be_no_number(tmp_path: Path) -> None:
    image_folder(tmp_path, {"cheap": 3, "5": 3})
    with pytest.raises(DataError, match="the name of its folder holds 'cheap'; expected a number"):
        load(tmp_path, "image-regression")


def test_two_texts_from_a_table(tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    rows = [f"one {number},two {number},{'same' if number % 2 else 'other'}" for number in range(40)]
    file.write_text("text,second,label\n" + "\n".join(rows), encoding="utf-8")
    data = load(file, TEXTS, text_pair_column="second")
    assert all(isinstance(one.content, tuple) for one in data["train"])
    assert ("one 3", "two 3") in {one.content for name in SPLITS for one in data[name]}
    with pytest.raises(DataError, match="has no column 'secnd'.*did you mean 'second'.*data.text_pair_column"):
        load(file, TEXTS, text_pair_column="secnd")
    file.write_text("text,second,label\n" + "\n".join([*rows, "alone,,same"]), encoding="utf-8")
    with pytest.raises(DataError, match="line 42: 'second' is empty"):
        load(file, TEXTS, text_pair_column="second")
    # What is between the two belongs to neither: "ab" + "c" is another pair than "a" + "bc".
    assert digest_of_text(("ab", "c")) != digest_of_text(("a", "bc"))


@pytest.mark.parametrize(
    ("name", "task"),
    [("wordnet-senses", "text-multilabel"), ("wordnet-relations", TEXTS), ("wordnet-similarity", "text-regression")],
)
def test_the_other_demos_of_wordnet(name: str, task: str) -> None:
    data = load(f"demo:{name}", task)
    assert sizes(data) == {"train": 1200, "validation": 400, "calibration": 200, "test": 1000} and data.notes == ()
    texts = [text for split in SPLITS for one in data[split] for text in halves(one)]
    assert len(texts) - len(set(texts)) <= 12  # different synsets with the same definition


def halves(example: Example) -> tuple[str, ...]:
    """The texts of an example."""
    return example.content if isinstance(example.content, tuple) else (str(example.content),)


def test_the_grids_hold_their_garments() -> None:
    data = load("demo:fashion-mnist-grids", "image-multilabel")
    assert len(data.labels) == 10 and {len(one.label) for one in data["train"]} == {1, 2, 3}  # type: ignore[arg-type]
    for one in data["validation"][:50]:
        assert isinstance(one.content, np.ndarray) and one.content.shape == (56, 56)
        cells = one.content.reshape(2, 28, 2, 28).any(axis=(1, 3)).sum()
        assert len(one.label) <= cells <= 3  # type: ignore[arg-type]
    assert sizes(data)["test"] == pytest.approx(1000, abs=60)
    with pytest.raises(DataError, match="the label holds .*; expected a number"):
        load("demo:fashion-mnist-grids", "image-regression")


def test_a_picture_with_two_captions_stands_in_one_split_only(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = ["image,text"]
    for number in range(20):
        Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        rows += [f"{number}.png,first of {number}", f"{number}.png,second of {number}"]
    file = tmp_path / "captions.csv"
    file.write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(DataError, match="20 pairs have an image that another pair has: .*keep one text for each"):
        load(file, "image-text")
    data = load(file, "image-text", on_error="skip")
    assert sum(sizes(data).values()) == 20 and len(data.notes) >= 20
    assert all("first" in str(one.content[1]) for name in SPLITS for one in data[name])  # type: ignore[index]


@pytest.mark.parametrize(("scale", "shift"), [(50_000, 200_000), (1e-5, 0)])
def test_numbers_that_no_head_gets_to_are_refused(tmp_path: Path, scale: float, shift: float) -> None:
    file = tmp_path / "numbers.csv"
    numbers = (f"text {n},{shift + scale * (n % 7 - 3)}" for n in range(40))
    file.write_text("text,label\n" + "\n".join(numbers), encoding="utf-8")
    with pytest.raises(DataError, match="Subtract the mean and divide by the deviation"):
        load(file, "text-regression")


# --- names of labels --------------------------------------------------------------------------------


def test_labels_get_the_names_of_the_configuration(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", texts({"0": 10, "1": 10, "2": 10}))
    raw = load_data(DataConfig(source=str(file)), TEXTS)
    # 0 takes the name that 1 gives away.
    config = DataConfig.model_validate({"source": str(file), "label_names": {0: "1", 1: "coat"}})
    for task in (TEXTS, "text-features"):
        data = load_data(config, task)  # type: ignore[arg-type]
        assert data.labels == ("1", "2", "coat") and data.fingerprints != raw.fingerprints
        found = {(str(one.content)[0], data.labels[int(one.label)]) for name in SPLITS for one in data[name]}  # type: ignore[arg-type]
        assert found == {("0", "1"), ("1", "coat"), ("2", "2")}


def test_each_of_several_labels_gets_its_name(tmp_path: Path) -> None:
    rows = [(f"text {number}", ("a;b", "b", "c", "")[number % 4]) for number in range(40)]
    file = write_csv(tmp_path / "a.csv", rows)
    data = load_data(DataConfig(source=str(file), label_names={"a": "zebra"}), "text-multilabel")
    assert data.labels == ("b", "c", "zebra")
    assert {one.label for one in data["train"]} == {(0, 2), (0,), (1,), ()}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"shirts": "Shirt"}, r"has not: 'shirts' \(did you mean 'shirt'\?\); found 'coat', 'shirt'"),
        ({"shirt": "coat"}, "gives 'shirt' the name 'coat', which another label"),
    ],
)
def test_names_that_no_label_takes(names: dict[str, str], said: str, tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", texts({"shirt": 10, "coat": 10}))
    with pytest.raises(DataError, match=said):
        load_data(DataConfig(source=str(file), label_names=names), TEXTS)


@pytest.mark.parametrize(
    ("names", "said"), [({"a": "x", "b": "x"}, "'a' and 'b' the same name 'x'"), ({"a": " "}, "an empty name")]
)
def test_names_that_say_nothing(names: dict[str, str], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        DataConfig(source="a.csv", label_names=names)


@pytest.mark.parametrize("task", ["text-regression", "image-text"])
def test_numbers_and_texts_have_no_names(task: Any) -> None:
    with pytest.raises(ConfigError, match=f"labels of {task} are numbers or texts"):
        load_data(DataConfig(source="a.csv", label_names={"a": "x"}), task)


# --- slices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "hub"])
def test_test_examples_carry_the_columns_that_validate_parts_them_by(tmp_path: Path, kind: str) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [
        {"text": f"{label} number {number}", "label": label, "site": ["north", "south"][number % 2], "age": number % 3}
        for label in ("a", "b")
        for number in range(20)
    ]
    rows[0]["site"] = None
    if kind == "csv":
        file = write_csv(tmp_path / "a.csv", [list(row.values()) for row in rows], ("text", "label", "site", "age"))
    elif kind == "jsonl":
        file = tmp_path / "a.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        file = tmp_path / "set" / "a.parquet"
        file.parent.mkdir()
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    config = DataConfig(source=f"hf:{file.parent}" if kind == "hub" else str(file))
    plain, data = load_data(config, TEXTS), load_data(config, TEXTS, ("site", "age"))
    by_text = {row["text"]: (("site", row["site"] or "(none)"), ("age", str(row["age"]))) for row in rows}
    assert data["test"] and all(one.metadata == by_text[str(one.content)] for one in data["test"])
    assert not any(one.metadata for name in ("train", "validation", "calibration") for one in data[name])  # type: ignore[index]
    same = {name for name in SPLITS if plain.fingerprints[name] == data.fingerprints[name]}
    assert same == {"train", "validation", "calibration"}  # no stage before validate is made stale
    with pytest.raises(DataError, match=r"no column 'sight', which validate\.slices names; .*did you mean 'site'\?"):
        load_data(config, TEXTS, ("sight",))


def test_a_folder_and_a_demo_have_no_columns(tmp_path: Path) -> None:
    image_folder(tmp_path / "a", {"x": 4, "y": 4})
    for source, task in ((str(tmp_path / "a"), "image-classification"), ("demo:wordnet-topics", TEXTS)):
        with pytest.raises(ConfigError) as caught:
            load_data(DataConfig(source=source), task, ("site",))  # type: ignore[arg-type]
        assert caught.value.problems[0].place == "validate.slices"
