"""Does transfer pay? The frozen features against raw inputs, and the strategy against training from scratch.

A backbone whose features are worth less than the inputs themselves has learned another world: its weights are a bad
start to stay close to, and nothing else in a training run says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.data.splits import Example
from stages.features.probe import fit_probe, score_head
from stages.finetune.config import FinetuneConfig
from stages.finetune.setup import Setup, build, seed_everything, with_frozen_result
from stages.finetune.strategies import Attempt, make_attempt
from stages.statistics import Gain, gain_of

if TYPE_CHECKING:
    import numpy as np

FRACTIONS = (1 / 9, 1 / 3, 1.0)
"""Of the training split, for the frozen features and the raw inputs."""

RAW_SIDE, RAW_TERMS, RAW_RATE = 32, 2000, 16_000


@dataclass(frozen=True)
class RawComparison:
    """Validation metrics of a linear probe on frozen features and on raw inputs, by training examples
    (`examples`, `frozen`, `raw`), and the gain of the features on all of them."""

    curve: list[dict[str, float]]
    gain: Gain

    @property
    def warning(self) -> str:
        """What to do where the features are shown to be worth less than the inputs; else empty."""
        if self.gain.high >= 0:
            return ""
        last = self.curve[-1]
        return (
            f"transfer does not pay here: a linear model on the raw inputs reaches {last['raw']:.4f}, on the frozen "
            f"features {last['frozen']:.4f} ({self.gain}). Unfreeze more (finetune.strategy: lp-ft or full), or take "
            "another backbone"
        )


def compare_with_raw(setup: Setup) -> RawComparison | None:
    """A linear probe on frozen features against the same probe on raw inputs, at three amounts of data.

    Raw inputs are pixels (32 × 32), TF-IDF weights of the most frequent terms, or statistics of mel bands. None for
    other modalities, and where there are no frozen features.
    """
    frozen, raw_inputs = setup.frozen, RAW_INPUTS.get(setup.processing.kind)
    if frozen is None or raw_inputs is None:
        return None
    data, task, outputs = setup.context.data, setup.task, setup.spec.io.width
    raw = raw_inputs(data["train"], data["validation"])
    inputs = {"frozen": (frozen.features["train"], frozen.features["validation"]), "raw": raw}
    probes = {"frozen": frozen.probe, "raw": fit_probe(raw[0], frozen.targets["train"], outputs, task)}
    curve: list[dict[str, float]] = []
    scores: dict[str, np.ndarray] = {}
    for fraction in FRACTIONS:
        count = round(fraction * len(data["train"]))
        targets = frozen.targets["train"][:count]
        if len({one.label for one in data["train"][:count]}) < 2:
            continue
        for name, (train, validation) in inputs.items():
            whole = probes[name]
            probe = whole
            if fraction < 1.0:
                probe = fit_probe(train[:count], targets, outputs, task, whole.regularization)
            scores[name], _ = score_head(probe.weight, probe.bias, validation, frozen.targets["validation"], task)
        curve.append({"examples": count, **{name: float(found.mean()) for name, found in scores.items()}})
    return RawComparison(curve, gain_of(scores["frozen"], scores["raw"], 0.95))


def raw_pixels(train: Sequence[Example], validation: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """float32 (examples, features) of both: RGB pixels of the whole image, without a channel that repeats another."""
    import numpy as np
    from PIL import Image

    from models.modalities.vision import decode_image

    def pixels(one: Example) -> np.ndarray:
        return np.asarray(decode_image(one.content).resize((RAW_SIDE, RAW_SIDE), Image.Resampling.BILINEAR))

    both = np.stack([pixels(one) for one in (*train, *validation)])
    if bool((both == both[..., :1]).all()):
        both = both[..., :1]
    flat = both.reshape(len(both), -1).astype(np.float32)
    return flat[: len(train)], flat[len(train) :]


def raw_terms(train: Sequence[Example], validation: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """float32 (examples, terms) of both: TF-IDF weights, the terms and their frequencies from train."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(max_features=RAW_TERMS, sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    fitted = vectorizer.fit_transform([text_of(one) for one in train]).toarray()
    others = vectorizer.transform([text_of(one) for one in validation]).toarray()
    return fitted.astype(np.float32), others.astype(np.float32)


def text_of(one: Example) -> str:
    """The text, or both of them."""
    return " ".join(map(str, one.content)) if isinstance(one.content, tuple) else str(one.content)


