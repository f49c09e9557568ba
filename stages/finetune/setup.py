"""The network to adapt and what surrounds it: made once, before any strategy touches a weight."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from models.errors import ModelError
from models.tasks import task_of
from stages.artifact import verify_files
from stages.data.splits import SplitName
from stages.environment import usable_threads
from stages.finetune.config import (
    ADAPTER_RATES,
    FLYP_RATE,
    LAYER_RATES,
    Family,
    FinetuneConfig,
    Strategy,
    merged_network_of,
)
from stages.finetune.rates import Rates, decaying_rates, one_rate
from stages.inputs import are_text_pairs

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch

    from models.classifier import Classifier
    from models.layers import Layer
    from models.modalities import Processing
    from models.spec import ModelSpec
    from models.tasks import Task
    from stages.base import StageContext
    from stages.features.probe import Probe
    from stages.finetune.label_names import NamedLabels

NAMES: tuple[SplitName, SplitName] = ("train", "validation")

CONVOLUTIONAL = 0.5
"""A network with more than this share of its parameters in convolutions learns like one."""


@dataclass(frozen=True)
class GivenHead:
    """A head that no training made: a dual encoder's own (`zero-shot`), or one from the names of the labels by a map
    that was fitted (`label names`). `scores` and `loss` on validation; `starts`: whether it is kept at the start, where
    the probe would be put in. `mistaken`: the share of validation examples, whose labels are all known, that it gives
    one of the unseen labels; None where there are none. `played`: the accuracies on seen and unseen labels to expect
    (see `LabelMap`)."""

    kind: Literal["zero-shot", "label names"]
    scores: np.ndarray
    loss: float
    starts: bool
    mistaken: float | None = None
    played: tuple[float, float] | None = None


@dataclass(frozen=True)
class FrozenResult:
    """What the frozen backbone gives: the linear probe, and what it and k nearest neighbours (where they have a vote)
    reach on validation; `given` where the network brings a head.

    `features`: float32 (examples, features) and `targets` (as the task makes them), by split. `scores`: float64
    (validation examples,), how good the probe's answers are.
    """

    features: dict[SplitName, np.ndarray]
    targets: dict[SplitName, np.ndarray]
    probe: Probe
    scores: np.ndarray
    loss: float
    knn_metric: float | None
    seconds: float
    given: GivenHead | None = None

    @property
    def keeps_head(self) -> bool:
        """Whether the network's own head is the start."""
        return self.given is not None and self.given.starts


