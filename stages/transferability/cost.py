"""What a backbone costs: counted (parameters, FLOPs, memory of training) and measured on this machine (times)."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.spec import IOSpec, TensorSpec
from stages.latency import OtherWork, is_disturbed, timed_turn
from stages.training_cost import ADAMW_COPIES, count_flops, inputs_of, saved_for_backward, take, typical_example

if TYPE_CHECKING:
    import torch

    from models.classifier import Classifier
    from models.modalities import Processing
    from stages.data.splits import Example

LATENCY_CALLS = 20
FEATURE_BATCH = 32
"""As `stages/finetune` computes features."""

STEPS = 3
"""Timed after one that is not: the first allocates the optimizer's state."""


@dataclass(frozen=True)
class Cost:
    """Cost of one backbone.

    `flops`: of one example, forward; a multiply-add counts twice, and only convolutions, matrix products and attention
    count. `latency_ms_p50`: one example, PyTorch, without preprocessing. `feature_pass_s`: one pass over the train
    split, `epoch_s`: one epoch of full fine-tuning on it, both from the median of measured batches, preprocessing
    included. `training_memory_bytes`: weights, gradients, AdamW's state and the activations kept for the
    backward pass at `batch_size`; the libraries and the temporary buffers of single operators come on top. The last two
    are None where the backbone could not be trained, and `problem` says why. `disturbed`: other processes wanted the
    same cores, so that the times are too long.
    """

    parameters: int
    flops: int
    latency_ms_p50: float
    feature_pass_s: float
    epoch_s: float | None
    training_memory_bytes: int | None
    batch_size: int
    device: str
    threads: int
    disturbed: bool
    problem: str = ""


def measure_cost(
    model: Classifier, processing: Processing, examples: Sequence[Example], batch_size: int, device: str, threads: int
) -> Cost:
    """Count and measure. Weights stay as they are; what batch norm remembers and the gradients do not.

    Training and the feature pass use the threads that PyTorch is set to, latency uses `threads`.
    """
    import torch

    model = model.to(device).eval()
    batch_size = min(batch_size, len(examples))
    typical = typical_example(processing, examples)
    with OtherWork() as others:
        latency_ms_p50 = measure_latency(model, processing, typical, device, threads)
        feature_pass_s = measure_feature_pass(model, processing, examples, device)
        epoch_s, memory, problem = measure_training(model, processing, examples, batch_size, device)
    return Cost(
        parameters=sum(one.numel() for one in model.backbone.parameters()),
        flops=count_flops(model.backbone, inputs_of(processing, [typical], device)),
        latency_ms_p50=latency_ms_p50,
        feature_pass_s=feature_pass_s,
        epoch_s=epoch_s,
        training_memory_bytes=memory,
        batch_size=batch_size,
        device=device,
        threads=threads,
        disturbed=is_disturbed(others.cores, max(threads, torch.get_num_threads())),
        problem=problem,
    )


def measure_latency(model: Classifier, processing: Processing, example: Example, device: str, threads: int) -> float:
    """Milliseconds of one example through backbone and head in PyTorch: the median of `LATENCY_CALLS`."""
    from models.runtimes.torch_eager import TorchEager

    outputs = int(model.task_head.get_parameter("bias").shape[0])
    io = IOSpec(processing.inputs, (TensorSpec("logits", "float32", ("batch", outputs)),))
    arrays = processing.arrays([example.content])
    with TorchEager(model, io, device, threads) as runtime:
        return statistics.median(timed_turn(runtime, [arrays], LATENCY_CALLS, 0))


def measure_feature_pass(model: Classifier, processing: Processing, examples: Sequence[Example], device: str) -> float:
    """Seconds that the features of all examples take, from the median of a few batches."""
    import torch

    batch_size = min(FEATURE_BATCH, len(examples))
    seconds = []
    with torch.inference_mode():
        for index in range(STEPS + 1):
            started = time.perf_counter()
            batch = take(examples, index * batch_size, batch_size)
            model.features(*inputs_of(processing, batch, device)).float().cpu()
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]) * len(examples) / batch_size


def measure_training(
    model: Classifier, processing: Processing, examples: Sequence[Example], batch_size: int, device: str
) -> tuple[float | None, int | None, str]:
    """(seconds an epoch, bytes, why there are none) of full fine-tuning with AdamW, in bf16 where a GPU has it."""
    import torch

    # A rate of zero costs as much as any other, and leaves the weights alone.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    seconds, activations = [], 0
    model.train()
    try:
        for index in range(STEPS + 1):
            started = time.perf_counter()
            batch = take(examples, index * batch_size, batch_size)
            inputs = inputs_of(processing, batch, device)
            labels = torch.tensor([one.label for one in batch], device=device)
            loss, saved = loss_and_saved_bytes(model, inputs, labels)
            activations = max(activations, saved)  # batches of texts are not equally long
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # a GPU works behind the clock's back
            seconds.append(time.perf_counter() - started)
    except (RuntimeError, ValueError) as error:
        return None, None, reason_of(error, batch_size)
    finally:
        model.zero_grad()
        model.eval()
    parameters = sum(one.numel() * one.element_size() for one in model.parameters())
    step_s = statistics.median(seconds[1:])
    return step_s * math.ceil(len(examples) / batch_size), ADAMW_COPIES * parameters + activations, ""


def loss_of(model: Classifier, inputs: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, in the arithmetic that finetune chooses by itself."""
    import torch

    kind = labels.device.type
    half = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    with torch.autocast(kind, torch.bfloat16, enabled=half):
        logits = model(*inputs)
    return torch.nn.functional.cross_entropy(logits.float(), labels)


def loss_and_saved_bytes(
    model: Classifier, inputs: Sequence[torch.Tensor], labels: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """The loss, and the bytes that autograd keeps for the backward pass, the network's own tensors left out."""
    with saved_for_backward(model) as kept:
        loss = loss_of(model, inputs, labels)
    return loss, sum(kept.values())


def reason_of(error: Exception, batch_size: int) -> str:
    """Why a training step failed, in words."""
    import torch

    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in text:
        return f"training runs out of memory at batch size {batch_size}; try a smaller finetune.batch_size"
    return f"cannot be trained as it is: {text}"
