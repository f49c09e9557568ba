"""WiSE-FT: weights between the starting and the trained ones (Wortsman et al. 2022, arXiv 2109.01903).

They often keep more of what the pretrained network knew at little or no cost. With adapters the start is the network
without them, so that α scales what they change.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stages.finetune.setup import Setup
from stages.finetune.strategies import Attempt
from stages.inputs import batches

if TYPE_CHECKING:
    import numpy as np
    import torch

ALPHAS = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Shares of the trained weights; 1 is the network as it was trained."""

STATISTICS_EXAMPLES = 512
"""Training examples that batch norm's statistics are measured on between two networks: they are not the statistics
of either, nor between them (Izmailov et al. 2018, arXiv 1803.05407)."""

BATCH = 32


def between_start_and_end(made: Attempt, setup: Setup) -> Attempt:
    """The attempt with the share of its trained weights that does best on validation; ties go to the larger share."""
    network: Any = made.network
    ends = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    starts = starting_state(made, setup, ends)
    rows: list[dict[str, float]] = []
    found: dict[float, np.ndarray] = {}
    for alpha in ALPHAS:
        put_between(network, starts, ends, alpha, setup)
        scores, loss = evaluate(network, setup)
        found[alpha] = scores
        rows.append({"alpha": alpha, "validation_metric": float(scores.mean()), "validation_loss": loss})
    best = max(rows, key=lambda row: (row["validation_metric"], row["alpha"]))["alpha"]
    put_between(network, starts, ends, best, setup)
    setup.context.log.info("%-10s WiSE-FT keeps %.1f of the change", "", best)
    return replace(made, scores=found[best], wise=rows)


def starting_state(made: Attempt, setup: Setup, ends: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state that training started from, under the names of the trained network."""
    from models.adapters import state_without_adapters

    return state_without_adapters(ends) if made.strategy == "lora" else setup.start(made.strategy).state_dict()


def put_between(
    network: Any, starts: dict[str, torch.Tensor], ends: dict[str, torch.Tensor], alpha: float, setup: Setup
) -> None:
    """Set the network to (1 − α) start + α end."""
    state = {
        name: end if alpha == 1.0 or not end.is_floating_point() else starts[name].lerp(end, alpha)
        for name, end in ends.items()
    }
    network.load_state_dict(state)
    if alpha != 1.0:
        measure_batchnorm(network, setup)


def measure_batchnorm(network: Any, setup: Setup) -> None:
    """Measure the statistics of the batch norms that training moved; those that were held are still right."""
    import torch

    from models.classifier import moving_batchnorms

    moving = moving_batchnorms(network)
    if not moving:
        return
    usual = [module.momentum for module in moving]
    network.eval()
    for module in moving:
        module.reset_running_stats()
        module.momentum = None  # the plain mean over all batches
        module.train()
    with torch.no_grad():
        examples = setup.context.data["train"][:STATISTICS_EXAMPLES]
        for arrays, _ in batches(setup.processing, examples, BATCH):
            network(*(torch.from_numpy(arrays[spec.name]) for spec in setup.processing.inputs))
    for module, momentum in zip(moving, usual, strict=True):
        module.momentum = momentum
    network.eval()


def evaluate(network: Any, setup: Setup) -> tuple[np.ndarray, float]:
    """float64 (validation examples,), how good the answers are, and the mean loss. In eval mode."""
    import numpy as np
    import torch

    from models.classifier import for_loss

    device, examples = setup.context.device, setup.context.data["validation"]
    network.to(device).eval()
    parts = []
    with setup.context.progress.task("validation", len(examples)) as advance, torch.inference_mode():
        for arrays, count in batches(setup.processing, examples, BATCH):
            inputs = [torch.from_numpy(arrays[spec.name]).to(device) for spec in setup.processing.inputs]
            parts.append(network(*inputs).float().cpu())
            advance(count)
    network.to("cpu")
    outputs, targets = torch.cat(parts), setup.targets("validation")
    with torch.no_grad():
        loss = float(setup.task.loss(for_loss(network, outputs), torch.from_numpy(targets)))
    return setup.task.scores(np.asarray(outputs.numpy()), targets), loss
