"""`pipeline diff`: what it finds between two runs, and what ends it with 1."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import run as cli
from pipeline.diff import compare, read_side
from tests.pipeline.report_run import broken_run, digest, gate, passing_run


def recorded(folder: Path, run: dict[str, Any], data: str = "the same") -> Path:
    """A run's folder with its record and the manifest of one stage."""
    run = copy.deepcopy(run)
    run["stages"][4]["measurements"]["data_fingerprint"] = digest(f"{data} test")
    run["config"].setdefault("validate", {"gates": {"max_metric_drop": 0.01}})
    (folder / "finetune").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(run))
    splits = {"train": digest(f"{data} train"), "test": digest(f"{data} test")}
    (folder / "finetune" / "manifest.json").write_text(json.dumps({"data_fingerprints": splits}))
    return folder


def changed(**metrics: float) -> dict[str, Any]:
    """The passing run with other metrics of its candidates (`_` for `-`) or of the reference (`pytorch`)."""
    run = passing_run()
    measured = run["stages"][4]["measurements"]
    entries = {one["name"]: one for one in measured["candidates"]} | {"pytorch": measured["reference"]}
    for name, metric in metrics.items():
        entries[name.replace("_", "-")]["metric"] = metric
    return run


def difference(
    tmp_path: Path, after: dict[str, Any], drop: float | None = None, data: str = "the same", allowed: bool = False
) -> Any:
    """From the passing run to `after`, as plain JSON."""
    before = recorded(tmp_path / "before", passing_run())
    found = compare(read_side(before), read_side(recorded(tmp_path / "after", after, data)), drop, allowed)
    return json.loads(json.dumps(found))


def test_a_run_does_not_differ_from_itself(tmp_path: Path) -> None:
    found = difference(tmp_path, passing_run())
    for key in ("config", "environment", "artifacts", "gates", "regressions", "notes"):
        assert found[key] == []
    assert [one["same"] for one in found["data"]] == [True, True]
    assert {one["change"] for one in found["numbers"]} == {0}
    assert found["max_metric_drop"] == 0.01


def test_every_kind_of_change_is_found(tmp_path: Path) -> None:
    after = changed(onnx_int8_static=0.85)
    after["config"]["finetune"] |= {"epochs": 7, "batch_size": 16}
    del after["config"]["seed"]
    after["environment"]["versions"] |= {"onnx": "1.24.0"}
    after["stages"][2]["digest"] = digest("other export")
    gates = after["stages"][4]["gates"]
    gates[0] = gate("max_metric_drop", "onnx-fp32", 0.5, "at most", 0.01)
    gates.append(gate("new", "onnx-fp32", 0.0, "at most", 0.01))
    gates.pop(1)
    after["stages"][4]["measurements"]["candidates"].pop(1)
    after["stages"][4]["measurements"]["reference"]["more_metrics"] = {"macro F1": 0.8}
    found = difference(tmp_path, after, data="other", allowed=True)
    assert found["config"] == [
        {"key": "seed", "before": 0, "after": None},
        {"key": "finetune.epochs", "before": 6, "after": 7},
        {"key": "finetune.batch_size", "before": None, "after": 16},
    ]
    assert {one["split"]: one["same"] for one in found["data"]} == {"test": False, "train": False}
    assert found["environment"] == [{"name": "onnx", "before": "1.23.2", "after": "1.24.0"}]
    assert [one["stage"] for one in found["artifacts"]] == ["export"]
    assert {one["gate"]: (one["before"], one["after"]) for one in found["gates"]} == {
        "validate: max_metric_drop [onnx-fp32]": ("pass", "fail"),
        "validate: min_agreement [onnx-fp32]": ("pass", None),
        "validate: new [onnx-fp32]": (None, "pass"),
    }
    numbers = {(one["subject"], one["name"]): one for one in found["numbers"]}
    assert numbers["onnx-int8-static", "metric"]["change"] == pytest.approx(-0.004)
    assert numbers["onnx-fp16", "metric"] | {"before": 0.857, "after": None} == numbers["onnx-fp16", "metric"]
    assert numbers["PyTorch", "macro F1"]["after"] == 0.8
    assert found["notes"] == ["the test examples are not the same: a difference of the metrics may be theirs"]
    assert [(one["subject"], one["reason"]) for one in found["regressions"]] == [
        ("validate: max_metric_drop [onnx-fp32]", "passed, and ends with fail now")
    ]


def test_metrics_of_other_test_examples_are_not_comparable(tmp_path: Path) -> None:
    for allowed, count in ((False, 1), (True, 0)):
        folder = tmp_path / str(allowed)
        found = difference(folder, passing_run(), data="other", allowed=allowed)["regressions"]
        assert len(found) == count and all("not comparable" in one["reason"] for one in found)


@pytest.mark.parametrize("loosened", ["before", "after"])
def test_the_stricter_allowance_holds(loosened: str, tmp_path: Path) -> None:
    """A change that loosens the margin is not judged by its own."""
    runs = {"before": passing_run(), "after": changed(onnx_int8_static=0.81)}
    runs[loosened]["config"]["validate"] = {"gates": {"max_metric_drop": 0.5}}
    before, after = (read_side(recorded(tmp_path / name, run)) for name, run in runs.items())
    found = compare(before, after, None)
    assert found["max_metric_drop"] == 0.01 and [one["subject"] for one in found["regressions"]] == ["onnx-int8-static"]
    assert compare(before, after, 0.5)["regressions"] == []


