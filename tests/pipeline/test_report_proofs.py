"""The sections of the report that say what the gates catch and where the error comes from."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from pipeline.report import svg
from pipeline.report.html import render_html
from pipeline.report.markdown import MAX_CHARACTERS, render_markdown
from pipeline.report.terminal import print_summary
from tests.pipeline.report_run import passing_run

HOSTILE = "<script>alert(1)</script> | **x** @you ::error::"


def defect(name: str, status: str, judged: dict[str, list[str]], reason: str = "") -> dict[str, Any]:
    numbers = {"relative_error": 0.25, "agreement": 0.5}
    return {"name": name, "what": f"what {name} is", "status": status, "judged": judged, "reason": reason,
            "numbers": numbers, "place": "graph", "seen": "here", "moved": 1.0}  # fmt: skip


def numbers(error: float | None, metric: float = 0.9) -> dict[str, Any]:
    return {"relative_error": error, "sqnr_db": 40.0, "agreement": 0.99, "metric": metric, "metric_difference": -0.01,
            "max_abs_error": error, "kl": None, "cosine": 1.0, "problem": ""}  # fmt: skip


def proven_run(name: str = "BGR") -> dict[str, Any]:
    run = passing_run()
    (validate,) = [one for one in run["stages"] if one["name"] == "validate"]
    validate["measurements"]["self_test"] = {
        "problem": "", "samples": 256, "caught": 1, "counted": 2, "score": 0.5, "false_alarms": 0, "seconds": 12.0,
        "by_precision": {"fp32": [2, 2], "int8": [1, 2]}, "outside": [0, 1],
        "defects": [
            defect("outputs halved", "caught", {"fp32": ["SQNR"], "int8": ["SQNR"]}),
            defect(name, "escaped", {"fp32": ["output error"], "int8": []}),
            defect("nearest resize", "escaped", {"fp32": [], "int8": []}) | {"place": "preprocessing"},
            defect("wrong sample rate", "not applicable", {}, "there is no audio"),
        ],
        "controls": [defect("written anew", "escaped", {"fp32": [], "int8": []})],
    }  # fmt: skip
    layer = {
        "first": {"node": "node_Conv_1", "operator": "Conv", "module": f"stem.{name}", "own": 0.7, "tensor": "t"},
        "limit": 0.3, "missing_outputs": [], "largest": [],
    }  # fmt: skip
    validate["measurements"]["drift"] = {
        "samples": 256, "start": "adapted",
        "steps": [
            {"name": "adapted", "after": None, "status": "measured", "from_before": None, "from_start": numbers(0.0)},
            {"name": "merged", "after": "adapted", "status": "measured", "from_before": numbers(1e-6),
             "from_start": numbers(1e-6)},
            {"name": "onnx-int8", "after": "merged", "status": "measured", "from_before": numbers(0.031),
             "from_start": numbers(0.032)},
            {"name": "onnx-int8-rtx", "after": "onnx-int8", "status": "UNPROVEN", "from_before": None,
             "from_start": None},
        ],
        "broken": [{"candidate": "onnx-int8", "step": "onnx-int8", "gates": ["SQNR"], "layer": layer, "reason": ""}],
        "reproduce": {"script": "validate/reproduce/reproduce.py", "samples": 8, "steps": []},
    }  # fmt: skip
    return run


def test_what_was_not_caught_comes_first_with_the_precision_it_hides_in() -> None:
    page = render_html(proven_run())
    table = page[page.index('id="self-test"') :]
    places = [table.index(name) for name in ("BGR", "outputs halved", "wrong sample rate", "nearest resize")]
    assert places == sorted(places) and "would not be seen" in table[places[-1] :]
    assert "0 of 1 would be seen if a device prepared its inputs otherwise" in table
    assert "as fp32 by output error; not as int8" in table
    assert "1 of 2 injected defects caught (50.0%), as fp32 2 of 2, as int8 1 of 2" in table
    assert "0 of 1 unchanged controls red" in table and "there is no audio" in table


def test_a_control_that_is_red_is_a_false_alarm() -> None:
    run = proven_run()
    (validate,) = [one for one in run["stages"] if one["name"] == "validate"]
    validate["measurements"]["self_test"]["controls"][0]["status"] = "caught"
    assert "false alarm" in render_html(run) and "false alarm" not in render_html(proven_run())


def test_the_waterfall_shows_each_step_and_calls_an_engine_unproven() -> None:
    page = render_html(proven_run())
    section = page[page.index('id="drift"') :]
    assert section.count("<svg") >= 1 and "UNPROVEN" in section
    assert "onnx-int8: adds 0.031" in section and "from the start 0.032" in section
    assert "the first layer is node_Conv_1 (Conv, module stem.BGR), which adds 0.7" in section
    assert "validate/reproduce/reproduce.py" in section


def test_engines_that_ran_here_are_not_said_to_have_run_nowhere() -> None:
    run = proven_run()
    (validate,) = [one for one in run["stages"] if one["name"] == "validate"]
    validate["measurements"]["engine_runs"] = [{"engine": "broken", "problem": "it does not load"}]
    assert "Engines have run on no device here" in render_html(run)
    validate["measurements"]["engine_runs"].append({"engine": "onnx-int8-rtx", "problem": ""})
    page = render_html(run)
    assert "Run here on the whole test split: onnx-int8-rtx;" in page and "on no device here" not in page


def test_both_are_in_markdown_and_on_the_terminal() -> None:
    text = render_markdown(proven_run())
    assert "### What the gates catch" in text and "### Where the error comes from" in text
    assert "UNPROVEN" in text and "Conv" in text.split("Error by step")[0]
    assert len(text) < MAX_CHARACTERS
    stream = io.StringIO()
    print_summary(proven_run(), Console(file=stream, width=120))
    printed = stream.getvalue()
    assert "✗ not caught" in printed and "1 of 2 injected defects caught" in printed


def test_without_them_there_is_no_section() -> None:
    page = render_html(passing_run())
    assert 'id="drift"' not in page and 'id="self-test"' not in page


def test_hostile_names_stay_text() -> None:
    page, text = render_html(proven_run(HOSTILE)), render_markdown(proven_run(HOSTILE))
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "<script>" not in text and "@you" not in text


@pytest.mark.parametrize("value", [None, 1, "x", [], {}, [1], {"a": 1}, float("nan")])
@pytest.mark.parametrize("key", ["self_test", "drift"])
def test_any_value_may_be_missing_or_odd(key: str, value: object) -> None:
    run = proven_run()
    (validate,) = [one for one in run["stages"] if one["name"] == "validate"]
    kept = validate["measurements"][key]
    for part in (*kept, None):
        validate["measurements"][key] = value if part is None else kept | {part: value}
        render_html(run)
        render_markdown(run)
        print_summary(run, Console(file=io.StringIO()))


def test_bars_are_as_long_as_the_logarithm_of_their_error() -> None:
    falls = [svg.Fall(f"step {power}", 10.0**-power, None, "ran", ("", "", "")) for power in (1, 3, 5)]
    drawn = svg.waterfall([*falls, svg.Fall("none", None, None, "ran")], ("", "", ""), "x", str, "error")
    widths = [float(part.split('"')[0]) for part in drawn.split('width="')[2:]]
    assert len(widths) == 3
    assert widths[0] - widths[1] == pytest.approx(widths[1] - widths[2], abs=2.1)
    assert widths[0] > widths[1] > widths[2] > 0
