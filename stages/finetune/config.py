"""The configuration of finetune, and the defaults that depend on the strategy and the kind of backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from models.adapters import NOT_FOLDABLE, SCALED_BY_B, Method
from stages.artifact import Artifact, digest_of, read_artifact
from stages.base import StageConfig
from stages.gate import stops

Strategy = Literal["feature-extraction", "full", "lp-ft", "gradual-unfreezing", "lora", "flyp"]
Family = Literal["cnn", "transformer", "text"]
Augment = Literal["none", "flip", "crop"]

ADAPTER_RATES: dict[str, tuple[float, float]] = {"timm": (1e-3, 2e-3), "hf": (5e-4, 1e-3), "dual": (5e-4, 1e-3)}
"""Library → learning rates of adapters and head. Adapters learn at about ten times the rate of full fine-tuning
(Schulman et al. 2025, "LoRA Without Regret"; measured on the two recipes)."""

FLYP_RATE = 1e-5
"""Learning rate of both towers in contrastive fine-tuning (Goyal et al. 2023, arXiv 2212.00638)."""

INT8_RATE = 2e-5
"""Learning rate of quantization-aware training. EfficientNet-Lite0, all of it trained on 1,500 Fashion-MNIST images,
then one epoch on 1,000 of them: INT8 .796 before; with 2e-5 .830, floating point stays at .836; with 1e-4 .808 and
.814, with 5e-4 .806 and .818 (500 validation images, INT8 simulated)."""

LAYER_RATES: dict[Family, tuple[float, float]] = {
    "cnn": (1e-3, 100.0),
    "transformer": (5e-4, 100.0),
    "text": (3e-4, 100.0),
}
"""Kind of backbone → learning rate of the head, and how many times lower the bottom layer learns, where all weights
are trained. The layers between are spaced geometrically, so the middle of a transformer learns at the 3e-5 to 5e-5
that full fine-tuning at one rate takes (Devlin et al. 2019; Dosovitskiy et al. 2021). EfficientNet-Lite0 on 1,500
Fashion-MNIST images, lp-ft for 4 epochs: .896 with (1e-3, 100), .884 with (3e-4, 10), its probe .856."""


def merged_network_of(run: str) -> Artifact:
    """The merge-lora artifact of a run folder. Raises `ValueError` where there is none."""
    artifact = read_artifact("merge-lora", Path(run) / "merge-lora")
    if artifact is None:
        raise ValueError("holds no merged network; run `pipeline all --until merge-lora` there first")
    return artifact


class LoraConfig(StageConfig):
    """Adapters that fold exactly into the base weights."""

    method: Method = Field(
        default="lora",
        description="lora, rslora, dora (low rank), loha, lokr (low rank, many more ranks from few numbers), ia3 "
        "(scales outputs), oft, boft, hra (rotate weights). Those that cannot be folded are refused.",
    )
    rank: int = Field(default=8, ge=1, description="Rank of the adapters (number); not of ia3, oft, boft.")
    alpha: float = Field(
        default=16.0, gt=0, description="Scale: ΔW = alpha / rank · B · A; not of ia3, oft, boft, hra."
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout before the adapter (share); not of ia3, oft, boft, hra."
    )

    @field_validator("method", mode="before")
    @classmethod
    def refuse_what_cannot_be_folded(cls, value: Any) -> Any:
        """Before anything is trained: say why such a method has no place here."""
        name = str(value).lower().replace("_", "-")
        if name in NOT_FOLDABLE:
            raise ValueError(
                f"{value} cannot be folded: {NOT_FOLDABLE[name]}; use one of {', '.join(get_args(Method))}"
            )
        return value


class AutoConfig(StageConfig):
    """When `strategy: auto` goes on to a more costly strategy."""

    min_gain: float = Field(
        default=0.005,
        ge=0,
        description="What a step must add to the validation metric to be worth its cost (0.01 = 1 point).",
    )
    confidence: float = Field(
        default=0.9,
        gt=0.5,
        lt=1,
        description="Of the interval of the gain, which must lie above zero (probability).",
    )


class QuantizationAwareConfig(StageConfig):
    """Training on with INT8 rounding, for networks that lose too much in `quantize` or keep much in floating point."""

    epochs: int = Field(
        default=0,
        ge=0,
        description="Passes over the training split after the strategy, in which weights and activations are rounded "
        "as static INT8 will round them, all weights learning (number); adapters are folded before. 0 goes without.",
    )
    learning_rate: float = Field(
        default=INT8_RATE, gt=0, description="Peak rate, one for all layers: the first ones need it most."
    )
    symmetric: bool = Field(
        default=False,
        description="Activations symmetric about zero, as int8-symmetric (TensorRT) has them; else as int8-static.",
    )


class LaunchConfig(StageConfig):
    """Training in several processes, on one or more machines, through `accelerate launch`."""

    processes: int | None = Field(
        default=None,
        ge=1,
        description="Processes that share each batch, one a GPU (number). Default: those of config_file, else 1: "
        "training in this process.",
    )
    config_file: str | None = Field(
        default=None,
        description="A configuration file of accelerate (`accelerate config` writes one), passed through: FSDP, more "
        "than one machine. finetune.precision stays in force.",
    )

    @field_validator("config_file")
    @classmethod
    def refuse_what_is_no_configuration(cls, value: str | None) -> str | None:
        """A YAML file with accelerate's keys."""
        if value is not None:
            settings_in(value)
        return value

    @property
    def count(self) -> int:
        """Processes on all machines together."""
        named = 1 if self.config_file is None else settings_in(self.config_file).get("num_processes", 1)
        return self.processes or named

    @property
    def starts_processes(self) -> bool:
        """Whether accelerate is needed at all."""
        return self.config_file is not None or self.count > 1


