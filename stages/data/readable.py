"""Remembers which images could be decoded, by content, so that a plan need not decode them all again.

The memory is a file in the user's cache folder, keyed by the SHA-256 of the content and by what decides
the verdict (Pillow's version and the size limit). It only saves time: losing it, or not being able to
write it, changes no result. Decoding takes about 2 ms an image, hashing about 0.05 ms.
"""

from __future__ import annotations

import os
from pathlib import Path

from models.modalities.vision import MAX_PIXELS

MAX_BYTES = 64 << 20
"""A memory larger than this (a million images) is begun anew."""


class ReadableImages:
    """Digests of images that were decoded before. Call `save` once at the end."""

    def __init__(self) -> None:
        self.file = memory_file()
        self.known = read_digests(self.file)
        self.new: list[str] = []

    def __contains__(self, digest: str) -> bool:
        return digest in self.known

    def add(self, digest: str) -> None:
        """Remember a digest whose content could be decoded."""
        self.known.add(digest)
        self.new.append(digest)

    def save(self) -> None:
        """Append what is new. One write of whole lines, so runs side by side do not tear each other's."""
        if not self.new:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if self.file.exists() and self.file.stat().st_size > MAX_BYTES:
                self.file.unlink()
            with self.file.open("ab", buffering=0) as stream:
                stream.write(("\n" + "\n".join(self.new) + "\n").encode())
        except OSError:
            pass  # a read-only home or a full disk: the next plan decodes again


def memory_file() -> Path:
    """`$XDG_CACHE_HOME/adapt-to-edge/readable-…txt`."""
    from PIL import __version__ as pillow

    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return cache / "adapt-to-edge" / f"readable-images-pillow-{pillow}-{MAX_PIXELS}.txt"


def read_digests(file: Path) -> set[str]:
    """The digests in a memory; a torn line matches no content and so does no harm."""
    try:
        return set(file.read_text(encoding="ascii", errors="replace").split())
    except OSError:
        return set()
