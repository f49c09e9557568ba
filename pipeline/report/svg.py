"""Plots as inline SVG: no script, no font, nothing to load. Colours are classes of `style.css`.

Every plot is one `<svg role="img">` with a text alternative; every mark has a `<title>` with its numbers.
Points that are missing or not finite are left out, never drawn as zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from pipeline.report.formats import MISSING
from pipeline.report.markup import Html, element, join, shorten

CHARACTER = 6.6
"""Width of a character of the 12 px label, in px (an upper mean over the system fonts)."""

Format = Callable[[float], str]


@dataclass(frozen=True)
class Scale:
    """Maps data values from [low, high] to pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        return self.start + (self.end - self.start) * ((value - self.low) / span if span else 0.5)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the scale."""
        return [
            tick for tick in nice_ticks(self.low, self.high, count) if self.low - 1e-12 <= tick <= self.high + 1e-12
        ]


@dataclass(frozen=True)
class Series:
    """A line of points; `style` is its CSS class."""

    name: str
    points: tuple[tuple[float, float], ...]
    style: str


@dataclass(frozen=True)
class Point:
    """One mark of a scatter plot with a vertical interval."""

    name: str
    x: float
    y: float
    style: str
    detail: str
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Bar:
    """One row of a timeline: seconds from the start, seconds long; `length` None draws no bar."""

    name: str
    start: float
    length: float | None
    style: str
    columns: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Row:
    """One row of a chart of intervals: a mark, a whisker and, pale, the single values behind them."""

    name: str
    value: float
    interval: tuple[float, float]
    style: str
    detail: str
    dots: tuple[float, ...] = field(default=())


@dataclass(frozen=True)
class Fall:
    """One row of a waterfall: the error that a step adds, and what has come together; None is not drawn."""

    name: str
    own: float | None
    total: float | None
    style: str
    columns: tuple[str, ...] = field(default=())


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` multiples of 1, 2 or 5 × 10ⁿ that cover [low, high]."""
    raw = (high - low) / max(count, 1)
    if not raw > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 12) for index in range(first, last + 1)]


def padded(values: Sequence[float], share: float = 0.08, least: float = 1e-9) -> tuple[float, float]:
    """The range of `values` widened by a share of itself on both sides."""
    low, high = min(values), max(values)
    margin = max((high - low) * share, least)
    return low - margin, high + margin


def drawing(width: float, height: float, description: str, *body: object) -> Html:
    """The `<svg>` element; scales down with the page, never up."""
    return element(
        "svg",
        element("title", description),
        *body,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=f"{width:.0f}",
        height=f"{height:.0f}",
        role="img",
        aria_label=description,
    )


def label(x: float, y: float, content: object, style: str = "label", anchor: str = "start", title: str = "") -> Html:
    """Text at a place; `title` holds the unshortened form."""
    tooltip = element("title", title) if title else Html("")
    return element("text", tooltip, content, x=x, y=y, class_=style, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> Html:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=style)


def axes(x: Scale, y: Scale, x_ticks: Sequence[float], x_format: Format, y_format: Format) -> Html:
    """Horizontal grid lines with their values, and the values under the x axis."""
    parts = []
    for tick in y.ticks(4):
        parts.append(line(x.start, y(tick), x.end, y(tick), "grid"))
        parts.append(label(x.start - 8, y(tick) + 4, y_format(tick), "tick", "end"))
    parts.append(line(x.start, y.start, x.end, y.start, "axis"))
    parts += [label(x(tick), y.start + 18, x_format(tick), "tick", "middle") for tick in x_ticks]
    return join(parts)


