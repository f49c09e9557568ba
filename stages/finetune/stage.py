"""finetune: adapt a pretrained backbone to labelled data.

Reads: the train and validation splits, the backbone's weights.
Writes: `base/` and `adapter/` (lora), or `checkpoint/`; `history.json`.
Gates: training stays finite; the validation accuracy beats the majority class; training does not fall below the
probe it started from.
Fails when: memory runs out, or an adapter is left untrained.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from models.errors import ModelError, TrainingError
from stages.artifact import digest_of, write_json
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

    from models.classifier import Classifier
    from models.modalities import Processing
    from models.spec import ModelSpec
    from stages.finetune.probe import Probe
    from stages.finetune.training import Trained, TrainingPlan

Strategy = Literal["feature-extraction", "full", "lora"]

DEFAULT_RATES: dict[tuple[str, str], tuple[float, float]] = {
    ("lora", "timm"): (1e-3, 2e-3),
    ("lora", "hf"): (5e-4, 1e-3),
    ("full", "timm"): (1e-4, 1e-3),
    ("full", "hf"): (3e-5, 3e-4),
}
"""(strategy, library) → learning rates of backbone and head. LoRA learns at about ten times the rate of
full fine-tuning (Schulman et al. 2025, "LoRA Without Regret"; measured on the two recipes)."""


class LoraConfig(StageConfig):
    """Low-rank adapters (Hu et al. 2021)."""

    rank: int = Field(default=8, ge=1, description="Rank of the adapters (number).")
    alpha: float = Field(default=16.0, gt=0, description="Scale: ΔW = alpha / rank · B · A.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before the adapter (share).")


class FinetuneConfig(StageConfig):
    """How the backbone is adapted."""

    strategy: Literal["auto", "feature-extraction", "full", "lora"] = Field(
        default="auto",
        description="feature-extraction: linear probe on the frozen backbone; lora: adapters in Linear and ungrouped "
        "convolution layers; full: all weights. auto is lora where the backbone has such layers and pretrained "
        "weights, else full.",
    )
    epochs: int = Field(default=3, ge=1, description="Passes over the training split (number).")
    batch_size: int = Field(default=32, ge=1, description="Examples a step (number).")
    backbone_learning_rate: float | None = Field(
        default=None, gt=0, description="Peak rate of the backbone or its adapters. Default: by strategy and library."
    )
    head_learning_rate: float | None = Field(
        default=None, gt=0, description="Peak rate of the head. Default: by strategy and library."
    )
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's weight decay, not on norms and biases.")
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1, description="Share of the steps spent warming up.")
    patience: int = Field(
        default=3, ge=1, description="Stop after so many epochs without a better validation accuracy."
    )
    initial_head: Literal["probe", "random"] = Field(
        default="probe", description="Where the head starts: a linear probe on the frozen features, or random weights."
    )
    from_scratch: bool = Field(
        default=False, description="Start from random backbone weights: the baseline that transfer must beat."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="Arithmetic of training. auto: bf16 on a GPU that has it, else fp32."
    )
    image_size: int | None = Field(
        default=None, ge=16, description="Side of the input image (pixels). Default: the backbone's."
    )
    max_length: int | None = Field(default=None, ge=4, description="Longest text (tokens). Default: 128.")
    augment: Literal["none", "flip"] = Field(
        default="flip",
        description="flip mirrors half of the images in training; none where left and right differ (digits, text).",
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of training (number). Default: every core this process may use."
    )
    workers: int | None = Field(
        default=None,
        ge=0,
        description="Processes that prepare training examples (number). Default: 0 on a CPU, up to 4 beside a GPU.",
    )
    lora: LoraConfig = Field(default_factory=LoraConfig, description="Settings of the adapters.")
    min_gain_over_majority: float = Field(
        default=0.01,
        ge=0,
        description="Gate: validation accuracy above the majority class by this much, or half of the way to 1 where "
        "that is less (accuracy).",
    )
    max_drop_from_probe: float = Field(
        default=0.01, ge=0, description="Gate: training may end this much below its own linear probe (accuracy)."
    )

    @field_validator("from_scratch")
    @classmethod
    def refuse_adapters_on_random_weights(cls, value: bool, info: ValidationInfo) -> bool:
        """Adapters on random weights learn next to nothing: the scratch baseline trains everything."""
        if value and info.data.get("strategy") == "lora":
            raise ValueError("adapters need pretrained weights; write strategy: full")
        return value


class Finetune:
    """See the module's docstring."""

    name = "finetune"
    config_type = FinetuneConfig
    consumes: tuple[str, ...] = ()
    splits: tuple[SplitName, ...] = ("train", "validation")
    packages = (*NETWORK_PACKAGES, *PROCESSING_PACKAGES, "torchvision", "peft", "accelerate", "scikit-learn")
    machine: tuple[MachinePart, ...] = ("device",)

    def run(self, context: StageContext, config: FinetuneConfig) -> StageResult:
        """Probe, then train where the strategy asks for it."""
        seed_everything(context, config)
        setup = build(context, config)
        probe = None
        if setup.strategy == "feature-extraction" or config.initial_head == "probe":
            probe = run_probe(setup, context)
        trained = None
        if setup.strategy == "feature-extraction":
            setup.save(context, setup.model)
        else:
            trained = run_training(setup, context, config)
        measurements = describe_result(setup, probe, trained, context)
        # Without the seconds: the same training gives the same bytes, so nothing that follows runs again.
        epochs = [{key: entry[key] for key in entry if key != "seconds"} for entry in measurements["history"]]
        write_json(context.output / "history.json", {"epochs": epochs})
        gates = check(measurements, config)
        return StageResult(gates, measurements, tuple(notes_of(measurements)))


