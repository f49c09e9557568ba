"""Corruptions of the test inputs, and what a candidate may lose under them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from pydantic import ValidationError

from models.checkpoint import load_checkpoint
from models.modalities.audio import Waveform
from models.modalities.vision import decode_image
from models.tasks import task_of
from stages.statistics import drop_p_value, keep_p_value, paired_interval
from stages.validate import Validate, ValidateConfig
from stages.validate.gates import check
from stages.validate.metrics import Outputs
from stages.validate.robustness import CORRUPTIONS, corruptions_for, robustness_gate, robustness_table
from stages.validate.stage import accepted_candidates, all_outputs
from tests.stages.chain import context_of, edit_weight, made, test_split, with_candidate
from tests.stages.test_validate import HEAD, SCENE, entry

SINGLE = task_of("image-classification")
TABLE = {one.name: one for one in CORRUPTIONS}


def corrupted(name: str, content: Any, seed: int = 0) -> Any:
    """A content after a corruption."""
    return TABLE[name].corrupted(content, TABLE[name].of, np.random.default_rng(seed))  # type: ignore[index]


# --- the corruptions ------------------------------------------------------------------------------


def test_noise_on_an_image_has_the_size_of_its_severity_and_grains_of_a_224th() -> None:
    grey = np.full((448, 500, 3), 128, np.uint8)
    noisy = corrupted("gaussian-noise", grey).astype(float) - 128
    assert noisy.std() / 255 == pytest.approx(0.12, rel=0.02) and abs(noisy.mean()) < 0.5
    assert (noisy[0::2, 0::2][:224] == noisy[1::2, 0::2][:224]).all()  # two pixels a grain
    small = corrupted("gaussian-noise", np.full((32, 40, 3), 128, np.uint8)).astype(int)
    assert len(np.unique(small)) > 50  # one pixel a grain
    assert (corrupted("gaussian-noise", grey) == corrupted("gaussian-noise", grey)).all()
    assert (corrupted("gaussian-noise", grey) != corrupted("gaussian-noise", grey, 1)).any()


def test_blur_brightness_and_jpeg_do_what_they_say() -> None:
    edge = np.zeros((224, 224, 3), np.uint8)
    edge[:, 112:] = 255
    step = corrupted("blur", edge)[100, :, 0].astype(float) / 255
    positions = np.arange(224) + 0.5 - 112  # an edge becomes the normal distribution with a deviation of 2 pixels
    inside = np.diff(step, prepend=0.0)
    assert np.sqrt((inside * (positions - 0.5) ** 2).sum()) == pytest.approx(2.0, abs=0.1)
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 100
    assert corrupted("brightness", red)[0, 0].tolist() == [151, 0, 0]  # 100 + .2 · 255
    assert corrupted("brightness", np.zeros((8, 8, 3), np.uint8))[0, 0].tolist() == [51, 51, 51]
    assert corrupted("brightness", np.full((8, 8, 3), 250, np.uint8))[0, 0].tolist() == [255, 255, 255]
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    again = np.asarray(decode_image(corrupted("jpeg", picture)), float)
    assert 20 < np.abs(again - picture).mean() < 100


def test_texts_keep_their_ends_their_words_or_most_of_them() -> None:
    text = " ".join(["abcdefgh", "on"] * 500)
    typos = corrupted("typos", text).split()
    changed = [word for word in typos if word not in ("abcdefgh", "on")]
    assert 60 < len(changed) < 140  # a fifth of 500
    assert all(sorted(word) == list("abcdefgh") and word[0] == "a" and word[-1] == "h" for word in changed)
    assert corrupted("typos", "it is a dog, no?") == "it is a dog, no?"
    assert corrupted("upper-case", "Straße 5") == "STRASSE 5"
    assert 850 < len(corrupted("dropped-words", text).split()) < 950
    assert all(corrupted("dropped-words", "one", seed) == "one" for seed in range(50))
    assert corrupted("dropped-words", "") == ""


def test_sound_gets_noise_at_its_ratio_and_less_of_itself() -> None:
    sound = Waveform(np.sin(np.arange(16_000) / 7).astype(np.float32), 16_000)
    noise = corrupted("white-noise", sound).samples - sound.samples
    ratio = 10 * np.log10(np.square(sound.samples).mean() / np.square(noise).mean())
    assert ratio == pytest.approx(20, abs=0.2)
    assert corrupted("gain", sound).samples == pytest.approx(sound.samples / 10)
    silence = Waveform(np.zeros(100, np.float32), 16_000)
    assert not corrupted("white-noise", silence).samples.any()


def test_of_a_pair_the_part_is_corrupted_that_it_is_for() -> None:
    image, random = np.full((32, 32, 3), 9, np.uint8), np.random.default_rng(0)
    found = TABLE["brightness"].corrupted((image, "a text"), "image-text", random)
    assert found[1] == "a text" and (found[0] != image).all()  # type: ignore[index]
    found = TABLE["upper-case"].corrupted((image, "a text"), "image-text", random)
    assert found[0] is image and found[1] == "A TEXT"  # type: ignore[index]
    assert TABLE["upper-case"].corrupted(("a", "b"), "text", random) == ("A", "B")


def test_a_task_has_the_corruptions_of_its_inputs() -> None:
    assert {one.of for one in corruptions_for("image-text", True)} == {"image", "text"}
    assert [one.name for one in corruptions_for("audio-regression", True)] == ["white-noise", "gain"]
    assert [one.name for one in corruptions_for("image-features", ["jpeg", "typos"])] == ["jpeg"]
    assert corruptions_for("image-classification", False) == []
    with pytest.raises(ValidationError):
        ValidateConfig.model_validate({"robustness": ["fog"]})


# --- the gate -------------------------------------------------------------------------------------


def outputs(wrong: int, samples: int = 600) -> Outputs:
    """Logits that are wrong on the first `wrong` samples, all of class 0."""
    logits = np.tile(np.array([[1.0, 0.0]], np.float32), (samples, 1))
    logits[:wrong] = (0, 1)
    return Outputs(logits)


def gate_of(wrong: dict[str, int], margin: float = 0.05, rule: str = "proven") -> Any:
    """The gate of a candidate with so many answers wrong by corruption, where the reference has none."""
    found = {name: (outputs(count), outputs(0)) for name, count in wrong.items()}
    table = robustness_table(found, np.zeros(600, np.int64), SINGLE, margin)
    json.dumps(table, allow_nan=False)
    return robustness_gate("x", table, margin, "accuracy", rule)


@pytest.mark.parametrize(
    ("wrong", "verdict", "named"),
    [
        ({"blur": 0, "jpeg": 3}, "pass", "jpeg"),
        ({"blur": 0, "jpeg": 28}, "inconclusive", "jpeg"),
        ({"blur": 60, "jpeg": 28}, "fail", "blur"),
        ({"blur": 36}, "inconclusive", "blur"),  # 6 %, which chance alone may be
        ({"blur": 40}, "fail", "blur"),
        ({"blur": 40, "jpeg": 0, "noise": 0, "brightness": 0}, "inconclusive", "blur"),  # of four one looks bad
    ],
)
def test_harm_must_be_shown_and_the_margin_proven_after_correction(
    wrong: dict[str, int], verdict: str, named: str
) -> None:
    gate = gate_of(wrong)
    assert gate.verdict == verdict and f"under {named}" in gate.message
    assert gate.measured == pytest.approx(wrong[named] / 600)


def test_the_observed_rule_takes_the_largest_drop() -> None:
    assert gate_of({"blur": 28, "jpeg": 3}, rule="observed").verdict == "pass"
    assert gate_of({"blur": 31, "jpeg": 3}, rule="observed").verdict == "fail"


def test_no_corruption_nan_and_no_sample_are_no_pass() -> None:
    empty = robustness_table({}, np.zeros(600, np.int64), SINGLE, 0.05)
    broken = robustness_table({"blur": (Outputs(None, "NaN"), outputs(0))}, np.zeros(600, np.int64), SINGLE, 0.05)
    for table, why in ((empty, "no corruption changed an input"), (broken, "blur: NaN")):
        gate = robustness_gate("x", table, 0.05, "accuracy", "proven")
        assert gate.verdict == "error" and why in gate.message
    assert "robustness drop" not in {one.name for one in check(entry(), ValidateConfig(), SCENE)}
    found = {one.name: one.verdict for one in check(entry(robustness=empty), ValidateConfig(), SCENE)}
    assert found["robustness drop"] == "error"


@pytest.mark.parametrize("binary", [True, False])
def test_the_margin_is_shown_to_be_kept_exactly_where_the_interval_is_below_it(binary: bool) -> None:
    random = np.random.default_rng(3)
    wanted = (random.random(300) < 0.9).astype(float) if binary else random.random(300)
    found = np.where(random.random(300) < 0.05, 1 - wanted, wanted)
    drop_high = -paired_interval(found, wanted, 0.90)[0]
    for margin, shown in ((drop_high + 1e-4, True), (drop_high - 1e-4, False)):
        assert (keep_p_value(found, wanted, margin) < 0.05) == shown
        assert keep_p_value(found, wanted, margin) + drop_p_value(found, wanted, margin) == pytest.approx(1)
    assert keep_p_value(np.ones(1), np.ones(1), 0.5) == 1


# --- the stage ------------------------------------------------------------------------------------


def scale(model: onnx.ModelProto) -> None:
    edit_weight(model, HEAD, lambda weight: weight * 1.01)


def test_a_run_of_the_stage_has_reference_and_candidates_under_the_same_corruptions(tmp_path: Path) -> None:
    config = ValidateConfig.model_validate(
        {
            "robustness": ["gaussian-noise", "brightness"],
            "robustness_samples": 24,
            "latency_calls": 20,
            "drift_samples": 0,
            "gates": {"min_samples": 24, "max_metric_drop": 0.2, "min_agreement_int8": 0.8, "max_robustness_drop": 0.4},
        }
    )
    inputs = made() | {"quantize": with_candidate(tmp_path / "quantize", scale)}
    result = Validate().run(context_of(tmp_path / "out", inputs), config)
    found = result.measurements["robustness"]
    json.dumps(found, allow_nan=False)
    assert found["samples"] == 24 and [one["name"] for one in found["corruptions"]] == ["gaussian-noise", "brightness"]
    assert all(not one["inert"] and 0 <= one["reference"] <= 1 for one in found["corruptions"])
    fp32 = result.measurements["candidates"][0]
    assert [one["drop"] for one in fp32["robustness"]["corruptions"]] == [0, 0]  # the same samples, and the same noise
    gates = [one for one in result.gates if one.name == "robustness drop"]
    assert [one.subject for one in gates] == ["onnx-fp32", "onnx-fp16", "onnx-changed"]
    assert all(one.verdict == "pass" for one in gates), [one.message for one in gates]


def test_capitals_change_nothing_where_the_tokenizer_lower_cases(tmp_path: Path) -> None:
    from stages.validate.robustness import measure_robustness

    inputs = made("text-classification")
    context = context_of(tmp_path, inputs, "text-classification", test_split("text-classification", 24))
    config = ValidateConfig(robustness=("upper-case", "dropped-words"))
    checkpoint = load_checkpoint(inputs["merge-lora"].folder / "checkpoint")
    candidates = accepted_candidates(context, config.providers)[:1]
    reference = all_outputs(context, config, checkpoint, [])["pytorch"]
    entries: list[dict[str, Any]] = [{"name": candidates[0].name, "problem": ""}]
    targets = np.arange(24) % 3
    found = measure_robustness(context, config, checkpoint, candidates, reference, targets, entries)
    assert found is not None
    inert = {one["name"]: one["inert"] for one in found["corruptions"]}
    judged = [one["name"] for one in entries[0]["robustness"]["corruptions"]]
    lower = checkpoint.processing.arrays(["a b"])["input_ids"].tolist()
    upper = checkpoint.processing.arrays(["A B"])["input_ids"].tolist()
    assert inert == {"upper-case": lower == upper, "dropped-words": False}
    assert sorted(judged) == sorted(name for name, nothing in inert.items() if not nothing)
