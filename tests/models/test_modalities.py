"""Preprocessing of images and texts."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.errors import DataError, ModelError
from models.modalities import processing_from_dict
from models.modalities.text import TextProcessing, tokenizer_json_of
from models.modalities.vision import ImageProcessing
from tests.models.tiny import png, tokenizer_json

CLS, SEP, GOOD, BIRD, PAD = 2, 3, 5, 8, 0


def test_image_declares_what_it_gives() -> None:
    processing = ImageProcessing(size=24, resize=27)
    arrays = processing.arrays([png(60, 40), np.zeros((30, 30, 3), np.uint8)])
    (tensor,) = processing.inputs
    assert (tensor.name, tensor.dtype, tensor.dims) == ("image", "uint8", ("batch", 24, 24, 3))
    assert arrays["image"].shape == (2, 24, 24, 3)
    assert arrays["image"].dtype == np.uint8
    assert (arrays["image"][0, 12, 12] == (200, 30, 60)).all()


def test_image_crops_the_centre_of_the_longer_side() -> None:
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255
    pixels = ImageProcessing(size=32, resize=32).arrays([wide])["image"][0]
    assert (pixels == 255).all()
    tall = ImageProcessing(size=32, resize=32).arrays([wide.transpose(1, 0, 2)])["image"][0]
    assert (tall == 255).all()


@pytest.mark.parametrize("shape", [(7, 500, 3), (1, 1, 3), (33, 31, 3), (500, 3, 3)])
def test_image_of_any_shape_gets_the_declared_size(shape: tuple[int, ...]) -> None:
    for processing in (ImageProcessing(32, 32), ImageProcessing(32, 37, "bilinear"), ImageProcessing(224, 256)):
        pixels = processing.arrays([np.full(shape, 9, np.uint8)])["image"]
        assert pixels.shape == (1, processing.size, processing.size, 3)
        assert (pixels == 9).all()


def test_interpolation_is_used() -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    bicubic, bilinear = (ImageProcessing(20, 20, name).arrays([image])["image"] for name in ("bicubic", "bilinear"))
    assert (bicubic != bilinear).any()


def test_image_from_path_bytes_and_grey_pixels_agree(tmp_path: Path) -> None:
    file = tmp_path / "grey.png"
    file.write_bytes(png(40, 40, (77, 77, 77)))
    contents = [file, str(file), file.read_bytes(), np.full((40, 40), 77, np.uint8)]
    pixels = ImageProcessing(16, 16).arrays(contents)["image"]
    assert (pixels == 77).all()


def test_no_images_give_an_empty_batch() -> None:
    assert ImageProcessing(16, 16).arrays([])["image"].shape == (0, 16, 16, 3)


def test_corrupt_image_is_named(tmp_path: Path) -> None:
    good, cut = tmp_path / "good.png", tmp_path / "cut.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(good)
    cut.write_bytes(good.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"cut\.png"):
        ImageProcessing(16, 16).arrays([good, cut])
    with pytest.raises(DataError, match="12 encoded bytes"):
        ImageProcessing(16, 16).arrays([b"not an image"])
    with pytest.raises(DataError, match=r"missing\.png"):
        ImageProcessing(16, 16).arrays([tmp_path / "missing.png"])


def test_huge_image_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.modalities.vision.MAX_PIXELS", 99)
    with pytest.raises(DataError, match="10 × 10 pixels are above the limit of 99"):
        ImageProcessing(16, 16).arrays([png(10, 10)])


def test_another_filter_is_off_by_more_than_verify_allows() -> None:
    from models.bundle import PIXEL_TOLERANCE

    smooth = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    bicubic, bilinear = (ImageProcessing(32, 32, one).pixels(smooth).astype(int) for one in ("bicubic", "bilinear"))  # type: ignore[arg-type]
    assert np.abs(bicubic - bilinear).max() > 5 * PIXEL_TOLERANCE


def test_a_long_thin_image_is_refused_before_it_is_resized() -> None:
    """1 × 60,000 pixels, its shorter side resized to 256, would be 3.9 billion pixels."""
    with pytest.raises(DataError, match="too long and thin"):
        ImageProcessing(224, 256).arrays([np.zeros((60_000, 1, 3), np.uint8)])


@pytest.mark.parametrize("mode", ["I", "I;16", "F"])
def test_more_than_eight_bits_are_refused(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("deep.png" if mode == "I;16" else "deep.tif")
    Image.new(mode, (4, 4), 30_000).save(path)
    with pytest.raises(DataError, match=r"deep\.\w+: has more than 8 bits a channel"):
        ImageProcessing(4, 4).arrays([path])


def test_photographs_stand_upright(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0, :, 0] = 255  # a red line on top
    exif = Image.Exif()
    exif[0x0112] = 3  # held upside down
    Image.fromarray(pixels[::-1, ::-1].copy()).save(tmp_path / "photo.png", exif=exif)
    found = ImageProcessing(4, 4).arrays([tmp_path / "photo.png"])["image"][0]
    np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white_whatever_they_hide(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0)).convert(mode)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    assert (ImageProcessing(4, 4).arrays([stream.getvalue()])["image"] == 255).all()


@pytest.mark.parametrize("pixels", [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 4), np.uint8), np.zeros(8)])
def test_pixels_of_another_kind_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(DataError, match="expected uint8"):
        ImageProcessing(8, 8).arrays([pixels])


def test_text_declares_what_it_gives() -> None:
    processing = TextProcessing(tokenizer_json(), max_length=16)
    arrays = processing.arrays(["good bird", "bird"])
    assert [(one.name, one.dtype, one.dims) for one in processing.inputs] == [
        ("input_ids", "int64", ("batch", "sequence")),
        ("attention_mask", "int64", ("batch", "sequence")),
    ]
    assert arrays["input_ids"].tolist() == [[CLS, GOOD, BIRD, SEP], [CLS, BIRD, SEP, PAD]]
    assert arrays["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.int64)}


def test_text_is_truncated_with_its_frame_kept() -> None:
    ids = TextProcessing(tokenizer_json(), max_length=4).arrays(["good good good bird"])["input_ids"]
    assert ids.tolist() == [[CLS, GOOD, GOOD, SEP]]


def test_text_own_padding_of_a_tokenizer_file_is_dropped() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json())
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(3)
    plain = TextProcessing(tokenizer_json_of(tokenizer.to_str()), max_length=16)
    assert plain.arrays(["good bird"])["input_ids"].tolist() == [[CLS, GOOD, BIRD, SEP]]


def test_what_is_no_text_is_refused() -> None:
    processing = TextProcessing(tokenizer_json(), 16)
    with pytest.raises(DataError, match="found bytes"):
        processing.arrays(["good", b"bad"])
    with pytest.raises(DataError, match="no valid Unicode"):
        processing.arrays(["good", "\ud800"])


def test_broken_tokenizer_is_a_model_error() -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        TextProcessing("{}", 16).arrays(["good"])


@pytest.mark.parametrize("processing", [ImageProcessing(24, 27, "bilinear"), TextProcessing(tokenizer_json(), 7)])
def test_saved_processing_comes_back_equal(processing: ImageProcessing | TextProcessing, tmp_path: Path) -> None:
    assert processing_from_dict(processing.save(tmp_path), tmp_path) == processing


def test_unknown_kind_and_missing_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'smell'.*image, text"):
        processing_from_dict({"kind": "smell"}, tmp_path)
    value = TextProcessing(tokenizer_json(), 7).save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        processing_from_dict(value, tmp_path)


def test_edge_needs_no_torch(tmp_path: Path) -> None:
    """Preprocessing runs on the device, where torch and transformers are not installed."""
    (tmp_path / "image.json").write_text(json.dumps(ImageProcessing(8, 8).save(tmp_path)))
    (tmp_path / "text.json").write_text(json.dumps(TextProcessing(tokenizer_json(), 7).save(tmp_path)))
    script = (
        "import json, sys; from pathlib import Path; import numpy as np\n"
        "from models.modalities import processing_from_dict\n"
        "folder = Path(sys.argv[1]); load = lambda name: json.loads((folder / name).read_text())\n"
        "processing_from_dict(load('image.json'), folder).arrays([np.zeros((9, 9, 3), np.uint8)])\n"
        "processing_from_dict(load('text.json'), folder).arrays(['good'])\n"
        "heavy = {'torch', 'transformers', 'timm', 'peft', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr


def test_two_texts_with_nothing_between_them_are_refused() -> None:
    from models.backbones.from_hf import check_pairs

    whole = json.loads(tokenizer_json())
    check_pairs(TextProcessing(json.dumps(whole), 16, pairs=True), "tiny")
    bare = json.dumps({**whole, "post_processor": None})
    with pytest.raises(ModelError, match="puts nothing between two texts"):
        check_pairs(TextProcessing(bare, 16, pairs=True), "tiny")
