"""Images: decode, resize and crop with Pillow outside the network; cast, normalise and layout happen inside it.

Resizing stays outside because TensorRT ignores or rejects an antialiased Resize; normalisation goes
inside so that no caller can get mean and std wrong (docs/decisions).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from models.errors import DataError, ModelError
from models.spec import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from models.modalities import Content

MAX_PIXELS = 64_000_000
"""Larger images are refused before they are decoded (decompression bombs)."""


SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif", "TIFF": ".tif"}
"""Pillow's names of formats → endings."""

Interpolation = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
"""Pillow's filters; the same filter of another library is another image."""


@dataclass(frozen=True)
class ImageProcessing:
    """Make an image `size` × `size` pixels.

    `fit` is `crop` (resize the shorter side to `resize` pixels, then crop the centre) or `squash` (resize
    both sides, whatever that does to the proportions).
    """

    size: int
    resize: int
    interpolation: Interpolation = "bicubic"
    fit: Literal["crop", "squash"] = "crop"
    kind: ClassVar[str] = "image"

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """`image`: uint8 (batch, height, width, 3), RGB."""
        return (TensorSpec("image", "uint8", ("batch", self.size, self.size, 3)),)

    def arrays(self, contents: Sequence[Content]) -> dict[str, np.ndarray]:
        """`image`: uint8 (batch, size, size, 3). Raises `DataError` for what is no image."""
        import numpy as np

        pixels = [self.pixels(content) for content in contents]
        return {"image": np.stack(pixels) if pixels else np.zeros((0, self.size, self.size, 3), np.uint8)}

    def pixels(self, content: Content) -> np.ndarray:
        """One image as uint8 (size, size, 3)."""
        import numpy as np
        from PIL import Image

        image = decode_image(content)
        method = Image.Resampling[self.interpolation.upper()]
        if self.fit == "squash":
            return np.asarray(image.resize((self.size, self.size), method), dtype=np.uint8)
        # Rounded as torchvision does, whose Resize and CenterCrop most pretrained weights have seen.
        shorter = min(image.size)
        width, height = (max(self.size, self.resize * side // shorter) for side in image.size)
        if width * height > MAX_PIXELS:
            raise DataError(
                f"an image of {image.width} × {image.height} pixels is too long and thin: at {self.resize} pixels on "
                f"its shorter side it has {width} × {height}; crop or remove it"
            )
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        image = image.resize((width, height), method).crop((left, top, left + self.size, top + self.size))
        return np.asarray(image, dtype=np.uint8)

    def count_truncated(self, contents: Sequence[Content]) -> int:
        """None: images are made smaller, not cut to a length."""
        return 0

    def examples(self) -> list[Content]:
        """Two made-up contents: black."""
        import numpy as np

        return [np.zeros((32, 32, 3), np.uint8)] * 2

    def extremes(self, contents: Sequence[Content]) -> list[list[Content]]:
        """None: every image becomes one of the declared size."""
        return []

    def to_file(self, content: Content) -> tuple[str, bytes]:
        """The ending and the bytes of a file that holds the image; pixels become a PNG."""
        from PIL import Image

        if isinstance(content, bytes | str | Path):
            data = content if isinstance(content, bytes) else Path(content).read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                return SUFFIXES.get(image.format or "", ".image"), data
        stream = io.BytesIO()
        decode_image(content).save(stream, format="PNG")
        return ".png", stream.getvalue()

    def from_file(self, data: bytes) -> Content:
        """The content of such a file."""
        return data

    def from_argument(self, argument: str) -> Content:
        """A path."""
        return Path(argument)

    def save(self, folder: Path) -> dict[str, Any]:
        """The declarative form; images need no files."""
        return {"kind": self.kind, **asdict(self)}

    @classmethod
    def from_dict(cls, value: dict[str, Any], folder: Path) -> ImageProcessing:
        """The inverse of `save`. Raises `ModelError` for values of another version."""
        known = get_args(Interpolation)
        if value["interpolation"] not in known or value["fit"] not in ("crop", "squash"):
            found = f"{value['interpolation']!r} and {value['fit']!r}"
            raise ModelError(f"the preprocessing asks for {found}; expected one of {', '.join(known)}; crop or squash")
        return cls(int(value["size"]), int(value["resize"]), value["interpolation"], value["fit"])


def decode_image(content: Content) -> Image.Image:
    """A path, encoded bytes or uint8 pixels as an RGB image, upright, transparent parts on white.

    Raises:
        DataError: it is no image, one of more than 8 bits a channel, or a larger one than `MAX_PIXELS`.
    """
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(content, np.ndarray):
        if content.dtype != np.uint8 or not (content.ndim == 2 or (content.ndim == 3 and content.shape[2] == 3)):
            found = f"{content.dtype} {content.shape}"
            raise DataError(f"pixels: found {found}, expected uint8 (height, width) or (height, width, 3)")
        return Image.fromarray(content).convert("RGB")
    if not isinstance(content, str | bytes | Path):
        raise DataError(f"expected an image, found {type(content).__name__}")
    name = str(content) if isinstance(content, str | Path) else f"{len(content)} encoded bytes"
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{name}: {image.width} × {image.height} pixels are above the limit of {MAX_PIXELS}")
            if image.mode.startswith(("I", "F")):
                # Pillow would clip them to 255: a 16-bit photograph becomes white.
                raise DataError(f"{name}: has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
            ImageOps.exif_transpose(image, in_place=True)
            return on_white(image) if image.has_transparency_data else image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: is no image that can be read ({error}); replace or remove it") from error


def digest_of_image(content: Content) -> str:
    """SHA-256 over width, height and RGB bytes of the decoded image. Raises `DataError`."""
    image = decode_image(content)
    digest = hashlib.sha256(f"{image.width} {image.height} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def image_decoder() -> str:
    """What decides how pixels come out, for a memory of digests."""
    from PIL import __version__ as pillow

    return f"pillow-{pillow}-{MAX_PIXELS}"


def on_white(image: Image.Image) -> Image.Image:
    """An image with transparent parts as it looks on white paper: what their pixels hide is at random."""
    from PIL import Image

    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")
