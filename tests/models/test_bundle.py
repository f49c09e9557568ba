"""A bundle is opened closed-world, verifies on its own evidence, and predicts what the pipeline predicts."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.bundle import (
    BUNDLE_FILE,
    check_name,
    check_spelling,
    open_bundle,
    sha256_of,
)
from models.errors import ConfigError, DataError, IntegrityError, RuntimeInferenceError
from models.spec import TaskName
from models.tasks.single_label import probabilities_from_logits
from tests.stages.chain import packed, test_split

TASKS: tuple[TaskName, ...] = ("image-classification", "text-classification", "audio-classification")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of an image bundle, to be broken."""
    return Path(shutil.copytree(packed() / "bundle", tmp_path / "bundle"))


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change `bundle.json`, whose own digest nothing holds."""
    path = bundle / BUNDLE_FILE
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def replace_array(bundle: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace a golden array together with its digest: damage that only running the network shows."""
    file = f"golden/{name}.npy"
    np.save(bundle / file, change(np.load(bundle / file)))
    edit_manifest(bundle, lambda manifest: manifest["files"].update({file: sha256_of(bundle / file)}))


def failed_checks(bundle: Path) -> list[str]:
    with open_bundle(bundle) as opened:
        report = opened.verify()
    assert report.ok == (not [one for one in report.checks if not one.ok])
    return [one.name for one in report.checks if not one.ok]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("form", ["bundle", "tiny.tar"])
def test_a_good_bundle_verifies(task: TaskName, form: str) -> None:
    with open_bundle(packed(task) / form) as opened:
        report = opened.verify()
        folder = opened.folder
    names = [check.name for check in report.checks]
    assert report.ok, report
    assert names[:2] == ["digests", "golden preprocessing"]
    assert len(names) == 2 + len(opened.manifest["models"]) >= 4
    assert folder.exists() == (form == "bundle")  # what a tar was unpacked to is gone


def test_a_folder_and_its_tar_are_the_same_bundle() -> None:
    with open_bundle(packed() / "bundle") as folder, open_bundle(packed() / "tiny.tar") as tar:
        assert folder.digest == tar.digest and len(folder.digest) == 64


@pytest.mark.parametrize("task", TASKS)
def test_predictions_are_those_of_the_network(task: TaskName) -> None:
    """The same examples by the pipeline's own way: its preprocessing, its session, its batch."""
    from models.checkpoint import load_checkpoint
    from models.runtimes.onnxruntime_session import OnnxRuntimeSession
    from tests.stages.chain import made, validated

    contents = [one.content for one in test_split(task)][:10]
    evidence = json.loads(validated(task)["validate"].file("evidence.json").read_text())
    entry = next(one for one in evidence["candidates"] if one["name"] == evidence["chosen"])
    checkpoint = load_checkpoint(made(task)["merge-lora"].folder / "checkpoint")
    with OnnxRuntimeSession(made(task)[entry["stage"]].file(entry["file"])) as session:
        logits = session.infer(checkpoint.processing.arrays(contents))["logits"]
    with open_bundle(packed(task) / "bundle") as opened:
        found = opened.predict(contents)
    assert [one.label for one in found] == [checkpoint.spec.labels[index] for index in logits.argmax(1)]
    probabilities = np.array([list(one.probabilities.values()) for one in found])
    np.testing.assert_allclose(probabilities, probabilities_from_logits(logits), rtol=1e-12)
    np.testing.assert_allclose(probabilities.sum(1), 1)


def test_what_is_no_image_is_named() -> None:
    with open_bundle(packed() / "bundle") as opened, pytest.raises(DataError, match=r"nowhere\.png"):
        opened.predict([Path("nowhere.png")])


def test_nothing_there_is_a_usage_error_and_no_bundle_an_integrity_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        open_bundle(tmp_path / "nothing")
    with pytest.raises(IntegrityError, match="is no bundle"):
        open_bundle(tmp_path)


# --- files ------------------------------------------------------------------------------------------


def test_a_changed_file_is_named(bundle: Path) -> None:
    model = bundle / "model/model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model/model\.onnx in the bundle has changed"):
        open_bundle(bundle)


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "evidence/evidence.json").unlink()
    with pytest.raises(IntegrityError, match=r"evidence/evidence\.json is missing"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["extra.txt", ".git/config", "golden/.hidden"])
