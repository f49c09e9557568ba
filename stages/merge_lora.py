"""merge-lora: fold the adapter into the base weights, and prove that nothing changed but the format.

Reads: finetune's `base/` and `adapter/`, or its `checkpoint/`.
Writes: `checkpoint/`, a plain network.
Gates: merged ≈ adapted on real inputs, within fp32's rounding and within a share of what the adapter
does; merging changed the backbone; the head was kept; a reload gives the same logits.
Fails when: the adapter cannot be read or folds to NaN, or there is neither an adapter nor a checkpoint.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from models.errors import MergeError
from stages.base import (
    NETWORK_PACKAGES,
    PROCESSING_PACKAGES,
    MachinePart,
    StageConfig,
    StageContext,
    StageResult,
)
from stages.data.splits import SplitName
from stages.gate import Gate, GateResult

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from models.checkpoint import Checkpoint

RELATIVE_TOLERANCE = 1e-5
"""Measured: exact methods merge at ≤1e-6 of the logit range in fp32; ten times that is left for depth."""

FLOOR_FACTOR = 4.0
"""A network with a near-dead batch-norm channel differs from itself in fp64 by 1e-4 (measured). Merged and
adapted each carry that rounding error: twice the measured one, and twice again for its spread."""

RELOAD_TOLERANCE = 1e-6
"""The same weights in the same precision: only the order of sums may differ."""

SHARE_OF_EFFECT = 0.01
"""A wrong merge (OFT on k×k convolutions) is off by as much as the adapter's whole effect (measured);
an exact one by rounding, at most 1e-3 of it on the two recipes."""


class MergeLoraConfig(StageConfig):
    """How strictly the merged network must equal the adapted one."""

    max_relative_error: float = Field(
        default=RELATIVE_TOLERANCE,
        gt=0,
        description="Largest |merged − adapted| on real inputs, as a share of the logit range (ratio).",
    )
    samples: int = Field(default=64, ge=2, description="Validation examples to compare on (number).")


class MergeLora:
    """See the module's docstring."""

    name = "merge-lora"
    config_type = MergeLoraConfig
    consumes = ("finetune",)
    splits: tuple[SplitName, ...] = ("validation",)
    packages = (*NETWORK_PACKAGES, *PROCESSING_PACKAGES, "peft")
    machine: tuple[MachinePart, ...] = ("threads",)

    def run(self, context: StageContext, config: MergeLoraConfig) -> StageResult:
        """Fold, or pass a plain checkpoint through."""
        source = context.inputs["finetune"].folder
        target = context.output / "checkpoint"
        if not (source / "adapter").is_dir():
            return pass_through(source / "checkpoint", target)
        measured = merge(source, target, context, config)
        return StageResult(check(measured), measured, (describe(measured),))


def pass_through(checkpoint: Path, target: Path) -> StageResult:
    """Copy a plain checkpoint byte by byte."""
    if not checkpoint.is_dir():
        raise MergeError(f"{checkpoint.parent} holds neither adapter/ nor checkpoint/; run finetune again with --force")
    shutil.copytree(checkpoint, target)
    note = "there is no adapter to fold: the checkpoint is passed through unchanged"
    return StageResult(measurements={"passed_through": True}, notes=(note,))


def merge(source: Path, target: Path, context: StageContext, config: MergeLoraConfig) -> dict[str, Any]:
    """Fold what is on disk, write it, and measure it against the adapted network and against itself reloaded."""
    import torch

    from models.adapters import fold, load_adapted
    from models.checkpoint import load_checkpoint, save_checkpoint
    from models.rounding import rounding_error

    torch.set_num_threads(context.threads)
    base = load_checkpoint(source / "base")
    adapted = load_adapted(source / "base", source / "adapter")
    inputs = real_inputs(context, base, config.samples)
    with torch.inference_mode():
        wanted = adapted(*inputs)  # float32 (samples, classes)
    if not bool(torch.isfinite(wanted).all()):
        raise MergeError("the adapted network gives NaN or infinity on validation examples; was the training stable?")
    # Taken before folding, which uses the adapted network up.
    asked = asked_changes(adapted)
    head = copy.deepcopy(adapted.get_submodule("base_model.model.task_head.modules_to_save.default"))
    merged = fold(adapted)
    save_checkpoint(target, merged, base.spec, base.processing)
    reloaded = load_checkpoint(target).model
    with torch.inference_mode():
        found, again = merged(*inputs), reloaded(*inputs)
        without_adapter = head(base.model.backbone(*inputs))
    measured = {
        "passed_through": False,
        "samples": len(wanted),
        "logit_range": float(wanted.max() - wanted.min()),
        "adapter_effect": float((wanted - without_adapter).abs().max()),
        "max_abs_error": float((found - wanted).abs().max()),
        "reload_max_abs_error": float((again - found).abs().max()),
        "head_max_abs_error": largest_difference(reloaded.task_head, head),
        "tolerance": config.max_relative_error,
        **weight_change(base.model, reloaded, asked),
    }
    if measured["max_abs_error"] > config.max_relative_error * measured["logit_range"]:
        floor = rounding_error(reloaded, [inputs], [again]) or 0.0  # none known: no allowance
        measured["fp32_rounding_error"] = floor
        if measured["logit_range"]:
            measured["tolerance"] = max(config.max_relative_error, FLOOR_FACTOR * floor / measured["logit_range"])
    return measured


