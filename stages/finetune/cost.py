"""What will training cost on this machine? Counted and measured before it; afterwards, what it really did.

The measured steps run on a copy of the network, and every random generator is put back: training is the same with and
without them.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.process_memory import memory_of_process
from stages.data.splits import Example
from stages.finetune.range_test import kept_random_state
from stages.finetune.rates import Rates, parameter_groups
from stages.finetune.setup import Setup, count
from stages.training_cost import ADAMW_COPIES, inputs_of, saved_for_backward, take

if TYPE_CHECKING:
    import torch

    from stages.finetune.strategies import Attempt

ESTIMATE = "estimate.json"
TIMED_STEPS, BUDGET_S = 3, 1.5
"""Timed steps after one that is not (it allocates the optimizer's state): fewer where they take longer than this."""

COUNTED = 2
"""Examples that FLOPs are counted on: batch norm does not train on one."""

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Estimate:
    """Before training. `flops`: of all epochs, forward and backward, as they are done (a frozen layer has no
    gradient of its weights); a multiply-add counts twice, and only convolutions, matrix products and attention count.
    `seconds`: of all epochs with their evaluations, from the median of measured steps, without early stopping.
    `peak_memory_bytes`: of the process on a CPU, of the network and its training on a GPU. `problem`: why a step could
    not be measured; what it would have given is None then. `processes` share a step of `batch_size`; memory is that of
    one of them.
    """

    trainable_parameters: int
    total_parameters: int
    flops: int | None
    seconds: float | None
    step_seconds: float | None
    peak_memory_bytes: int | None
    batch_size: int
    epochs: int
    processes: int
    device: str
    problem: str = ""


def estimate_cost(network: Any, rates: Rates, setup: Setup, hold: bool, folder: Path) -> Estimate:
    """Measure a few steps as training will do them; said aloud. A resumed run takes what is in `folder`.

    `hold`: batch norm keeps its statistics, as it will in training.
    """
    from stages.artifact import write_json

    file = folder / ESTIMATE
    if file.is_file():
        return Estimate(**json.loads(file.read_text(encoding="utf-8")))
    estimate = measure(network, rates, setup, hold)
    setup.context.log.info("%-10s %s", "", in_words(asdict(estimate)))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(estimate))
    return estimate


def measure(network: Any, rates: Rates, setup: Setup, hold: bool) -> Estimate:
    """See `estimate_cost`."""
    import torch

    from models.classifier import hold_batchnorm
    from stages.finetune.training import steps_per_epoch

    config, data, device = setup.config, setup.context.data, setup.context.device
    processes = config.launch.count
    share = min(config.batch_size // processes, len(data["train"]))
    trained = sum(one.numel() for one in network.parameters() if one.requires_grad)
    before = memory_of_process("VmRSS")
    flops = seconds = step = memory = None
    problem = ""
    trial = copy.deepcopy(network).to(device)
    if hold:
        hold_batchnorm(trial)
    with kept_random_state():
        try:
            step, activations = time_steps(trial.train(), rates, setup, share)
            per_example = count_training_flops(trial, setup, take(data["train"], 0, COUNTED))
            evaluation = time_evaluation(trial.eval(), setup, take(data["validation"], 0, EVALUATION_BATCH))
        except (RuntimeError, ValueError) as error:
            problem = f"a step cannot be measured: {(str(error).splitlines() or [type(error).__name__])[0]}"
        else:
            steps = steps_per_epoch(len(data["train"]), config.batch_size)
            judged = evaluation * len(data["validation"]) / EVALUATION_BATCH / processes
            flops = per_example * len(data["train"]) * config.epochs
            seconds = (step * steps + judged) * config.epochs
            added = (ADAMW_COPIES - 1) * 4 * trained + activations  # gradients and two moments, fp32
            if device == "cuda":
                memory = added + sum(one.numel() * one.element_size() for one in trial.parameters())
            elif before is not None:
                memory = max(before + added, memory_of_process("VmHWM") or 0)
    del trial
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return Estimate(
        trained,
        count(network),
        flops,
        seconds,
        step,
        memory,
        config.batch_size,
        config.epochs,
        processes,
        device,
        problem,
    )


def time_steps(trial: Any, rates: Rates, setup: Setup, size: int) -> tuple[float, int]:
    """(median seconds of a step, most bytes kept for a backward pass), preprocessing included."""
    import torch

    optimizer = torch.optim.AdamW(parameter_groups(trial, rates, setup.config.weight_decay), lr=rates.head)
    seconds: list[float] = []
    activations = 0
    for index in range(TIMED_STEPS + 1):
        if len(seconds) > 1 and sum(seconds[1:]) > BUDGET_S:
            break
        started = time.perf_counter()
        batch = take(setup.context.data["train"], index * size, size)
        if index == 0:
            with saved_for_backward(trial) as kept:
                loss = loss_of(trial, setup, batch)
            activations = sum(kept.values())
        else:
            loss = loss_of(trial, setup, batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trial.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # a GPU works behind the clock's back
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]), activations


