"""Preprocessing of audio: what a backbone hears is what its own feature extractor would have made of it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from models.errors import DataError, ModelError
from models.modalities import processing_from_dict
from models.modalities.audio import AudioProcessing, Form, Waveform, decode_audio, digest_of_audio

RATE, SECONDS = 16_000, 2
SAMPLES = RATE * SECONDS
LOG_MEL = AudioProcessing(RATE, SAMPLES, "log-mel", 80)
FBANK = AudioProcessing(RATE, 200 * 160 + 400, "fbank", 128, True, -4.2677393, 4.5689974)
WAVEFORM = AudioProcessing(RATE, SAMPLES, "waveform")
FORMS = {"log-mel": LOG_MEL, "fbank": FBANK, "waveform": WAVEFORM}


def speech_like(seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """Noise under a slow envelope, with pauses: float32 (samples,)."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    tones = sum(np.sin(2 * np.pi * pitch * time) for pitch in (130, 390, 1200, 2700))
    envelope = np.clip(np.sin(2 * np.pi * 2.3 * time), 0, 1)
    noise = 0.001 * random.standard_normal(len(time))
    return (0.15 * envelope * tones + noise).astype(np.float32)


def tone(rate: int, seconds: float = 1.5, pitch: float = 440.0) -> np.ndarray:
    """A pure tone: float32 (samples,)."""
    return (0.4 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encoded(samples: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype: str | None = None) -> bytes:
    """A file's bytes."""
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=kind, subtype=subtype)
    return stream.getvalue()


# --- parity with transformers -------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.4, 2.0, 3.1])
@pytest.mark.parametrize("mels", [80, 128])
def test_log_mel_is_whispers_own(seconds: float, mels: int) -> None:
    from transformers import WhisperFeatureExtractor

    wave = speech_like(seconds)
    extractor = WhisperFeatureExtractor(feature_size=mels)
    found = AudioProcessing(RATE, SAMPLES, "log-mel", mels).arrays([Waveform(wave, RATE)])["log_mel"][0]
    cut = np.pad(wave[:SAMPLES], (0, max(0, SAMPLES - len(wave))))
    # Its numpy path keeps the transform in complex64: measured 1e-7. Its torch path works in float32: measured 3e-5.
    np.testing.assert_allclose(found, extractor._np_extract_fbank_features(cut[None], "cpu")[0], atol=1e-6)
    wanted = extractor(wave, sampling_rate=RATE, max_length=SAMPLES, return_tensors="np")["input_features"][0]
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    assert found.shape == (mels, 200) and found.dtype == np.float32


@pytest.mark.parametrize("seconds", [0.01, 0.5, 2.0, 3.1])
def test_fbank_is_that_of_the_audio_spectrogram_transformer(seconds: float) -> None:
    from transformers import ASTFeatureExtractor

    wave = speech_like(seconds)
    found = FBANK.arrays([Waveform(wave, RATE)])["fbank"][0]
    assert found.shape == (201, 128) and found.dtype == np.float32
    if seconds < 0.025:  # no whole window: its extractor fails there
        np.testing.assert_allclose(found, 4.2677393 / (2 * 4.5689974), atol=1e-6)
        return
    wanted = ASTFeatureExtractor(max_length=201)(wave, sampling_rate=RATE, return_tensors="np")["input_values"][0]
    np.testing.assert_allclose(found, wanted, atol=1e-6)  # measured 1e-7


@pytest.mark.parametrize("seconds", [0.4, 2.0, 3.1])
@pytest.mark.parametrize("normalize", [True, False])
def test_waveform_is_wav2vecs_own(seconds: float, normalize: bool) -> None:
    from transformers import Wav2Vec2FeatureExtractor

    wave = speech_like(seconds) + np.float32(0.1)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=normalize, return_attention_mask=True)
    wanted = extractor(
        wave, sampling_rate=RATE, padding="max_length", truncation=True, max_length=SAMPLES, return_tensors="np"
    )
    found = AudioProcessing(RATE, SAMPLES, "waveform", normalize=normalize).arrays([Waveform(wave, RATE)])
    np.testing.assert_allclose(
        found["waveform"], wanted["input_values"], atol=5e-6
    )  # measured 5e-7: its mean and variance are float32
    assert found["valid_samples"].tolist() == wanted["attention_mask"].sum(1).tolist()
    assert (found["waveform"][0, found["valid_samples"][0] :] == 0).all()


