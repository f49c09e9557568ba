"""What a candidate loses under corruption of its inputs, against the reference under the same corruption.

A network in lower precision may hold on clean samples and give way on noisy ones: the ranges of INT8 are those of clean
calibration samples. So the metric drop is taken again on corrupted ones, sample by sample. Corruptions are of one fixed
severity, drawn from the seed, the same for reference and candidates, and done to the raw input, before preprocessing.

Images: the kinds and sizes of Hendrycks & Dietterich 2019 (arXiv 1903.12261, ImageNet-C) at severity 2 of 5, made
for 224 pixels: on larger images grain and blur grow with the shorter side. Texts: neighbouring letters swapped as in
Belinkov & Bisk 2018 (arXiv 1711.02173), words left out as in Wei & Zou 2019 (arXiv 1901.11196).
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from models.errors import RuntimeInferenceError
from models.spec import side_by_side
from models.tasks import MODALITY_OF_TASK, task_of
from stages.gate import Gate, GateResult
from stages.statistics import drop_p_value, holm, keep_p_value, paired_interval

if TYPE_CHECKING:
    import numpy as np

    from models.checkpoint import Checkpoint
    from models.modalities import Content
    from models.runtimes.base import Runtime
    from models.spec import IOSpec, TaskName
    from models.tasks import Task
    from stages.base import StageContext
    from stages.validate.config import ValidateConfig
    from stages.validate.metrics import Outputs
    from stages.validate.stage import Measured

    Change = Callable[[Any, np.random.Generator], Any]

CorruptionName = Literal[
    "gaussian-noise", "blur", "brightness", "jpeg",
    "typos", "upper-case", "dropped-words",
    "white-noise", "gain",
]  # fmt: skip

ALPHA = 0.05
SIDE = 224
"""Pixels of the shorter side that the sizes of the image corruptions are made for."""
NOISE, BLUR_PIXELS, BRIGHTER, JPEG_QUALITY = 0.12, 2.0, 0.2, 18
"""ImageNet-C's second severity: standard deviation and lightness as a share of white, radius in pixels, quality."""
SWAPPED_WORDS, DROPPED_WORDS = 0.2, 0.1
"""Shares of the words: of those of four letters or more, and of all."""
SNR_DB, GAIN = 20.0, 0.1
"""Of the noise to the whole recording; −20 dB."""


# --- images ---------------------------------------------------------------------------------------


def add_noise(content: Content, random: np.random.Generator) -> Content:
    """Gaussian noise on every channel, in grains of a 224th of the shorter side, at least a pixel."""
    import numpy as np

    from models.modalities.vision import decode_image

    pixels = np.asarray(decode_image(content), np.float32) / 255
    sizes = [max(1, round(side * min(1.0, SIDE / min(pixels.shape[:2])))) for side in pixels.shape[:2]]
    grains = random.standard_normal((*sizes, 3), np.float32) * np.float32(NOISE)
    rows, columns = (np.arange(side) * size // side for side, size in zip(pixels.shape[:2], sizes, strict=True))
    return to_pixels(pixels + grains[rows][:, columns])


def blur(content: Content, random: np.random.Generator) -> Content:
    """Gaussian blur, in Pillow's approximation by box filters."""
    import numpy as np
    from PIL import ImageFilter

    from models.modalities.vision import decode_image

    image = decode_image(content)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(BLUR_PIXELS * min(image.size) / SIDE)), np.uint8)


def brighten(content: Content, random: np.random.Generator) -> Content:
    """More value (V of HSV) with the same hue and saturation; black becomes grey."""
    import numpy as np

    from models.modalities.vision import decode_image

    pixels = np.asarray(decode_image(content), np.float32) / 255
    value = pixels.max(axis=2, keepdims=True)
    target = np.minimum(value + np.float32(BRIGHTER), 1)
    return to_pixels(np.where(value > 0, pixels * target / np.maximum(value, 1e-6), target))


def compress(content: Content, random: np.random.Generator) -> Content:
    """As a JPEG of low quality."""
    from models.modalities.vision import decode_image

    stream = io.BytesIO()
    decode_image(content).save(stream, format="JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()


def to_pixels(values: np.ndarray) -> np.ndarray:
    """Shares of white as uint8."""
    import numpy as np

    return np.asarray(np.rint(np.clip(values, 0, 1) * 255), np.uint8)


# --- texts ----------------------------------------------------------------------------------------


def swap_letters(text: str, random: np.random.Generator) -> str:
    """In a fifth of the words of four letters or more two neighbours between the first and the last are swapped."""

    def swapped(match: re.Match[str]) -> str:
        word = match.group()
        if random.random() >= SWAPPED_WORDS:
            return word
        place = int(random.integers(1, len(word) - 2))
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]

    return re.sub(r"\w{4,}", swapped, text)


