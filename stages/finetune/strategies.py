"""The strategies: each takes the same start and gives an attempt, a network and the scores of its answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from models.errors import TrainingError
from stages.environment import usable_cores
from stages.finetune.config import Strategy
from stages.finetune.setup import Setup, count, seed_everything

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from peft import PeftModel

    from models.classifier import Classifier
    from stages.finetune.cost import Estimate
    from stages.finetune.range_test import RangeTest
    from stages.finetune.rates import Rates
    from stages.finetune.training import Trained


@dataclass(frozen=True)
class Attempt:
    """What one strategy gave. `scores`: float64 (validation examples,), None where training diverged.

    `network` is the adapted network on the CPU (with adapters: inside peft's wrapper). `rates` is the table of layers
    (see `rate_table`), `history` has an entry an epoch, `seconds` is the time spent training, `wise` the metrics
    between start and end (see `stages.finetune.wise`).
    """

    strategy: Strategy
    network: Classifier | PeftModel
    scores: np.ndarray | None
    seconds: float
    trainable_parameters: int
    rates: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    diverged: str | None = None
    wise: list[dict[str, float]] = field(default_factory=list)
    range_test: RangeTest | None = None
    estimate: Estimate | None = None
    history_metric: str | None = None
    """Of the epochs, where it is not that of the result."""
    total_parameters: int | None = None
    """Of what was trained, where that is more than the result."""

    @property
    def metric(self) -> float | None:
        """On the validation split."""
        return None if self.scores is None else float(self.scores.mean())


def make_attempt(strategy: Strategy, setup: Setup, folder: Path) -> Attempt:
    """Adapt a copy of the start. What it learns is kept in `folder`, from where the same call resumes.

    Raises:
        TrainingError: it cannot be trained (memory, batch norm, adapters that never move).
    """
    seed_everything(setup.context, setup.config)
    made = STRATEGIES[strategy](strategy, setup, folder)
    if setup.config.wise_ft and made.history and not made.diverged:
        from stages.finetune.wise import between_start_and_end

        made = between_start_and_end(made, setup)
    return made


def extract_features(strategy: Strategy, setup: Setup, folder: Path) -> Attempt:
    """The frozen backbone with the linear probe as its head, or with the head that it brings."""
    frozen = setup.frozen
    assert frozen is not None
    network = setup.start(strategy)
    scores, learnt = frozen.scores, count(network.task_head)
    if frozen.given is not None and frozen.given.starts:
        scores = frozen.given.scores
        learnt = 0 if setup.own_head else learnt + count(network.backbone.get_submodule("projection"))  # and the map
    return Attempt(strategy, network, scores, frozen.seconds, learnt)


def train_all(strategy: Strategy, setup: Setup, folder: Path) -> Attempt:
    """Every weight at once: `full` from a random head, `lp-ft` from the probe (Kumar et al. 2022, arXiv 2202.10054)."""
    network, rates = setup.start(strategy), setup.rates(strategy)
    ahead = look_ahead(strategy, network, setup, rates, folder)
    return attempt_from(strategy, network, rates, train_once(strategy, network, setup, rates, folder), ahead)


def train_in_phases(strategy: Strategy, setup: Setup, folder: Path) -> Attempt:
    """From the top down: each phase unfreezes more layers and has its own optimizer (Howard & Ruder 2018, ULMFiT).

    A phase starts from the best epoch of all phases before it.
    """
    from stages.finetune.rates import unfreeze
    from stages.finetune.training import Trained, rank_of

    config, rates, layers = setup.config, setup.rates(strategy), setup.layers
    network = setup.start(strategy)
    ahead = look_ahead(strategy, network, setup, rates, folder)  # with all layers: the most that will learn at once
    best, history = Trained(0, [], None), list[dict[str, float]]()
    for phase in range(1, config.phases + 1):
        opened = math.ceil(len(layers) * phase / config.phases)
        unfreeze(network, layers[-opened:])
        setup.context.log.info(
            "%-10s phase %d/%d: %d of %d layers learn", "", phase, config.phases, opened, len(layers)
        )
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        epochs = epochs_of_phase(config.epochs, config.phases, phase)
        trained = train_once(strategy, network, setup, rates, folder / f"phase-{phase}", epochs)
        done = len(history)
        history += [{**entry, "epoch": entry["epoch"] + done, "phase": phase} for entry in trained.history]
        if trained.diverged:
            return attempt_from(strategy, network, rates, replace(trained, history=history), ahead)
        if best.best_epoch and rank_of(history[best.best_epoch - 1]) >= rank_of(history[trained.best_epoch + done - 1]):
            network.load_state_dict(before)
        else:
            best = Trained(trained.best_epoch + done, history, trained.scores)
    return attempt_from(strategy, network, rates, best, ahead)


def epochs_of_phase(epochs: int, phases: int, phase: int) -> int:
    """All phases together have `epochs`; those that cannot be shared out go to the last ones."""
    return epochs * phase // phases - epochs * (phase - 1) // phases


def train_adapters(strategy: Strategy, setup: Setup, folder: Path) -> Attempt:
    """Small adapters beside frozen weights; the head is trained whole."""
    from models.adapters import AdapterSettings, adapter_weights, inject_adapters, untrained_adapters

    chosen = setup.config.lora
    settings = AdapterSettings(chosen.method, chosen.rank, chosen.alpha, chosen.dropout)
    network = inject_adapters(setup.start(strategy), settings, setup.example_inputs)
    rates, before = setup.rates(strategy), adapter_weights(network)
    ahead = look_ahead(strategy, network, setup, rates, folder)
    trained = train_once(strategy, network, setup, rates, folder)
    if not trained.diverged and (untrained := untrained_adapters(network, before)):
        raise TrainingError(
            f"{len(untrained)} adapters were never trained, the first is {untrained[0]}; is the layer used in the "
            "forward pass, and the learning rate high enough?"
        )
    return attempt_from(strategy, network, rates, trained, ahead)


def train_towers(strategy: Strategy, setup: Setup, folder: Path) -> Attempt:
    """Both towers on images with the names of their labels, by a contrastive loss as in pretraining; then a head of the
    names, and no text tower any more (Goyal et al. 2023, FLYP, arXiv 2212.00638)."""
    from stages.finetune.label_names import paired, with_tuned_names
    from stages.finetune.wise import evaluate

    pairs = paired(setup)
    network, rates = pairs.model, pairs.rates(strategy)
    ahead = look_ahead(strategy, network, pairs, rates, folder)
    made = attempt_from(strategy, network, rates, train_once(strategy, network, pairs, rates, folder), ahead)
    tuned = with_tuned_names(network, setup)
    scores = None if made.diverged else evaluate(tuned, setup)[0]
    whole = count(network)
    return replace(made, network=tuned, scores=scores, total_parameters=whole, history_metric=pairs.task.metric)


STRATEGIES: dict[Strategy, Callable[[Strategy, Setup, Path], Attempt]] = {
    "feature-extraction": extract_features,
    "lora": train_adapters,
    "lp-ft": train_all,
    "gradual-unfreezing": train_in_phases,
    "full": train_all,
    "flyp": train_towers,
}


def train_once(
    strategy: Strategy,
    network: Any,
    setup: Setup,
    rates: Rates,
    folder: Path,
    epochs: int | None = None,
    hold_batchnorm: bool = False,
) -> Trained:
    """One training of what has gradients; divergence is said aloud and is a result, not an error.

    `hold_batchnorm`: also where the strategy lets its statistics move.
    """
    from models.classifier import Classifier
    from stages.finetune.training import Diverged, Trained, TrainingPlan, train

    config, context = setup.config, setup.context
    plan = TrainingPlan(
        epochs=epochs or config.epochs,
        batch_size=config.batch_size,
        rates=rates,
        weight_decay=config.weight_decay,
        warmup_fraction=config.warmup_fraction,
        patience=config.patience,
        precision=config.precision,
        augment=config.augment,
        hold_batchnorm=hold_batchnorm or setup.holds_batchnorm(strategy),
        workers=default_workers(context.device) if config.workers is None else config.workers,
        seed=context.seed,
        processes=config.launch.count,
    )
    data = context.data
    try:
        if config.launch.starts_processes:
            from stages.finetune.launch import train_in_processes

            base = network if isinstance(network, Classifier) else setup.start(strategy)
            return train_in_processes(network, base, setup, plan, folder, config.launch)
        return train(network, setup.processing, data["train"], data["validation"], plan, context, folder)
    except Diverged as error:
        context.log.error("%-10s training diverged: %s", "", error)
        return Trained(0, error.history, None, str(error))


@dataclass(frozen=True)
class Ahead:
    """What is known before training: its cost, and whether the rates are too high, where that was asked for."""

    estimate: Estimate
    range_test: RangeTest | None


def look_ahead(strategy: Strategy, network: Any, setup: Setup, rates: Rates, folder: Path) -> Ahead:
    """Estimate and test, and say what was found."""
    from stages.finetune.cost import estimate_cost
    from stages.finetune.range_test import find_rates
    from stages.finetune.rates import rate_table, rates_in_words

    for line in rates_in_words(rate_table(network, rates)):
        setup.context.log.info("%-10s %s", "", line)
    hold = setup.holds_batchnorm(strategy)
    estimate = estimate_cost(network, rates, setup, hold, folder)
    if not setup.config.learning_rate_test:
        return Ahead(estimate, None)
    found = find_rates(network, rates, setup, hold)
    if found.warning:
        setup.context.log.warning("%-10s %s", "", found.warning)
    return Ahead(estimate, found)


def default_workers(device: str) -> int:
    """On a CPU training itself wants the cores; a GPU waits for pictures to be decoded."""
    return 0 if device == "cpu" else min(4, usable_cores() - 1)


def attempt_from(strategy: Strategy, network: Any, rates: Rates, trained: Trained, ahead: Ahead) -> Attempt:
    """The attempt that a training gave."""
    from stages.finetune.rates import rate_table

    network = network.to("cpu")
    table = rate_table(network, rates)
    return Attempt(
        strategy=strategy,
        network=network,
        scores=trained.scores,
        seconds=sum(entry["seconds"] for entry in trained.history),
        trainable_parameters=sum(row["trained"] for row in table),
        rates=table,
        history=trained.history,
        best_epoch=trained.best_epoch,
        diverged=trained.diverged,
        range_test=ahead.range_test,
        estimate=ahead.estimate,
    )
