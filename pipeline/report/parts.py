"""Pieces of the page that several sections use."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.report.markup import Html, element


def chip(text: str, style: str) -> Html:
    """A short verdict: words first, colour second."""
    return element("span", text, class_=f"chip {style}")


def scrolling(content: Html, name: str) -> Html:
    """A region that scrolls sideways where the window is narrow, reachable by keyboard."""
    return element("div", content, class_="scroll", tabindex="0", role="region", aria_label=name)


def table(caption: str, heads: Sequence[str], rows: Sequence[Html], numeric: Sequence[int] = ()) -> Html:
    """A table with a caption for screen readers; `numeric` columns are right-aligned."""
    head = [
        element("th", name, scope="col", class_="number" if index in numeric else None)
        for index, name in enumerate(heads)
    ]
    return scrolling(
        element("table", element("caption", caption), element("thead", element("tr", *head)), element("tbody", *rows)),
        caption,
    )