@dataclass(frozen=True)
class Setup:
    """The network to adapt and what surrounds it."""

    model: Classifier
    spec: ModelSpec
    processing: Processing
    strategy: Strategy
    weights: str

    def save(self, context: StageContext, model: Classifier, name: str = "checkpoint") -> None:
        """Write a checkpoint into the stage's output."""
        from models.checkpoint import save_checkpoint

        save_checkpoint(context.output / name, model.to("cpu"), self.spec, self.processing)


def seed_everything(context: StageContext, config: FinetuneConfig) -> None:
    """Seed Python, numpy and torch; name the number of threads."""
    import torch
    from transformers import set_seed

    torch.set_num_threads(config.threads or usable_cores())
    set_seed(context.seed)


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build(context: StageContext, config: FinetuneConfig) -> Setup:
    """Load the backbone and put a head on it."""
    from models.classifier import make_spec, new_classifier
    from models.registry import load_backbone

    backbone = context.backbone
    loaded = load_backbone(backbone, context.task, config.image_size, config.max_length, not config.from_scratch)
    model = new_classifier(loaded, len(context.data.labels))
    spec = make_spec(context.task, backbone, loaded, context.data.labels)
    strategy = choose_strategy(model, config)
    key = digest_of([backbone.weights_digest, spec.architecture, config.from_scratch, context.seed])
    return Setup(model, spec, loaded.processing, strategy, key)


def choose_strategy(model: Classifier, config: FinetuneConfig) -> Strategy:
    """What `auto` means for this network."""
    from models.adapters import target_modules

    if config.strategy != "auto":
        return config.strategy
    if config.from_scratch:
        return "full"
    try:
        target_modules(model)
    except ModelError:
        return "full"
    return "lora"


def run_probe(setup: Setup, context: StageContext) -> Probe:
    """Fit the linear probe and put it into the head."""
    import numpy as np

    from stages.finetune.probe import compute_features, fit_probe, put_into_head

    features, labels = {}, {}
    names: tuple[SplitName, SplitName] = ("train", "validation")
    for name in names:
        examples = context.data[name]
        features[name] = compute_features(setup.model, setup.processing, examples, context, setup.weights)
        labels[name] = np.array([one.label for one in examples])
    probe = fit_probe(
        features["train"], labels["train"], features["validation"], labels["validation"], len(context.data.labels)
    )
    put_into_head(setup.model, probe)
    context.log.info("%-10s linear probe: validation accuracy %.4f", "", probe.validation_accuracy)
    return probe


def run_training(setup: Setup, context: StageContext, config: FinetuneConfig) -> Trained:
    """Train adapters or all weights; write the result, unless training diverged."""
    from models.adapters import LoraSettings, inject_lora, save_adapter, untrained_adapters
    from stages.finetune.training import Diverged, Trained, train

    plan = make_plan(setup, context, config)
    network: Any = setup.model
    if setup.strategy == "lora":
        setup.save(context, setup.model, "base")
        settings = LoraSettings(config.lora.rank, config.lora.alpha, config.lora.dropout)
        network = inject_lora(setup.model.to("cpu"), settings, example_inputs(setup, context))
    try:
        trained = train(network, setup.processing, context.data["train"], context.data["validation"], plan, context)
    except Diverged as error:
        context.log.error("%-10s training diverged: %s", "", error)
        return Trained(plan, 0, None, [], str(error))
    network = network.to("cpu")
    if setup.strategy != "lora":
        setup.save(context, network)
        return trained
    if untrained := untrained_adapters(network):
        raise TrainingError(
            f"{len(untrained)} adapters were never trained (lora_B is zero), the first is {untrained[0]}; "
            "is the layer used in the forward pass?"
        )
    save_adapter(network, context.output / "adapter")
    return trained


def example_inputs(setup: Setup, context: StageContext) -> list[torch.Tensor]:
    """The network's inputs for two training examples."""
    import torch

    arrays = setup.processing.arrays([one.content for one in context.data["train"][:2]])
    return [torch.from_numpy(arrays[spec.name]) for spec in setup.processing.inputs]


