"""Class names, file names and messages that hold anything at all do no harm in any output: property tests."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from models.errors import ConfigError, Problem, StageError
from pipeline import cli
from pipeline.diff import compare, print_difference, read_side
from pipeline.report import contradictions, report_schema
from pipeline.report.github import render_annotations
from pipeline.report.html import render_html
from pipeline.report.intoto import render_statement
from pipeline.report.junit import render_junit
from pipeline.report.markdown import MAX_CHARACTERS, render_markdown
from pipeline.report.markup import UNPRINTABLE, field_text, json_text, log_text
from pipeline.report.plain import render_plain
from pipeline.show import print_description
from pipeline.terminal import SafeFormatter
from tests.pipeline.test_report import Page, hostile_run, summary_of
from tests.pipeline.test_report_ci import commands_of

FRAGMENTS = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "--><b>", "<!-- adapt-to-edge", "]]>", "&lt;",
    "</td></tr>", "</details>", "<details>", "</pre>", '" onload="x', "' x='", "|", "| --- |", "`", "```", "**b**",
    "__i__", "~~s~~", "# h", "> q", "- l", "1. l", "[l](http://e.example)", "![i](http://e.example/i.png)",
    "[x]: http://e.example", "http://e.example", "www.e.example", "a@e.example", "@everyone", "#1", "o/r#2", "$x$",
    ":tada:", "\\", "::error::x", "::set-output name=a::b", "::stop-commands::x", "##[error]x",
    "##vso[task.setvariable variable=a]b", "##teamcity[x]", "%0A::error::x", "%25", "\r\n", "\n", "\r", "\t", "\x0b",
    "\x85", "\u2028", "\x00", "\x07", "\b\b\b", "\x1b[31m", "\x1b]8;;http://e.example\x07", "\x9b2J", "\u202e",
    "\u2066", "\u200f", "\ufffe", "\ud800", "\udfff", "[red]x[/red]", "[link=http://e.example]x", "{{x}}", "${{x}}",
    "%s", "{0}", "\N{BOM}", "e\u0301" * 20, "x" * 400,
)  # fmt: skip
"""What some output or other gives a meaning to."""

ANY = st.characters(exclude_categories=())
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(ANY, min_size=1, max_size=6), min_size=1, max_size=5).map("".join)
"""Anything, lone surrogates and control characters too, with the dangerous pieces in all orders."""

QUICK = settings(max_examples=40, deadline=None, derandomize=True, database=None)
ALL = "".join(FRAGMENTS)
ORDERS = re.compile(
    "[^\t\n\x20-\x7e\xa0-\U0010ffff]|[\u200e\u200f\u202a-\u202e\u2066-\u2069]|^\\s*::(error|set-|stop)|##\\w*\\[", re.M
)
"""What a terminal or the log of a CI system obeys."""


class StrictPage(Page):
    """A page in which nothing is a comment or an instruction."""

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"a declaration: {data}")


HARMLESS = StrictPage(render_html(hostile_run("x")))


@QUICK
@given(TEXTS)
@example(ALL)
def test_a_page_keeps_its_tags_and_attributes(text: str) -> None:
    source = render_html(hostile_run(text))
    page = StrictPage(source)
    assert page.tags <= HARMLESS.tags
    assert {(tag, name) for tag, name, _ in page.attributes} <= {(tag, name) for tag, name, _ in HARMLESS.attributes}
    assert {value for _, name, value in page.attributes if name in ("href", "class", "id")} <= {
        value for _, name, value in HARMLESS.attributes if name in ("href", "class", "id")
    }
    assert not UNPRINTABLE.search(source)


def tokens_of(markdown: str) -> list[Token]:
    """Every token, also those inside paragraphs and cells, as CommonMark with GitHub's tables reads them."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    found: list[Token] = []
    for token in parser.parse(markdown):
        found += [token, *(token.children or ())]
    return found


OWN_HTML = re.compile(r"</?(details|summary|pre)>|<br>")


@QUICK
@given(TEXTS)
@example(ALL)
@example("</pre>\n" * 30)
def test_markdown_keeps_its_structure(text: str) -> None:
    source = render_markdown(hostile_run(text))
    assert len(source) <= MAX_CHARACTERS
    tokens = tokens_of(source)
    kinds = {token.type for token in tokens}
    assert not kinds & {
        "link_open",
        "image",
        "code_inline",
        "fence",
        "code_block",
        "blockquote_open",
        "s_open",
        "em_open",
    }
    for token in tokens:
        if token.type in ("html_inline", "html_block"):
            left = OWN_HTML.sub("", token.content)
            assert "<" not in left and ">" not in left
    shown = "".join(token.content for token in tokens if token.type in ("text", "text_special", "entity"))
    assert not re.search("@[A-Za-z0-9]", shown)
    assert "://" not in source and not re.search("www\\.", source, re.IGNORECASE)
    assert not UNPRINTABLE.search(source)
    widths = [line.count("|") for line in source.splitlines() if line.startswith("|")]
    assert set(widths) <= {3, 6, 8, 11}