def settings_in(file: str) -> dict[str, Any]:
    """A configuration file of accelerate. Raises `ValueError`: it is none, and why."""
    import yaml

    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read: {error}; `accelerate config --config_file FILE` writes one") from error
    except yaml.YAMLError as error:
        raise ValueError(f"is not valid YAML: {error}") from error
    if not isinstance(settings, dict) or "distributed_type" not in settings:
        raise ValueError("is no configuration of accelerate: it has no distributed_type")
    count = settings.get("num_processes", 1)
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"has num_processes: {count!r}; expected a number from 1 up")
    return settings


class FinetuneConfig(StageConfig):
    """How the backbone is adapted."""

    strategy: Literal["auto", Strategy] = Field(
        default="auto",
        description="feature-extraction: linear probe on the frozen backbone; lora: adapters in Linear and ungrouped "
        "convolution layers; full: all weights at once; lp-ft: the probe first, then all weights from it; "
        "gradual-unfreezing: all weights in phases, from the top down; flyp: both towers of a dual encoder, on images "
        "with the names of their labels. auto: the probe, then adapters, then all "
        "weights, each only while the one before was worth it.",
    )
    epochs: int = Field(default=3, ge=1, description="Passes over the training split (number), all phases together.")
    batch_size: int = Field(default=32, ge=1, description="Examples a step (number), of all processes together.")
    backbone_learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Peak rate of the backbone or its adapters, one for all layers. Default: by layer_rate_ratio, "
        "or by library for adapters.",
    )
    head_learning_rate: float | None = Field(
        default=None, gt=0, description="Peak rate of the head. Default: by strategy and kind of backbone."
    )
    layer_rate_ratio: float | None = Field(
        default=None,
        ge=1,
        description="How many times lower the bottom layer learns than the head, the layers between in geometric "
        "steps (ratio). Default: 100; for adapters one rate.",
    )
    phases: int = Field(
        default=3, ge=2, description="gradual-unfreezing: in how many steps the layers are unfrozen (number)."
    )
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's weight decay, not on norms and biases.")
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1, description="Share of the steps spent warming up.")
    patience: int = Field(default=3, ge=1, description="Stop after so many epochs without a better validation metric.")
    initial_head: Literal["probe", "random", "label-names"] | None = Field(
        default=None,
        description="Where the head starts: a linear probe on the frozen features, random weights (of a dual encoder "
        "with both towers its own head), or what a text tower says of the names of the labels (image-classification). "
        "Default: random for full, label-names for flyp, the probe for the others; of a dual encoder its own head "
        "where the probe is no better.",
    )
    label_templates: tuple[str, ...] = Field(
        default=("a photo of a {}.",),
        min_length=1,
        description="label-names, flyp: texts with {} in the place of the name; their embeddings are averaged.",
    )
    unseen_labels: tuple[str, ...] = Field(
        default=(),
        description="label-names with feature-extraction: labels without examples, known by their names only; they "
        "follow the others.",
    )
    wise_ft: bool = Field(
        default=False,
        description="Afterwards try weights between the starting ones and the trained ones (WiSE-FT; adapters are "
        "scaled) and keep the best on validation.",
    )
    from_run: str | None = Field(
        default=None,
        description="Folder of another run whose merged network this one starts from, with a new head: transfer "
        "through an intermediate task. It must have the same backbone.",
    )
    compare_direct: bool = Field(
        default=False,
        description="With from_run: train from the backbone directly too, to say what the intermediate task is worth. "
        "The probes are compared in any case.",
    )
    from_scratch: bool = Field(
        default=False, description="Start from random backbone weights: the baseline that transfer must beat."
    )
    learning_rate_test: bool = Field(
        default=False,
        description="Before training, raise the rates step by step on a copy of the network, to say whether the "
        "configured ones are too high. Costs 40 steps.",
    )
    scratch_fractions: tuple[float, ...] = Field(
        default=(),
        description="Shares of the training split on which the strategy is compared with training from scratch "
        "(0 to 1, e.g. [0.25, 0.5, 1]). Each costs two trainings; the full one costs one more.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="Arithmetic of training. auto: bf16 on a GPU that has it, else fp32."
    )
    image_size: int | None = Field(
        default=None, ge=16, description="Side of the input image (pixels). Default: the backbone's."
    )
    max_length: int | None = Field(default=None, ge=4, description="Longest text (tokens). Default: 128.")
    max_seconds: float | None = Field(
        default=None,
        gt=0,
        description="How much of a recording the network hears (seconds): longer ones are cut, shorter ones end in "
        "silence. Default: 10, or the backbone's own.",
    )
    augment: Augment = Field(
        default="flip",
        description="flip mirrors half of the images in training; crop also takes a part of each, 60 to 100 % of its "
        "area, at the size of the whole; none where left and right differ (digits, text).",
    )
    locked_tower: Literal["image", "text"] | None = Field(
        default=None,
        description="image-text: this tower keeps its weights while the other one learns (LiT); for full and lp-ft.",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of training (number). Default: every core this process may use, at most "
        "OMP_NUM_THREADS.",
    )
    workers: int | None = Field(
        default=None,
        ge=0,
        description="Processes that prepare training examples (number). Default: 0 on a CPU, up to 4 beside a GPU.",
    )
    lora: LoraConfig = Field(default_factory=LoraConfig, description="Settings of the adapters.")
    launch: LaunchConfig = Field(default_factory=LaunchConfig, description="More than one process: more than one GPU.")
    auto: AutoConfig = Field(default_factory=AutoConfig, description="When auto goes on.")
    quantization_aware: QuantizationAwareConfig = Field(
        default_factory=QuantizationAwareConfig, description="Training on with INT8 rounding."
    )
    min_gain_over_majority: float = Field(
        default=0.01,
        ge=0,
        description="Gate: validation metric above the best constant answer (the majority class) by this much, or half "
        "of the way to 1 where that is less (0.01 = 1 point).",
    )
    max_drop_from_probe: float = Field(
        default=0.01,
        ge=0,
        description="Gate: training may end this much below the linear probe, a head that it started from, or the "
        "network that quantization-aware training started from (0.01 = 1 point).",
    )

    @field_validator("from_run")
    @classmethod
    def refuse_what_is_no_run(cls, value: str | None) -> str | None:
        """A run with a merged network whose gates passed."""
        if value is not None:
            merged = merged_network_of(value)
            failed = [gate["name"] for gate in merged.manifest["gates"] if stops(gate)]
            if failed:
                raise ValueError(f"merge-lora of that run has a failed gate ({failed[0]})")
        return value

    def outside(self) -> dict[str, str]:
        """The digest of the network to start from, and of the configuration of accelerate."""
        found = {} if self.from_run is None else {"from_run": merged_network_of(self.from_run).digest}
        if self.launch.config_file is not None:
            found["launch"] = digest_of([self.launch.processes, settings_in(self.launch.config_file)])
        return found

    @field_validator("scratch_fractions")
    @classmethod
    def refuse_what_is_no_share(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        """Shares of a split, none of them twice."""
        if any(not 0 < share <= 1 for share in value) or len(set(value)) != len(value):
            raise ValueError("expected different shares above 0, at most 1")
        return value

    @field_validator("label_templates")
    @classmethod
    def refuse_what_names_no_label(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Each has one place for the name."""
        for template in value:
            if template.count("{}") != 1:
                raise ValueError(f"{template!r} has not one {{}} for the name; write e.g. 'a photo of a {{}}.'")
        return value

    @field_validator("from_scratch")
    @classmethod
    def refuse_transfer_of_random_weights(cls, value: bool, info: ValidationInfo) -> bool:
        """There is nothing to keep in random weights: the scratch baseline trains everything."""
        strategy = info.data.get("strategy")
        if value and strategy in ("lora", "lp-ft", "gradual-unfreezing", "flyp"):
            raise ValueError(f"{strategy} needs pretrained weights; write strategy: full")
        return value

    @model_validator(mode="after")
    def refuse_contradictions(self) -> FinetuneConfig:
        """Settings that exclude each other."""
        if self.backbone_learning_rate and self.layer_rate_ratio:
            raise ValueError(
                "backbone_learning_rate gives all layers one rate, layer_rate_ratio each its own; write one of them"
            )
        if (
            self.strategy == "auto"
            and not self.from_scratch
            and (self.backbone_learning_rate or self.head_learning_rate or self.layer_rate_ratio)
        ):
            raise ValueError("auto tries strategies whose rates differ by ten times; to set rates name the strategy")
        if self.from_run and self.from_scratch:
            raise ValueError("from_scratch has random weights, from_run those of another run; write one of them")
        if self.compare_direct and not self.from_run:
            raise ValueError("compare_direct compares with from_run, which is not written")
        self.refuse_what_names_exclude()
        if self.quantization_aware.epochs and self.launch.starts_processes:
            raise ValueError(
                "quantization_aware trains in one process; leave launch out, or train in several first and go on from "
                "that run in another: from_run with strategy: feature-extraction and quantization_aware"
            )
        if self.strategy == "lp-ft" and self.initial_head == "random":
            raise ValueError("lp-ft starts from the probe; with initial_head: random write strategy: full")
        if self.batch_size % self.launch.count:
            whole = max(1, round(self.batch_size / self.launch.count)) * self.launch.count
            raise ValueError(
                f"{self.launch.count} processes cannot share a batch of {self.batch_size} equally; "
                f"write batch_size: {whole}"
            )
        if self.locked_tower and self.strategy not in ("full", "lp-ft"):
            raise ValueError(f"locked_tower is for strategy: full or lp-ft, not {self.strategy}")
        if self.locked_tower and self.from_scratch:
            raise ValueError("there is nothing to keep in random weights; leave locked_tower or from_scratch out")
        if self.strategy == "gradual-unfreezing" and self.epochs < self.phases:
            raise ValueError(f"there are fewer epochs than phases ({self.epochs} and {self.phases}); each needs one")
        if self.scratch_fractions and self.from_scratch:
            raise ValueError("from_scratch is the baseline itself; scratch_fractions compares with it")
        if self.wise_ft and self.strategy == "feature-extraction":
            raise ValueError("wise_ft looks between starting and trained weights; feature-extraction trains none")
        if self.wise_ft and self.strategy in ("lora", "auto") and self.lora.method not in SCALED_BY_B:
            raise ValueError(f"wise_ft can scale {' and '.join(SCALED_BY_B)} only, not {self.lora.method}")
        return self

    def refuse_what_names_exclude(self) -> None:
        """Raises `ValueError` for settings that label names exclude, or that want them."""
        if self.strategy == "flyp" and self.initial_head in ("probe", "random"):
            raise ValueError(f"flyp starts from the names of the labels; leave initial_head: {self.initial_head} out")
        if self.initial_head == "label-names" and self.strategy == "auto":
            raise ValueError(
                "auto goes up from the probe, which initial_head: label-names would leave out; name the strategy"
            )
        if self.names_labels:
            for name in ("from_scratch", "from_run", "scratch_fractions"):
                if getattr(self, name):
                    raise ValueError(f"label names need the pretrained towers as they are; leave {name} out")
        if not all(one.strip() for one in self.unseen_labels):
            raise ValueError("unseen_labels has an empty name, which says nothing; leave it out")
        if self.unseen_labels and not (self.names_labels and self.strategy == "feature-extraction"):
            raise ValueError(
                "unseen_labels are known by their names only, and training forgets them; write strategy: "
                "feature-extraction with initial_head: label-names"
            )
        if self.unseen_labels and self.quantization_aware.epochs:
            raise ValueError("quantization_aware trains, and training forgets unseen_labels; write one of them")

    @property
    def names_labels(self) -> bool:
        """Whether the head is made of the names of the labels."""
        return self.initial_head == "label-names" or self.strategy == "flyp"

    def head_from_probe(self, strategy: Strategy) -> bool:
        """Whether the head starts as the linear probe."""
        return not self.names_labels and (self.initial_head or ("random" if strategy == "full" else "probe")) == "probe"