@pytest.mark.parametrize(
    ("metrics", "drop", "regressed"),
    [
        ({"onnx_int8_static": 0.844}, None, []),  # by 0.01, which binary fractions make a little more
        ({"onnx_int8_static": 0.8439}, None, ["onnx-int8-static"]),
        ({"onnx_int8_static": 0.8439}, 0.02, []),
        ({"onnx_int8_static": 0.8539}, 0.0, ["onnx-int8-static"]),
        ({"onnx_fp16": 0.5, "pytorch": 0.5}, None, ["PyTorch", "onnx-fp16"]),
        ({"onnx_fp32": 0.99}, 0.0, []),
    ],
    ids=str,
)
def test_a_metric_that_fell_too_far(
    metrics: dict[str, float], drop: float | None, regressed: list[str], tmp_path: Path
) -> None:
    found = difference(tmp_path, changed(**metrics), drop)
    assert [one["subject"] for one in found["regressions"]] == regressed
    assert all("fell by" in one["reason"] for one in found["regressions"])


def test_what_ships_is_compared_when_it_is_another_candidate(tmp_path: Path) -> None:
    after = changed(onnx_fp16=0.84)
    after["stages"][4]["measurements"]["chosen"] = "onnx-fp16"
    found = difference(tmp_path, after)
    assert found["chosen"] == {"before": "onnx-int8-static", "after": "onnx-fp16"}
    assert [one["subject"] for one in found["regressions"]] == ["what ships", "onnx-fp16"]
    assert found["regressions"][0] | {"before": 0.854, "after": 0.84} == found["regressions"][0]


@pytest.mark.parametrize("case", ["broken", "nothing chosen", "no metric", "another metric"])
def test_no_evidence_is_never_a_pass(case: str, tmp_path: Path) -> None:
    after = broken_run() if case == "broken" else passing_run()
    measured = after["stages"][4]["measurements"]
    if case == "nothing chosen":
        measured["chosen"] = None
    elif case == "no metric":
        measured["reference"]["metric"] = None
    elif case == "another metric":
        measured["metric_name"] = "samples F1"
    reasons = [one["reason"] for one in difference(tmp_path, after, 1.0)["regressions"]]
    assert reasons
    assert ("cannot be compared" if case == "another metric" else "nothing was measured in") in reasons[0]


def test_a_bundle_is_compared_by_the_evidence_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one is compared in test_tiny_run; here its evidence stands in a folder."""
    from contextlib import nullcontext

    class Opened:
        task = "image-classification"

        def file(self, name: str) -> Path:
            assert name == "evidence/evidence.json"
            return tmp_path / "evidence.json"

    gates = [gate("accuracy drop", "onnx-fp32", 0.0, "at most", 0.005)]
    evidence = passing_run()["stages"][4]["measurements"]
    evidence |= {"gates": gates, "metric_name": "accuracy", "data_fingerprint": digest("the same test")}
    (tmp_path / "evidence.json").write_text(json.dumps(evidence))
    monkeypatch.setattr("models.bundle.open_bundle", lambda _: nullcontext(Opened()))
    bundle = read_side(tmp_path / "model.tar")
    run = read_side(recorded(tmp_path / "run", passing_run()))
    found = compare(run, bundle, None)
    assert (found["config"], found["regressions"]) == (None, [])
    assert found["max_metric_drop"] == 0.005  # of the gate that held it
    assert {one["split"]: one["same"] for one in found["data"]} == {"test": True, "train": None}


def test_the_command_says_it_and_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = recorded(tmp_path / "before", passing_run())
    after = changed(onnx_int8_static=0.8)
    after["config"]["backbone"] = "::error::a \x1b[31mname\nof two lines"
    newer = recorded(tmp_path / "after", after)
    assert cli(["diff", str(before), str(before)]) == 0
    out = capsys.readouterr().out
    assert "configuration: the same" in out
    assert "no gate that passed is red, and no metric fell by more than 0.01" in out
    assert cli(["diff", str(before), str(newer)]) == 1
    out = capsys.readouterr().out
    assert "regressed: onnx-int8-static: accuracy fell by 0.054; 0.01 is allowed" in out
    assert "−5.4 pt" in out
    assert "\x1b" not in out and "::error" not in out
    assert cli(["diff", str(before), str(newer), "--json", "--max-metric-drop", "0.1"]) == 0
    assert json.loads(capsys.readouterr().out)["max_metric_drop"] == 0.1
    assert cli(["diff", str(before), str(tmp_path / "nowhere")]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_an_allowance_that_nobody_has_named_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = passing_run()
    run["config"]["validate"] = {}
    folder = recorded(tmp_path / "run", run)
    assert cli(["diff", str(folder), str(folder)]) == 2
    assert "--max-metric-drop" in capsys.readouterr().err