def raise_case(text: str, random: np.random.Generator) -> str:
    """All in capitals."""
    return text.upper()


def drop_words(text: str, random: np.random.Generator) -> str:
    """Each word is left out with a chance of one in ten; one stays."""
    words = text.split()
    kept = [word for word in words if random.random() >= DROPPED_WORDS]
    return " ".join(kept or words[:1])


# --- audio ----------------------------------------------------------------------------------------


def add_white_noise(content: Content, random: np.random.Generator) -> Content:
    """White noise, 20 dB below the recording's mean power; silence stays."""
    import numpy as np

    from models.modalities.audio import Waveform, decode_audio

    sound = decode_audio(content)
    size = np.float32(np.sqrt(np.square(sound.samples, dtype=np.float64).mean() / 10 ** (SNR_DB / 10)))
    noise = random.standard_normal(sound.samples.shape, np.float32) * size
    return Waveform(sound.samples + noise, sound.rate)


def turn_down(content: Content, random: np.random.Generator) -> Content:
    """A tenth of its size."""
    import numpy as np

    from models.modalities.audio import Waveform, decode_audio

    sound = decode_audio(content)
    return Waveform(sound.samples * np.float32(GAIN), sound.rate)


@dataclass(frozen=True)
class Corruption:
    """One row of the table. `of`: the part of a content that it changes."""

    name: CorruptionName
    of: Literal["image", "text", "audio"]
    what: str
    change: Change

    def corrupted(self, content: Content, kind: str, random: np.random.Generator) -> Content:
        """A content of a preprocessing of this kind, corrupted."""
        if not isinstance(content, tuple):
            return self.change(content, random)  # type: ignore[no-any-return]
        if kind == "image-text":
            image, text = content
            return (self.change(image, random), text) if self.of == "image" else (image, self.change(text, random))
        return tuple(self.change(part, random) for part in content)


CORRUPTIONS: tuple[Corruption, ...] = (
    Corruption("gaussian-noise", "image", f"noise of {NOISE:g} of white", add_noise),
    Corruption("blur", "image", f"Gaussian, {BLUR_PIXELS:g} pixels of {SIDE}", blur),
    Corruption("brightness", "image", f"{BRIGHTER:g} of white more", brighten),
    Corruption("jpeg", "image", f"quality {JPEG_QUALITY}", compress),
    Corruption("typos", "text", f"letters swapped in {SWAPPED_WORDS:.0%} of the longer words", swap_letters),
    Corruption("upper-case", "text", "all in capitals", raise_case),
    Corruption("dropped-words", "text", f"{DROPPED_WORDS:.0%} of the words left out", drop_words),
    Corruption("white-noise", "audio", f"at {SNR_DB:g} dB below the recording", add_white_noise),
    Corruption("gain", "audio", f"{GAIN:g} of its size", turn_down),
)


def corruptions_for(task: TaskName, asked: bool | Sequence[str]) -> list[Corruption]:
    """Those that were asked for (True: all) of what a task has."""
    parts = MODALITY_OF_TASK[task].split("-")
    fitting = [one for one in CORRUPTIONS if one.of in parts]
    return [one for one in fitting if asked is True or (asked and one.name in asked)]


# --- measuring ------------------------------------------------------------------------------------