def make_plan(setup: Setup, context: StageContext, config: FinetuneConfig) -> TrainingPlan:
    """The training's arguments, defaults filled in."""
    from stages.finetune.training import TrainingPlan

    backbone_rate, head_rate = DEFAULT_RATES[setup.strategy, setup.spec.backbone.library]
    if config.from_scratch:
        backbone_rate = head_rate
    return TrainingPlan(
        epochs=config.epochs,
        batch_size=config.batch_size,
        backbone_learning_rate=config.backbone_learning_rate or backbone_rate,
        head_learning_rate=config.head_learning_rate or head_rate,
        weight_decay=config.weight_decay,
        warmup_fraction=config.warmup_fraction,
        patience=config.patience,
        precision=config.precision,
        flip=config.augment == "flip",
        freeze_batchnorm=setup.strategy == "lora",
        workers=default_workers(context.device) if config.workers is None else config.workers,
        seed=context.seed,
    )


def default_workers(device: str) -> int:
    """On a CPU training itself wants the cores; a GPU waits for pictures to be decoded."""
    return 0 if device == "cpu" else min(4, usable_cores() - 1)


def describe_result(
    setup: Setup, probe: Probe | None, trained: Trained | None, context: StageContext
) -> dict[str, Any]:
    """The measurements of the stage."""
    validation = Counter(one.label for one in context.data["validation"])
    majority = max(Counter(one.label for one in context.data["train"]).items(), key=lambda item: item[1])[0]
    accuracy = trained.validation_accuracy if trained else probe.validation_accuracy if probe else None
    trainable, total = count_parameters(setup)
    return {
        "strategy": setup.strategy,
        "metric": "accuracy",
        "validation_accuracy": accuracy,
        "majority_baseline": validation[majority] / len(context.data["validation"]),
        "probe_validation_accuracy": probe.validation_accuracy if probe else None,
        "probe_regularizations": probe.table if probe else [],
        "best_epoch": trained.best_epoch if trained else 0,
        "diverged": trained.diverged if trained else None,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "backbone_learning_rate": trained.plan.backbone_learning_rate if trained else None,
        "head_learning_rate": trained.plan.head_learning_rate if trained else None,
        "samples": {name: len(context.data[name]) for name in ("train", "validation")},
        "truncated": count_truncated(setup.processing, context),
        "history": trained.history if trained else [],
    }


def count_parameters(setup: Setup) -> tuple[int, int]:
    """(trained, all) parameters; peft's copy of the untrained head is none of the network's."""
    parameters = [item for item in setup.model.named_parameters() if ".original_module." not in item[0]]
    total = sum(one.numel() for _, one in parameters)
    if setup.strategy == "feature-extraction":
        return sum(one.numel() for one in setup.model.task_head.parameters()), total
    return sum(one.numel() for _, one in parameters if one.requires_grad), total


def count_truncated(processing: Processing, context: StageContext) -> int:
    """How many training texts are longer than the network is shown; 0 for images."""
    from models.modalities.text import TextProcessing

    texts = [one.content for one in context.data["train"]]
    return processing.count_truncated(texts) if isinstance(processing, TextProcessing) else 0


def check(measured: dict[str, Any], config: FinetuneConfig) -> tuple[GateResult, ...]:
    """The stage's gates."""
    accuracy, probe = measured["validation_accuracy"], measured["probe_validation_accuracy"]
    majority, samples = measured["majority_baseline"], measured["samples"]["validation"]
    trained = measured["strategy"] != "feature-extraction"
    # A rare class leaves little room: half of it must be enough, or a perfect network fails.
    threshold = min(majority + config.min_gain_over_majority, (1 + majority) / 2)
    gates = [
        Gate("beats the majority class", "at least", threshold, "accuracy").check(
            "network", accuracy, samples, f"the majority class alone gives {majority:.3f}"
        )
    ]
    if trained:
        diverged = measured["diverged"]
        finite = Gate("training stays finite", "at most", 0.0, "losses that are NaN or infinite")
        gates.insert(0, finite.check("network", float(bool(diverged)), detail=diverged or ""))
    if trained and probe is not None:
        floor = probe - config.max_drop_from_probe
        gates.append(
            Gate("not below its linear probe", "at least", floor, "accuracy").check(
                "network", accuracy, samples, f"the probe gives {probe:.3f}"
            )
        )
    return tuple(gates)


def notes_of(measured: dict[str, Any]) -> list[str]:
    """What a person should read."""
    if measured["diverged"]:
        return [f"training diverged: {measured['diverged']}"]
    share = measured["trainable_parameters"] / measured["total_parameters"]
    line = f"{measured['strategy']}: validation accuracy {measured['validation_accuracy']:.4f}"
    if measured["probe_validation_accuracy"] is not None:
        line += f" (probe {measured['probe_validation_accuracy']:.4f}, majority {measured['majority_baseline']:.4f})"
    notes = [f"{line}; {share:.1%} of {measured['total_parameters']:,} parameters trained"]
    if measured["truncated"]:
        notes.append(
            f"{measured['truncated']} of {measured['samples']['train']} training texts are longer than "
            "finetune.max_length and were cut"
        )
    return notes