def line_chart(
    series: Sequence[Series],
    description: str,
    y_format: Format,
    x_label: str,
    rules: Sequence[tuple[str, float]] = (),
    marked_x: float | None = None,
) -> Html:
    """Lines over a whole-numbered x axis, labelled at their ends; `rules` are dashed horizontal lines."""
    width, height, left, right, bottom = 480.0, 250.0, 48.0, 134.0, 206.0
    drawn = [item for item in series if item.points]
    xs = [x for item in drawn for x, _ in item.points]
    ys = [y for item in drawn for _, y in item.points] + [value for _, value in rules]
    low, high = (min(xs), max(xs)) if min(xs) < max(xs) else (min(xs) - 1, max(xs) + 1)
    x = Scale(low, high, left, width - right)
    y = Scale(*padded(ys, 0.1, least=abs(max(ys)) * 0.05 or 0.1), bottom, 16)
    ticks = [tick for tick in x.ticks(6) if tick == int(tick) and (len(set(xs)) > 1 or tick in xs)]
    parts = [axes(x, y, ticks, lambda tick: f"{tick:.0f}", y_format)]
    if marked_x is not None and low <= marked_x <= high:
        parts.append(line(x(marked_x), 16, x(marked_x), bottom, "marker"))
        parts.append(label(x(marked_x), 12, "kept", "tick", "middle"))
    ends = [(y(value), name, "rule-label", value) for name, value in rules]
    parts += [line(left, y(value), width - right, y(value), "rule") for _, value in rules]
    for item in drawn:
        path = " ".join(f"{x(px):.2f},{y(py):.2f}" for px, py in item.points)
        parts.append(element("polyline", points=path, class_=f"line {item.style}"))
        parts += [
            element(
                "circle",
                element("title", f"{item.name}, {x_label} {px:.0f}: {y_format(py)}"),
                cx=x(px),
                cy=y(py),
                r=3.0,
                class_=f"dot {item.style}",
            )
            for px, py in item.points
        ]
        ends.append((y(item.points[-1][1]), item.name, f"end-label {item.style}", item.points[-1][1]))
    for place, (_, name, style, value) in zip(spread([end[0] for end in ends], 14), ends, strict=True):
        parts.append(label(width - right + 8, place + 4, f"{name} {y_format(value)}", style))
    parts.append(label((left + width - right) / 2, bottom + 38, x_label, "tick", "middle"))
    return drawing(width, height, description, *parts)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Positions moved apart to at least `gap` px, keeping their order and their centre."""
    order = sorted(range(len(places)), key=lambda index: (places[index], index))
    moved = list(places)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    shift = (sum(places) - sum(moved)) / len(places) if places else 0.0
    return [place + shift for place in moved]


def scatter(
    points: Sequence[Point],
    description: str,
    x_label: str,
    y_label: str,
    x_format: Format,
    y_format: Format,
    front: Sequence[tuple[float, float]] = (),
) -> Html:
    """Marks with vertical intervals and their names beside them, moved where they would overlap; `front` is a stair
    behind them, from left to right."""
    width, height, left, right, bottom = 980.0, 330.0, 56.0, 24.0, 276.0
    ys = [value for point in points for value in (point.y, *(point.interval or ()))]
    x_low, x_high = 0.0, max(point.x for point in points) * 1.18
    x = Scale(x_low, x_high or 1.0, left, width - right)
    y = Scale(*padded(ys, 0.1, least=0.005), bottom, 26)
    parts = [axes(x, y, x.ticks(8), x_format, y_format), label(0, 12, y_label, "tick")]
    parts.append(label(width - right, bottom + 40, x_label, "tick", "end"))
    if len(front) > 1:
        corners = [f"{x(px):.2f},{y(py):.2f} {x(nx):.2f},{y(py):.2f}" for (px, py), (nx, _) in pairwise(front)]
        last = f"{x(front[-1][0]):.2f},{y(front[-1][1]):.2f}"
        parts.append(element("polyline", points=" ".join([*corners, last]), class_="front"))
    for point in points:
        if point.interval:
            parts.append(
                line(x(point.x), y(point.interval[0]), x(point.x), y(point.interval[1]), f"whisker {point.style}")
            )
    taken = [(x(point.x) - 9, y(point.y) - 9, x(point.x) + 9, y(point.y) + 9) for point in points]
    taken += [(x(px), y(py) - 2, x(nx), y(py) + 2) for (px, py), (nx, _) in pairwise(front)]
    for point in points:
        parts.append(mark(x(point.x), y(point.y), point))
        text = shorten(point.name, 40)
        place, anchor, box = free_place(x(point.x), y(point.y), len(text) * CHARACTER, taken, (left, 16, width, bottom))
        taken.append(box)
        parts.append(label(*place, text, f"label {point.style}", anchor, title=point.name))
    return drawing(width, height, description, *parts)


def mark(x: float, y: float, point: Point) -> Html:
    """A circle; the reference is a diamond, so that it differs by more than its colour."""
    title = element("title", f"{point.name}: {point.detail}")
    if point.style == "reference":
        return element("path", title, d=f"M{x:.2f} {y - 7:.2f}l7 7l-7 7l-7 -7z", class_="mark reference")
    return element("circle", title, cx=x, cy=y, r=7.0 if point.style == "chosen" else 5.5, class_=f"mark {point.style}")


Box = tuple[float, float, float, float]


def free_place(
    x: float, y: float, length: float, taken: Sequence[Box], frame: Box
) -> tuple[tuple[float, float], str, Box]:
    """Where a label of `length` px beside (x, y) overlaps nothing: right, left, above or below, then further off."""
    options: list[tuple[tuple[float, float], str, Box]] = []
    for drop in (0, -18, 18, -34, 34, -50, 50):
        right, left = x + 13, x - 13
        options.append(((right, y + drop + 4), "start", (right, y + drop - 8, right + length, y + drop + 8)))
        options.append(((left, y + drop + 4), "end", (left - length, y + drop - 8, left, y + drop + 8)))
    for option in options:
        box = option[2]
        inside = box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
        if inside and not any(overlaps(box, other) for other in taken):
            return option
    return options[0]


def overlaps(one: Box, other: Box) -> bool:
    """Whether two boxes share area."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def histogram(edges: Sequence[float], counts: Sequence[float], description: str, edge_format: Format) -> Html:
    """Bars of one width, one a bin, with the values of some edges below; fits linear and log bins alike."""
    width, height, left, right, bottom = 300.0, 132.0, 6.0, 6.0, 100.0
    x = Scale(0, len(counts), left, width - right)
    y = Scale(0, max(counts) or 1, bottom, 12)
    total = sum(counts) or 1
    parts = [line(left, bottom, width - right, bottom, "axis")]
    for index, count in enumerate(counts):
        if count > 0:
            top = min(y(count), bottom - 1)
            title = (
                f"{edge_format(edges[index])} to {edge_format(edges[index + 1])}: {count:,.0f} ({count / total:.1%})"
            )
            step = x(index + 1) - x(index)
            parts.append(
                element(
                    "rect",
                    element("title", title),
                    x=x(index) + 0.5,
                    y=top,
                    width=max(step - 1, 1),
                    height=bottom - top,
                    class_="bar",
                )
            )
    for index in labelled_edges(edges):
        anchor = "start" if index == 0 else "end" if index == len(counts) else "middle"
        parts.append(label(x(index), bottom + 18, edge_format(edges[index]), "tick", anchor))
    return drawing(width, height, description, *parts)


