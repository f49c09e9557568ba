"""Defects of the preprocessing and of the samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from models.modalities.audio import AudioProcessing, Waveform, decode_audio
from models.modalities.image_text import PairProcessing
from models.modalities.text import TextProcessing
from models.modalities.vision import ImageProcessing
from stages.validate.self_test.subject import Arrays, Mutant, Subject

if TYPE_CHECKING:
    from models.modalities import Content, Processing

NO_IMAGE, NO_TEXT, NO_AUDIO = "there are no images", "there are no texts", "there is no audio"
QUIET = 0.01
"""−40 dB: what samples of 16 bits become where they are divided by the full scale of another width."""


def image_part(processing: Processing) -> ImageProcessing | None:
    """That of the images."""
    part = processing.image if isinstance(processing, PairProcessing) else processing
    return part if isinstance(part, ImageProcessing) else None


def text_part(processing: Processing) -> TextProcessing | None:
    """That of the texts."""
    part = processing.text if isinstance(processing, PairProcessing) else processing
    return part if isinstance(part, TextProcessing) else None


def with_part(processing: Processing, part: ImageProcessing | TextProcessing) -> Processing:
    """The preprocessing with another part of images or of texts."""
    if not isinstance(processing, PairProcessing):
        return part
    return replace(processing, image=part) if isinstance(part, ImageProcessing) else replace(processing, text=part)


# --- images ------------------------------------------------------------------------------------------


def swap_channels(subject: Subject) -> Mutant | str:
    """Blue, green, red."""
    if image_part(subject.processing) is None:
        return NO_IMAGE

    def reverse(arrays: Arrays) -> Arrays:
        return {**arrays, "image": arrays["image"][..., ::-1].copy()}

    return Mutant(inputs=reverse)


def resize_nearest(subject: Subject) -> Mutant | str:
    """The nearest pixel, without antialias."""
    part = image_part(subject.processing)
    if part is None:
        return NO_IMAGE
    return Mutant(processing=with_part(subject.processing, replace(part, interpolation="nearest")))


def resize_otherwise(subject: Subject) -> Mutant | str:
    """Bilinear in place of the filter, bicubic in place of bilinear."""
    part = image_part(subject.processing)
    if part is None:
        return NO_IMAGE
    other: Any = "bicubic" if part.interpolation == "bilinear" else "bilinear"
    return Mutant(processing=with_part(subject.processing, replace(part, interpolation=other)))


def fit_otherwise(subject: Subject) -> Mutant | str:
    """Squashed in place of cropped, or the other way round."""
    part = image_part(subject.processing)
    if part is None:
        return NO_IMAGE
    other: Any = "squash" if part.fit == "crop" else "crop"
    return Mutant(processing=with_part(subject.processing, replace(part, fit=other)))


# --- texts -------------------------------------------------------------------------------------------


def pad_left(subject: Subject) -> Mutant | str:
    """Padding before the text."""
    import numpy as np

    part = text_part(subject.processing)
    if part is None:
        return NO_TEXT
    names, pad = [tensor.name for tensor in part.inputs], part.pad_id

    def moved(arrays: Arrays) -> Arrays:
        ids = arrays["input_ids"]
        mask = arrays.get("attention_mask", ids != pad)
        ends = ids.shape[1] - np.argmax(mask[:, ::-1] != 0, axis=1)  # where the text of a row ends
        places = (np.arange(ids.shape[1])[None] + ends[:, None]) % ids.shape[1]
        return {**arrays, **{name: np.take_along_axis(arrays[name], places, axis=1) for name in names}}

    return Mutant(inputs=moved)


def ignore_mask(subject: Subject) -> Mutant | str:
    """Padding counts as text."""
    import numpy as np

    part = text_part(subject.processing)
    if part is None or part.fixed:
        return "there is no mask of padding"

    def ones(arrays: Arrays) -> Arrays:
        return {**arrays, "attention_mask": np.ones_like(arrays["attention_mask"])}

    return Mutant(inputs=ones)


def turn_case(subject: Subject) -> Mutant | str:
    """The tokenizer no longer lower-cases; of one that does not, every text is in lower case."""
    part = text_part(subject.processing)
    if part is None:
        return NO_TEXT
    value = json.loads(part.tokenizer_json)
    if keep_case(value.get("normalizer")):
        changed = replace(part, tokenizer_json=json.dumps(value, ensure_ascii=False))
        return Mutant(processing=with_part(subject.processing, changed))
    return Mutant(content=on_texts(str.lower))


def keep_case(normalizer: Any) -> bool:
    """Take lower-casing out of a tokenizer's normalizer, in place; whether there was any."""
    found = False
    if isinstance(normalizer, dict):
        if normalizer.get("lowercase"):
            normalizer["lowercase"], found = False, True
        steps = normalizer.get("normalizers", [])
        kept = [step for step in steps if step.get("type") != "Lowercase"]
        if len(kept) < len(steps):
            normalizer["normalizers"], found = kept, True
        for step in kept:
            found = keep_case(step) or found
    return found