def measure_robustness(
    context: StageContext,
    config: ValidateConfig,
    checkpoint: Checkpoint,
    candidates: Sequence[Measured],
    reference: Outputs,
    targets: np.ndarray,
    entries: Sequence[dict[str, Any]],
) -> dict[str, Any] | None:
    """Run reference and candidates under each corruption, on `robustness_samples` at most, and fill in `robustness` of
    the candidates' entries. What each does to the reference is returned; None where nobody asked.

    `reference` and `targets` are those of the whole clean test split. A corruption that changes no input of the network
    (capitals, where the tokenizer lower-cases) says nothing: it is `inert`, and no candidate is judged by it.
    """
    from stages.validate.judge import rows_of, spread_over
    from stages.validate.notes import REFERENCE

    asked = corruptions_for(checkpoint.spec.task, config.robustness)
    if not asked:
        return None
    task, margin = task_of(checkpoint.spec.task), config.gates.max_robustness_drop or 0.0
    places = spread_over(len(context.data["test"]), config.robustness_samples)
    failed = {entry["name"] for entry in entries if entry["problem"]}
    sound = [one for one in candidates if one.name not in failed]
    found: dict[str, dict[str, Outputs]] = {
        one.name: outputs_under(one, context, config, checkpoint, sound, places) for one in asked if places
    }
    clean, rows = rows_of(reference, places), []
    for one in asked:
        under = found.get(one.name, {}).get(REFERENCE)
        effect = effect_on(under, clean, targets[places], task)
        rows.append({"name": one.name, "what": one.what, "inert": bool(places) and under is None, **effect})
    for entry in entries:
        own = {
            name: (outputs[entry["name"]], outputs[REFERENCE])
            for name, outputs in found.items()
            if entry["name"] in outputs
        }
        entry["robustness"] = robustness_table(own, targets[places], task, margin)
    return {"samples": len(places), "corruptions": rows}


def outputs_under(
    corruption: Corruption,
    context: StageContext,
    config: ValidateConfig,
    checkpoint: Checkpoint,
    candidates: Sequence[Measured],
    places: Sequence[int],
) -> dict[str, Outputs]:
    """Name → outputs of the reference and of every candidate on the same corrupted samples; empty where the corruption
    changes no input. Each sample's randomness is its own: it depends on the seed, the corruption and its place."""
    import numpy as np

    from models.runtimes.onnxruntime_session import OnnxRuntimeSession
    from models.runtimes.torch_eager import TorchEager
    from stages.validate.notes import REFERENCE
    from stages.validate.providers import PROVIDERS

    spec, processing, test = checkpoint.spec, checkpoint.processing, context.data["test"]
    number, size = [one.name for one in CORRUPTIONS].index(corruption.name), config.batch_size
    collected: dict[str, Collected] = {}
    changed = False
    with ExitStack() as stack, context.progress.task(corruption.name, len(places)) as advance:
        runtimes: dict[str, Runtime] = {}
        eager = TorchEager(checkpoint.model, spec.io, "cpu", context.threads)
        runtimes[REFERENCE] = stack.enter_context(eager)
        for one in candidates:
            session = OnnxRuntimeSession(one.path, PROVIDERS[one.provider], context.threads)
            runtimes[one.name] = stack.enter_context(session)
        collected = {name: Collected() for name in runtimes}
        for start in range(0, len(places), size):
            part = places[start : start + size]
            contents = [
                corruption.corrupted(
                    test[place].content, processing.kind, np.random.default_rng([context.seed, number, place])
                )
                for place in part
            ]
            inputs = processing.arrays(contents)
            changed = changed or not same_arrays(inputs, processing.arrays([test[place].content for place in part]))
            for name, runtime in runtimes.items():
                collected[name].add(runtime, inputs, spec.io, len(part))
            advance(len(part))
    return {name: one.outputs() for name, one in collected.items()} if changed else {}


