"""`strategy: auto`: from cheap to costly, going on only while the step before was worth it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.finetune.config import Strategy
from stages.finetune.setup import Setup
from stages.finetune.strategies import Attempt, make_attempt
from stages.statistics import gain_of

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Rung:
    """One strategy tried by auto: what it gained over the best before it, and what follows from that."""

    strategy: Strategy
    validation_metric: float | None
    seconds: float
    gain: dict[str, float] | None
    kept: bool
    reason: str


def climb(setup: Setup, folder: Path) -> tuple[Attempt, list[Rung]]:
    """The attempt to keep, and the way there. Attempts that are done already are taken from `folder`."""
    best = make_attempt("feature-extraction", setup, folder)
    rungs = [Rung(best.strategy, best.metric, best.seconds, None, True, "the start")]
    for strategy in costlier(setup):
        if room := too_little_room(best, setup):
            rungs[-1] = dataclasses.replace(rungs[-1], reason=f"{rungs[-1].reason}; {room}")
            break
        setup.context.log.info("%-10s auto: tries %s", "", strategy)
        made = make_attempt(strategy, setup, folder / strategy)
        rung = judge(made, best, setup)
        setup.context.log.info("%-10s auto: %s: %s", "", strategy, rung.reason)
        rungs.append(rung)
        if not rung.kept:
            break
        best = made
    return best, rungs


def costlier(setup: Setup) -> Iterator[Strategy]:
    """What comes after the probe, in the order of its cost."""
    if setup.takes_adapters:
        yield "lora"
    yield "lp-ft"


def too_little_room(best: Attempt, setup: Setup) -> str:
    """Why nothing can be gained any more; empty where it can."""
    wanted = setup.config.auto.min_gain
    if best.metric is not None and 1 - best.metric < wanted:
        return f"no more than {1 - best.metric:.4f} is left to gain, less than finetune.auto.min_gain ({wanted:g})"
    return ""


def judge(made: Attempt, best: Attempt, setup: Setup) -> Rung:
    """Whether a step was worth it: a gain of `min_gain` or more, whose interval lies above zero."""
    wanted = setup.config.auto
    if made.scores is None or best.scores is None:
        return Rung(made.strategy, None, made.seconds, None, False, f"training diverged; {best.strategy} is kept")
    gain = gain_of(made.scores, best.scores, wanted.confidence)
    cost = f"{made.seconds:.0f} s"
    problem = ""
    if gain.difference < wanted.min_gain:
        problem = f"less than finetune.auto.min_gain ({wanted.min_gain:g})"
    elif gain.low <= 0:
        problem = f"{len(made.scores)} validation examples cannot tell it from none"
    if problem:
        reason = f"{gain} over {best.strategy} for {cost}: {problem}; {best.strategy} is kept"
    else:
        reason = f"{gain} over {best.strategy} for {cost}"
    found: dict[str, Any] = dataclasses.asdict(gain)
    return Rung(made.strategy, made.metric, made.seconds, found, not problem, reason)
