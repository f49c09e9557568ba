"""What CI is told of a run: report.json, annotations, the in-toto statement, Markdown that fits."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import run as cli
from pipeline.report import FILES, contradictions, render, report_schema, write_reports
from pipeline.report.github import LIMIT, render_annotations
from pipeline.report.intoto import PREDICATE, STATEMENT, render_statement
from pipeline.report.markdown import MAX_CHARACTERS, cut, render_markdown
from pipeline.report.plain import render_plain
from tests.pipeline.report_run import broken_run, candidate, digest, gate_failed_run, passing_run

RUNS = {"passed": passing_run, "broken": broken_run, "gate": gate_failed_run}
COMMENT_CHARACTERS, SUMMARY_BYTES = 65_536, 2**20


def with_gates(*found: dict[str, Any]) -> dict[str, Any]:
    """A run that ended with these gates of validate, and no others."""
    run = gate_failed_run()
    for stage in run["stages"]:
        stage["gates"] = []
    run["stages"][4]["gates"] = list(found)
    return run


def judged(name: str, verdict: str, measured: float | None = 1.0, **more: Any) -> dict[str, Any]:
    """A gate result with any of the four verdicts."""
    values = {"measured": measured, "direction": "at most", "threshold": 0.5, "unit": "", "message": f"of {name}"}
    return {"name": name, "subject": "onnx-fp16", "verdict": verdict, **values, **more}


FOUR = (
    judged("a pass", "pass", 0.1),
    judged("tolerated", "inconclusive", 0.4, tolerated=True),
    judged("waived", "fail", 9.0, waived="by an owner until 2027-01-01: a reason"),
    judged("close", "fail", 0.6),
    judged("open", "inconclusive", 0.4),
    judged("nothing", "error", None),
    judged("far", "fail", 50.0),
)
"""Every verdict, and what lets one through."""


# --- report.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_the_plain_report_holds_its_schema(name: str) -> None:
    assert contradictions(json.loads(render_plain(RUNS[name]())), report_schema()) == []


def test_the_plain_report_of_nothing_holds_its_schema() -> None:
    assert contradictions(json.loads(render_plain({})), report_schema()) == []


def test_the_schema_of_the_plain_report_refuses_a_pass_that_stops() -> None:
    report = json.loads(render_plain(passing_run()))
    report["gates"][0]["stops"] = True
    assert contradictions(report, report_schema())
    del report["counts"]
    assert any("counts" in problem for problem in contradictions(report, report_schema()))


def test_every_verdict_is_told_and_the_worst_comes_first() -> None:
    report = json.loads(render_plain(with_gates(*FOUR)))
    assert contradictions(report, report_schema()) == []
    assert [(one["name"], one["verdict"], one["stops"]) for one in report["gates"]] == [
        ("nothing", "error", True),
        ("far", "fail", True),
        ("close", "fail", True),
        ("open", "inconclusive", True),
        ("waived", "fail", False),
        ("tolerated", "inconclusive", False),
        ("a pass", "pass", False),
    ]
    assert report["counts"] == {"gates": 7, "pass": 1, "fail": 3, "inconclusive": 2, "error": 1, "stops": 4}


def test_a_verdict_that_nobody_knows_is_a_failure() -> None:
    report = json.loads(render_plain(with_gates(judged("new", "splendid"))))
    assert [(one["verdict"], one["stops"]) for one in report["gates"]] == [("fail", True)]


def test_the_plain_report_says_what_ships() -> None:
    report = json.loads(render_plain(passing_run()))
    assert (report["verdict"], report["chosen"]) == ("pass", "onnx-int8-static")
    tar = {"folder": "package/bundle", "tar": "package/fashion-mnist.tar", "sha256": digest("tar")}
    assert report["bundle"] == tar
    assert json.loads(render_plain(gate_failed_run()))["bundle"] is None


# --- annotations ----------------------------------------------------------------------------------


def commands_of(text: str) -> list[tuple[str, str, str]]:
    """(command, title, message) as the runner of GitHub Actions reads them; every line must be one."""
    found = []
    for line in text.splitlines():
        command = re.fullmatch(r"::(error|warning|notice) title=([^:,]*)::(.*)", line)
        assert command, line
        title, message = command[2], command[3]
        for code, character in (("%3A", ":"), ("%2C", ","), ("%0D", "\r"), ("%0A", "\n"), ("%25", "%")):
            title, message = title.replace(code, character), message.replace(code, character)
        found.append((command[1], title, message))
    return found


def test_annotations_tell_errors_from_what_is_let_through() -> None:
    found = commands_of(render_annotations(with_gates(*FOUR)))
    assert [(level, title.partition(": ")[2].partition(" [")[0]) for level, title, _ in found] == [
        ("error", "nothing"), ("error", "far"), ("error", "close"), ("error", "open"), ("warning", "waived"),
        ("warning", "tolerated"),
    ]  # fmt: skip
    assert found[0][1].endswith("(error)")
    assert found[4][2] == "of waived; waived by an owner until 2027-01-01: a reason"


def test_a_good_end_is_a_notice_and_a_broken_stage_an_error_in_all_its_lines() -> None:
    assert [(level, title) for level, title, _ in commands_of(render_annotations(passing_run()))] == [
        ("notice", "Ready to ship: onnx-int8-static")
    ]
    (found,) = commands_of(render_annotations(broken_run()))
    assert found[:2] == ("error", "Stage export failed")
    assert found[2].splitlines()[1].startswith("expected an operator of opset 20")


def test_a_run_that_failed_never_goes_without_an_error() -> None:
    assert [level for level, _, _ in commands_of(render_annotations({"status": "failed"}))] == ["error"]


def test_at_most_ten_annotations_of_a_type() -> None:
    gates = [judged(f"bad {index}", "fail", 1.0 + index) for index in range(3000)]
    gates += [judged(f"excused {index}", "fail", waived="by an owner") for index in range(3000)]
    found = commands_of(render_annotations(with_gates(*gates)))
    assert [sum(level == kind for level, _, _ in found) for kind in ("error", "warning")] == [LIMIT, LIMIT]
    assert "bad 2999" in found[0][1]  # the worst
    assert found[LIMIT - 1][1] == "2991 more"


# --- the statement --------------------------------------------------------------------------------


def test_the_statement_is_about_what_was_measured_and_packed() -> None:
    statement = json.loads(render_statement(passing_run()))
    assert (statement["_type"], statement["predicateType"]) == (STATEMENT, PREDICATE)
    assert {one["name"]: one["digest"] for one in statement["subject"]} == {
        "onnx-fp32.onnx": {"sha256": digest("onnx-fp32")},
        "onnx-fp16.onnx": {"sha256": digest("onnx-fp16")},
        "onnx-int8-static.onnx": {"sha256": digest("onnx-int8-static")},
        "package/fashion-mnist.tar": {"sha256": digest("tar")},
    }
    predicate = statement["predicate"]
    assert (predicate["result"], predicate["warnedTests"], predicate["failedTests"]) == ("PASSED", [], [])
    assert "validate: min_agreement [onnx-fp16]" in predicate["passedTests"]
    assert "validate: came to its end" in predicate["passedTests"]
    canonical = json.dumps(passing_run()["config"], sort_keys=True, separators=(",", ":")).encode()
    assert predicate["configuration"][0]["digest"] == {"sha256": hashlib.sha256(canonical).hexdigest()}


def test_what_did_not_pass_is_named_by_a_statement_that_says_failed_alone() -> None:
    run = passing_run()
    first, second, _ = run["stages"][4]["measurements"]["candidates"]
    first["passed"], second["over_limits"] = False, ["size: 2 is above 1"]
    names = [one["name"] for one in json.loads(render_statement(run))["subject"]]
    assert names == ["onnx-int8-static.onnx", "package/fashion-mnist.tar"]
    statement = json.loads(render_statement(run | {"status": "gate-failed"}))
    assert statement["predicate"]["result"] == "FAILED" and len(statement["subject"]) == 4


@pytest.mark.parametrize(
    ("found", "result"),
    [((FOUR[0],), "PASSED"), ((FOUR[0], FOUR[1]), "WARNED"), (FOUR[:3], "WARNED"), (FOUR, "FAILED"), ((), "FAILED")],
    ids=["passed", "tolerated", "waived", "failed", "no gate"],
)
def test_the_result_of_the_statement(found: tuple[dict[str, Any], ...], result: str) -> None:
    run = with_gates(*found)
    if result != "FAILED":
        run |= {"status": "passed", "bundle": "package/bundle"}
        run["stages"][4]["status"], run["stages"][5] = "ran", passing_run()["stages"][5]
    predicate = json.loads(render_statement(run))["predicate"]
    assert predicate["result"] == result
    assert bool(predicate["failedTests"]) is (result == "FAILED")
    assert bool(predicate["warnedTests"]) is (len(found) > 1)


def test_a_run_that_measured_nothing_has_no_statement(tmp_path: Path) -> None:
    write_reports(passing_run(), tmp_path)
    assert (tmp_path / FILES["in-toto"]).exists()
    write_reports(broken_run(), tmp_path)
    assert not (tmp_path / FILES["in-toto"]).exists()


# --- Markdown -------------------------------------------------------------------------------------


def test_markdown_with_thousands_of_gates_and_candidates_fits_and_says_how_many_are_left() -> None:
    run = with_gates(*(judged(f"gate {index}", "fail" if index % 2 else "pass", float(index)) for index in range(6000)))
    measured = run["stages"][4]["measurements"]
    measured["candidates"] = [candidate(f"onnx-{index}", "fp32", 0.8, 0.1, 3.0, 10) for index in range(3000)]
    run["stages"][0]["notes"] = [f"note {index}" for index in range(3000)]
    text = render_markdown(run)
    assert len(text) <= MAX_CHARACTERS < COMMENT_CHARACTERS
    assert len(text.encode()) < SUMMARY_BYTES
    assert "gate 5999 " in text and "gate 1 " not in text  # the worst are shown
    rows = len(re.findall(r"^\| \S+.*\| gate \d+ ", text, re.MULTILINE))
    left = re.findall(r"_([\d,]+) more in report.html._", text)
    assert len(left) == 3
    assert rows + int(left[1]) == 6000
    assert text.count("<details>") == text.count("</details>")


def test_a_table_is_never_cut_between_its_head_and_its_first_row() -> None:
    rows = [f"| {index} | {'x' * 20} |" for index in range(50)]
    section = "\n".join(["### Gates", "", "| Gate | Text |", "| --- | --- |", *rows])
    for room in range(20, len(section)):
        found = cut(section, room)
        assert len(found) <= room
        if "| Gate |" in found:
            assert "\n| --- | --- |\n| 0 |" in found
        if found:
            left = re.search(r"_(\d+) more", found)
            assert left and int(left[1]) + sum(row in found for row in rows) == 50


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["markdown", "github", "json", "junit", "html", "in-toto"])
def test_the_command_prints_each_form(form: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text(json.dumps(gate_failed_run()), encoding="utf-8")
    assert cli(["report", str(tmp_path), "--format", form]) == 0
    assert capsys.readouterr().out == render(gate_failed_run(), form)


@pytest.mark.parametrize("case", ["no run", "no record", "form", "no subject"])
def test_the_command_refuses_what_it_cannot_print(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"no run": None, "no record": "[]", "form": "{}", "no subject": json.dumps(broken_run())}[case]
    if content:
        (tmp_path / "run.json").write_text(content, encoding="utf-8")
    form = {"form": "pdf", "no subject": "in-toto"}.get(case, "markdown")
    assert cli(["report", str(tmp_path), "--format", form]) == 2
    said = {"no run": "holds no run", "no record": "not the record", "form": "'pdf'", "no subject": "run validate"}
    assert said[case] in capsys.readouterr().err