@dataclass(frozen=True)
class Setup:
    """The start of every strategy. `model` has pretrained weights and a random head; it is copied, never trained.

    `frozen` is None only where neither the head nor a gate asks for the probe: random weights, random head.
    """

    model: Classifier
    spec: ModelSpec
    processing: Processing
    context: StageContext
    config: FinetuneConfig
    frozen: FrozenResult | None = None
    own_head: bool = False
    """Whether the head of `model` is not random but the backbone's own."""
    named: NamedLabels | None = None
    """Where the head is made of the names of the labels."""

    @property
    def task(self) -> Task:
        """What is asked of the network."""
        return task_of(self.context.task)

    def targets(self, name: SplitName) -> np.ndarray:
        """What every example of a split should give, as the task's array."""
        return self.task.targets([one.label for one in self.context.data[name]], self.spec.io.width)

    def start(self, strategy: Strategy) -> Classifier:
        """A network to train: the pretrained weights, with the head that the strategy starts from. Always the same."""
        from models.classifier import lock
        from stages.features.probe import put_into_head

        network = copy.deepcopy(self.model)
        if self.frozen is not None and not self.frozen.keeps_head and self.config.head_from_probe(strategy):
            put_into_head(network, self.frozen.probe)
        if self.config.locked_tower and not self.config.from_scratch:
            lock(network.backbone.get_submodule(f"network.{self.config.locked_tower}"))
        return network

    def save(self, model: Classifier, folder: Path) -> None:
        """Write a checkpoint."""
        from models.checkpoint import save_checkpoint

        save_checkpoint(folder, model.to("cpu"), self.spec, self.processing)

    @cached_property
    def example_inputs(self) -> list[torch.Tensor]:
        """The network's inputs for two training examples."""
        import torch

        arrays = self.processing.arrays([one.content for one in self.context.data["train"][:2]])
        return [torch.from_numpy(arrays[spec.name]) for spec in self.processing.inputs]

    @cached_property
    def layers(self) -> list[Layer]:
        """The backbone's layers, the lowest first."""
        from models.layers import backbone_layers

        return backbone_layers(self.model, self.example_inputs)

    @cached_property
    def family(self) -> Family:
        """Which defaults fit this backbone."""
        from torch import nn

        if self.processing.kind == "text":
            return "text"
        kernels = sum(one.weight.numel() for one in self.model.modules() if isinstance(one, nn.Conv2d))
        return "cnn" if kernels > CONVOLUTIONAL * count(self.model.backbone) else "transformer"

    @cached_property
    def takes_adapters(self) -> bool:
        """Whether the backbone has layers for adapters."""
        from models.adapters import target_modules

        try:
            target_modules(self.model, self.example_inputs, self.config.lora.method)
        except ModelError:
            return False
        return True

    def holds_batchnorm(self, strategy: Strategy) -> bool:
        """Whether batch norm keeps the pretrained statistics: those that a probe was fitted under, or that an adapter
        does not carry."""
        kept = self.frozen is not None and self.frozen.keeps_head
        return strategy == "lora" or kept or self.config.head_from_probe(strategy)

    def rates(self, strategy: Strategy) -> Rates:
        """The learning rates of each layer: the user's, or the defaults of the strategy and the kind of backbone."""
        config = self.config
        backbone: float | None
        if strategy == "lora":
            backbone, head = ADAPTER_RATES[self.spec.backbone.library]
            ratio = config.layer_rate_ratio
        elif strategy == "flyp":
            backbone, head, ratio = FLYP_RATE, FLYP_RATE, config.layer_rate_ratio
        else:
            backbone, (head, default) = None, LAYER_RATES[self.family]
            # Random weights have nothing to keep: every layer learns at the head's rate.
            ratio = config.layer_rate_ratio or (1.0 if config.from_scratch else default)
        head = config.head_learning_rate or head
        if config.backbone_learning_rate or ratio is None:
            return one_rate(self.layers, head, config.backbone_learning_rate or backbone or head)
        return decaying_rates(self.layers, head, ratio)


def count(module: torch.nn.Module) -> int:
    """Number of parameters; peft's copy of the untrained head is none of the network's."""
    return sum(one.numel() for name, one in module.named_parameters() if ".original_module." not in name)


def build(context: StageContext, config: FinetuneConfig) -> Setup:
    """Load the backbone and put a head on it."""
    from models.classifier import make_spec, new_classifier
    from models.registry import load_backbone

    if config.names_labels:
        from stages.finetune.label_names import build_named

        return build_named(context, config)
    backbone = context.backbone
    pairs = are_text_pairs(context.task, context.data["train"])
    loaded = load_backbone(
        backbone, context.task, config.image_size, config.max_length, not config.from_scratch, config.max_seconds, pairs
    )
    spec = make_spec(context.task, backbone, loaded, context.data.labels)
    model = new_classifier(loaded, spec.io.width, task_of(context.task).embeds)
    if config.from_run:
        start_from(model, spec, config.from_run)
    own_head = loaded.head is not None and not config.from_scratch
    return Setup(model, spec, loaded.processing, context, config, own_head=own_head)


def start_from(model: Classifier, spec: ModelSpec, run: str) -> None:
    """Give the backbone the weights of another run's merged network; the head stays new.

    Raises:
        ModelError: that run has another backbone, or its files are not those that it wrote.
    """
    from models.checkpoint import load_checkpoint

    merged = merged_network_of(run)
    if changed := verify_files(merged):
        raise ModelError(f"the network of finetune.from_run ({run}) is not as it was written: {changed}")
    other = load_checkpoint(merged.folder / "checkpoint")
    if other.spec.architecture != spec.architecture:
        raise ModelError(
            f"finetune.from_run ({run}) has {other.spec.backbone.id}, of another architecture or size than here "
            f"{spec.backbone.id}; both runs need the same backbone, image_size and max_length"
        )
    model.backbone.load_state_dict(other.model.backbone.state_dict())


def weights_of(context: StageContext, config: FinetuneConfig) -> list[str]:
    """What the backbone's weights come from: digests, and the seed of random ones."""
    seed = [f"seed {context.seed}"] if config.from_scratch else []
    started_from = [] if config.from_run is None else [config.outside()["from_run"]]
    return [context.backbone.weights_digest, *started_from, *seed]