def largest_difference(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """Largest difference of two layers' weights and biases."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((left - right).detach().abs().max()) for left, right in pairs)


def real_inputs(context: StageContext, base: Checkpoint, samples: int) -> list[torch.Tensor]:
    """The network's inputs for the first validation examples."""
    import torch

    arrays = base.processing.arrays([one.content for one in context.data["validation"][:samples]])
    return [torch.from_numpy(arrays[tensor.name]) for tensor in base.spec.io.inputs]


def asked_changes(adapted: PeftModel) -> dict[str, torch.Tensor]:
    """Weight name → ΔW, float32, as the adapters ask for it; empty for methods that do not add (DoRA, IA3, OFT, …)."""
    from peft.tuners.loha.layer import LoHaLayer
    from peft.tuners.lokr.layer import LoKrLayer
    from peft.tuners.lora.layer import Conv1d, Conv2d, Linear

    if getattr(adapted.peft_config["default"], "use_dora", False):
        return {}
    prefix = "base_model.model."
    return {
        f"{name.removeprefix(prefix)}.weight": module.get_delta_weight("default").detach()
        for name, module in adapted.named_modules()
        if isinstance(module, Conv1d | Conv2d | Linear | LoHaLayer | LoKrLayer)
    }


def weight_change(base: torch.nn.Module, merged: torch.nn.Module, asked: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How far the backbone moved, and how much of the asked-for change is in the stored weights.

    `delta_retained` is the share of the change that the adapters ask for that the merged weights show
    (⟨ΔW, W′ − W⟩ / ‖ΔW‖²), None where they do not say what they ask for; `delta_retained_bf16` the same after both
    are cast to bf16, which rounds small updates away.
    """
    import torch

    before, after = dict(base.named_parameters()), dict(merged.named_parameters())
    said = bool(asked)
    if not said:
        changes = {
            name: after[name].detach() - before[name].detach() for name in before if name.startswith("backbone.")
        }
        asked = {name: change for name, change in changes.items() if bool(change.count_nonzero())}
    largest = kept = kept_bf16 = squared = norm = 0.0
    for name, delta in asked.items():
        old, new = before[name].detach(), after[name].detach()
        largest = max(largest, float((new - old).abs().max()))
        kept += float((delta * (new - old)).sum())
        kept_bf16 += float((delta * (new.to(torch.bfloat16).float() - old.to(torch.bfloat16).float())).sum())
        squared += float(delta.square().sum())
        norm += float(old.square().sum())
    return {
        "max_weight_change": largest,
        "relative_weight_change": (squared / norm) ** 0.5 if norm else 0.0,
        "delta_retained": None if not said else kept / squared if squared else 0.0,
        "delta_retained_bf16": kept_bf16 / squared if squared else 0.0,
    }


def check(measured: dict[str, Any]) -> tuple[GateResult, ...]:
    """The stage's gates."""
    scale = measured["logit_range"] or float("nan")
    effect = measured["adapter_effect"] or float("nan")
    samples = measured["samples"]
    smallest = 1e-12
    return (
        Gate("merged equals adapted", "at most", measured["tolerance"], "of the logit range").check(
            "merged network", measured["max_abs_error"] / scale, samples
        ),
        Gate("merge keeps the adapter's effect", "at most", SHARE_OF_EFFECT, "of the adapter's effect").check(
            "merged network", measured["max_abs_error"] / effect, samples
        ),
        Gate("merging changed the backbone", "at least", smallest, "largest weight change").check(
            "merged network", measured["max_weight_change"]
        ),
        Gate("head kept", "at most", 0.0, "largest weight difference").check(
            "merged network", measured["head_max_abs_error"]
        ),
        Gate("reload equals merged", "at most", RELOAD_TOLERANCE, "of the logit range").check(
            "merged network", measured["reload_max_abs_error"] / scale, samples
        ),
    )


def describe(measured: dict[str, Any]) -> str:
    """One line for a person."""
    return (
        f"folded: max error {measured['max_abs_error']:.2g} at a logit range of {measured['logit_range']:.3g}; "
        f"the adapted weights moved by {measured['relative_weight_change']:.2%}"
    )