def test_an_added_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_text("smuggled")
    with pytest.raises(IntegrityError, match="was added"):
        open_bundle(bundle)


def test_links_and_pipes_are_refused(bundle: Path, tmp_path: Path) -> None:
    card = bundle / "README.md"
    card.rename(tmp_path / "README.md")
    card.symlink_to(tmp_path / "README.md")  # the content is right, the file is not the bundle's
    with pytest.raises(IntegrityError, match="link or a device"):
        open_bundle(bundle)
    card.unlink()
    os.mkfifo(card)
    with pytest.raises(IntegrityError, match="link or a device"):
        open_bundle(bundle)


def test_a_swap_after_opening_is_seen_by_verify(bundle: Path) -> None:
    with open_bundle(bundle) as opened:
        (bundle / "README.md").write_text("another card")
        report = opened.verify()
    assert [(check.name, check.ok) for check in report.checks] == [("digests", False)]


# --- bundle.json ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.update(schema_version=99), "schema version 99; this program reads 2"),
        (lambda manifest: manifest.pop("files"), "lacks the key 'files'"),
        (lambda manifest: manifest.update(files=[]), "not of the expected shape"),
        (lambda manifest: manifest["files"].update({"../out": "0" * 64}), "unsafe path"),
        (lambda manifest: manifest["files"].update({"/etc/passwd": "0" * 64}), "unsafe path"),
        (lambda manifest: manifest["files"].update({"readme.md": "0" * 64}), "one path on some systems"),
        (lambda manifest: manifest.update(chosen="another"), "is not among its models"),
        (lambda manifest: manifest.update(labels=["a", "a", "b"]), "not unique"),
        (lambda manifest: manifest.update(labels=[]), "the labels are none"),
        (lambda manifest: manifest["models"][manifest["chosen"]].update(file="../m.onnx"), "not among its files"),
        (lambda manifest: manifest["io"].pop("inputs"), "lacks the key 'inputs'"),
        (lambda manifest: manifest["processing"].pop("size"), "lacks the key 'size'"),
    ],
)  # fmt: skip
def test_a_manifest_of_the_wrong_shape(bundle: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit_manifest(bundle, change)
    with pytest.raises(IntegrityError, match=message):
        open_bundle(bundle)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b"[" * 100_000, b'{"files": {}, "files": {}}'])
def test_a_manifest_that_is_no_manifest(bundle: Path, content: bytes) -> None:
    (bundle / BUNDLE_FILE).write_bytes(content)
    with pytest.raises(IntegrityError):
        open_bundle(bundle)


# --- evidence ---------------------------------------------------------------------------------------


def chosen_outputs(bundle: Path) -> str:
    manifest = json.loads((bundle / BUNDLE_FILE).read_text())
    return str(manifest["models"][manifest["chosen"]]["golden_outputs"])


@pytest.mark.parametrize("change", [lambda logits: logits[:, ::-1], lambda logits: logits * np.nan,
                                    lambda logits: logits[:0], lambda logits: logits / 2])  # fmt: skip
def test_outputs_that_are_not_the_golden_ones_fail(bundle: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    name = chosen_outputs(bundle)
    replace_array(bundle, name, change)
    assert failed_checks(bundle) == [f"golden outputs of {name.removeprefix('outputs-')}"]


@pytest.mark.parametrize("change", [lambda image: image[..., ::-1], lambda image: image.astype(np.int16),
                                    lambda image: image[:, :-1]])  # fmt: skip
def test_another_preprocessing_fails(bundle: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    replace_array(bundle, "image", change)
    assert "golden preprocessing" in failed_checks(bundle)


def test_a_pixel_rounded_another_way_passes_and_another_resize_fails(bundle: Path) -> None:
    replace_array(bundle, "image", lambda image: image - (image > 2).astype(np.uint8) * 2)
    with open_bundle(bundle) as opened:
        check = opened.verify().checks[1]
    assert check.ok and "by 2 of 255 at most" in check.message
    edit_manifest(bundle, lambda manifest: manifest["processing"].update(fit="squash"))
    assert "golden preprocessing" in failed_checks(bundle)


def test_another_network_fails(bundle: Path) -> None:
    """Digests can be written again by whoever swaps the file; the golden outputs were made by the right one."""
    import onnx
    from onnx import numpy_helper

    path = bundle / "model/model.onnx"
    model = onnx.load(path)
    bias = next(one for one in model.graph.initializer if one.name.endswith("task_head.bias"))
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias)[::-1].copy() + 1, bias.name))
    onnx.save(model, path)
    edit_manifest(bundle, lambda manifest: manifest["files"].update({"model/model.onnx": sha256_of(path)}))
    with open_bundle(bundle) as opened:
        chosen = opened.chosen
    assert failed_checks(bundle) == [f"golden outputs of {chosen}"]


