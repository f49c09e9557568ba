"""Is the learning rate too high? A range test: the loss while all rates rise together (Smith 2017, arXiv 1506.01186).

Every layer keeps its share of the head's rate, so what is found is a factor on all of the configured rates. Nothing of
it stays: it runs on a copy of the network, and the state of every random generator is put back.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from stages.finetune.rates import Rates, parameter_groups
from stages.inputs import batches

if TYPE_CHECKING:
    import torch

    from stages.finetune.setup import Setup

LOWEST, HIGHEST, STEPS = 1e-2, 1e2, 40
"""Factors on the configured rates that the test goes through, and in how many steps."""

SMOOTHING = 0.7
RISE = 1.5
"""The loss has left its valley when it is this many times the smallest one."""

MARGIN = 10.0
"""The rate to use is this many times below the one where the loss is lowest (Howard & Gugger 2020, fastai)."""


@dataclass(frozen=True)
class RangeTest:
    """`curve`: [factor, smoothed loss] of each step. `lowest` is the factor at the lowest loss; None where the
    loss never rose, so that no rate that was tried is too high."""

    curve: list[tuple[float, float]]
    lowest: float | None

    @property
    def proposed(self) -> float | None:
        """What to multiply the configured rates with."""
        return None if self.lowest is None else self.lowest / MARGIN

    @property
    def warning(self) -> str:
        """What to do where the configured rates are beyond the lowest loss; empty where they are not."""
        if self.lowest is None or self.lowest >= 1:
            return ""
        return (
            f"the learning rates are too high: the loss is lowest at {self.lowest:.2g} times the configured ones and "
            f"rises above; multiply finetune.head_learning_rate and the backbone's by {self.lowest / MARGIN:.1g}"
        )


def find_rates(network: torch.nn.Module, rates: Rates, setup: Setup, hold: bool) -> RangeTest:
    """Raise the rates from step to step on a copy of `network` until the loss rises or `HIGHEST` is reached.

    `hold`: batch norm keeps its statistics, as it will in training.
    """
    import torch

    from models.classifier import for_loss, hold_batchnorm

    device, plan = setup.context.device, setup.config
    trial = copy.deepcopy(network).to(device)
    if hold:
        hold_batchnorm(trial)
    curve: list[tuple[float, float]] = []
    with kept_random_state():
        trial.train()
        optimizer = torch.optim.AdamW(parameter_groups(trial, rates, plan.weight_decay), lr=rates.head)
        base = [group["lr"] for group in optimizer.param_groups]
        smoothed = 0.0
        with setup.context.progress.task("learning rate test", STEPS) as advance:
            for step, (inputs, targets) in enumerate(training_batches(setup)):
                factor = LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1))
                for group, rate in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = rate * factor
                logits = trial(*(one.to(device) for one in inputs))
                loss = setup.task.loss(for_loss(trial, logits.float()), targets.to(device))
                smoothed = SMOOTHING * smoothed + (1 - SMOOTHING) * loss.item()
                value = smoothed / (1 - SMOOTHING ** (step + 1))  # without the bias of the start at 0
                curve.append((factor, value))
                if has_risen(curve):
                    break
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                advance()
    finite = [point for point in curve if math.isfinite(point[1])]
    lowest = min(finite, key=lambda point: point[1])[0] if has_risen(curve) and finite else None
    return RangeTest(finite, lowest)


def has_risen(curve: Sequence[tuple[float, float]]) -> bool:
    """Whether the last loss is far above the lowest, or no number."""
    last = curve[-1][1]
    return not math.isfinite(last) or last > RISE * min(loss for _, loss in curve)


def training_batches(setup: Setup) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    """Inputs and targets of `STEPS` batches, the training split again and again."""
    import torch

    examples, size = setup.context.data["train"], setup.config.batch_size
    full = [examples[start : start + size] for start in range(0, len(examples), size)]
    full = [part for part in full if len(part) == size] or full
    for part in islice(cycle(full), STEPS):
        targets = torch.from_numpy(setup.task.targets([one.label for one in part], setup.spec.io.width))
        for arrays, _ in batches(setup.processing, part, size):
            yield [torch.from_numpy(arrays[spec.name]) for spec in setup.processing.inputs], targets


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Put the state of Python's, numpy's and torch's generators back at the end."""
    import numpy as np
    import torch

    states: Any = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)
