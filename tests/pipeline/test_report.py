"""The reports of a run: what they say, what they must never say, and what they survive."""

from __future__ import annotations

import copy
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.report import FILES, render, run_schema, validate_run, write_reports
from pipeline.report.evidence import front_of
from pipeline.report.facts import Facts
from pipeline.report.html import render_html
from pipeline.report.junit import render_junit
from pipeline.report.markdown import MAX_CHARACTERS, render_markdown
from pipeline.report.terminal import print_summary
from stages.gate import stops
from tests.pipeline.report_run import (
    broken_run,
    candidate,
    confusion,
    gate,
    gate_failed_run,
    not_run,
    passing_run,
)

VOID = {"meta", "br"}
HOSTILE = (
    "<script>alert(1)</script>",
    "a|b`c`**d**",
    "::error::gotcha",
    "##[error]gotcha",
    "[red]x[/red] [l](http://e.example) @everyone #1 $x$ www.e.example",
    '" onload="alert(1)',
    "null\x00bell\x07esc\x1b[31m\ud800\u202eevil",
    "two\nlines\n::error::second",
    "x" * 3000,
)


class Page(HTMLParser):
    """Checks that tags nest, and collects tags, attributes and text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def summary_of(run: dict[str, Any], width: int = 100) -> str:
    """What `print_summary` prints."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_summary(run, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def render_all(run: dict[str, Any]) -> tuple[str, str, str, str]:
    """All four reports."""
    return render_html(run), render_markdown(run), render_junit(run), summary_of(run)