@QUICK
@given(TEXTS)
@example(ALL)
def test_junit_is_xml_with_the_same_elements(text: str) -> None:
    source = render_junit(hostile_run(text))
    tags = [element.tag for element in ElementTree.fromstring(source.encode()).iter()]
    assert tags == [element.tag for element in ElementTree.fromstring(render_junit(hostile_run("x"))).iter()]
    assert not UNPRINTABLE.search(source)


@QUICK
@given(TEXTS)
@example(ALL)
def test_a_line_of_annotations_is_one_command(text: str) -> None:
    source = render_annotations(hostile_run(text))
    assert source.count("\n") == len(commands_of(source)) == len(commands_of(render_annotations(hostile_run("x"))))
    assert not UNPRINTABLE.search(source)


def paired(text: str) -> str:
    """Two lone surrogates that make a pair as the character that they are in JSON."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


@QUICK
@given(TEXTS)
@example(ALL)
def test_json_is_ascii_and_keeps_every_character(text: str) -> None:
    report = json.loads(render_plain(hostile_run(text)).encode("ascii"))
    assert report["run"] == paired(text)
    assert contradictions(report, report_schema()) == []
    statement = json.loads(render_statement(hostile_run(text)).encode("ascii"))
    assert paired(f"validate: {text} [{text}]") in statement["predicate"]["failedTests"]


@QUICK
@given(TEXTS)
@example(ALL)
def test_json_on_standard_output_keeps_its_values_and_gives_no_orders(text: str) -> None:
    printed = json_text(json.dumps({text: [text]}, indent=2, ensure_ascii=False))
    assert json.loads(printed) == {paired(text): [paired(text)]}
    assert not ORDERS.search(printed)
    printed.encode()


@QUICK
@given(TEXTS, st.sampled_from([40, 100, 200]))
@example(ALL, 100)
def test_the_terminal_gets_no_orders(text: str, width: int) -> None:
    assert not ORDERS.search(summary_of(hostile_run(text), width))


@QUICK
@given(TEXTS)
@example(ALL)
def test_lines_of_the_log_give_no_orders(text: str) -> None:
    record = logging.LogRecord("pipeline", logging.INFO, "", 0, "%-10s %s", ("validate", text), None)
    for printed in (SafeFormatter("%(message)s").format(record), log_text(text), field_text(text)):
        assert not ORDERS.search(printed)
        printed.encode()
    assert not re.search("[\t\r\n]", field_text(text))


def printed_by(action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> str:
    """What an action writes to standard output and standard error."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stream)
        patch.setattr("sys.stderr", stream)
        action()
        stream.flush()
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode()


@pytest.mark.parametrize("text", [ALL, *FRAGMENTS])
def test_commands_give_no_orders(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = json.loads(json.dumps(hostile_run(text)))
    file = tmp_path / "run" / "run.json"
    file.parent.mkdir()
    file.write_text(json.dumps(run | {"config": {"a": "b", text: text}}))
    other = tmp_path / "other" / "run.json"
    other.parent.mkdir()
    other.write_text(json.dumps(run | {"config": {"a": text}}))
    found = compare(read_side(file.parent), read_side(other.parent), 0.01)
    errors: list[Exception] = [StageError(text), ConfigError([Problem(text, text, text)])]
    said = [(error, as_json) for error in errors for as_json in (True, False)]
    actions: list[Callable[[], object]] = [
        lambda: print_difference(found),
        lambda: print_description({"kind": "run", "path": text, **run}),
        lambda: print_description({"kind": "bundle", "path": text, text: {text: [text]}}),
        *(partial(cli.report, error, as_json) for error, as_json in said),
    ]
    for action in actions:
        printed = printed_by(action, monkeypatch)
        assert printed
        assert not ORDERS.search(printed.replace("\r\n", "\n"))


def test_the_properties_would_notice() -> None:
    """Each check finds the harm that it looks for."""
    assert ORDERS.search("a\n  ::error::b") and ORDERS.search("\x1b[31m") and ORDERS.search("x ##vso[y]")
    assert {token.type for token in tokens_of("[l](http://e.example) `c`")} >= {"link_open", "code_inline"}
    with pytest.raises(AssertionError):
        StrictPage("<p><!-- x --></p>")
    with pytest.raises(AssertionError):
        commands_of("::error title=a:b,c::d")


def hostile_plan(text: str) -> Any:
    """Decisions as `--dry-run` prints them."""
    from pipeline.runner import Decision

    class Planned:
        def plan(self, names: object) -> list[Decision]:
            return [Decision("finetune", False, text)]

    return Planned()


@pytest.mark.parametrize("text", FRAGMENTS)
@pytest.mark.parametrize("as_json", [True, False])
def test_the_plan_gives_no_orders(text: str, as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = printed_by(lambda: cli.print_plan(hostile_plan(text), ["finetune"], as_json), monkeypatch)
    assert not ORDERS.search(printed.replace("\r\n", "\n"))
