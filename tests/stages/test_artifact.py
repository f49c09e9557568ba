"""Digests, the manifest last, and one rename."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.errors import IntegrityError
from stages.artifact import (
    MANIFEST,
    SCHEMA_VERSION,
    commit_folder,
    digest_files,
    read_artifact,
    verify_files,
    write_json,
)


def commit(folder: Path, text: str = "one") -> Path:
    scratch, final = folder / "scratch", folder / "final"
    (scratch / "sub").mkdir(parents=True)
    (scratch / "sub/a.txt").write_text(text)
    commit_folder(scratch, final, {"schema_version": SCHEMA_VERSION, "files": digest_files(scratch)})
    return final


def test_commit_replaces_the_old_folder_whole(tmp_path: Path) -> None:
    first = read_artifact("x", commit(tmp_path))
    assert first is not None
    second = read_artifact("x", commit(tmp_path, "two"))
    assert second is not None
    assert second.digest != first.digest
    assert second.file("sub/a.txt").read_text() == "two"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final"]


@pytest.mark.parametrize(
    ("damage", "found"), [("change", "has changed"), ("add", "was added"), ("remove", "is missing")]
)
def test_verify_names_what_differs(tmp_path: Path, damage: str, found: str) -> None:
    final = commit(tmp_path)
    artifact = read_artifact("x", final)
    assert artifact is not None
    assert verify_files(artifact) == ""
    target = final / "sub/a.txt"
    if damage == "change":
        target.write_text("other")
    elif damage == "add":
        (final / "b.txt").write_text("smuggled")
    else:
        target.unlink()
    assert found in verify_files(artifact)


def test_a_link_is_no_part_of_an_artifact(tmp_path: Path) -> None:
    final = commit(tmp_path)
    artifact = read_artifact("x", final)
    assert artifact is not None
    (final / "link").symlink_to("/etc/hostname")
    assert "symbolic link" in verify_files(artifact)
    with pytest.raises(IntegrityError):
        artifact.file("../scratch")


def test_a_torn_or_foreign_manifest_is_no_artifact(tmp_path: Path) -> None:
    final = commit(tmp_path)
    text = (final / MANIFEST).read_text()
    (final / MANIFEST).write_text(text[: len(text) // 2])
    assert read_artifact("x", final) is None
    (final / MANIFEST).write_text(json.dumps({"schema_version": 99, "files": {}}))
    assert read_artifact("x", final) is None


def test_write_json_keeps_the_old_file_when_the_value_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="nan|JSON"):
        write_json(file, {"a": float("nan")})
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]
