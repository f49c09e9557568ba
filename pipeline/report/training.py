"""The training section of the page: what learned, how fast, against which baselines, and what the backbone kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.report import svg
from pipeline.report.facts import Facts, mapping, number, records, sequence
from pipeline.report.formats import (
    MISSING,
    format_bytes,
    format_duration,
    format_interval,
    format_percent,
    format_points,
)
from pipeline.report.markup import Html, element, join, shorten
from pipeline.report.parts import chip, table

MAX_LAYERS = 80
"""More cells than that are too thin to point at; the numbers are in run.json."""


def training_section(facts: Facts) -> Html:
    """Loss and metric over the epochs, the way of `auto`, learning curves, layers."""
    measured = facts.measured("finetune")
    if not measured:
        return Html("")
    history = records(measured.get("history"))
    epochs = [plot for plot in (loss_plot(history, measured), metric_plot(history, measured)) if plot]
    curves = [plot for plot in (raw_plot(measured), scratch_plot(measured), rate_plot(measured)) if plot]
    return join(
        [
            element("p", summary(measured), class_="hint"),
            *(element("p", shorten(one, 600)) for one in sequence(measured.get("advice"))),
            element("div", *epochs, class_="pair"),
            quantization_table(measured),
            cost_table(measured),
            ladder_table(measured),
            element("div", *curves, class_="pair") if curves else Html(""),
            layers_figure(measured),
        ]
    )


def summary(measured: dict[str, Any]) -> str:
    """What was trained and what came of it, in a sentence."""
    strategy = measured.get("strategy")
    trained, total = number(measured.get("trainable_parameters")), number(measured.get("total_parameters"))
    parts = [f"Strategy {strategy}" if strategy else "Training"]
    if trained and total:
        parts.append(f"{trained:,.0f} of {total:,.0f} parameters trained ({trained / total:.1%})")
    if (metric := number(measured.get("validation_metric"))) is not None:
        constant = number(measured.get("constant_baseline"))
        against = f" ({measured.get('constant')}: {format_percent(constant)})" if constant is not None else ""
        parts.append(f"validation {metric_of(measured)} {format_percent(metric)}{against}")
    if gain := gain_text(measured.get("gain_over_probe")):
        parts.append(f"{gain} against the linear probe")
    return "; ".join(parts) + "."


def metric_of(measured: dict[str, Any]) -> str:
    """What the metric is called."""
    return shorten(measured.get("metric") or "metric", 40)


def gain_text(value: object) -> str:
    """`+2.0 pt [+0.1, +4.2]` of a gain in the record; empty where there is none."""
    gain = mapping(value)
    difference, low, high = (number(gain.get(key)) for key in ("difference", "low", "high"))
    if difference is None:
        return ""
    interval = f" {format_interval((low, high))}" if low is not None and high is not None else ""
    return f"{format_points(difference)}{interval}"


def series_of(rows: Sequence[dict[str, Any]], key: str, name: str, style: str, x: str) -> svg.Series:
    """The points of one quantity; rows without it are left out."""
    points = [(number(row.get(x)), number(row.get(key))) for row in rows]
    return svg.Series(name, tuple((at, value) for at, value in points if at is not None and value is not None), style)


def loss_plot(history: Sequence[dict[str, Any]], measured: dict[str, Any]) -> Html:
    """Training and validation loss."""
    series = [
        series_of(history, "train_loss", "train", "second", "epoch"),
        series_of(history, "validation_loss", "validation", "first", "epoch"),
    ]
    if not any(item.points for item in series):
        return Html("")
    text = "Loss by epoch: " + "; ".join(
        f"{item.name} from {item.points[0][1]:.3g} to {item.points[-1][1]:.3g}" for item in series if item.points
    )
    chart = svg.line_chart(
        series, text, lambda value: f"{value:.2f}", "epoch", marked_x=number(measured.get("best_epoch"))
    )
    return element("figure", element("h3", "Loss"), chart)


def metric_plot(history: Sequence[dict[str, Any]], measured: dict[str, Any]) -> Html:
    """Validation metric and the frozen probe, where they are of one metric (flyp's epochs have another); the best
    constant answer is far below, and stands in the text."""
    series = [series_of(history, "validation_metric", "validation", "first", "epoch")]
    if not series[0].points:
        return Html("")
    name = shorten(measured.get("history_metric") or metric_of(measured), 40)
    probe = number(measured.get("probe_validation_metric"))
    rules = [("frozen probe", probe)] if probe is not None and name == metric_of(measured) else []
    text = f"Validation {name} by epoch: from {series[0].points[0][1]:.1%} to {series[0].points[-1][1]:.1%}"
    chart = svg.line_chart(
        series, text, lambda value: f"{100 * value:.1f}%", "epoch", rules, number(measured.get("best_epoch"))
    )
    return element("figure", element("h3", f"Validation {name}"), chart)


def quantization_table(measured: dict[str, Any]) -> Html:
    """What INT8 costs with and without quantization-aware training, simulated on the validation split."""
    aware = mapping(measured.get("quantization_aware"))
    if not aware:
        return Html("")
    rows = []
    for name, key in (("floating point", "float_metric"), ("INT8 in every layer", "int8_metric")):
        pair = [number(mapping(aware.get(key)).get(when)) for when in ("before", "after")]
        values = (element("td", format_percent(value), class_="number") for value in pair)
        rows.append(element("tr", element("td", name), *values))
    if diverged := aware.get("diverged"):
        outcome = f"It diverged, and the network from before is kept: {diverged}"
    elif aware.get("kept") is True:
        outcome = f"Epochs with INT8 rounding: {aware.get('epochs')}; what they gave is kept."
    else:
        outcome = "INT8 gained nothing by it; the network from before is kept."
    heads = ("", "Without", "With")
    return join(
        [
            element("h3", "Quantization-aware training"),
            table(f"Validation {metric_of(measured)} by quantization-aware training", heads, rows, numeric=(1, 2)),
            element("p", shorten(outcome, 400), class_="hint"),
        ]
    )


def cost_table(measured: dict[str, Any]) -> Html:
    """What training was estimated to cost from a few measured steps, and what it did."""
    cost = mapping(measured.get("cost"))
    estimated, actual = mapping(cost.get("estimated")), mapping(cost.get("actual"))
    if not estimated:
        return Html("")

    def cells(name: str, *values: str) -> Html:
        return element("tr", element("td", name), *(element("td", value, class_="number") for value in values))

    def plain(row: dict[str, Any], key: str) -> str:
        return MISSING if (value := number(row.get(key))) is None else f"{value:,.0f}"

    flops = number(estimated.get("flops"))
    rows = [
        cells("parameters that learn", *(plain(row, "trainable_parameters") for row in (estimated, actual))),
        cells("epochs", *(plain(row, "epochs") for row in (estimated, actual))),
        cells("time", *(format_duration(number(row.get("seconds"))) for row in (estimated, actual))),
        cells("peak memory", *(format_bytes(number(row.get("peak_memory_bytes"))) for row in (estimated, actual))),
        cells("TFLOPs", MISSING if flops is None else f"{flops / 1e12:.3g}", MISSING),
    ]
    return join(
        [
            element("h3", "What it cost"),
            table("What training cost", ("", "Estimated", "Measured"), rows, numeric=(1, 2)),
        ]
    )


def ladder_table(measured: dict[str, Any]) -> Html:
    """What `auto` tried, what each step gained for how much time, and why it stopped."""
    rungs = records(measured.get("ladder"))
    if not rungs:
        return Html("")
    rows = [
        element(
            "tr",
            element("td", shorten(rung.get("strategy"), 40)),
            element("td", format_percent(number(rung.get("validation_metric"))), class_="number"),
            element("td", gain_text(rung.get("gain")) or MISSING, class_="number"),
            element("td", format_duration(number(rung.get("seconds"))), class_="number"),
            element("td", chip("✓ kept", "pass") if rung.get("kept") is True else chip("left", "plain")),
            element("td", shorten(rung.get("reason"), 300), class_="message"),
        )
        for rung in rungs
    ]
    heads = ("Strategy", "Validation", "Gain over the best before", "Time", "", "Why")
    return join([element("h3", "How auto chose"), table("How auto chose", heads, rows, numeric=(1, 2, 3))])


def curve_figure(title: str, series: Sequence[svg.Series], hint: str) -> Html:
    """Metrics over the number of training examples."""
    text = f"{title} " + "; ".join(
        f"{item.name} from {item.points[0][1]:.1%} to {item.points[-1][1]:.1%}" for item in series if item.points
    )
    chart = svg.line_chart(series, text, lambda value: f"{100 * value:.1f}%", "training examples")
    return element("figure", element("h3", title), chart, element("figcaption", shorten(hint, 400)))


def raw_plot(measured: dict[str, Any]) -> Html:
    """The frozen features against the raw inputs."""
    against = mapping(measured.get("against_raw"))
    curve = records(against.get("curve"))
    series = [
        series_of(curve, "frozen", "features", "first", "examples"),
        series_of(curve, "raw", "raw inputs", "second", "examples"),
    ]
    if not all(item.points for item in series):
        return Html("")
    gain = gain_text(against.get("gain"))
    hint = str(against.get("warning") or f"A linear model on each; the features are worth {gain}.")
    return curve_figure("Does transfer pay?", series, hint)


def scratch_plot(measured: dict[str, Any]) -> Html:
    """The strategy against training from scratch."""
    rows = records(measured.get("against_scratch"))
    series = [
        series_of(rows, "tuned", shorten(measured.get("strategy") or "tuned", 16), "first", "examples"),
        series_of(rows, "scratch", "from scratch", "second", "examples"),
    ]
    if not all(item.points for item in series):
        return Html("")
    gain = gain_text(rows[-1].get("gain"))
    return curve_figure("Against training from scratch", series, f"The same budget; on the most examples {gain}.")


def rate_plot(measured: dict[str, Any]) -> Html:
    """The loss while all learning rates rise."""
    found = mapping(measured.get("learning_rate_test"))
    points = [[number(value) for value in sequence(point)] for point in sequence(found.get("curve"))]
    pairs = [(float(step + 1), point[1], point[0]) for step, point in enumerate(points) if len(point) == 2]
    drawn = tuple((step, loss) for step, loss, _ in pairs if loss is not None)
    if not drawn:
        return Html("")
    lowest = number(found.get("lowest"))
    marked = next((step for step, _, factor in pairs if factor is not None and factor == lowest), None)
    factors = [factor for _, _, factor in pairs if factor is not None]
    text = f"Loss while the rates rise from {factors[0]:.2g} to {factors[-1]:.2g} times the configured ones"
    hint = str(found.get("warning") or "") or (
        f"Lowest at {lowest:.2g} times the configured rates." if lowest else "It never rose: no rate tried is too high."
    )
    chart = svg.line_chart(
        [svg.Series("loss", drawn, "first")], text, lambda value: f"{value:.2f}", "step", marked_x=marked
    )
    return element("figure", element("h3", "Learning rate test"), chart, element("figcaption", f"{text}. {hint}"))


def layers_figure(measured: dict[str, Any]) -> Html:
    """Each layer's rate, how far its weights moved and how much its outputs changed, as a heat map."""
    kept = records(measured.get("forgetting"))
    rates = {str(row.get("layer")): number(row.get("rate")) for row in records(measured.get("layer_rates"))}
    if not kept or len(kept) > MAX_LAYERS:
        return Html("")
    names = [str(row.get("layer")) for row in kept]
    columns = {
        "learning rate": [rates.get(name) for name in names],
        "weights moved": [number(row.get("movement")) for row in kept],
        "outputs changed": [None if (cka := number(row.get("cka"))) is None else 1 - cka for row in kept],
    }
    text = f"{len(names)} layers from the input to the features: " + "; ".join(
        f"{name} {min(found):.2g} to {max(found):.2g}"
        for name, values in columns.items()
        if (found := [value for value in values if value is not None])
    )
    caption = (
        "From the input (left) to the features (right), each row shaded up to its own largest value. Weights moved is "
        "‖W′ − W‖ / ‖W‖; outputs changed is 1 − CKA against the pretrained network on validation examples."
    )
    chart = svg.strips(names, columns, text, lambda value: f"{value:.2g}")
    return element("figure", element("h3", "What each layer learned"), chart, element("figcaption", caption))
