"""What a person should read of the measurements of finetune."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stages.statistics import Gain


def notes_of(measured: dict[str, Any]) -> Iterator[str]:
    """A sentence each."""
    if measured["diverged"]:
        yield f"training diverged: {measured['diverged']}"
        return
    yield result_of(measured)
    if (given := measured["given_head"]) and given["mistaken_for_unseen"] is not None:
        yield (
            f"the head gives {given['mistaken_for_unseen']:.1%} of the validation examples an unseen label, though all "
            "of theirs are known: the price of finding unseen ones"
        )
    if given and (played := given.get("played_unseen")):
        yield (
            f"where each known label played unseen on the training examples, {played['unseen']:.1%} of the unseen ones "
            f"and {played['seen']:.1%} of the others were right: expect about that"
        )
    if gain := measured["gain_over_probe"]:
        seconds = measured["seconds"]
        yield (
            f"against the probe {Gain(**gain)} for {seconds['training']:.0f} s of training; the probe took "
            f"{seconds['frozen']:.0f} s"
        )
    if measured["quantization_aware"]:
        yield quantization_of(measured)
    yield from cost_of(measured)
    yield from comparisons_of(measured)
    raw = measured["against_raw"]
    yield from (one for one in measured["advice"] if not raw or one != raw["warning"])  # that one was said
    yield from (f"auto: {rung['strategy']}: {rung['reason']}" for rung in measured["ladder"])
    if (found := measured["learning_rate_test"]) and found["warning"]:
        yield found["warning"]
    if measured["wise_ft"]:
        best = max(measured["wise_ft"], key=lambda row: (row["validation_metric"], row["alpha"]))
        yield f"WiSE-FT keeps {best['alpha']:g} of the change"
    if measured["truncated"]:
        yield (
            f"{measured['truncated']} of {measured['samples']['train']} training examples are longer than "
            "the network is shown and were cut (finetune.max_length, finetune.max_seconds)"
        )


def result_of(measured: dict[str, Any]) -> str:
    """The strategy and its metric beside the baselines."""
    share = measured["trainable_parameters"] / measured["total_parameters"]
    line = f"{measured['strategy']}: validation {measured['metric']} {measured['validation_metric']:.4f}"
    if measured["probe_validation_metric"] is not None:
        line += f" (probe {measured['probe_validation_metric']:.4f}"
        if given := measured["given_head"]:
            line += f", {given['kind']} {given['validation_metric']:.4f}"
        line += f", {measured['constant']} {measured['constant_baseline']:.4f})"
    return f"{line}; {share:.1%} of {measured['total_parameters']:,} parameters trained"


def cost_of(measured: dict[str, Any]) -> Iterator[str]:
    """What training was estimated to cost, and did."""
    estimated, actual = measured["cost"]["estimated"], measured["cost"]["actual"]
    if not estimated or estimated["seconds"] is None:
        return
    line = (
        f"training took {actual['seconds']:.0f} s for {actual['epochs']} epochs, estimated were "
        f"{estimated['seconds']:.0f} s for {estimated['epochs']}"
    )
    if actual["peak_memory_bytes"] and estimated["peak_memory_bytes"]:
        line += f"; memory {actual['peak_memory_bytes'] / 1e9:.2f} GB, {estimated['peak_memory_bytes'] / 1e9:.2f} GB"
    yield line


def quantization_of(measured: dict[str, Any]) -> str:
    """What training with INT8 rounding gave."""
    aware, metric = measured["quantization_aware"], measured["metric"]
    if aware["diverged"]:
        return f"quantization-aware training diverged, the network from before is kept: {aware['diverged']}"
    int8, floats = aware["int8_metric"], aware["float_metric"]
    line = (
        f"quantization-aware training (epochs: {aware['epochs']}): {metric} in INT8, simulated, from "
        f"{int8['before']:.4f} to {int8['after']:.4f}"
    )
    if not aware["kept"]:
        return f"{line}: that gained nothing, the network from before is kept"
    return f"{line}; in floating point from {floats['before']:.4f} to {floats['after']:.4f}"


def comparisons_of(measured: dict[str, Any]) -> Iterator[str]:
    """Against raw inputs, training from scratch, and going directly."""
    if raw := measured["against_raw"]:
        line = f"a linear model on the raw inputs reaches {raw['curve'][-1]['raw']:.4f}"
        if raw["gain"]["low"] <= 0:
            line += "; the validation examples do not show that the features are better"
        yield raw["warning"] or line
    for row in measured["against_scratch"]:
        yield (
            f"with {row['examples']} training examples {measured['strategy']} reaches {shown(row['tuned'])}, training "
            f"from scratch {shown(row['scratch'])}"
        )
    if direct := measured["against_direct"]:
        for what, name in (("probe", "the probe"), ("tuned", measured["strategy"])):
            if gain := direct.get(f"{what}_gain"):
                there = f"{name} reaches {direct[what]:.4f}, directly {direct[f'direct_{what}']:.4f}"
                yield f"through {direct['run']} {there} ({Gain(**gain)})"


def shown(metric: float | None) -> str:
    """A metric, or what there is instead."""
    return "nothing (it diverged)" if metric is None else f"{metric:.4f}"