def with_frozen_result(setup: Setup) -> Setup:
    """The same setup with the probe on the frozen features."""
    from stages.features.compute import compute_features, features_key
    from stages.features.probe import NEIGHBOURS, fit_probe, outputs_of_neighbours, score_head

    context, task, outputs = setup.context, setup.task, setup.spec.io.width
    key = features_key(weights_of(context, setup.config), setup.spec, setup.processing, context.device)
    started = time.monotonic()
    features: dict[SplitName, np.ndarray] = {}
    for name in NAMES:
        features[name] = compute_features(
            setup.model, setup.processing, context.data[name], key, context.device, context.progress, f"{name} features"
        )
    setup.model.to("cpu")
    targets = {name: setup.targets(name) for name in NAMES}
    probe = fit_probe(features["train"], targets["train"], outputs, task)
    scores, loss = score_head(probe.weight, probe.bias, features["validation"], targets["validation"], task)
    knn = None
    if not task.embeds:
        voted = outputs_of_neighbours(features["train"], targets["train"], features["validation"], outputs, task)
        knn = float(task.scores(voted, targets["validation"]).mean())
    context.log.info(
        "%-10s linear probe: validation %s %.4f%s", "", task.metric, scores.mean(),
        "" if knn is None else f" ({NEIGHBOURS} nearest neighbours {knn:.4f})",
    )  # fmt: skip
    given = judge_own_head(setup, features, targets, probe.cv_metric) if setup.own_head else None
    seconds = time.monotonic() - started
    setup = replace(setup, frozen=FrozenResult(features, targets, probe, scores, loss, knn, seconds, given))
    if setup.named is not None and not setup.own_head:
        from stages.finetune.label_names import with_label_map

        return with_label_map(setup)
    return setup


def judge_own_head(
    setup: Setup, features: dict[SplitName, np.ndarray], targets: dict[SplitName, np.ndarray], probe: float | None
) -> GivenHead:
    """What the backbone's own head reaches on the features, with no training at all. It is kept where on the folds of
    the training data it is as good as a probe, whose metric there is `probe` (the validation split has no part in it),
    or where it was asked for.
    """
    import numpy as np

    from stages.features.probe import CV_EXAMPLES, FOLDS

    task = setup.task
    outputs = {name: outputs_of_head(setup.model, features[name]) for name in NAMES}
    folds = [held_out for _, held_out in task.folds(targets["train"][:CV_EXAMPLES], FOLDS)]
    found = [float(task.scores(outputs["train"][one], targets["train"][one]).mean()) for one in folds]
    own = float(np.average(found, weights=[len(one) for one in folds])) if folds else 0.0
    scores = task.scores(outputs["validation"], targets["validation"])
    wanted = setup.config.initial_head != "probe" and (probe is None or own >= probe)
    starts = wanted or setup.config.names_labels
    setup.context.log.info(
        "%-10s zero-shot: validation %s %.4f; on folds of the training data %.4f, the linear probe %s: starts from %s",
        "", task.metric, scores.mean(), own, "nothing" if probe is None else f"{probe:.4f}",
        "its own head" if starts else "the probe",
    )  # fmt: skip
    loss = loss_of_head(setup, outputs["validation"], targets["validation"])
    return GivenHead("zero-shot", scores, loss, starts, share_of_unseen(setup, outputs["validation"]))


def share_of_unseen(setup: Setup, outputs: np.ndarray) -> float | None:
    """How many of these answers are an unseen label; None where there is none."""
    seen = len(setup.context.data.labels)
    return float((outputs.argmax(1) >= seen).mean()) if setup.config.unseen_labels else None


def outputs_of_head(model: Classifier, features: np.ndarray) -> np.ndarray:
    """float32 (examples, outputs) of the network's head."""
    import torch

    with torch.inference_mode():
        outputs: np.ndarray = model.task_head(torch.from_numpy(features)).numpy()
    return outputs


def loss_of_head(setup: Setup, outputs: np.ndarray, targets: np.ndarray) -> float:
    """The mean loss of such outputs."""
    import torch

    from models.classifier import for_loss

    with torch.inference_mode():
        return float(setup.task.loss(for_loss(setup.model, torch.from_numpy(outputs)), torch.from_numpy(targets)))


def seed_everything(context: StageContext, config: FinetuneConfig) -> None:
    """Seed Python, numpy and torch; name the number of threads."""
    import torch
    from transformers import set_seed

    torch.set_num_threads(config.threads or usable_threads())
    set_seed(context.seed)