class Collected:
    """The outputs of a runtime, batch by batch, until there is a problem."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.problem = ""

    def add(self, runtime: Runtime, inputs: Mapping[str, np.ndarray], io: IOSpec, count: int) -> None:
        """Run a batch of `count` samples."""
        from stages.validate.metrics import output_problem

        if self.problem:
            return
        try:
            found = runtime.infer(inputs)
        except RuntimeInferenceError as error:
            self.problem = str(error)
            return
        self.problem = output_problem(found, io, count)
        if not self.problem:
            self.parts.append(side_by_side({output.name: found[output.name] for output in io.outputs}))

    def outputs(self) -> Outputs:
        """All of them, or the problem."""
        import numpy as np

        from stages.validate.metrics import Outputs

        if self.problem or not self.parts:
            return Outputs(None, self.problem or "there is not one sample")
        return Outputs(np.concatenate(self.parts))


def same_arrays(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    """Whether the inputs of a network are equal bit by bit."""
    import numpy as np

    return all(np.array_equal(one[name], other[name]) for name in one)


def effect_on(under: Outputs | None, clean: Outputs, targets: np.ndarray, task: Task) -> dict[str, Any]:
    """The reference's metric on the clean samples and under the corruption, and the share of its answers that changed;
    None where it is not known."""
    before = None if clean.values is None else float(task.scores(clean.values, targets).mean())
    if under is None or under.values is None or clean.values is None:
        return {"clean": before, "reference": None, "changed": None}
    return {
        "clean": before,
        "reference": float(task.scores(under.values, targets).mean()),
        "changed": float(1 - task.same(under.values, clean.values).mean()),
    }


def robustness_table(
    found: Mapping[str, tuple[Outputs, Outputs]], targets: np.ndarray, task: Task, margin: float
) -> dict[str, Any]:
    """What a candidate loses under each corruption, the worst first. `found`: corruption → outputs of candidate and
    reference.

    `keeps_p` is Holm's adjusted p-value of the hypothesis that the drop is above `margin` (small where it is shown not
    to be), `loses_p` that of the other one; `interval` lies between both one-sided 95 % bounds of that drop alone.
    """
    problems = {name: one.problem or other.problem for name, (one, other) in found.items()}
    problem = next((f"{name}: {text}" for name, text in problems.items() if text), "")
    if problem or not found:
        problem = problem or "no corruption changed an input of this network"
        return {"problem": problem, "samples": len(targets), "corruptions": []}
    rows: list[dict[str, Any]] = []
    keeps, loses = [], []
    for name, (after, before) in found.items():
        assert after.values is not None and before.values is not None
        scores, wanted = (task.scores(one, targets) for one in (after.values, before.values))
        low, high = paired_interval(wanted, scores, 0.90)
        keeps.append(keep_p_value(scores, wanted, margin))
        loses.append(drop_p_value(scores, wanted, margin))
        rows.append({"name": name, "reference": float(wanted.mean()), "metric": float(scores.mean()),
                     "drop": float((wanted - scores).mean()), "interval": [low, high]})  # fmt: skip
    for row, kept, lost in zip(rows, holm(keeps), holm(loses), strict=True):
        row |= {"keeps_p": kept, "loses_p": lost}
    rows.sort(key=lambda row: (row["loses_p"], -row["drop"]))
    return {"problem": "", "samples": len(targets), "corruptions": rows}


def robustness_gate(name: str, table: Mapping[str, Any], margin: float, metric: str, rule: str) -> GateResult:
    """One gate over all corruptions. `rule` as of the metric drop: proven passes where the drop under every corruption
    is shown to keep the margin, fails where one is shown not to, both after Holm's correction for their number, and is
    inconclusive between; observed takes the largest drop that was seen."""
    gate, rows, samples = Gate("robustness drop", "at most", margin, metric), table["corruptions"], table["samples"]
    if table["problem"] or not rows:
        return gate.check(name, None, detail=table["problem"])
    if rule == "observed":
        worst = max(rows, key=lambda row: float(row["drop"]))
        return gate.check(name, worst["drop"], samples, f"under {worst['name']}, the worst of {len(rows)}")
    lost = [row for row in rows if row["loses_p"] < ALPHA]
    open_ = [row for row in rows if not row["keeps_p"] <= ALPHA]
    decisive = (lost or open_ or sorted(rows, key=lambda row: -float(row["keeps_p"])))[0]
    if problem := gate.no_evidence(decisive["drop"], samples):
        return gate.result(name, "error", decisive["drop"], problem, "")
    low, high = decisive["interval"]
    word = "is above" if lost else f"leaves open whether it is {gate.direction}" if open_ else "is at most"
    p_value = decisive["loses_p" if lost else "keeps_p"]
    text = f"{decisive['drop']:.6g} ({low:.6g} to {high:.6g}) under {decisive['name']} {word} {margin:.6g}"
    detail = f"{len(rows)} corruptions on the same samples; adjusted p {p_value:.2g}"
    return gate.result(name, "fail" if lost else "inconclusive" if open_ else "pass", decisive["drop"], text, detail)


def robustness_notes(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The worst corruption of each candidate."""
    lines = []
    for entry in entries:
        table = entry.get("robustness") or {"problem": "", "corruptions": []}
        if table["problem"]:
            lines.append(f"{entry['name']} under corruption: {table['problem']}")
        elif table["corruptions"]:
            worst = max(table["corruptions"], key=lambda row: float(row["drop"]))
            lines.append(
                f"{entry['name']}: the worst of {len(table['corruptions'])} corruptions is {worst['name']} with "
                f"{0.0 - worst['drop']:+.4f} against the reference's {worst['reference']:.4f} under it"
            )
    return lines