def test_pickled_arrays_are_refused(bundle: Path) -> None:
    name = f"golden/{chosen_outputs(bundle)}.npy"
    np.save(bundle / name, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    edit_manifest(bundle, lambda manifest: manifest["files"].update({name: sha256_of(bundle / name)}))
    with open_bundle(bundle) as opened, pytest.raises(IntegrityError, match="is no array"):
        opened.verify()


def test_another_number_of_labels_is_an_error(bundle: Path) -> None:
    edit_manifest(bundle, lambda manifest: manifest["labels"].append("z"))
    with open_bundle(bundle) as opened, pytest.raises(RuntimeInferenceError, match=r"expected \(1, 4\)"):
        opened.predict([np.zeros((32, 32, 3), np.uint8)])


# --- tar --------------------------------------------------------------------------------------------


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    """The good tar with members added at its end."""
    shutil.copyfile(packed() / "tiny.tar", path)
    with tarfile.open(path, "a") as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (member("../outside"), "unsafe path"),
        (member("/tmp/outside"), "unsafe path"),
        (member("tiny/a\\b"), "unsafe path"),
        (member("tiny/link", tarfile.SYMTYPE, "/etc/passwd"), "no plain file"),
        (member("tiny/link", tarfile.LNKTYPE, "tiny/README.md"), "no plain file"),
        (member("tiny/pipe", tarfile.FIFOTYPE), "no plain file"),
        (member("tiny/README.md"), "one path on some systems"),
        (member("tiny/readme.MD"), "one path on some systems"),
        (member("tiny/README.md/inside"), "one path on some systems"),
        (member("tiny/added"), "was added"),
    ],
)
def test_a_hostile_member_is_refused(tmp_path: Path, info: tarfile.TarInfo, message: str) -> None:
    with pytest.raises(IntegrityError, match=message):
        open_bundle(tar_of(tmp_path / "hostile.tar", (info, b"")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hostile.tar"]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_tar_that_is_cut_off(tmp_path: Path, share: float) -> None:
    data = (packed() / "tiny.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(IntegrityError):
        open_bundle(tmp_path / "cut.tar")


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_what_is_no_tar(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "no.tar").write_bytes(content)
    with pytest.raises(IntegrityError):
        open_bundle(tmp_path / "no.tar")


def test_a_compressed_tar_and_bytes_behind_the_end_are_refused(tmp_path: Path) -> None:
    import gzip

    data = (packed() / "tiny.tar").read_bytes()
    (tmp_path / "zipped.tar").write_bytes(gzip.compress(data))
    with pytest.raises(IntegrityError):
        open_bundle(tmp_path / "zipped.tar")
    (tmp_path / "longer.tar").write_bytes(data + b"behind the end")
    with pytest.raises(IntegrityError, match="behind the end"):
        open_bundle(tmp_path / "longer.tar")


@pytest.mark.parametrize("name", ["a", "a/b.c", "ünï/código"])
def test_plain_names_are_allowed(name: str) -> None:
    check_name(name)


def test_unicode_forms_of_one_name_collide() -> None:
    seen: dict[str, str] = {}
    check_spelling("caf\u00e9", seen)
    with pytest.raises(IntegrityError, match="one path on some systems"):
        check_spelling("cafe\u0301", seen)


@pytest.mark.parametrize(("shift", "ok"), [(0.5, True), (2.0, False), (float("nan"), False)])
def test_spectrograms_may_be_rounded_another_way_but_not_more(tmp_path: Path, shift: float, ok: bool) -> None:
    from models.bundle import FEATURE_TOLERANCE

    bundle = Path(shutil.copytree(packed("audio-classification") / "bundle", tmp_path / "bundle"))
    replace_array(bundle, "log_mel", lambda array: array + np.float32(shift * FEATURE_TOLERANCE))
    with open_bundle(bundle) as opened:
        check = next(one for one in opened.verify().checks if one.name == "golden preprocessing")
    assert check.ok == ok and "values of log_mel differ" in check.message