# --- the rate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_a_file_of_another_rate_is_heard_as_the_same_tone(form: Form, rate: int, tmp_path: Path) -> None:
    """440 Hz stay 440 Hz. Read as if it were at 16 kHz, the same file is another sound: twice or a third as high."""
    processing, file = FORMS[form], tmp_path / "tone.wav"
    soundfile.write(file, tone(rate), rate, subtype="FLOAT")
    name = processing.inputs[0].name
    wanted = processing.arrays([Waveform(tone(RATE), RATE)])[name]
    found = processing.arrays([file])[name]
    unresampled = processing.arrays([Waveform(tone(rate), RATE)])[name]
    # Away from the edges of the tone, where a filter rings: 0.1 to 1.3 seconds.
    part = {"log-mel": np.s_[:, :, 10:130], "fbank": np.s_[:, 10:130], "waveform": np.s_[:, 1600:20800]}[form]
    assert rms(found[part] - wanted[part]) < TOLERANCES[form]
    assert rms(unresampled[part] - wanted[part]) > 0.3


TOLERANCES = {"log-mel": 1e-5, "fbank": 1e-4, "waveform": 1e-5}
"""Root mean square, of features whose scale is about 1: measured 6e-8, 1.4e-5 and 1e-6 (.5 to 1.4 unresampled)."""


def rms(difference: np.ndarray) -> float:
    return float(np.sqrt((difference**2).mean()))


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_the_pitch_and_the_length_are_kept(rate: int) -> None:
    arrays = WAVEFORM.arrays([encoded(tone(rate, 1.0), rate)])
    (length,) = arrays["valid_samples"]
    assert abs(length - RATE) <= 1
    spectrum = np.abs(np.fft.rfft(arrays["waveform"][0, :length]))
    assert abs(spectrum.argmax() * RATE / length - 440) <= 1


# --- decoding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "subtype", "error"),
    [("WAV", "PCM_16", 0), ("FLAC", "PCM_16", 0), ("AIFF", "PCM_16", 0), ("OGG", "VORBIS", 0.1), ("MP3", None, 0.1)],
)
def test_every_format_decodes_to_the_same_sound(kind: str, subtype: str | None, error: float) -> None:
    exact = (speech_like(1.0) * 32767).round().astype(np.int16)
    found = decode_audio(encoded(exact, RATE, kind, subtype))
    wanted = exact.astype(np.float32) / 32768
    assert found.rate == RATE and abs(len(found.samples) - len(wanted)) <= (1200 if kind == "MP3" else 0)
    if kind != "MP3":  # whose encoder shifts it
        assert rms(found.samples - wanted) <= error * rms(wanted)
    same = digest_of_audio(encoded(exact, RATE, kind, subtype)) == digest_of_audio(encoded(exact))
    assert same == (error == 0)


def test_path_bytes_and_samples_agree(tmp_path: Path) -> None:
    wave = speech_like(0.7)
    file = tmp_path / "a.wav"
    soundfile.write(file, wave, RATE, subtype="FLOAT")
    arrays = LOG_MEL.arrays([file, str(file), file.read_bytes(), Waveform(wave, RATE)])["log_mel"]
    assert (arrays == arrays[:1]).all() and arrays.std() > 0.1
    assert len({digest_of_audio(one) for one in (file, file.read_bytes(), Waveform(wave, RATE))}) == 1
    assert digest_of_audio(Waveform(wave, 8_000)) != digest_of_audio(Waveform(wave, RATE))


def test_channels_are_mixed() -> None:
    left, right = speech_like(0.5, seed=1), speech_like(0.5, seed=2)
    stereo = LOG_MEL.arrays([encoded(np.stack([left, right], 1), subtype="FLOAT")])["log_mel"]
    mixed, alone = (LOG_MEL.arrays([Waveform(one, RATE)])["log_mel"] for one in ((left + right) / 2, left))
    np.testing.assert_allclose(stereo, mixed, atol=1e-5)
    assert np.abs(stereo - alone).max() > 0.05
    twice = Waveform(np.stack([left, left], 1), RATE)
    assert digest_of_audio(twice) == digest_of_audio(Waveform(left, RATE))


@pytest.mark.parametrize("rate", [8_000, RATE, 44_100])
def test_what_is_longer_is_cut_and_counted(rate: int) -> None:
    long, short = speech_like(3.0, rate), speech_like(1.0, rate)
    contents = [Waveform(long, rate), Waveform(short, rate)]
    assert WAVEFORM.arrays(contents)["valid_samples"].tolist() == [SAMPLES, RATE]
    assert WAVEFORM.count_truncated(contents) == 1
    # What lies beyond the clip is not heard, the filter's few milliseconds aside.
    other = long.copy()
    other[round(2.1 * rate) :] = 0.9
    both = LOG_MEL.arrays([Waveform(long, rate), Waveform(other, rate)])["log_mel"]
    assert (both[0] == both[1]).all()


def test_silence_and_a_single_sample_are_heard() -> None:
    for processing in FORMS.values():
        contents = [*processing.examples(), Waveform(np.full(1, 0.5, np.float32), 44_100)]
        arrays = processing.arrays(contents)
        assert all(np.isfinite(array).all() for array in arrays.values())
        assert arrays.get("valid_samples", np.ones(3)).min() >= 1
        assert len(processing.arrays([])[processing.inputs[0].name]) == 0
        for batch in processing.extremes(contents):
            assert all(np.isfinite(array).all() for array in processing.arrays(batch).values())


