"""Audio: decode, mix to one channel, resample and cut; then what the backbone's own feature extractor would do.

Spectrograms are computed here, in numpy, and not in the network: opsets and engines differ in their transforms, and a
waveform is what a device has (docs/decisions). Decoding is libsndfile's work (soundfile), resampling libsoxr's (soxr).
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal, get_args

from models.errors import DataError, ModelError
from models.spec import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from models.modalities import Content

MAX_SAMPLES = 64_000_000
"""Longer recordings, all channels counted, are refused before they are decoded: 24 minutes of stereo at 44.1 kHz."""

WINDOW, HOP = 400, 160
"""Samples of a spectrogram's window and of its step: 25 and 10 ms at the 16 kHz of every backbone that takes one."""

MARGIN_SECONDS = 0.1
"""What is resampled beyond the end of a clip, so that the filter sees what follows (it is some milliseconds long)."""

Form = Literal["waveform", "log-mel", "fbank"]


@dataclass(frozen=True, eq=False)
class Waveform:
    """Sound in memory. `samples`: float32 (samples,) or (samples, channels), full scale is 1; `rate` in Hz."""

    samples: np.ndarray
    rate: int


@dataclass(frozen=True)
class AudioProcessing:
    """The first `samples` of a recording, one channel at `rate` Hz, in the form that the backbone was trained on.

    - `waveform`: mean 0 and variance 1 where `normalize` says so, then zeros to the end (wav2vec 2.0, Baevski et al.
      2020, and its kin). The number of samples before the zeros is an input too.
    - `log-mel`: silence to the end, then Whisper's spectrogram (Radford et al. 2022).
    - `fbank`: Kaldi's filter bank as the Audio Spectrogram Transformer takes it (Gong et al. 2021), zeros to the end,
      then (x − mean) / 2 std.

    `mels` is the number of bands of the two spectrograms.
    """

    rate: int
    samples: int
    form: Form
    mels: int = 0
    normalize: bool = True
    mean: float = 0.0
    std: float = 0.5
    kind: ClassVar[str] = "audio"

    @property
    def seconds(self) -> float:
        """How much of a recording the network hears."""
        return self.samples / self.rate

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """All float32, batch first, but for `valid_samples`: int64 (batch,).

        `waveform` (batch, samples) and `valid_samples`; `log_mel` (batch, mels, frames); or `fbank` (batch, frames,
        mels).
        """
        if self.form == "waveform":
            wave = TensorSpec("waveform", "float32", ("batch", self.samples))
            return (wave, TensorSpec("valid_samples", "int64", ("batch",)))
        if self.form == "log-mel":
            return (TensorSpec("log_mel", "float32", ("batch", self.mels, self.samples // HOP)),)
        return (TensorSpec("fbank", "float32", ("batch", frames_of(self.samples), self.mels)),)

    def arrays(self, contents: Sequence[Content]) -> dict[str, np.ndarray]:
        """The inputs of the network. Raises `DataError` for what is no recording."""
        import numpy as np

        clips = [self.clip(content) for content in contents]
        first, *others = self.inputs
        shape = [dim for dim in first.dims if isinstance(dim, int)]
        batch = np.zeros((len(clips), *shape), np.float32)
        for row, clip in zip(batch, clips, strict=True):
            row[...] = self.features(clip)
        lengths = np.array([len(clip) for clip in clips], np.int64)
        return {first.name: batch} | {tensor.name: lengths for tensor in others}

    def clip(self, content: Content) -> np.ndarray:
        """At most `samples` samples of one recording, at `rate`: float32, one at least."""
        return resample(decode_audio(content), self.rate, self.samples)

    def features(self, clip: np.ndarray) -> np.ndarray:
        """One clip in the backbone's form: float32, of the shape in `inputs` without the batch."""
        import numpy as np

        if self.form == "fbank":
            frames = fbank(clip, self.mels, self.rate)
            missing = frames_of(self.samples) - len(frames)
            return (np.pad(frames, ((0, missing), (0, 0))) - np.float32(self.mean)) / np.float32(2 * self.std)
        if self.form == "waveform" and self.normalize:
            exact = clip.astype(np.float64)
            clip = ((exact - exact.mean()) / np.sqrt(exact.var() + 1e-7)).astype(np.float32)
        whole = np.pad(clip, (0, self.samples - len(clip)))
        return whole if self.form == "waveform" else log_mel(whole, self.mels, self.rate)

    def count_truncated(self, contents: Sequence[Content]) -> int:
        """How many of the recordings are longer than the network hears."""
        recordings = (decode_audio(content) for content in contents)
        return sum(len(one.samples) * self.rate > self.samples * one.rate for one in recordings)

    def examples(self) -> list[Content]:
        """Two made-up contents: silence."""
        import numpy as np

        return [Waveform(np.zeros(self.samples, np.float32), self.rate)] * 2

    def extremes(self, contents: Sequence[Content]) -> list[list[Content]]:
        """Batches at the limits: silence alone, and a recording of a tenth beside a whole one."""
        import numpy as np

        clip = self.clip(contents[0])
        short, long = clip[: max(1, self.samples // 10)], np.resize(clip, self.samples)  # repeated to the end
        return [self.examples()[:1], [Waveform(short, self.rate), Waveform(long, self.rate)]]

    def to_file(self, content: Content) -> tuple[str, bytes]:
        """The ending and the bytes of a file that holds the content; samples in memory become a WAV of floats."""
        if isinstance(content, str | Path):
            return Path(content).suffix.lower() or ".audio", Path(content).read_bytes()
        if isinstance(content, bytes):
            return SUFFIXES.get(content[:4], ".audio"), content
        import soundfile

        waveform, stream = decode_audio(content), io.BytesIO()
        soundfile.write(stream, waveform.samples, waveform.rate, format="WAV", subtype="FLOAT")
        return ".wav", stream.getvalue()

    def from_file(self, data: bytes) -> Content:
        """The content of such a file."""
        return data

    def from_argument(self, argument: str) -> Content:
        """A path."""
        return Path(argument)

    def save(self, folder: Path) -> dict[str, Any]:
        """The declarative form; audio needs no files."""
        return {"kind": self.kind, **asdict(self)}

    @classmethod
    def from_dict(cls, value: dict[str, Any], folder: Path) -> AudioProcessing:
        """The inverse of `save`. Raises `ModelError` for values of another version."""
        if value["form"] not in get_args(Form):
            raise ModelError(
                f"the preprocessing asks for {value['form']!r}; expected one of {', '.join(get_args(Form))}"
            )
        numbers = int(value["rate"]), int(value["samples"]), value["form"], int(value["mels"])
        return cls(*numbers, bool(value["normalize"]), float(value["mean"]), float(value["std"]))


SUFFIXES = {
    b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3\x03": ".mp3", b"ID3\x04": ".mp3", b"FORM": ".aiff",
}  # fmt: skip
"""First bytes → ending, for a person; libsndfile looks at the content."""


# --- decoding ----------------------------------------------------------------------------------------


def decode_audio(content: Content) -> Waveform:
    """A path, encoded bytes or a `Waveform` as one channel (the mean of all): float32 (samples,) at its own rate.

    Raises:
        DataError: it is no recording, an empty or cut one, holds NaN, or is longer than `MAX_SAMPLES`.
    """
    import numpy as np

    if isinstance(content, Waveform):
        return to_mono(content, "a waveform")
    if isinstance(content, np.ndarray):
        found = f"{content.dtype} {content.shape}"
        raise DataError(f"samples: found a bare array, {found}; expected it with its rate, Waveform(samples, rate)")
    import soundfile

    name = str(content) if isinstance(content, str | Path) else f"{len(content)} encoded bytes"
    try:
        with io.BytesIO(content) if isinstance(content, bytes) else Path(str(content)).open("rb") as stream:
            check_length(stream, name)
            with soundfile.SoundFile(stream) as file:
                if file.frames * file.channels > MAX_SAMPLES:
                    raise DataError(
                        f"{name}: {file.frames} samples in {file.channels} channels are above the limit of "
                        f"{MAX_SAMPLES}; cut it"
                    )
                samples, rate, promised = file.read(dtype="float32"), file.samplerate, file.frames
    except (soundfile.SoundFileError, OSError, TypeError, ValueError) as error:
        raise DataError(f"{name}: is no recording that can be read ({error}); replace or remove it") from error
    if len(samples) < promised:
        raise DataError(f"{name}: is cut off after {len(samples)} of {promised} samples; replace or remove it")
    return to_mono(Waveform(samples, rate), name)


def check_length(stream: BinaryIO, name: str) -> None:
    """A WAV whose header promises more bytes than there are: libsndfile reads what is left without a word.

    0 and all ones stand for a length that the writer did not know. Raises `DataError`.
    """
    header, size = stream.read(8), stream.seek(0, io.SEEK_END)
    stream.seek(0)
    promised = int.from_bytes(header[4:8], "little")
    if header[:4] == b"RIFF" and promised not in (0, 0xFFFFFFFF) and promised + 8 > size + 1:  # a padding byte
        raise DataError(f"{name}: is cut off after {size} of {promised + 8} bytes; replace or remove it")


def to_mono(waveform: Waveform, name: str) -> Waveform:
    """The mean of all channels. Raises `DataError` for samples that are no sound."""
    import numpy as np

    samples, rate = waveform.samples, waveform.rate
    if samples.dtype != np.float32 or samples.ndim not in (1, 2) or rate <= 0:
        found = f"{samples.dtype} {samples.shape} at {rate} Hz"
        raise DataError(f"{name}: found {found}; expected float32 (samples,) or (samples, channels) at a rate")
    if not samples.size:
        raise DataError(f"{name}: holds no samples; replace or remove it")
    if not np.isfinite(samples).all():
        raise DataError(f"{name}: holds NaN or infinite samples; replace or remove it")
    return Waveform(samples if samples.ndim == 1 else samples.mean(axis=1, dtype=np.float32), rate)


def resample(waveform: Waveform, rate: int, samples: int) -> np.ndarray:
    """The first `samples` of one channel at `rate` Hz: float32, at least one, fewer where the recording is shorter."""
    import numpy as np

    needed = math.ceil((samples / rate + MARGIN_SECONDS) * waveform.rate)
    start = waveform.samples[:needed]
    if waveform.rate != rate:
        import soxr

        start = soxr.resample(start, waveform.rate, rate, quality="HQ")
    clip: np.ndarray = start[:samples] if len(start) else np.zeros(1, np.float32)
    return clip


def digest_of_audio(content: Content) -> str:
    """SHA-256 over the rate and the decoded samples of one channel: the same recording in another lossless format is
    the same. Raises `DataError`."""
    waveform = decode_audio(content)
    digest = hashlib.sha256(f"{waveform.rate} ".encode())
    digest.update(waveform.samples.astype("<f4").tobytes())
    return digest.hexdigest()


def audio_decoder() -> str:
    """What decides how samples come out, for a memory of digests."""
    import soundfile

    return f"libsndfile-{soundfile.__libsndfile_version__}-{MAX_SAMPLES}"


# --- spectrograms ------------------------------------------------------------------------------------


def frames_of(samples: int) -> int:
    """How many whole windows are in a clip."""
    return max(0, 1 + (samples - WINDOW) // HOP)


def log_mel(clip: np.ndarray, mels: int, rate: int) -> np.ndarray:
    """Whisper's spectrogram: float32 (mels, samples // HOP), about -1 to 1.5.

    Power of windows centred on every step, in Slaney's mel bands; log10, at most 8 below the loudest; (x + 4) / 4.
    """
    import numpy as np

    padded = np.pad(clip.astype(np.float64), WINDOW // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:-1]
    hann = np.hanning(WINDOW + 1)[:-1]  # periodic
    power = np.abs(np.fft.rfft(windows * hann)) ** 2
    levels = np.log10(np.maximum(power @ slaney_bands(mels, rate), 1e-10))
    scaled: np.ndarray = ((np.maximum(levels, levels.max() - 8.0) + 4.0) / 4.0).T.astype(np.float32)
    return scaled


def fbank(clip: np.ndarray, mels: int, rate: int) -> np.ndarray:
    """Kaldi's log filter bank of whole windows: float32 (frames, mels), natural logarithm.

    Each window without its mean, pre-emphasised by 0.97, Hann, a transform of 512 points, bands from 20 Hz up.
    """
    import numpy as np

    if len(clip) < WINDOW:
        return np.zeros((0, mels), np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(clip.astype(np.float64), WINDOW)[::HOP]
    level = windows - windows.mean(axis=1, keepdims=True)
    before = np.concatenate([level[:, :1], level[:, :-1]], axis=1)
    power = np.abs(np.fft.rfft((level - 0.97 * before) * np.hanning(WINDOW), 512)) ** 2
    # Kaldi's floor is the smallest step of float32 from 1.
    levels: np.ndarray = np.log(np.maximum(power @ kaldi_bands(mels, rate), np.finfo(np.float32).eps))
    return levels.astype(np.float32)


@cache
def slaney_bands(mels: int, rate: int) -> np.ndarray:
    """Triangles of equal area: float64 (WINDOW // 2 + 1, mels), 0 to 8,000 Hz.

    The scale is that of Slaney's Auditory Toolbox (1998): linear below 1 kHz, logarithmic above.
    """
    import numpy as np

    def hertz_of(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * math.log(6.4) / 27))

    top = 15 + math.log(8000 / 1000) * 27 / math.log(6.4)
    edges = hertz_of(np.linspace(0, top, mels + 2))
    bands = triangles(np.linspace(0, rate / 2, WINDOW // 2 + 1), edges)
    area: np.ndarray = 2 / (edges[2:] - edges[:-2])
    weighted: np.ndarray = bands * area
    return weighted


@cache
def kaldi_bands(mels: int, rate: int) -> np.ndarray:
    """Triangles on the mel scale (O'Shaughnessy 1987) of height 1: float64 (257, mels), 20 Hz to half the rate."""
    import numpy as np

    def mel_of(hertz: np.ndarray) -> np.ndarray:
        mel: np.ndarray = 1127 * np.log(1 + hertz / 700)
        return mel

    low, high = mel_of(np.array([20, rate // 2]))
    return triangles(mel_of(np.arange(257) * rate / 512), np.linspace(low, high, mels + 2))


def triangles(points: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Heights at `points` of the triangles between every other of `edges`: float64 (points, edges − 2)."""
    import numpy as np

    widths = np.diff(edges)
    distance = edges[None] - points[:, None]
    heights: np.ndarray = np.maximum(0, np.minimum(-distance[:, :-2] / widths[:-1], distance[:, 2:] / widths[1:]))
    return heights
