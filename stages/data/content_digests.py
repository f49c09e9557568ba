"""Digests of decoded contents, so that a picture or a recording saved again in another format is the same one.

Decoding takes about 2 ms an image and hashing its file about 0.05 ms, so what was decoded once is remembered in a
file of the user's cache folder: SHA-256 of the file's bytes → SHA-256 of its pixels or samples. The memory is keyed by
what decides how they come out (the decoder's version, the size limit). It only saves time: losing it, or not being
able to write it, changes no result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from models.modalities.audio import audio_decoder, digest_of_audio
from models.modalities.vision import digest_of_image, image_decoder
from stages.data.splits import digest_of_text
from stages.environment import user_cache

if TYPE_CHECKING:
    from models.modalities import Content

DECODERS: dict[str, tuple[Callable[[Content], str], Callable[[], str]]] = {
    "image": (digest_of_image, image_decoder),
    "audio": (digest_of_audio, audio_decoder),
}
"""Modality → how a content is decoded and digested, and what decides the result."""

MAX_BYTES = 128 << 20
"""A memory larger than this (a million contents) is begun anew."""


class ContentDigests:
    """Digests of decoded images or recordings, and of pairs of an image and a text. Call `save` once at the end."""

    def __init__(self, modality: str) -> None:
        modality = modality.partition("-")[0]
        self.digest_of, decoder = DECODERS[modality]
        self.file = user_cache() / f"{modality}-digests-{decoder()}.txt"
        self.known = read_memory(self.file)
        self.new: list[str] = []

    def digest(self, content: Content) -> str:
        """SHA-256 of what a path, encoded bytes or an array decodes to.

        Raises:
            OSError: the file cannot be read.
            DataError: it is none of its modality.
        """
        if isinstance(content, tuple):
            image, text = content
            return digest_of_text((self.digest(image), text))
        data = content.read_bytes() if isinstance(content, Path) else content
        if not isinstance(data, bytes):
            return self.digest_of(data)
        key = hashlib.sha256(data).hexdigest()
        if key not in self.known:
            # From the path where there is one, so that an error names it.
            self.known[key] = self.digest_of(content)
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


def read_memory(file: Path) -> dict[str, str]:
    """The pairs in a memory; a torn line is left out."""
    try:
        lines = file.read_text(encoding="ascii", errors="replace").split("\n")
    except OSError:
        return {}
    pairs = [line.split() for line in lines]
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2 and all(len(part) == 64 for part in pair)}