def on_texts(change: Callable[[str], str]) -> Callable[[Content], Content]:
    """`change` for each text in a content: one, two, or that beside an image."""

    def changed(content: Content) -> Content:
        if isinstance(content, tuple):
            return tuple(change(one) if isinstance(one, str) else one for one in content)  # type: ignore[return-value]
        return change(content) if isinstance(content, str) else content

    return changed


def cut_short(subject: Subject) -> Mutant | str:
    """A quarter of the tokens that fit."""
    part = text_part(subject.processing)
    if part is None:
        return NO_TEXT
    if part.fixed:
        return "every text has one length"
    return Mutant(processing=with_part(subject.processing, replace(part, max_length=max(4, part.max_length // 4))))


def leave_marks_out(subject: Subject) -> Mutant | str:
    """No [CLS], no [SEP]."""
    part = text_part(subject.processing)
    if part is None:
        return NO_TEXT
    value = json.loads(part.tokenizer_json)
    if value.get("post_processor") is None:
        return "the tokenizer adds no marks"
    changed = replace(part, tokenizer_json=json.dumps(value | {"post_processor": None}, ensure_ascii=False))
    return Mutant(processing=with_part(subject.processing, changed))


# --- audio -------------------------------------------------------------------------------------------


def keep_rate(subject: Subject) -> Mutant | str:
    """Recordings are taken for what they are resampled to; those that have the rate already for twice that."""
    processing = subject.processing
    if not isinstance(processing, AudioProcessing):
        return NO_AUDIO
    rate = processing.rate

    def mistaken(content: Content) -> Content:
        sound = decode_audio(content)
        return Waveform(sound.samples, 2 * rate if sound.rate == rate else rate)

    return Mutant(content=mistaken)


def turn_down(subject: Subject) -> Mutant | str:
    """Sound of a hundredth of its size."""
    if not isinstance(subject.processing, AudioProcessing):
        return NO_AUDIO

    def quiet(content: Content) -> Content:
        sound = decode_audio(content)
        return Waveform(sound.samples * sound.samples.dtype.type(QUIET), sound.rate)

    return Mutant(content=quiet)


def keep_level(subject: Subject) -> Mutant | str:
    """The waveform is not normalised; the filter bank has mean 0 and standard deviation .5."""
    processing = subject.processing
    if not isinstance(processing, AudioProcessing):
        return NO_AUDIO
    if processing.form == "log-mel":
        return "the spectrogram is scaled by its loudest place"
    return Mutant(processing=replace(processing, normalize=False, mean=0.0, std=0.5))


# --- samples -----------------------------------------------------------------------------------------


def shuffle_pairing(subject: Subject) -> Mutant | str:
    """Each sample is compared with the one before it."""
    return Mutant(shift=1)


def halve_batch(subject: Subject) -> Mutant | str:
    """The same graph, half as many samples at a time."""
    return Mutant(halved_batch=True)


def optimize_nothing(subject: Subject) -> Mutant | str:
    """The same graph, without ONNX Runtime's own optimizations."""
    return Mutant(optimization="none")