def labelled_edges(edges: Sequence[float], count: int = 4) -> list[int]:
    """Which edges to name: powers of ten where the bins hold at least two, else the ends and the middle."""
    powers = [
        index for index, edge in enumerate(edges) if edge > 0 and abs(math.log10(edge) - round(math.log10(edge))) < 1e-6
    ]
    if len(powers) < 2:
        return sorted({0, len(edges) // 2, len(edges) - 1})
    return powers[:: math.ceil(len(powers) / count)]


def heatmap(labels: Sequence[str], matrix: Sequence[Sequence[float]], description: str) -> Html:
    """A confusion matrix: rows are the truth, shaded by their share of the row; numbers in up to 20 classes."""
    size = len(labels)
    cell = max(14.0, min(46.0, 640.0 / size))
    names = [shorten(name, 18) for name in labels]
    left = max(len(name) for name in names) * CHARACTER + 34
    top = max(len(name) for name in names) * CHARACTER * 0.72 + 34
    font = "cell" if cell >= 30 else "cell small"
    parts = [label(left, 12, "predicted →", "tick"), label(left - 10, top - 8, "true ↓", "tick", "end")]
    for index, name in enumerate(names):
        middle = left + (index + 0.5) * cell
        column = element(
            "text",
            element("title", labels[index]),
            name,
            class_="label",
            transform=f"translate({middle + 3:.2f} {top - 8:.2f}) rotate(-45)",
        )
        parts += [column, label(left - 10, top + (index + 0.5) * cell + 4, name, "label", "end", title=labels[index])]
    for row, counts in enumerate(matrix):
        total = sum(counts) or 1
        for column_index, count in enumerate(counts):
            share = count / total
            x, y = left + column_index * cell, top + row * cell
            title = f"true {labels[row]}, predicted {labels[column_index]}: {count:,.0f} ({share:.1%} of the row)"
            parts.append(
                element(
                    "rect",
                    element("title", title),
                    x=x + 1,
                    y=y + 1,
                    width=cell - 2,
                    height=cell - 2,
                    class_="cell-empty",
                )
            )
            if count > 0:
                parts.append(
                    element(
                        "rect",
                        element("title", title),
                        x=x + 1,
                        y=y + 1,
                        width=cell - 2,
                        height=cell - 2,
                        fill_opacity=0.06 + 0.94 * share,
                        class_="cell-fill",
                    )
                )
            if size <= 20 and count > 0:
                parts.append(
                    label(
                        x + cell / 2,
                        y + cell / 2 + 4,
                        f"{count:.0f}",
                        f"{font}{' strong' if share > 0.5 else ''}",
                        "middle",
                    )
                )
    return drawing(left + size * cell + top * 0.72 + 4, top + size * cell + 4, description, *parts)


def strips(
    names: Sequence[str], rows: Mapping[str, Sequence[float | None]], description: str, cell_format: Format
) -> Html:
    """Rows of cells, one a name, shaded by their share of the row's largest value; missing ones stay empty."""
    width, left, row, top = 980.0, 130.0, 30.0, 6.0
    cell = (width - left - 70) / max(len(names), 1)
    parts = []
    for index, (title, values) in enumerate(rows.items()):
        largest = max((value for value in values if value is not None), default=0.0)
        y = top + index * row
        parts.append(label(left - 12, y + row / 2 + 4, title, "label", "end"))
        for column, (name, value) in enumerate(zip(names, values, strict=True)):
            box = {"x": left + column * cell, "y": y, "width": max(cell - 1, 1.0), "height": row - 3}
            shown = MISSING if value is None else cell_format(value)
            parts.append(element("rect", element("title", f"{name}: {title} {shown}"), **box, class_="cell-empty"))
            if value is not None and value > 0 and largest > 0:
                strength = 0.06 + 0.94 * value / largest
                parts.append(
                    element(
                        "rect",
                        element("title", f"{name}: {title} {shown}"),
                        **box,
                        fill_opacity=strength,
                        class_="cell-fill",
                    )
                )
        parts.append(label(width - 62, y + row / 2 + 4, f"≤ {cell_format(largest)}", "tick"))
    bottom = top + len(rows) * row
    parts.append(label(left, bottom + 14, shorten(names[0], 30), "tick"))
    parts.append(label(width - 70, bottom + 14, shorten(names[-1], 50), "tick", "end"))
    return drawing(width, bottom + 22, description, *parts)


def time_ticks(end: float, count: int = 5) -> list[float]:
    """Seconds from 0 to `end` in steps that a clock has."""
    steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 43200, 86400)
    step = next((step for step in steps if end / step <= count), steps[-1])
    return [float(tick) for tick in range(0, int(end) + 1, max(step, int(end / 50)))]


def timeline(bars: Sequence[Bar], heads: Sequence[str], description: str, x_format: Format) -> Html:
    """Rows of bars on a common time axis, with columns of text at the right."""
    width, row, left, right, top = 980.0, 32.0, 120.0, 300.0, 30.0
    end = max((bar.start + (bar.length or 0) for bar in bars), default=0) or 1.0
    x = Scale(0, end, left, width - right)
    bottom = top + len(bars) * row
    ticks = time_ticks(end)
    parts = [line(x(tick), top, x(tick), bottom, "grid") for tick in ticks]
    parts += [label(x(tick), bottom + 18, x_format(tick), "tick", "middle") for tick in ticks]
    columns = [width - right + 110, width - right + 205, width - 4]
    parts += [label(place, top - 10, head, "tick", "end") for place, head in zip(columns, heads, strict=False)]
    for index, bar in enumerate(bars):
        y = top + index * row
        parts.append(label(left - 12, y + row / 2 + 4, bar.name, "label", "end"))
        if bar.length is not None:
            length = max(x(bar.length) - x(0), 2.0)
            parts.append(
                element(
                    "rect",
                    element("title", f"{bar.name}: {bar.columns[0]}"),
                    x=x(bar.start),
                    y=y + 8,
                    width=length,
                    height=row - 16,
                    rx=2.0,
                    class_=f"span {bar.style}",
                )
            )
        parts += [
            label(place, y + row / 2 + 4, text, "label value", "end")
            for place, text in zip(columns, bar.columns, strict=False)
        ]
    return drawing(width, bottom + 26, description, *parts)


def interval_rows(rows: Sequence[Row], description: str, x_label: str, x_format: Format, zero: str = "") -> Html:
    """A mark with its whisker a row, what it says at the right; `zero` names a dashed line at 0 where it is not the
    edge of the plot."""
    width, row, left, right, top = 980.0, 26.0, 190.0, 290.0, 24.0
    values = [value for one in rows for value in (one.value, *one.interval, *one.dots)]
    low, high = padded([*values, 0.0], 0.06)
    x = Scale(low if min(values) < 0 else 0.0, high, left, width - right)
    bottom = top + len(rows) * row
    ticks = x.ticks(6)
    parts = [line(x(tick), top, x(tick), bottom, "grid") for tick in ticks]
    parts += [label(x(tick), bottom + 18, x_format(tick), "tick", "middle") for tick in ticks]
    if zero:
        parts += [line(x(0), top, x(0), bottom, "rule"), label(x(0), 12, zero, "tick", "middle")]
    for index, one in enumerate(rows):
        y = top + (index + 0.5) * row
        name = shorten(one.name, 26)
        parts.append(label(left - 14, y + 4, name, f"label {one.style}", "end", title=one.name))
        parts.append(line(x(one.interval[0]), y, x(one.interval[1]), y, f"whisker {one.style}"))
        parts += [element("circle", cx=x(dot), cy=y, r=2.5, class_="dot pale") for dot in one.dots]
        title = element("title", f"{one.name}: {one.detail}")
        if one.dots:  # a bar, so that it hides none of them
            place = {"x": x(one.value) - 1.5, "y": y - 8, "width": 3.0, "height": 16.0}
            parts.append(element("rect", title, **place, class_=f"median {one.style}"))
        else:
            parts.append(element("circle", title, cx=x(one.value), cy=y, r=5.0, class_=f"mark {one.style}"))
        parts.append(label(width - right + 14, y + 4, one.detail, "label value"))
    parts.append(label((left + width - right) / 2, bottom + 38, x_label, "tick", "middle"))
    return drawing(width, bottom + 44, description, *parts)


def waterfall(falls: Sequence[Fall], heads: Sequence[str], description: str, x_format: Format, x_label: str) -> Html:
    """Rows of bars on a logarithmic axis, with a diamond at the total, and columns of text at the right."""
    width, row, left, right, top = 980.0, 32.0, 170.0, 300.0, 30.0
    known = [value for fall in falls for value in (fall.own, fall.total) if value is not None and value > 0]
    low = math.floor(math.log10(min(known, default=1e-6)))
    high = max(math.ceil(math.log10(max(known, default=1.0))), low + 1)
    x = Scale(low, high, left, width - right)
    bottom = top + len(falls) * row
    ticks = [float(power) for power in range(low, high + 1, max(1, (high - low) // 6))]
    parts = [line(x(tick), top, x(tick), bottom, "grid") for tick in ticks]
    parts += [label(x(tick), bottom + 18, x_format(10**tick), "tick", "middle") for tick in ticks]
    parts.append(label((left + width - right) / 2, bottom + 36, x_label, "tick", "middle"))
    columns = [width - right + 92, width - right + 184, width - 4]
    parts += [label(place, top - 10, head, "tick", "end") for place, head in zip(columns, heads, strict=False)]
    for index, fall in enumerate(falls):
        y = top + index * row
        parts.append(label(left - 12, y + row / 2 + 4, shorten(fall.name, 22), "label", "end", title=fall.name))
        if fall.own is not None and fall.own > 0:
            title = element("title", f"{fall.name}: adds {x_format(fall.own)}")
            end = max(x(math.log10(fall.own)), left + 2)
            box = {"x": left, "y": y + 8, "width": end - left, "height": row - 16}
            parts.append(element("rect", title, **box, rx=2.0, class_=f"span {fall.style}"))
        if fall.total is not None and fall.total > 0:
            point = Point(fall.name, fall.total, 0, "reference", f"from the start {x_format(fall.total)}")
            parts.append(mark(x(math.log10(fall.total)), y + row / 2, point))
        parts += [
            label(place, y + row / 2 + 4, text, "label value", "end")
            for place, text in zip(columns, fall.columns, strict=False)
        ]
    return drawing(width, bottom + 44, description, *parts)