def paths_in(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place in a JSON value, but only the first two items of a list."""
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:2] if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths_in(item, (*path, key))


def replaced(run: dict[str, Any], path: tuple[str | int, ...], value: object) -> dict[str, Any]:
    """A copy of the run with another value at `path`."""
    changed = copy.deepcopy(run)
    place: Any = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


# --- what the headline says -----------------------------------------------------------------------


def test_the_page_shows_how_the_backbone_was_adapted() -> None:
    page = Page(render_html(passing_run()))
    for part in (
        "+1.5 pt +0.2 … +2.9 pt against the linear probe", "How auto chose", "training diverged; lora is kept",
        "peak memory1.90 GB2.04 GB", "Unfreeze more: lp-ft",
        "Does transfer pay?", "the features are worth +4.6 pt", "Against training from scratch", "Learning rate test",
        "Lowest at 1 times the configured rates", "What each layer learned", "blocks.1.0: weights moved 0.021",
        "blocks.1.0: outputs changed 0.17", "stem: learning rate 0",
    ):  # fmt: skip
        assert part in page.text, part


def test_epochs_of_another_metric_have_its_name_and_no_rule() -> None:
    run = passing_run()
    same = render_html(run)
    assert "Validation accuracy by epoch" in same and "frozen probe" in same
    measured = next(stage for stage in run["stages"] if stage["name"] == "finetune")["measurements"]
    measured["history_metric"] = "recall at 1"
    other = render_html(run)
    assert "Validation recall at 1 by epoch" in other and "Validation accuracy by epoch" not in other
    assert other.count("frozen probe") == same.count("frozen probe") - 1


def test_the_page_shows_what_int8_costs_and_what_is_really_in_it() -> None:
    run = passing_run()
    text = Page(render_html(run)).text
    assert "by share of the arithmetic in INT8, accuracy from 85.8% at 96% to 83.0% at 100%" in text
    assert "int8 96%, fp32 4%" in text and "blocks.1.0.conv_dw" in text and "floating point" in text
    assert "bias-correction" in text and "0.846" in text and "smooth" in text
    assert "int8 96%, fp32 4%" in render_markdown(run)
    (validated,) = [stage for stage in run["stages"] if stage["name"] == "validate"]
    reason = "not faster than onnx-fp32: 0.15× its speed, 0.15× at least"
    validated["measurements"]["candidates"][2]["not_worth_it"] = {"latency": reason}
    for report in (Page(render_html(run)).text, render_markdown(run)):
        assert "not earn" in report and "0.15× at least" in report


def test_quantization_aware_training_is_shown_with_and_without() -> None:
    run = passing_run()
    finetune = next(stage for stage in run["stages"] if stage["name"] == "finetune")
    text = Page(render_html(run)).text
    assert "Quantization-aware training" in text
    assert "79.6%" in text and "83.9%" in text and "86.1%" in text and "86.0%" in text
    assert "Epochs with INT8 rounding: 1" in text
    aware = finetune["measurements"]["quantization_aware"]
    aware["kept"] = False
    assert "INT8 gained nothing by it" in Page(render_html(run)).text
    aware["diverged"] = "the loss is nan"
    assert "It diverged" in Page(render_html(run)).text


def test_a_run_without_those_measurements_shows_none_of_it() -> None:
    run = passing_run()
    finetune = next(stage for stage in run["stages"] if stage["name"] == "finetune")
    for key in (
        "advice",
        "cost",
        "ladder",
        "against_raw",
        "against_scratch",
        "learning_rate_test",
        "forgetting",
        "gain_over_probe",
        "quantization_aware",
    ):
        finetune["measurements"][key] = None
    page = Page(render_html(run))
    for part in (
        "Unfreeze more",
        "What it cost",
        "How auto chose",
        "Does transfer pay?",
        "Against training",
        "Learning rate test",
        "each layer learned",
        "Quantization-aware",
    ):
        assert part not in page.text
    assert "Validation accuracy" in page.text


def test_passed_run_says_what_ships_with_its_numbers() -> None:
    facts = Facts(passing_run())
    assert (facts.verdict, facts.headline) == ("pass", "Ready to ship: onnx-int8-static")
    for part in ("1,000 held-out examples", "accuracy 85.4% (−0.3 pt", "4.8× the speed", "27% of its size (3.6 MB)"):
        assert part in facts.explanation
    for report in (render_html(passing_run()), render_markdown(passing_run()), summary_of(passing_run())):
        assert "Ready to ship" in report.replace("&#58;", ":")
        assert "85.4%" in report
        assert "4.8×" in report


def test_failed_gate_is_named_first_and_nothing_ships() -> None:
    run = gate_failed_run()
    assert Facts(run).verdict == "fail"
    assert Facts(run).headline == "Not shipped: 1 gate failed"
    page = Page(render_html(run)).text
    assert "max_metric_drop · onnx-int8-static (validate): 0.034 is above 0.01" in page
    assert page.index("✗ fail") < page.index("✓ pass", page.index("Finding"))
    assert "11 of 12 gates passed" in render_markdown(run)
    assert "gate failed: validate max_metric_drop [onnx-int8-static]: 0.034 is above 0.01" in summary_of(run)


def test_broken_stage_shows_its_error_in_full_and_what_did_run() -> None:
    page = Page(render_html(broken_run())).text
    assert "Not shipped: export failed" in page
    assert "operator aten::foo is not supported\nexpected an operator of opset 20" in page
    assert "2 min 28 s" in page
    assert "aten::foo" in summary_of(broken_run())


def test_interrupted_run_says_that_it_resumes() -> None:
    run = broken_run()
    run["stages"][2] |= {"status": "interrupted", "error": None}
    run["status"] = "interrupted"
    assert Facts(run).headline == "Not finished: interrupted in export"
    assert "resumes" in Facts(run).explanation


@pytest.mark.parametrize("change", ["no gates", "gate failed", "nothing chosen", "status", "not packed"])
def test_nothing_is_ready_to_ship_without_evidence(change: str) -> None:
    run = passing_run()
    if change == "no gates":
        for stage in run["stages"]:
            stage["gates"] = []
    elif change == "gate failed":
        run["stages"][0]["gates"] = [gate("accuracy", "network", None, "at least", 0.5)]
    elif change == "nothing chosen":
        run["stages"][4]["measurements"]["chosen"] = None
    elif change == "status":
        run["status"] = "failed"
    else:
        run["stages"][5] = not_run("package")
    assert Facts(run).verdict != "pass"
    assert all("Ready to ship" not in report for report in render_all(run))


def test_almost_all_is_never_shown_as_all() -> None:
    run = passing_run()
    run["stages"][4]["measurements"]["candidates"][2]["agreement"] = 0.99999
    assert ">99.9%" in render_markdown(run)


def test_left_out_candidate_is_reported_with_its_reason() -> None:
    for report in (Page(render_html(passing_run())).text, render_markdown(passing_run())):
        assert "onnx-int8-dynamic" in report
        assert "accuracy fell 3.4 points on the validation split" in report


# --- the page -------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [passing_run(), broken_run(), gate_failed_run()], ids=["passed", "broken", "gate"])
def test_page_loads_nothing_and_runs_nothing(run: dict[str, Any]) -> None:
    source = render_html(run)
    page = Page(source)
    assert page.tags.isdisjoint({"script", "link", "iframe", "img", "object", "embed", "form", "base"})
    identities = {value for _, name, value in page.attributes if name == "id"}
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "srcset", "data", "action", "xlink:href")
        if name == "href":
            assert value is not None
            assert value.startswith("#")
            assert value[1:] in identities
    assert "url(" not in source
    assert "@import" not in source
    assert "default-src 'none'" in source


def test_page_has_every_plot_with_a_text_alternative() -> None:
    page = Page(render_html(passing_run()))
    names = [value or "" for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    assert len(names) == sum(1 for tag, name, _ in page.attributes if tag == "svg" and name == "role")
    for start, count in (
        ("Accuracy against median latency", 1),
        ("Absolute output error", 3),
        ("onnx-int8-static: by share of the arithmetic in INT8", 1),
        ("Confusion matrix of 10 classes; 895 of 1000", 1),
        ("Latency of one example: PyTorch p50 24.6 ms, p95 28.9 ms; onnx-int8-static", 1),
        ("accuracy difference by slice: label=Coat −1.0", 1),
        ("Loss by epoch", 1),
        ("Validation accuracy by epoch", 1),
        ("Stages one after the other", 1),
    ):
        assert sum(name.startswith(start) for name in names) == count, start


def test_the_front_is_what_nothing_beats_in_both() -> None:
    run = passing_run()
    assert front_of(Facts(run)) == [(5.12, 0.854), (9.84, 0.857)]  # fp16 and PyTorch are slower and no better
    measured = run["stages"][4]["measurements"]
    measured["candidates"][0]["passed"] = False
    measured["reference"]["metric"] = 0.9
    assert front_of(Facts(run)) == [(5.12, 0.854), (10.9, 0.857), (24.6, 0.9)]
    measured["candidates"][2]["latency_ms_p50"] = None
    assert front_of(Facts(run)) == [(10.9, 0.857), (24.6, 0.9)]
    assert front_of(Facts({})) == []


def test_of_a_thousand_slices_the_worst_are_drawn_and_the_others_counted() -> None:
    run = passing_run()
    judged = run["stages"][4]["measurements"]["candidates"][2]["slices"]
    judged["slices"] = [dict(judged["slices"][0], name=f"label={index}") for index in range(1000)]
    source = render_html(run)
    assert "label=23<" in source and "label=24<" not in source
    assert "976 more are in run.json" in source
    judged["slices"][0]["interval"] = None  # a critical slice without samples
    source = render_html(run)
    assert "975 more" in source
    for entry in run["stages"][4]["measurements"]["candidates"]:
        entry["slices"] = None
    assert "difference by slice" not in render_html(run)


def test_page_has_lineage_configuration_and_environment() -> None:
    run = passing_run()
    text = Page(render_html(run)).text
    assert all(stage["digest"] in text for stage in run["stages"])
    assert run["stages"][4]["measurements"]["candidates"][0]["sha256"] in text
    assert run["stages"][5]["measurements"]["sha256"] in text
    large = run["stages"][4]["measurements"]["candidates"][0]
    large["digest"] = "e" * 64  # of a graph and its weights, as waivers name it
    assert "e" * 64 in render_html(run) and "e" * 64 not in text
    assert json.loads(render(run, "json"))["candidates"][0]["digest"] == "e" * 64
    assert '"source": "demo:fashion-mnist"' in text
    assert "onnxruntime" in text
    assert "16.8 GB" in text


def test_scrolling_regions_are_reachable_by_keyboard() -> None:
    source = render_html(passing_run())
    assert source.count('class="scroll"') == source.count('class="scroll" tabindex="0" role="region" aria-label=')
    assert "prefers-color-scheme: dark" in source


def test_many_classes_give_a_list_and_no_matrix() -> None:
    run = passing_run()
    labels = tuple(f"class {index}" for index in range(300))
    run["stages"][4]["measurements"] |= {"labels": list(labels), "confusion": confusion(labels)}
    source = render_html(run)
    assert "300 classes are too many to draw" in source
    assert "Most frequent mistakes" in source
    assert len(source) < 200_000


def test_confusion_matrix_of_another_size_is_not_drawn() -> None:
    run = passing_run()
    run["stages"][4]["measurements"]["confusion"] = [[1, 2], [3]]
    assert "Confusion matrix" not in render_html(run)


def test_same_run_gives_the_same_bytes() -> None:
    assert render_all(passing_run()) == render_all(copy.deepcopy(passing_run()))


# --- hostile and missing values -------------------------------------------------------------------


def hostile_run(text: str) -> dict[str, Any]:
    """A run that has `text` wherever text comes from outside."""
    run = gate_failed_run()
    run |= {"run": text, "backbone": text, "task": text, "config": {text: text}}
    measured = run["stages"][4]["measurements"]
    measured |= {"labels": [text] * 10, "chosen": text, "objective": text}
    measured["candidates"][2] |= {"name": text, "precision": text, "file": text, "excused": [text]}
    measured["candidates"][2]["slices"]["slices"][0]["name"] = text
    run["stages"][4]["gates"][5] |= {"verdict": "fail", "waived": text}
    run["stages"][4]["gates"][6] |= {"name": text, "subject": text, "message": text, "unit": text}
    run["stages"][3]["measurements"]["candidates"][1] |= {"name": text, "reason": text}
    run["stages"][0] |= {"notes": [text], "reason": text}
    run["stages"][5] |= {"status": "failed", "error": text}
    run["environment"]["versions"] = {text: text}
    return run


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text: str, tmp_path: Path) -> None:
    run = hostile_run(text)
    write_reports(run, tmp_path)

    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert not any(name.startswith("on") for _, name, _ in page.attributes)

    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<script" not in markdown
    assert "](http" not in markdown
    assert "`" not in markdown
    assert "@everyone" not in markdown
    assert "://" not in markdown
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} <= {3, 6, 8, 11}

    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert root.get("failures") == "1"
    assert root.get("errors") == "1"

    for width in (40, 100, 200):
        printed = summary_of(run, width)
        assert not re.search(r"^\s*::(error|warning|notice)", printed, re.MULTILINE)
        assert "##[" not in printed
        assert "\x1b" not in printed
        assert "\x07" not in printed


@pytest.mark.parametrize("value", [None, "text", math.nan, -1, [], {}, True], ids=repr)
def test_any_value_may_be_missing_or_odd(value: object) -> None:
    run = passing_run() | {"status": "failed"}
    run["stages"][5] |= {"status": "failed", "error": "disk full"}
    for path in paths_in(run):
        changed = replaced(run, path, value)
        ElementTree.fromstring(render_junit(changed))
        assert render_markdown(changed).startswith("## ❌")
        assert "nan%" not in render_html(changed)
        assert "Not shipped" in summary_of(changed)


def test_empty_record_still_reports() -> None:
    html, markdown, junit, printed = render_all({})
    assert "Not shipped" in html
    assert "Not shipped" in markdown
    assert "Not shipped" in printed
    assert ElementTree.fromstring(junit).get("tests") == "0"


@pytest.mark.parametrize("status", ["UNPROVEN", "PROVEN"])
def test_an_engine_is_named_with_what_proves_it(status: str) -> None:
    run = passing_run()
    digest = "0" * 64
    engine = {
        "name": "onnx-fp16.sm86-sm89", "candidate": "onnx-fp16", "sha256": digest, "size_bytes": 7.5e6,
        "status": status, "targets": ["sm86", "sm89"], "ships_for": ["sm86"], "runtime": "tensorrt-rtx",
        "library_version": "1.7.1.116", "onnx_sha256": digest, "mends": ["zero points became 0 (3 nodes)"],
    }  # fmt: skip
    left = engine | {"name": "onnx-fp32.sm86", "ships_for": []}
    run["stages"][4]["measurements"]["engines"] = [engine, left]
    assert validate_run(run) == []
    html, markdown, _, printed = render_all(run)
    for report in (Page(html).text, markdown, printed):
        assert ("UNPROVEN" in report) is (status == "UNPROVEN")
    for report in (Page(html).text, markdown):
        assert "onnx-fp16.sm86-sm89" in report and "zero points became 0" in report
        assert "onnx-fp32.sm86" not in report  # it is not shipped
    headline = Facts(run).headline
    assert headline.startswith("Ready to ship") and ("sm86 UNPROVEN" in headline) is (status == "UNPROVEN")


def test_runs_on_other_providers_and_of_engines_stand_beside_the_candidates() -> None:
    run = passing_run()
    measured = run["stages"][4]["measurements"]
    other = candidate("onnx-fp16 on cuda", "fp16", 0.8, 0.1, 3.0, 10) | {"provider": "cuda", "candidate": "onnx-fp16"}
    engine = candidate("onnx-fp16.sm86 on sm86", "fp16", 0.8, 0.1, 2.0, 10) | {"provider": "engine"}
    measured |= {"provider": "tensorrt-rtx", "gpu": "a GPU", "other_runs": [other], "engine_runs": [engine]}
    assert validate_run(run) == []
    html, markdown, _, _ = render_all(run)
    for report in (Page(html).text, markdown):
        assert "onnx-fp16 on cuda" in report and "onnx-fp16.sm86 on sm86" in report
        assert "on tensorrt-rtx" in report  # whose numbers the candidates' are
    assert len(Facts(run).candidates) == len(Facts(passing_run()).candidates)


def test_markdown_fits_a_comment_whatever_the_run_holds() -> None:
    run = passing_run()
    run["stages"][4]["gates"] = [gate("&" * 200, "<" * 200, 1.0, "at most", 0.0, "@" * 50) for _ in range(5000)]
    run["stages"][4]["measurements"]["candidates"] = [candidate("|" * 200, "fp32", 0.8, 0.1, 3.0, 10)] * 500
    run["stages"][0]["notes"] = ["*" * 1000] * 500
    run["stages"][5] |= {"status": "failed", "error": "<\n" * 90_000}
    markdown = render_markdown(run)
    assert len(markdown) <= MAX_CHARACTERS
    assert "report.html" in markdown
    assert len(render_html(run)) < 2_000_000


# --- junit ----------------------------------------------------------------------------------------


def test_junit_has_a_case_for_every_gate() -> None:
    run = gate_failed_run()
    root = ElementTree.fromstring(render_junit(run))
    cases = root.findall("./testsuite/testcase")
    assert len([case for case in cases if case.find("skipped") is None]) == sum(len(s["gates"]) for s in run["stages"])
    failed = [case for case in cases if case.find("failure") is not None]
    assert [(case.get("classname"), case.get("name")) for case in failed] == [
        ("validate", "max_metric_drop [onnx-int8-static]")
    ]
    failure = failed[0].find("failure")
    assert failure is not None
    assert failure.get("message") == "0.034 is above 0.01"
    assert {key: root.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "13", "failures": "1", "errors": "0", "skipped": "1",
    }  # fmt: skip


def test_junit_marks_the_stage_that_failed_and_skips_those_behind() -> None:
    root = ElementTree.fromstring(render_junit(broken_run()))
    assert [case.get("classname") for case in root.iter("testcase") if case.find("error") is not None] == ["export"]
    assert [case.get("classname") for case in root.iter("testcase") if case.find("skipped") is not None] == [
        "quantize", "validate", "package",
    ]  # fmt: skip


def test_junit_names_of_a_suite_are_unique() -> None:
    run = passing_run()
    run["stages"][0]["gates"] = [gate("same", "network", value, "at most", 1.0) for value in (0.5, 2.0, 0.5)]
    cases = ElementTree.fromstring(render_junit(run)).findall("./testsuite[@name='finetune']/testcase")
    assert [case.get("name") for case in cases] == ["same [network]", "same [network] (2)", "same [network] (3)"]
    assert [case.find("failure") is not None for case in cases] == [False, True, False]


# --- verdicts -------------------------------------------------------------------------------------


def with_gate(**changes: Any) -> dict[str, Any]:
    """A run that passed but for one gate of validate."""
    run = passing_run()
    run["stages"][4]["gates"][6] = gate("max_metric_drop", "onnx-int8-static", 0.034, "at most", 0.01) | changes
    if stops(run["stages"][4]["gates"][6]):
        run["stages"][4]["status"], run["stages"][5] = "gate-failed", not_run("package")
        run |= {"status": "gate-failed", "bundle": None}
    return run


WAIVED = "by Ada until 2099-12-31: two queues, one team"


@pytest.mark.parametrize(
    ("changes", "headline", "word", "element"),
    [
        ({"verdict": "inconclusive"}, "Not shipped: 1 gate inconclusive", "? inconclusive", "failure"),
        ({"verdict": "error"}, "Not shipped: 1 gate without evidence", "✗ no evidence", "error"),
        ({"verdict": "unheard of"}, "Not shipped: 1 gate failed", "✗ fail", "failure"),
        ({"verdict": "inconclusive", "tolerated": True}, "Ready to ship: onnx-int8-static; 1 gate let through",
         "? inconclusive let through", "skipped"),
        ({"verdict": "fail", "waived": WAIVED}, "Ready to ship: onnx-int8-static; 1 gate waived", "✗ fail waived",
         "skipped"),
    ],
)  # fmt: skip
def test_each_verdict_is_shown_for_what_it_is(changes: dict[str, Any], headline: str, word: str, element: str) -> None:
    run = with_gate(**changes)
    facts = Facts(run)
    page, markdown, junit, printed = Page(render_html(run)).text, *render_all(run)[1:]
    assert facts.headline == headline and facts.verdict == ("pass" if headline.startswith("Ready") else "fail")
    assert headline in page and headline.split(":")[0] in markdown and headline in printed
    assert word in " ".join(page.split())
    assert "11 of 12 gates passed" in markdown
    name = "max_metric_drop [onnx-int8-static]"
    (case,) = [one for one in ElementTree.fromstring(junit).iter("testcase") if one.get("name") == name]
    (problem,) = case
    assert problem.tag == element
    if changes.get("waived"):
        assert all("two queues" in report for report in (page, markdown, str(problem.get("message")), printed))
    if changes.get("tolerated"):
        assert all("on_inconclusive" in report for report in (page, printed, str(problem.get("message"))))
    if changes["verdict"] in ("fail", "inconclusive", "error"):
        assert validate_run(run) == []


def test_the_slices_of_the_chosen_candidate_are_listed_with_their_intervals() -> None:
    text = " ".join(Page(render_html(passing_run())).text.split())
    assert "onnx-int8-static against PyTorch on the same examples of each slice; the worst of 10" in text
    assert "label=Shirt" in text and "−3.0 pt" in text and "−8.0 … +1.0 pt" in text and "0.74" in text
    assert "label=Coat critical" in text
    assert "differs from itself by 2e−7 with another batch size, 0 with other threads, 4e−7 with fp64" in text


def test_percentiles_stand_with_their_bounds_or_say_that_there_is_none() -> None:
    text = "".join(Page(render_html(passing_run())).text.split())
    assert "onnx-int8-static5.12ms≤5.17ms5.63ms≤6.14ms7.17msnobound100225/s" in text


def test_corruptions_are_listed_with_what_they_do() -> None:
    run = passing_run()
    text = "".join(Page(render_html(run)).text.split())
    assert "eachatonefixedseverity,on512testexamples" in text
    assert "blurGaussian,2pixelsof22485.7%70.1%21.0%" in text and "85.7%noinputchanges–" in text
    assert "onnx-int8-staticblur68.1%−2.0pt−3.5…−0.5pt0.003" in text


def test_the_last_release_stands_beside_what_is_shipped_now() -> None:
    run = passing_run()
    said = "onnx-int8-static has 85.4% accuracy, fashion-mnist-1 (onnx-fp16) 85.1% on the same examples: +0.3 pt"
    text = " ".join(Page(render_html(run)).text.split())
    assert f"{said} (interval −0.4 … +1.0 pt). 0.47× its latency." in text
    assert "run here with the preprocessing of this network" in text and "another test split" not in text
    assert "### Against the last release" in render_markdown(run)
    found = next(stage for stage in run["stages"] if stage["name"] == "validate")["measurements"]["baseline"]
    found |= {"problem": "it has other labels", "metric_difference": None}
    assert "fashion-mnist-1 (onnx-fp16): it has other labels" in Page(render_html(run)).text
    found["problem"] = ""
    assert "nothing was compared" in Page(render_html(run)).text


def test_what_is_no_pass_is_listed_before_what_is() -> None:
    run = with_gate(verdict="fail", waived=WAIVED)
    text = Page(render_html(run)).text
    assert text.index("✗ fail") < text.index("✓ pass", text.index("Finding"))


# --- files and schema -----------------------------------------------------------------------------


def test_write_reports_writes_its_files_and_nothing_else(tmp_path: Path) -> None:
    write_reports(passing_run(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES.values())


def test_failed_write_leaves_the_earlier_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_reports(passing_run(), tmp_path)
    before = (tmp_path / "report.html").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.report.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_reports(gate_failed_run(), tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == len(FILES)


@pytest.mark.parametrize("run", [passing_run(), broken_run(), gate_failed_run()], ids=["passed", "broken", "gate"])
def test_schema_accepts_real_runs(run: dict[str, Any]) -> None:
    assert validate_run(run) == []


def test_schema_is_valid_itself() -> None:
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(run_schema())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 99),
        (("status",), "ok"),
        (("stages", 0, "status"), "skipped"),
        (("stages", 0, "digest"), "abc"),
        (("stages", 0, "digest"), None),
        (("stages", 0, "gates", 0, "measured"), None),
        (("stages", 4, "measurements", "candidates", 0, "metric"), 85.7),
        (("stages", 4, "measurements", "confusion", 0, 0), -1),
        (("bundle",), 1),
    ],
    ids=str,
)
def test_schema_refuses_what_is_wrong(path: tuple[str | int, ...], value: object) -> None:
    problems = validate_run(replaced(passing_run(), path, value))
    assert len(problems) >= 1
    assert problems[0].startswith("$.")


def test_schema_refuses_a_missing_key() -> None:
    run = passing_run()
    del run["environment"]
    assert any("environment" in problem for problem in validate_run(run))
