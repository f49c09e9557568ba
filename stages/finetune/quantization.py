"""Quantization-aware training: some more epochs, in which the network feels the INT8 rounding that quantize will do.

Fake quantizers go into the trained network, every weight learns with them at one small rate, and they are taken out
again: what is left is a plain network, whose later INT8 costs less (Jacob et al. 2018, arXiv 1712.05877). Adapters are
folded first, since rounding concerns the sum of a weight and its adapter.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from stages.finetune.setup import Setup
from stages.finetune.strategies import Attempt, train_once
from stages.inputs import batches

if TYPE_CHECKING:
    from pathlib import Path

    from models.classifier import Classifier

OBSERVED_EXAMPLES = 256
"""Training examples that show the first ranges: as many as quantize calibrates on (`quantize.calibration_samples`)."""

BATCH = 32


@dataclass(frozen=True)
class QuantizationAware:
    """What it gave, on the validation split. `float_metric` and `int8_metric`: (before, after); INT8 is simulated, with
    no node left in floating point. `kept`: False where INT8 gained nothing by it, so that the network is as before."""

    epochs: int
    learning_rate: float
    layers: int
    float_metric: tuple[float, float]
    int8_metric: tuple[float, float]
    kept: bool
    history: list[dict[str, float]]
    seconds: float
    diverged: str | None = None


def train_for_int8(made: Attempt, setup: Setup, folder: Path) -> tuple[Attempt, QuantizationAware | None]:
    """The attempt with a plain network that was trained on with INT8 rounding, and what that gave.

    The network as it was, with its adapter, where INT8 gained nothing, and None beside it where it had diverged before.
    What is learnt is kept in `folder`, from where the same call resumes.
    """
    from models.fake_quantization import insert_rounding, remove_rounding
    from stages.finetune.rates import one_rate
    from stages.finetune.wise import evaluate

    config = setup.config.quantization_aware
    if made.diverged:
        return made, None
    assert made.scores is not None
    network = plain_copy(made, setup)
    layers = insert_rounding(network, config.symmetric)
    observe_ranges(network, setup)
    before = float(evaluate(network, setup)[0].mean())
    rate = config.learning_rate
    setup.context.log.info(
        "%-10s INT8 in %d layers, simulated: validation %s %.4f before training with it", "", layers,
        setup.task.metric, before,
    )  # fmt: skip
    trained = train_once(
        made.strategy, network, setup, one_rate(setup.layers, rate, rate), folder, config.epochs, hold_batchnorm=True
    )
    after = before if trained.scores is None else float(trained.scores.mean())
    remove_rounding(network.to("cpu"))
    kept = trained.diverged is None and after > before
    scores = evaluate(network, setup)[0] if kept else made.scores
    found = QuantizationAware(
        epochs=len(trained.history),
        learning_rate=rate,
        layers=layers,
        float_metric=(float(made.scores.mean()), float(scores.mean())),
        int8_metric=(before, after),
        kept=kept,
        history=trained.history,
        seconds=sum(entry["seconds"] for entry in trained.history),
        diverged=trained.diverged,
    )
    return replace(made, network=network, scores=scores) if kept else made, found


def plain_copy(made: Attempt, setup: Setup) -> Classifier:
    """The attempt's network without adapters, all of it to be trained but a locked tower."""
    import copy

    from models.adapters import fold
    from models.classifier import Classifier

    network: Any = copy.deepcopy(made.network)
    plain: Classifier = network if isinstance(network, Classifier) else fold(network)
    if not setup.config.locked_tower:
        plain.requires_grad_(True)
    return plain


def observe_ranges(network: Classifier, setup: Setup) -> None:
    """Show training examples, as evaluation shows them, to the fake quantizers in the network."""
    import torch

    from models.fake_quantization import observing

    device, examples = setup.context.device, setup.context.data["train"][:OBSERVED_EXAMPLES]
    network.to(device).eval()
    with setup.context.progress.task("ranges", len(examples)) as advance, torch.no_grad(), observing(network):
        for arrays, count in batches(setup.processing, examples, BATCH):
            network(*(torch.from_numpy(arrays[spec.name]).to(device) for spec in setup.processing.inputs))
            advance(count)


def describe(found: QuantizationAware | None) -> dict[str, Any] | None:
    """As plain values, for the measurements."""
    if found is None:
        return None
    pairs = {"float_metric": found.float_metric, "int8_metric": found.int8_metric}
    return asdict(found) | {name: {"before": one[0], "after": one[1]} for name, one in pairs.items()}
