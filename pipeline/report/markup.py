"""Text that came from outside, made safe for the place it is put in.

Class names, file names and error messages are data: they may hold markup, table bars or workflow
commands. `element` escapes every child that is not already `Html`, so nothing is escaped by memory.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

UNPRINTABLE = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
"""What XML 1.0 forbids, control characters, and the marks that reverse the reading direction."""

MARKDOWN_SPECIAL = re.compile(r"[&<>|\\`*\[\]#~@$]|:(?=\S)|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.", re.IGNORECASE)
"""Everything GitHub gives a meaning to inside a line: code, links, mentions, tables, maths, emoji, addresses."""


WORKFLOW_COMMAND = re.compile(
    r"::(?=(error|warning|notice|debug|group|endgroup|add-|set-|save-state|stop-commands|remove-matcher|echo))|##(?=\w*\[)",
    re.IGNORECASE,
)
"""How GitHub Actions, Azure Pipelines and TeamCity recognise a command in a log; `aten::conv2d` is none."""


class Html(str):
    """A string that is markup already."""


def clean(value: object) -> str:
    """`value` as text without control characters, lone surrogates or direction overrides."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(value))


def shorten(value: object, limit: int = 160) -> str:
    """One line of at most `limit` characters."""
    line = " ".join(clean(value).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def element(tag: str, *children: object, **attributes: object) -> Html:
    """`<tag …>children</tag>`; text is escaped. `class_` gives `class`, `font_size` gives `font-size`.

    Attributes that are None are left out; floats are written with at most two decimals.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(number_text(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Html(f"<{tag}{written}>{join(children)}</{tag}>")


def join(children: Iterable[object], separator: str = "") -> Html:
    """Children one after the other, escaped where they are not `Html`."""
    return Html(separator.join(child if isinstance(child, Html) else html.escape(clean(child)) for child in children))


def number_text(value: object) -> str:
    """An attribute value: floats short, so that the same run gives the same bytes everywhere."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return clean(value)


def markdown_text(value: object, limit: int = 160) -> str:
    """One line that GitHub shows as it is: special characters become character references.

    A mention is looked for in the rendered text, so a name after @ is kept apart by a zero-width space.
    """
    escaped = MARKDOWN_SPECIAL.sub(lambda match: f"&#{ord(match.group())};", shorten(value, limit))
    return escaped.replace("&#64;", "&#64;&#8203;")


def terminal_text(value: object, limit: int = 160) -> str:
    """One line that no CI log takes for a workflow command (`::error::`, `##[error]`)."""
    return defused(shorten(value, limit))


def log_text(value: object) -> str:
    """Lines as they are, of which none is a workflow command or changes what a terminal shows."""
    return "\n".join(defused(clean(line)) for line in str(value).splitlines())


def field_text(value: object) -> str:
    """The whole of a value as a field of a line: no line breaks, no tabs, else as `log_text`."""
    return defused(re.sub(r"[\t\r\n]", " ", clean(value)))


def defused(line: str) -> str:
    """A line whose workflow commands are parted by a zero-width space."""
    return WORKFLOW_COMMAND.sub(lambda match: "\u200b".join(match.group()) + "\u200b", line)


def json_text(text: str) -> str:
    """JSON that says the same in other escapes: nothing in it is a workflow command, an order to a terminal, or a
    character that UTF-8 cannot hold. JSON itself has none of these outside of its strings."""
    text = WORKFLOW_COMMAND.sub(lambda match: f"\\u{ord(match.group()[0]):04x}{match.group()[1:]}", text)
    return UNPRINTABLE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)
