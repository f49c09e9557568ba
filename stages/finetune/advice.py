"""Was enough unfrozen? Advice to let more of the backbone learn, with the evidence for it; silent without."""

from __future__ import annotations

from typing import Any

from stages.statistics import Gain

FAR_GAIN = 0.05
"""The probe is far below: even the lower end of the gain's 95% interval is this much of the metric (1 at best).

Measured on validation: EfficientNet-Lite0 on Fashion-MNIST .017 (lp-ft), Whisper tiny.en on recordings and MiniLM on
the similarity of texts below 0, MiniLM on the senses of words .114 (lora)."""

LOW_CKA = 0.9
"""The backbone had to change: the most changed layer is less alike to its pretrained self than this (1 for the same).

Measured in the same runs: .82, 1.00, .96 and .80."""

STEEP = 20.0
"""All layers learn, but the lowest this many times more slowly than the head: the default is 100."""


def advise(measured: dict[str, Any]) -> list[str]:
    """A sentence each, from the measurements of finetune: where raw inputs beat the frozen features, and where training
    gained much over them by changing the backbone much, as it does far from what the backbone has learned from
    (Kornblith et al. 2019, arXiv 1805.08974: the linear probe falls short where the domain differs)."""
    found = []
    if (raw := measured["against_raw"]) and raw["warning"]:
        found.append(raw["warning"])
    gain, changes = measured["gain_over_probe"], [row for row in measured["forgetting"] if row["cka"] is not None]
    if not gain or not changes or measured["diverged"]:
        return found
    most = min(changes, key=lambda row: float(row["cka"]))
    step = next_step(measured)
    if gain["low"] >= FAR_GAIN and most["cka"] < LOW_CKA and step:
        found.append(
            f"these data are far from what the backbone learned from: {measured['strategy']} reaches "
            f"{measured['validation_metric']:.4f} where the probe on frozen features has "
            f"{measured['probe_validation_metric']:.4f} ({Gain(**gain)}), and the outputs of {most['layer']} are not "
            f"what they were (CKA {most['cka']:.2f}). Unfreeze more: {step}"
        )
    return found


def next_step(measured: dict[str, Any]) -> str:
    """How more of the backbone would learn than did; empty where all of it learns, and fast."""
    if measured["strategy"] == "lora":
        return "write finetune.strategy: lp-ft, which trains all weights"
    rates, head = measured["backbone_learning_rates"], measured["head_learning_rate"]
    ratio = head / rates[0] if rates and head else 1.0
    if ratio >= STEEP:
        return f"the lowest layer learns {ratio:.0f} times more slowly than the head; try finetune.layer_rate_ratio: 10"
    return ""