def test_what_is_declared_is_what_comes() -> None:
    for processing in FORMS.values():
        arrays = processing.arrays([Waveform(speech_like(1.0), RATE)] * 3)
        assert list(arrays) == [tensor.name for tensor in processing.inputs]
        for tensor in processing.inputs:
            assert arrays[tensor.name].dtype == tensor.dtype
            assert arrays[tensor.name].shape == (3, *tensor.dims[1:])


def broken(name: str) -> bytes:
    """A file that something is wrong with."""
    wave = speech_like(1.0)
    if name == "empty":
        return encoded(wave[:0])
    if name == "not a number":
        return encoded(np.where(np.arange(len(wave)) == 9, np.nan, wave).astype(np.float32), subtype="FLOAT")
    if name == "cut wav":
        return encoded(wave)[:9000]
    if name == "cut flac":
        return encoded(wave, kind="FLAC")[:9000]
    return b"" if name == "no bytes" else b"no recording at all"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "holds no samples"), ("not a number", "NaN or infinite"), ("cut wav", "is cut off after 9000 of"),
        ("cut flac", "is cut off|no recording that can be read"), ("no bytes", "no recording that can be read"),
        ("text", "no recording that can be read"),
    ],
)  # fmt: skip
def test_a_corrupt_recording_is_named(name: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.wav"
    file.write_bytes(broken(name))
    with pytest.raises(DataError, match=rf"bad\.wav: .*({message})"):
        LOG_MEL.arrays([Waveform(speech_like(0.1), RATE), file])
    with pytest.raises(DataError, match=rf"encoded bytes: .*({message})"):
        LOG_MEL.arrays([file.read_bytes()])


def test_a_wav_from_a_pipe_does_not_know_its_length() -> None:
    data = bytearray(encoded(speech_like(0.5), subtype="PCM_16"))
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    assert abs(len(decode_audio(bytes(data)).samples) - RATE // 2) <= 1


def test_what_is_no_sound_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wave = speech_like(0.1)
    with pytest.raises(DataError, match=r"bare array, float32 \(1600,\); expected it with its rate"):
        LOG_MEL.arrays([wave])
    for strange in (wave.astype(np.float64), np.zeros((2, 2, 2), np.float32)):
        with pytest.raises(DataError, match="expected float32"):
            LOG_MEL.arrays([Waveform(strange, RATE)])
    with pytest.raises(DataError, match="at 0 Hz"):
        LOG_MEL.arrays([Waveform(wave, 0)])
    with pytest.raises(DataError, match=r"missing\.wav"):
        LOG_MEL.arrays([tmp_path / "missing.wav"])
    monkeypatch.setattr("models.modalities.audio.MAX_SAMPLES", 99)
    with pytest.raises(DataError, match="1600 samples in 1 channels are above the limit of 99"):
        LOG_MEL.arrays([encoded(wave)])


# --- files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_saved_processing_comes_back_equal(form: Form, tmp_path: Path) -> None:
    value = json.loads(json.dumps(FORMS[form].save(tmp_path)))
    assert processing_from_dict(value, tmp_path) == FORMS[form]
    with pytest.raises(ModelError, match="'mfcc'; expected one of waveform, log-mel, fbank"):
        processing_from_dict({**value, "form": "mfcc"}, tmp_path)


def test_golden_recordings_are_the_originals(tmp_path: Path) -> None:
    data = encoded(speech_like(0.2), kind="FLAC")
    (tmp_path / "a.flac").write_bytes(data)
    for content in (data, tmp_path / "a.flac"):
        assert LOG_MEL.to_file(content) == (".flac", data)
    stereo = Waveform(np.stack([speech_like(0.2), speech_like(0.2, seed=3)], 1), 44_100)
    suffix, written = LOG_MEL.to_file(stereo)
    assert suffix == ".wav" and digest_of_audio(LOG_MEL.from_file(written)) == digest_of_audio(stereo)


def test_the_device_needs_numpy_and_two_small_libraries(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", speech_like(0.3, 8_000), 8_000)
    values: dict[str, Any] = {form: one.save(tmp_path) for form, one in FORMS.items()}
    (tmp_path / "all.json").write_text(json.dumps(values))
    script = (
        "import json, sys; from pathlib import Path\n"
        "from models.modalities import processing_from_dict\n"
        "folder = Path(sys.argv[1])\n"
        "for value in json.loads((folder / 'all.json').read_text()).values():\n"
        "    processing_from_dict(value, folder).arrays([folder / 'a.wav'])\n"
        "heavy = {'torch', 'transformers', 'scipy', 'librosa', 'PIL', 'tokenizers', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
