"""Artifacts on disk: a folder whose `manifest.json` is written last and lists every file's SHA-256.

A folder appears under its final name by one rename (`commit_folder`), so a reader sees the whole
artifact or none of it, also after `kill -9` or on a full disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import IntegrityError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 3


@dataclass(frozen=True)
class Artifact:
    """A committed stage folder and its manifest. Never changed by a consumer."""

    stage: str
    folder: Path
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 over the names and digests of all files: the identity that consumers depend on."""
        return digest_of(self.manifest["files"])

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists.

        Raises:
            IntegrityError: the manifest does not list it.
        """
        if name not in self.manifest["files"]:
            raise IntegrityError(
                f"{self.folder}: the manifest lists no file {name!r}; run the stage again with --force"
            )
        return self.folder / name


DROPPINGS = (".DS_Store", "Thumbs.db", "desktop.ini")
"""Files that file managers leave in a folder by looking at it."""


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file as hex, read in 1 MiB blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value in its canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_files(folder: Path) -> dict[str, str]:
    """Relative POSIX path → SHA-256 for every file below `folder` but the manifest and `DROPPINGS`.

    Raises:
        IntegrityError: a symbolic link stands in the folder.
    """
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise IntegrityError(f"{path} is a symbolic link; an artifact holds plain files only")
        if path.is_file() and path != folder / MANIFEST and path.name not in DROPPINGS:
            digests[path.relative_to(folder).as_posix()] = sha256_of_file(path)
    return digests


def read_artifact(stage: str, folder: Path) -> Artifact | None:
    """The artifact in `folder`, or None where there is no readable manifest (an unfinished stage)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION or "files" not in manifest:
        return None
    return Artifact(stage, folder, manifest)


def verify_files(artifact: Artifact) -> str:
    """Empty when every file has its digest; otherwise what differs, in words."""
    try:
        found = digest_files(artifact.folder)
    except IntegrityError as error:
        return str(error)
    recorded = artifact.manifest["files"]
    for name in sorted(recorded.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in recorded:
            return f"{name} was added"
        if found[name] != recorded[name]:
            return f"{name} has changed"
    return ""


def unchanged_files(artifact: Artifact, names: Iterable[str]) -> dict[str, str]:
    """The digests of some of its files, as they are now.

    Raises:
        IntegrityError: one is not as its stage recorded it.
    """
    files = {name: sha256_of_file(artifact.file(name)) for name in names}
    for name, digest in files.items():
        if digest != artifact.manifest["files"][name]:
            raise IntegrityError(
                f"{artifact.folder / name} has changed since {artifact.stage} wrote it; run {artifact.stage} again"
            )
    return files


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a torn one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=2, ensure_ascii=False, allow_nan=False)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def commit_folder(scratch: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest into `scratch`, flush everything, and rename it to `final`."""
    write_json(scratch / MANIFEST, manifest)
    for path in (*scratch.rglob("*"), scratch):
        flush(path)
    retired = scratch.with_name(f"{scratch.name}.retired")
    shutil.rmtree(retired, ignore_errors=True)
    if final.exists():
        os.rename(final, retired)
    os.rename(scratch, final)
    flush(final.parent)  # the rename itself must survive a power cut, not only the files
    shutil.rmtree(retired, ignore_errors=True)


def flush(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
