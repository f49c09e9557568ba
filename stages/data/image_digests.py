"""The digest of an image's decoded pixels, so that a picture saved again in another format is the same picture.

Decoding takes about 2 ms an image and hashing its file about 0.05 ms, so what was decoded once is remembered in a
file of the user's cache folder: SHA-256 of the file's bytes → SHA-256 of its pixels. The memory is keyed by what
decides how pixels come out (Pillow's version and the size limit). It only saves time: losing it, or not being able
to write it, changes no result.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from models.modalities.vision import MAX_PIXELS, decode_image
from stages.environment import user_cache

if TYPE_CHECKING:
    from PIL import Image

    from models.modalities import Content

MAX_BYTES = 128 << 20
"""A memory larger than this (a million images) is begun anew."""


class ImageDigests:
    """Digests of decoded images. Call `save` once at the end."""

    def __init__(self) -> None:
        self.file = memory_file()
        self.known = read_memory(self.file)
        self.new: list[str] = []

    def digest(self, content: Content) -> str:
        """SHA-256 over the size and the RGB pixels of a path, of encoded bytes or of an array.

        Raises:
            OSError: the file cannot be read.
            DataError: it is no image.
        """
        data = content.read_bytes() if isinstance(content, Path) else content
        if not isinstance(data, bytes):
            return digest_of_pixels(decode_image(data))
        key = hashlib.sha256(data).hexdigest()
        if key not in self.known:
            # From the path where there is one, so that an error names it.
            self.known[key] = digest_of_pixels(decode_image(content))
            self.new.append(f"{key} {self.known[key]}")
        return self.known[key]

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


def digest_of_pixels(image: Image.Image) -> str:
    """SHA-256 over width, height and RGB bytes."""
    digest = hashlib.sha256(f"{image.width} {image.height} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def memory_file() -> Path:
    """`$XDG_CACHE_HOME/adapt-to-edge/image-digests-…txt`."""
    from PIL import __version__ as pillow

    return user_cache() / f"image-digests-pillow-{pillow}-{MAX_PIXELS}.txt"


def read_memory(file: Path) -> dict[str, str]:
    """The pairs in a memory; a torn line is left out."""
    try:
        lines = file.read_text(encoding="ascii", errors="replace").split("\n")
    except OSError:
        return {}
    pairs = [line.split() for line in lines]
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2 and all(len(part) == 64 for part in pair)}
