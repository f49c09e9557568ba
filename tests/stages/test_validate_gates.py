"""The gates beside the outputs': slices, calibration, other metrics, waivers, limits, noise and memory."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from models.errors import RuntimeInferenceError
from models.runtimes.peak_memory import peak_memory_of
from models.tasks import TASKS, task_of
from stages.data.splits import Example
from stages.gate import GateResult
from stages.validate import Validate, ValidateConfig
from stages.validate.bootstrap import further_drops, resampled
from stages.validate.calibration import calibration, calibration_error, gaps_of
from stages.validate.config import GatesConfig
from stages.validate.further import plan_in_words, planned_samples
from stages.validate.gates import Scene, check, choice_gates, limit_results, over_limits, settled
from stages.validate.noise import NoiseFloor
from stages.validate.slices import slice_gates, slice_notes, slice_table, slices_of
from stages.validate.waivers import WaiverConfig, waived, waiver_notes
from tests.stages.chain import LABELS, SAMPLES, context_of, made, test_split, with_candidate
from tests.stages.test_validate import HEAD, SCENE, edit_weight, entry

SINGLE = task_of("image-classification")
DIGEST = "d" * 64


def verdicts(results: list[GateResult]) -> dict[str, str]:
    return {one.name: one.verdict for one in results}


def gates(**gates: Any) -> ValidateConfig:
    return ValidateConfig(gates=GatesConfig(**gates))


# --- the metric -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        ([-0.009, 0.0], "pass"),
        ([-0.011, -0.002], "inconclusive"),
        ([-0.03, -0.011], "fail"),
        ([float("nan"), 0.0], "error"),
    ],
)
def test_non_inferiority_is_proven_refuted_or_open(bounds: list[float], verdict: str) -> None:
    (drop,) = [
        one for one in check(entry(metric_difference_one_sided=bounds), gates(), SCENE) if one.name == "accuracy drop"
    ]
    assert drop.verdict == verdict


def test_an_open_drop_says_how_many_samples_would_tell() -> None:
    open_ = entry(metric_difference_one_sided=[-0.02, 0.01], difference_variance=0.05)
    (drop,) = [one for one in check(open_, gates(), SCENE) if one.name == "accuracy drop"]
    assert "0.01 takes about 4280" in drop.message


@pytest.mark.parametrize(
    ("asked", "reference", "margin"),
    [
        ("mlperf-99", 0.8, 0.008),
        ("mlperf-99.9", 0.8, 0.0008),
        (0.98, 0.8, 0.01),  # max_metric_drop is stricter
        (0.995, 0.8, 0.004),
        ("mlperf-99", -0.1, None),
        ("mlperf-99", None, None),
    ],
)
def test_a_share_of_the_reference_is_a_margin(asked: Any, reference: float | None, margin: float | None) -> None:
    config = GatesConfig(min_metric_ratio=asked)
    assert config.margin_of(reference) == (None if margin is None else pytest.approx(margin))
    if margin is None:
        results = check(entry(), ValidateConfig(gates=config), Scene(1000, "R²", reference))
        assert verdicts(results)["R² drop"] == "error"


def test_a_share_above_one_is_refused() -> None:
    with pytest.raises(ValidationError, match="at most 1"):
        GatesConfig(min_metric_ratio=99)


@pytest.mark.parametrize(
    ("limits", "numbers", "found"),
    [
        ({"max_flip_rate": 0.01}, {}, {"flip rate": "pass"}),
        ({"max_flip_rate": 0.005}, {}, {"flip rate": "inconclusive"}),
        ({"max_flip_rate": 0.0005}, {}, {"flip rate": "fail"}),
        ({"max_ece_increase": 0.03}, {}, {"ECE increase": "pass"}),
        ({"max_ece_increase": 0.01}, {}, {"ECE increase": "inconclusive"}),
        ({"max_ece_increase": 0.01}, {"ece_increase": None, "ece_increase_interval": None}, {"ECE increase": "error"}),
        ({"max_nll_increase": 0.001}, {"nll_increase_interval": [0.002, 0.02]}, {"NLL increase": "fail"}),
        ({"max_drops": {"macro F1": 0.02}}, {"further_drops": {"macro F1": {"drop": 0, "interval": [-0.01, 0.01]}}},
         {"macro F1 drop": "pass"}),
        ({"max_drops": {"macro F1": 0.02}}, {"further_drops": None}, {"macro F1 drop": "error"}),
    ],
)  # fmt: skip
def test_what_is_asked_for_is_held_by_its_bound(limits: dict, numbers: dict, found: dict[str, str]) -> None:
    assert found.items() <= verdicts(check(entry(**numbers), gates(**limits), SCENE)).items()
    assert not found.keys() & verdicts(check(entry(**numbers), gates(), SCENE)).keys()


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "disturbed", "found"),
    [
        ({"max_latency_ms": 1.5}, False, {"p95 latency": "fail"}),
        ({"max_latency_ms": 1.5}, True, {"p95 latency": "inconclusive"}),
        ({"max_latency_ms": 2.5}, True, {"p95 latency": "pass"}),  # slowed, and fast enough all the same
        ({"min_speedup": 1.5}, False, {"speed-up": "pass"}),
        ({"min_speedup": 2.0}, False, {"speed-up": "inconclusive"}),
        ({"min_speedup": 3.0}, False, {"speed-up": "fail"}),
        ({"min_speedup": 1.5}, True, {"speed-up": "inconclusive"}),
        ({"max_memory_bytes": 999}, False, {"peak memory": "fail"}),
        ({"max_memory_bytes": 1000}, True, {"peak memory": "pass"}),
    ],
)
def test_limits_on_a_busy_machine_are_open_where_that_matters(
    limits: dict, disturbed: bool, found: dict[str, str]
) -> None:
    assert verdicts(limit_results(entry(), gates(**limits), disturbed)) == found


def test_a_busy_machine_excuses_nothing() -> None:
    """A best turn above the limit is above it without the others too, and what is doubted is never let through."""
    slow = entry(turns_ms=[1.6, 1.9])
    assert verdicts(limit_results(slow, gates(max_latency_ms=1.5), True)) == {"p95 latency": "fail"}
    assert verdicts(limit_results(slow, gates(max_latency_ms=1.7), True)) == {"p95 latency": "inconclusive"}
    lenient = ValidateConfig(on_inconclusive="pass", gates=GatesConfig(max_latency_ms=1.7, min_speedup=1.5))
    latency, speed = limit_results(slow, lenient, True)
    assert latency.stops and speed.stops and len(over_limits(slow, lenient, True)) == 2
    excused = lenient.model_copy(update={"waivers": (waiver(gate="p95 latency"), waiver(gate="speed-up"))})
    assert over_limits(slow, excused, True) == []


def test_no_candidate_known_to_keep_the_limits_is_inconclusive_and_none_that_keeps_them_fails() -> None:
    for speedup, verdict in ((2.0, "inconclusive"), (3.0, "fail")):
        config, slow = gates(min_speedup=speedup), entry()
        slow["over_limits"] = over_limits(slow, config)
        assert slow["over_limits"]
        assert verdicts(choice_gates([slow], None, config)) == {"a candidate can ship": verdict}
    lenient = ValidateConfig(on_inconclusive="pass", gates=GatesConfig(min_speedup=2.0))
    assert over_limits(entry(), lenient) == []


# --- waivers --------------------------------------------------------------------------------------


def waiver(**changes: Any) -> WaiverConfig:
    values = {"gate": "agreement", "subject": "x", "owner": "Ada", "reason": "ties", "digest": DIGEST,
              "expires": datetime.date(2099, 12, 31)}  # fmt: skip
    return WaiverConfig.model_validate(values | changes)


@pytest.mark.parametrize(
    ("change", "numbers", "holds", "note"),
    [
        ({}, {"agreement": 0.5}, True, "lets it through (Ada, until 2099-12-31): ties"),
        ({"expires": "2020-01-01"}, {"agreement": 0.5}, False, "expired on 2020-01-01 and does nothing"),
        ({"digest": "e" * 64}, {"agreement": 0.5}, False, f"than were measured ({DIGEST}), and does nothing"),
        ({"subject": "y"}, {"agreement": 0.5}, False, "is about nothing that was checked"),
        ({"gate": "SQNR"}, {"agreement": 0.5}, False, "is not needed: the gate passed"),
        ({}, {"agreement": None}, False, "there is no evidence, and that cannot be waived"),
    ],
)
def test_a_waiver_holds_for_one_gate_of_the_same_bytes_until_its_day(
    change: dict, numbers: dict, holds: bool, note: str
) -> None:
    config = ValidateConfig(waivers=(waiver(**change),))
    results = settled(check(entry(**numbers), config, SCENE), config, DIGEST)
    (gate,) = [one for one in results if one.name == "agreement"]
    assert not gate.passed  # the verdict stays
    assert gate.stops is not holds
    (said,) = waiver_notes(config.waivers, results, {"x": DIGEST})
    assert note in said


def test_a_waiver_of_a_run_elsewhere_and_of_a_limit_is_said_to_hold() -> None:
    elsewhere, limit = waiver(subject="x on cuda"), waiver(gate="p95 latency")
    config = ValidateConfig(waivers=(elsewhere, limit), gates=GatesConfig(max_latency_ms=1.5))
    results = settled(check(entry(name="x on cuda", agreement=0.5), config, SCENE), config, DIGEST)
    slow = entry(digest=DIGEST)
    assert over_limits(slow, config) == []
    said = waiver_notes(config.waivers, [*results, *limit_results(slow, config, False)], {"x on cuda": DIGEST})
    assert [" lets it through (Ada" in line for line in said] == [True, True]
    other = waiver(subject="x on cuda", digest="e" * 64)
    (line,) = waiver_notes((other,), results, {"x on cuda": DIGEST})
    assert "is for other bytes" in line


def test_the_last_day_counts_and_the_next_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    one, failed = waiver(), GateResult("agreement", "x", "fail", 0.5, "at least", 0.9, "", "")
    config = ValidateConfig(waivers=(one,))
    digests = set()
    for day, holds in ((one.expires, True), (one.expires + datetime.timedelta(1), False)):
        monkeypatch.setattr("stages.validate.waivers.today", lambda day=day: day)
        assert bool(waived(failed, (one,), DIGEST).waived) is holds
        digests.add(json.dumps(config.outside()))
    assert len(digests) == 2  # what was validated under the waiver is stale


@pytest.mark.parametrize(
    "change",
    [{"gate": "acuracy drop"}, {"gate": "comparable outputs"}, {"owner": ""}, {"digest": "abc"}, {"expires": "soon"}],
)
def test_a_waiver_that_cannot_hold_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        waiver(**change)


def test_only_what_is_inconclusive_is_let_through() -> None:
    config = ValidateConfig(on_inconclusive="pass")
    numbers = {"metric_difference_one_sided": [-0.02, 0.01], "agreement": 0.5, "sqnr_db": None}
    results = {one.name: one for one in settled(check(entry(**numbers), config, SCENE), config, DIGEST)}
    assert not results["accuracy drop"].stops and results["accuracy drop"].verdict == "inconclusive"
    assert results["agreement"].stops and results["SQNR"].stops


# --- slices ---------------------------------------------------------------------------------------


def sliced(lost: int, size: int, others: int, **options: Any) -> dict[str, Any]:
    """A table in which the slice `label=bad` of `size` samples loses `lost`, and ten others of `others` nothing."""
    before = np.ones(size + 10 * others)
    scores = np.where(np.arange(len(before)) < lost, 0.0, 1.0)
    slices = {"label=bad": list(range(size))}
    slices |= {f"label={one}": list(range(size + one * others, size + (one + 1) * others)) for one in range(10)}
    return slice_table(scores, before, slices, **{"margin": 0.05, "minimum": 50, "critical": {}} | options)


@pytest.mark.parametrize(
    ("lost", "size", "verdict"),
    [(0, 100, "pass"), (10, 100, "pass"), (25, 100, "fail"), (8, 20, "pass")],  # the last is too small to be judged
)
def test_harm_to_a_slice_must_be_shown(lost: int, size: int, verdict: str) -> None:
    table = sliced(lost, size, 100)
    (gate,) = slice_gates("x", table, 0.05, "accuracy", asked=False)
    assert gate.verdict == verdict
    assert ("label=bad" in gate.message) is (verdict == "fail" or lost == 10)
    assert (table["judged"], table["too_small"]) == ((11, 0) if size >= 50 else (10, 1))


@pytest.mark.parametrize(
    ("lost", "margin", "verdict"), [(0, 0.05, "pass"), (3, 0.05, "inconclusive"), (25, 0.05, "fail"), (3, 0.1, "pass")]
)
def test_a_critical_slice_must_be_proven(lost: int, margin: float, verdict: str) -> None:
    table = sliced(lost, 100, 100, critical={"label=bad": margin})
    results = slice_gates("x", table, 0.05, "accuracy", asked=False)
    assert {one.subject: one.verdict for one in results} == {"x": "pass", "x, label=bad": verdict}
    config = ValidateConfig(critical_slices={"label=bad": margin}, gates=GatesConfig(max_slice_drop=None))
    alone = [one for one in check(entry(slices=table), config, SCENE) if one.name == "slice drop"]
    assert [one.verdict for one in alone] == [verdict]  # held also where the others are not


def test_a_critical_slice_that_is_not_there_is_no_evidence_and_small_slices_leave_it_open() -> None:
    missing = slice_gates("x", sliced(0, 100, 100, critical={"label=gone": 0.1}), 0.05, "accuracy", asked=False)
    assert {one.subject: one.verdict for one in missing} == {"x": "pass", "x, label=gone": "error"}
    small = sliced(0, 20, 20)
    assert slice_gates("x", small, 0.05, "accuracy", asked=False) == []
    (note,) = slice_notes([{"slices": None}, {"slices": small}])
    assert "11 have fewer samples" in note and slice_notes([{"slices": sliced(0, 100, 20)}]) == []
    for named in ({"slices": ("site",)}, {"critical_slices": {"label=bad": 0.5}}):
        table = sliced(0, 20, 20, critical=named.get("critical_slices", {}))
        found = check(entry(slices=table), ValidateConfig.model_validate(named), SCENE)
        (gate,) = [one for one in found if one.name == "slice drop" and one.subject == "x"]
        assert gate.verdict == "inconclusive" and "have too few samples" in gate.message
    nothing = {"judged": 0, "too_small": 0, "slices": []}
    assert [one.verdict for one in slice_gates("x", nothing, 0.05, "accuracy", asked=True)] == ["error"]


def test_a_column_cannot_pass_for_the_classes() -> None:
    with pytest.raises(ValidationError, match="rename the column"):
        ValidateConfig(slices=("site", "label"))


def test_slices_are_classes_and_values_of_columns() -> None:
    examples = [
        Example("a", 0, "1", "1", (("language", "en"),)),
        Example("b", 1, "2", "2", (("language", "de"),)),
        Example("c", 1, "3", "3", (("language", "en"),)),
    ]
    assert slices_of(examples, ("shirt", "coat"), "text-classification") == {
        "label=shirt": [0], "label=coat": [1, 2], "language=en": [0, 2], "language=de": [1],
    }  # fmt: skip
    assert set(slices_of(examples, (), "text-regression")) == {"language=en", "language=de"}
    several = [Example("a", (0, 1), "1", "1"), Example("b", (1,), "2", "2")]
    assert slices_of(several, ("x", "y"), "text-multilabel") == {"label=x": [0], "label=y": [0, 1]}


# --- calibration and other metrics ----------------------------------------------------------------


def logits_of(samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of three classes with labels drawn from their own probabilities: calibrated by construction."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (samples, 3)).astype(np.float32)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return logits, (random.uniform(size=(samples, 1)) > shares.cumsum(1)).sum(1).clip(max=2)


def test_the_calibration_error_is_that_of_its_definition() -> None:
    """Bin by bin, as Guo et al. 2017 write it."""
    from models.tasks.single_label import probabilities_from_logits

    logits, targets = logits_of(500)
    shares = probabilities_from_logits(logits)
    confidence, right = shares.max(1), shares.argmax(1) == targets
    expected = 0.0
    for index in range(15):
        inside = (confidence >= index / 15) & (confidence < (index + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration_error(gaps_of(logits, targets)) == pytest.approx(expected, abs=1e-9)


def test_halved_logits_are_worse_calibrated_and_rounding_is_not() -> None:
    logits, targets = logits_of(2000)
    halved = calibration(logits / 2, logits, targets, SINGLE, 0)
    assert halved["reference_ece"] < 0.03 < halved["ece_increase_interval"][0] < halved["ece_increase"]
    assert 0 < halved["nll_increase_interval"][0] < halved["nll_increase"]
    rounded = calibration(logits.astype(np.float16).astype(np.float32), logits, targets, SINGLE, 0)
    assert abs(rounded["ece_increase"]) < 1e-3 and abs(rounded["nll_increase"]) < 1e-4
    same = calibration(logits, logits, targets, SINGLE, 0)
    assert same["ece_increase"] == 0 and same["ece_increase_interval"][1] == pytest.approx(2.706 / 2003, rel=1e-3)
    other = calibration(logits, logits, targets, task_of("image-regression"), 0)
    assert set(other.values()) == {None}


@pytest.mark.parametrize("name", TASKS)
def test_the_other_metrics_of_a_task_are_those_that_it_names(name: Any) -> None:
    task, random = task_of(name), np.random.default_rng(0)
    kinds: dict[str, list[Any]] = {
        "multilabel": [(index % 3, 3) for index in range(40)],
        "regression": list(map(float, range(40))),
        "text": [str(index) for index in range(40)],
    }
    labels = kinds.get(name.split("-")[1], [index % 4 for index in range(40)])
    targets = task.targets(labels, 4)
    outputs = random.normal(size=(40, 1 if "regression" in name else 4)).astype(np.float32)
    found = task.more_metrics(outputs, targets)
    assert found.keys() == task.further_metrics.keys() and set(task.further_metrics.values()) <= {1, -1}
    for metric, values in task.more_scores(outputs, targets).items():
        assert values.shape == (40,) and values.mean() == pytest.approx(found[metric])


def test_the_bootstrap_of_a_mean_is_near_students_interval() -> None:
    from stages.statistics import paired_interval

    random = np.random.default_rng(0)
    losses = random.exponential(0.1, 300)
    drop, low, high = resampled(lambda rows: float(losses[rows].mean()), 300, 0)
    wanted = paired_interval(losses, np.zeros(300), 0.90)
    assert drop == pytest.approx(losses.mean())
    assert (low, high) == pytest.approx(wanted, abs=0.003)
    assert resampled(lambda rows: float(losses[rows].mean()), 300, 0)[1] == low  # seeded


def test_a_statistic_that_no_resample_changes_is_no_proof() -> None:
    """BCa is NaN where no pair differs, and percentiles have no width: the bound is that of no flip."""
    drop, low, high = resampled(lambda rows: 0.0, 300, 0)
    assert drop == 0 and high == pytest.approx(2.706 / 302.706, rel=1e-3) and low == -high
    assert np.isnan(resampled(lambda rows: 0.0, 1, 0)[1])


def test_losses_count_as_drops_whatever_the_direction_of_a_metric() -> None:
    numbers = np.linspace(-1, 1, 60, dtype=np.float32)[:, None]
    worse = numbers + np.random.default_rng(0).normal(0, 0.3, (60, 1)).astype(np.float32)
    drops = further_drops(worse, numbers, numbers, task_of("text-regression"), ("MAE", "Spearman"), 0)
    assert drops["MAE"]["drop"] == pytest.approx(float(np.abs(worse - numbers).mean()))
    assert drops["MAE"]["interval"][0] > 0 and 0 < drops["Spearman"]["interval"][0] < drops["Spearman"]["drop"]


# --- noise, memory, the whole stage ---------------------------------------------------------------


def test_the_tolerance_follows_the_noise_below_its_ceiling() -> None:
    quiet, loud = (NoiseFloor(32, noise, 0.0, None) for noise in (2e-6, 1e-3))
    assert quiet.tolerances({"fp32": 1e-3, "fp16": 2e-2})["fp32"][0] == pytest.approx(4e-5)
    assert loud.tolerances({"fp32": 1e-3, "fp16": 2e-2})["fp32"][0] == 1e-3
    assert NoiseFloor(32, 0.0, 0.0, 0.0).tolerances({"fp32": 1e-3, "fp16": 2e-2})["fp32"][0] == pytest.approx(2e-5)
    assert quiet.tolerances({"fp32": 1e-3, "fp16": 2e-2})["fp16"][0] == 2e-2


def test_the_plan_takes_the_flips_of_the_validation_split(tmp_path: Path) -> None:
    from stages.candidates import Candidate

    pilot = Candidate("a", "a.onnx", "int8", 1, measurements={"agreement": 0.95, "reference_metric": 0.9})
    plan = planned_samples(context_of(tmp_path, {}), ValidateConfig(), [pilot])
    assert (plan["pilot"], plan["needed"], plan["samples"]) == ("a", 4280, SAMPLES)
    assert "at a's flip rate of 5.00% on validation" in plan_in_words(plan)
    none = planned_samples(context_of(tmp_path, {}), gates(max_metric_drop=0.0), [])
    assert none["needed"] is None and "no number of samples" in plan_in_words(none)
    nothing_lost = planned_samples(context_of(tmp_path, {}), gates(min_metric_ratio=1.0), [pilot])
    assert (nothing_lost["margin"], nothing_lost["needed"]) == (0.0, None)


def test_peak_memory_is_that_of_a_process_of_its_own(tmp_path: Path) -> None:
    model = made()["export"].file("onnx-fp32.onnx")
    ballast = np.ones(300_000_000, np.uint8)  # what this process holds does not count
    peak = peak_memory_of(model, {"image": np.zeros((1, 32, 32, 3), np.uint8)}, 1)
    assert 20e6 < peak < 200e6 < len(ballast)
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(RuntimeInferenceError, match=r"memory of broken\.onnx failed; it said: "):
        peak_memory_of(tmp_path / "broken.onnx", {}, 1)


def test_a_run_of_the_stage_has_all_of_it(tmp_path: Path) -> None:
    """A candidate with halved logits, a waiver for what fails, columns, limits and another metric."""
    halved = with_candidate(tmp_path / "quantize", lambda model: edit_weight(model, HEAD, lambda weight: weight / 2))
    digest = halved.manifest["files"]["onnx-changed.onnx"]
    examples = tuple(
        Example(one.content, one.label, one.digest, one.origin, (("site", "ab"[index % 2]),))
        for index, one in enumerate(test_split("image-classification"))
    )
    floats = made()["export"].manifest["files"]
    memory = [  # of both: one of them at least is not chosen
        waiver(gate="peak memory", subject=name, digest=floats[f"{name}.onnx"]).model_dump()
        for name in ("onnx-fp32", "onnx-fp16")
    ]
    config = ValidateConfig.model_validate(
        {
            "latency_calls": 20,
            "slices": ["site"],
            "critical_slices": {f"label={LABELS[0]}": 0.3},
            "waivers": [waiver(gate="SQNR", subject="onnx-changed", digest=digest).model_dump(), *memory],
            "gates": {
                "min_samples": 24,
                "max_metric_drop": 0.1,
                "min_agreement_int8": 0.8,
                "min_slice_samples": 20,
                "max_slice_drop": 0.2,
                "max_drops": {"macro F1": 0.3},
                "max_flip_rate": 0.3,
                "max_memory_bytes": 300_000_000,
            },
        }
    )
    result = Validate().run(context_of(tmp_path / "out", made() | {"quantize": halved}, examples=examples), config)
    assert [f"{one.name} of {one.subject}: {one.message}" for one in result.gates if one.stops] == []
    (sqnr,) = [one for one in result.gates if one.subject == "onnx-changed" and not one.passed]
    assert (sqnr.name, sqnr.verdict) == ("SQNR", "fail") and "by Ada until 2099-12-31: ties" in sqnr.waived
    evidence = result.measurements
    json.dumps(evidence, allow_nan=False)
    changed = {one["name"]: one for one in evidence["candidates"]}["onnx-changed"]
    assert changed["passed"] and changed["excused"] == ["SQNR"] and changed["nll_increase"] is not None
    assert {one["name"] for one in changed["slices"]["slices"]} == {"label=a", "site=a", "site=b"}
    assert 20e6 < changed["peak_memory_bytes"] < 300e6
    floor = evidence["noise_floor"]
    assert floor["samples"] == 32 and 0 < floor["largest"] < 1e-4 and floor["fp64"] > 0
    assert any("waiver for SQNR of onnx-changed lets it through" in note for note in result.notes)
    assert sum("is not needed: the gate passed" in note for note in evidence["waivers"]) == 2
    assert any(note.startswith("to prove that a drop is at most 0.1 takes about") for note in result.notes)
