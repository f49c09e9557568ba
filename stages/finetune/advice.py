"""Was enough unfrozen? Advice to let more of the backbone learn, with the evidence for it; silent without. And what the
batches of a contrastive training can teach."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from fractions import Fraction
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


FEW_POSITIVES = 0.5
"""Fewer of the examples than this share have another one of their label in the batch: the contrastive loss is 0 for the
others, so most of every step teaches nothing."""


def share_with_positive(labels: Sequence[Hashable], batch_size: int) -> float:
    """The expected share (0 to 1) of the examples of a batch, drawn without replacement, that have another one of their
    label in it. `labels`: of all training examples.

    Of N examples n have the label of a given one: that none of those is among the other B − 1 of its batch has the
    hypergeometric probability C(N − n, B − 1) / C(N − 1, B − 1).
    """
    examples = len(labels)
    others = min(batch_size, examples) - 1
    if others < 1:
        return 0.0
    ways = math.comb(examples - 1, others)
    alone = sum(Fraction(count * math.comb(examples - count, others), ways) for count in Counter(labels).values())
    return float(1 - alone / examples)


def note_on_batches(labels: Sequence[Hashable], batch_size: int) -> str:
    """What the batches of a contrastive training by labels hold; and where most examples are alone, what to do."""
    share = share_with_positive(labels, batch_size)
    note = f"in a batch of {batch_size} {share:.0%} of the examples have another one of their label to be drawn to"
    if share >= FEW_POSITIVES:
        return note
    larger = batch_size
    while larger < len(labels) and share_with_positive(labels, larger) < FEW_POSITIVES:
        larger = min(2 * larger, len(labels))
    if share_with_positive(labels, larger) < FEW_POSITIVES:
        return f"{note}; the others teach nothing, and no batch has more: give more examples a label in common"
    return f"{note}; the others teach nothing: write finetune.batch_size: {larger}"


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