def loss_of(trial: Any, setup: Setup, batch: Sequence[Example]) -> torch.Tensor:
    """The task's loss of a batch, in the arithmetic of training."""
    import torch

    from models.classifier import for_loss
    from stages.finetune.training import choose_precision

    device = setup.context.device
    precision = choose_precision(setup.config.precision, device)
    targets = setup.task.targets([one.label for one in batch], setup.spec.io.width)
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.autocast(device, half, enabled=precision != "fp32"):
        outputs = trial(*inputs_of(setup.processing, batch, device))
    return setup.task.loss(for_loss(trial, outputs.float()), torch.from_numpy(targets).to(device))


def count_training_flops(trial: Any, setup: Setup, batch: Sequence[Example]) -> int:
    """Of one example, forward and backward. Attention by its plain formula: see `stages.training_cost.count_flops`.

    A convolution's gradients of input and weight cost what its forward pass does, each: torch 2.13 counts the second
    as if there were no groups.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

    def of_gradients(gradient: Any, inputs: Any, weight: Any, *others: Any, **kwargs: Any) -> int:
        transposed, wanted = others[4], others[7]
        return int(conv_flop_count(inputs, weight, gradient, transposed=transposed)) * int(wanted[0] + wanted[1])

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: of_gradients})
    with sdpa_kernel(SDPBackend.MATH), counter:
        torch.autograd.backward(loss_of(trial, setup, batch))
    return int(counter.get_total_flops()) // len(batch)


def time_evaluation(trial: Any, setup: Setup, batch: Sequence[Example]) -> float:
    """Seconds of a forward pass."""
    import torch

    started = time.perf_counter()
    with torch.inference_mode():
        loss_of(trial, setup, batch).item()
    return time.perf_counter() - started


def actual_cost(attempt: Attempt, setup: Setup) -> dict[str, Any]:
    """What training was: parameters, epochs that ran, their seconds, and the peak of memory (None where other processes
    trained, which nobody asked)."""
    import torch

    memory = None
    if not setup.config.launch.starts_processes:
        cuda = setup.context.device == "cuda"
        memory = torch.cuda.max_memory_allocated() if cuda else memory_of_process("VmHWM")
    return {
        "trainable_parameters": attempt.trainable_parameters,
        "epochs": len(attempt.history),
        "seconds": attempt.seconds,
        "peak_memory_bytes": memory,
    }


def in_words(estimate: dict[str, Any]) -> str:
    """For a person, before training."""
    share = f"{estimate['trainable_parameters']:,} of {estimate['total_parameters']:,} parameters learn"
    if estimate["problem"]:
        return f"{share}; {estimate['problem']}"
    parts = [
        f"about {estimate['seconds']:.0f} s for {estimate['epochs']} epochs",
        f"{estimate['flops'] / 1e12:.3g} TFLOPs",
    ]
    if estimate["peak_memory_bytes"] is not None:
        parts.append(f"{estimate['peak_memory_bytes'] / 1e9:.2g} GB")
    return f"{share}; {', '.join(parts)} (a step of {estimate['batch_size']} takes {estimate['step_seconds']:.2g} s)"