def raw_levels(train: Sequence[Example], validation: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """float32 (examples, 160) of both: mean and deviation over time of each of 80 mel bands of the whole recording."""
    import numpy as np

    from models.modalities.audio import MAX_SAMPLES, decode_audio, log_mel, resample

    def levels(one: Example) -> np.ndarray:
        sound = resample(decode_audio(one.content), RAW_RATE, MAX_SAMPLES)
        bands = log_mel(np.pad(sound, (0, max(0, RAW_RATE // 10 - len(sound)))), 80, RAW_RATE)
        return np.concatenate([bands.mean(axis=1), bands.std(axis=1)])

    both = np.stack([levels(one) for one in (*train, *validation)])
    return both[: len(train)], both[len(train) :]


RAW_INPUTS: dict[str, Callable[[Sequence[Example], Sequence[Example]], tuple[np.ndarray, np.ndarray]]] = {
    "image": raw_pixels,
    "text": raw_terms,
    "audio": raw_levels,
}


def compare_with_scratch(setup: Setup, whole: Attempt, folder: Path) -> list[dict[str, Any]]:
    """The strategy of `whole` against the same network trained from scratch with the same budget, each on shares of
    the training split (`finetune.scratch_fractions`): `examples`, `tuned`, `scratch` (validation metrics), `gain`.

    A share is the first examples of the split, which is shuffled. What is trained is kept in `folder` until the stage
    is done.
    """
    rows: list[dict[str, Any]] = []
    examples = setup.context.data["train"]
    for fraction in sorted(setup.config.scratch_fractions):
        count = round(fraction * len(examples))
        tuned, part = whole, with_examples(setup, count)
        if count < len(examples):
            tuned = make_attempt(whole.strategy, with_frozen_result(part), folder / f"tuned-{count}")
        scratch = make_attempt("full", from_scratch(part), folder / f"scratch-{count}")
        row: dict[str, Any] = {"examples": count, "tuned": tuned.metric, "scratch": scratch.metric, "gain": None}
        if tuned.scores is not None and scratch.scores is not None:
            row["gain"] = vars(gain_of(tuned.scores, scratch.scores, 0.95))
        rows.append(row)
    return rows


def with_examples(setup: Setup, count: int) -> Setup:
    """The same setup with the first `count` training examples."""
    data = setup.context.data
    some = replace(data, splits={**data.splits, "train": data["train"][:count]})
    return replace(setup, context=replace(setup.context, data=some))


def from_scratch(setup: Setup) -> Setup:
    """The same network with random weights, all of them trained at the rate of its kind, for the same budget."""
    config = scratch_config(setup.config)
    seed_everything(setup.context, config)
    return build(setup.context, config)


def scratch_config(config: FinetuneConfig) -> FinetuneConfig:
    """The configuration of that training: what only says something of pretrained weights is taken out."""
    changes: dict[str, Any] = {"strategy": "full", "from_scratch": True, "initial_head": "random", "wise_ft": False}
    changes |= {"scratch_fractions": (), "from_run": None, "compare_direct": False, "locked_tower": None}
    rates = dict.fromkeys(("backbone_learning_rate", "head_learning_rate", "layer_rate_ratio"))
    return FinetuneConfig.model_validate({**config.model_dump(), **changes, **rates})


def compare_with_direct(setup: Setup, made: Attempt, folder: Path) -> dict[str, Any] | None:
    """What the intermediate task is worth: the probe on its features against the probe on the backbone's own, and with
    `finetune.compare_direct` the strategy from both. None without `finetune.from_run`."""
    config = setup.config
    if config.from_run is None:
        return None
    without = FinetuneConfig.model_validate({**config.model_dump(), "from_run": None, "compare_direct": False})
    seed_everything(setup.context, without)
    direct = with_frozen_result(build(setup.context, without))
    assert setup.frozen is not None and direct.frozen is not None
    found: dict[str, Any] = {
        "run": Path(config.from_run).name,
        "probe": float(setup.frozen.scores.mean()),
        "direct_probe": float(direct.frozen.scores.mean()),
        "probe_gain": vars(gain_of(setup.frozen.scores, direct.frozen.scores, 0.95)),
    }
    if config.compare_direct and made.scores is not None:
        other = make_attempt(made.strategy, direct, folder / "direct")
        found |= {"tuned": made.metric, "direct_tuned": other.metric}
        if other.scores is not None:
            found["tuned_gain"] = vars(gain_of(made.scores, other.scores, 0.95))
    return found
