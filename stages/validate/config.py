"""What validate asks of candidates, and how it measures and chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from stages.artifact import digest_of, sha256_of_file
from stages.base import StageConfig
from stages.candidates import FLOATS
from stages.validate.baseline import digest_of_baseline
from stages.validate.engines import EngineRule
from stages.validate.providers import ProviderName
from stages.validate.robustness import CorruptionName
from stages.validate.waivers import WaiverConfig

AGREEMENT_NARROW = 0.94
MLPERF_RATIOS = {"mlperf-99": 0.99, "mlperf-99.9": 0.999}
"""The quality targets of MLPerf Inference (Reddi et al. 2020, arXiv 1911.02549): 99 % and 99.9 % of the FP32 model's
metric."""


class GatesConfig(StageConfig):
    """What a release must hold. Every candidate must be true to the reference; a candidate above a limit on latency
    or size is left out of the choice, and one must remain."""

    min_samples: int = Field(
        default=100,
        ge=1,
        description="Fewest test samples that count as evidence (number). 100 see a drop of 6.5 "
        "points where one answer in twenty flips; a drop of 1 point takes thousands.",
    )
    max_metric_drop: float = Field(
        default=0.01, ge=0, description="Largest drop of the metric below the reference (0.01 = 1 point)."
    )
    min_metric_ratio: float | Literal["mlperf-99", "mlperf-99.9"] | None = Field(
        default=None,
        description="The same as a share of the reference's metric, e.g. 0.99; mlperf-99 and mlperf-99.9 are MLPerf "
        "Inference's two. Of max_metric_drop and this one the stricter holds.",
    )
    metric_drop: Literal["proven", "observed"] = Field(
        default="proven",
        description="What the margins bound. proven: the drop that the samples do not rule out (paired one-sided "
        "non-inferiority at 5 %): it passes where none beyond the margin is left possible, fails where one is shown, "
        "and is inconclusive between; where answers flip that takes 8.56·flips/margin² samples. observed: the drop "
        "that was seen, whatever it proves.",
    )
    max_drops: dict[str, float] = Field(
        default={},
        description="Other metrics of the task (as the report names them, e.g. macro F1, mAP, Spearman): the largest "
        "loss of each, in its unit, judged as metric_drop says.",
    )
    min_agreement: float = Field(
        default=0.99,
        ge=0,
        le=1,
        description="Smallest share of samples with the reference's answer (its top-1 class), of every candidate.",
    )
    min_agreement_int8: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="The same for INT8 candidates alone. Default: min_agreement where that is written, else 0.94: "
        "near-ties flip in INT8 without harm to the metric, which has a gate of its own.",
    )
    min_agreement_int4: float | None = Field(
        default=None, ge=0, le=1, description="The same for candidates with INT4 weights alone; the same default."
    )
    min_agreement_fp8: float | None = Field(
        default=None, ge=0, le=1, description="The same for FP8 candidates alone; the same default."
    )
    max_flip_rate: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Largest share of samples that are right in one of reference and candidate and wrong in the other, "
        "by its 95 % bound (Clopper–Pearson).",
    )
    max_slice_drop: float | None = Field(
        default=0.05,
        ge=0,
        description="No class, and no value of the columns in validate.slices, may be shown to lose more of the metric "
        "than this (one-sided at 5 %, Holm's correction for their number). null: not checked.",
    )
    max_robustness_drop: float | None = Field(
        default=0.05,
        ge=0,
        description="With robustness: largest drop of the metric below the reference's under the same corruption, as "
        "metric_drop says, after Holm's correction for the number of corruptions. null: not checked.",
    )
    min_slice_samples: int = Field(default=50, ge=2, description="Fewest samples of a slice that is judged (number).")
    max_ece_increase: float | None = Field(
        default=None,
        ge=0,
        description="Of one label of several: largest increase of the expected calibration error, by its 95 % bound.",
    )
    max_nll_increase: float | None = Field(
        default=None,
        ge=0,
        description="Of one label of several: largest increase of the negative log-likelihood (nats), by its 95 % "
        "bound.",
    )
    max_relative_error_fp32: float = Field(
        default=1e-3,
        gt=0,
        description="Ceiling of fp32's largest output error as a share of the reference's range (ratio). The tolerance "
        "is 20 times the reference's own noise where that is less.",
    )
    max_relative_error_fp16: float = Field(
        default=2e-2,
        gt=0,
        description="Largest output error of fp16 as a share of the reference's range (ratio).",
    )
    max_relative_error_bf16: float = Field(
        default=1e-1,
        gt=0,
        description="Largest output error of bf16 as a share of the reference's range (ratio).",
    )
    min_sqnr_db: float = Field(
        default=10.0,
        description="Smallest signal-to-quantization-noise ratio of any candidate (dB). Halved logits, which keep "
        "every class, have 6 dB.",
    )
    min_cosine: float = Field(
        default=0.95,
        ge=-1,
        le=1,
        description="Of tasks that give embeddings: smallest cosine similarity of any sample to the reference's. "
        "Agreement on the nearest does not see that all turn together, which breaks an index made before.",
    )
    max_latency_ms: float | None = Field(
        default=None,
        gt=0,
        description="Limit: largest latency at batch 1 on this machine, of the percentile in latency_percentile "
        "(milliseconds).",
    )
    latency_percentile: Literal[50, 90, 95, 99] = Field(
        default=95, description="The percentile of single calls that max_latency_ms limits."
    )
    latency_rule: Literal["observed", "proven"] = Field(
        default="observed",
        description="What max_latency_ms limits. observed: the percentile as it was seen. proven: its upper bound at "
        "99 % confidence, by order statistics; without enough latency_calls (64 for p90, 130 for p95, 662 for p99) "
        "there is none, which is inconclusive.",
    )
    max_size_bytes: int | None = Field(
        default=None, gt=0, description="Limit: largest model, with its external weights (bytes)."
    )
    min_speedup: float | None = Field(
        default=None,
        gt=0,
        description="Limit: smallest speed against PyTorch at batch 1 (ratio), by its 97.9 % interval over the turns.",
    )
    max_memory_bytes: int | None = Field(
        default=None,
        gt=0,
        description="Limit: largest peak of resident memory of a process that loads the model and runs it at batch 1 "
        "(bytes), ONNX Runtime itself included.",
    )
    max_latency_regression: float | None = Field(
        default=None,
        gt=0,
        description="With baseline: largest latency at batch 1 against its (ratio: 1.1 is a tenth slower), by its "
        "97.9 % interval over turns that both take.",
    )
    min_mutation_score: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Smallest share of the self-test's defects that these gates must catch (ratio). Then no control "
        "may be red. Those of the preprocessing, which candidates share, are not among them. Asks for the self-test.",
    )
    engines: EngineRule = Field(
        default="require-receipt",
        description="Engines run on devices that this machine is not. require-receipt: each that is shipped has the "
        "receipt of a device (receipts) with its digest; allow-unproven: it may be packed without one, and is named "
        "UNPROVEN wherever it is named.",
    )

    def margin_of(self, metric: float | None) -> float | None:
        """The largest drop of a reference's metric: `max_metric_drop`, or what `min_metric_ratio` leaves, if less. None
        where the metric has no share to keep (it is not above 0)."""
        if self.min_metric_ratio is None:
            return self.max_metric_drop
        if metric is None or metric <= 0:
            return None
        asked = self.min_metric_ratio
        ratio = MLPERF_RATIOS[asked] if isinstance(asked, str) else asked
        return min(self.max_metric_drop, (1 - ratio) * metric)

    @field_validator("min_metric_ratio")
    @classmethod
    def check_ratio(cls, value: float | str | None) -> float | str | None:
        """A share."""
        if isinstance(value, float) and not 0 < value <= 1:
            raise ValueError(f"found {value}; expected a share of the reference's metric above 0, at most 1")
        return value

    @property
    def ceilings(self) -> dict[str, float]:
        """Precision in floating point → the largest error as a share of the reference's range."""
        return {
            "fp32": self.max_relative_error_fp32,
            "fp16": self.max_relative_error_fp16,
            "bf16": self.max_relative_error_bf16,
        }

    def agreement_of(self, precision: str) -> float:
        """The share of samples that a candidate of this precision must agree on."""
        if precision in FLOATS:
            return self.min_agreement
        narrow = {"int8": self.min_agreement_int8, "int4": self.min_agreement_int4, "fp8": self.min_agreement_fp8}
        own = narrow[precision]
        if own is not None:
            return own
        return self.min_agreement if "min_agreement" in self.model_fields_set else AGREEMENT_NARROW


class ValidateConfig(StageConfig):
    """How candidates are measured and which one is shipped."""

    objective: Literal["latency", "size", "accuracy"] = Field(
        default="latency",
        description="What the shipped candidate is best at, among those whose gates all passed (accuracy: the task's "
        "metric).",
    )
    batch_size: int = Field(
        default=32, ge=1, description="Batch size of the metric and throughput measurements (number)."
    )
    providers: tuple[ProviderName, ...] = Field(
        default=("cpu",),
        min_length=1,
        description="Execution providers of ONNX Runtime that every candidate is run on, held to the gates and timed. "
        "The first decides what is shipped; one that this machine lacks is an error before anything runs.",
    )
    latency_calls: int = Field(default=100, ge=20, description="Timed calls of each runtime at batch 1 (number).")
    robustness: bool | tuple[CorruptionName, ...] = Field(
        default=False,
        description="Take the metric drop again under corruptions of the test inputs, each of one fixed severity: of "
        "images gaussian-noise, blur, brightness, jpeg; of texts typos, upper-case, dropped-words; of audio "
        "white-noise, gain. true: all that the task has.",
    )
    robustness_samples: int = Field(
        default=512,
        ge=1,
        description="Most test samples that each corruption is tried on (number). 512 prove a margin of 0.05 where one "
        "answer in ten flips.",
    )
    self_test: bool = Field(
        default=False,
        description="Put some thirty known defects into this model, its graph and its preprocessing, and report which "
        "of them the gates catch. Each costs one pass over `self_test_samples`.",
    )
    self_test_samples: int = Field(
        default=512,
        ge=1,
        description="Most test samples that each defect of the self-test is run on (number). Below 268 no samples "
        "prove a margin of 0.01, even where nothing flips.",
    )
    drift_samples: int = Field(
        default=256,
        ge=0,
        description="Most test samples on which the error of each step, from the adapted network to the candidates, is "
        "taken apart (number); 0: not at all.",
    )
    receipts: tuple[str, ...] = Field(
        default=(), description="Files of `pipeline verify --receipt`, from the devices that engines are built for."
    )
    baseline: str | None = Field(
        default=None,
        description="The last release: the folder of its run, or its bundle (folder or tar). Its network runs on the "
        "same test samples, and the chosen candidate may lose no more against it than the gates allow against the "
        "reference.",
    )
    on_inconclusive: Literal["fail", "pass"] = Field(
        default="fail",
        description="What becomes of a gate whose evidence fits both: fail stops the run, pass lets it through, and "
        "says so.",
    )
    slices: tuple[str, ...] = Field(
        default=(), description="Columns of the data's table whose values part the test split into slices of their own."
    )
    critical_slices: dict[str, float] = Field(
        default={},
        description="Slices with a margin of their own, which must be proven: label=<class> or <column>=<value>, and "
        "the largest drop of the metric.",
    )
    waivers: tuple[WaiverConfig, ...] = Field(
        default=(),
        description="Gates that somebody takes on himself: gate, subject, owner, reason, expires (YYYY-MM-DD) and the "
        "digest of the candidate that it holds for. The verdict stays, and every report says that it is waived.",
    )
    gates: GatesConfig = Field(default_factory=GatesConfig, description="Thresholds.")

    @field_validator("providers")
    @classmethod
    def each_once(cls, value: tuple[ProviderName, ...]) -> tuple[ProviderName, ...]:
        """A provider that is named twice would be measured twice under one name."""
        if len(set(value)) != len(value):
            raise ValueError("a provider is named twice")
        return value

    @field_validator("baseline")
    @classmethod
    def refuse_what_ships_nothing(cls, value: str | None) -> str | None:
        """A bundle, or a run whose validate passed."""
        if value is not None:
            digest_of_baseline(Path(value))
        return value

    @model_validator(mode="after")
    def check_regression(self) -> ValidateConfig:
        """There is something to be slower than."""
        if self.gates.max_latency_regression is not None and self.baseline is None:
            raise ValueError("gates.max_latency_regression compares with baseline, which is not written")
        return self

    @field_validator("slices")
    @classmethod
    def refuse_the_label(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """`label=<value>` of a column would be mixed with the classes, which are slices anyway."""
        if "label" in value:
            raise ValueError("label is what classes are called, which are slices anyway; rename the column")
        return value

    def outside(self) -> dict[str, str]:
        """What the receipts and the baseline hold, wherever they lie, and which waivers have expired by now."""
        found = [sha256_of_file(Path(file)) if Path(file).is_file() else "missing" for file in self.receipts]
        expired = (
            {"expired_waivers": "; ".join(one.title for one in self.waivers if one.expired)} if self.waivers else {}
        )
        released = {} if self.baseline is None else {"baseline": digest_of_baseline(Path(self.baseline))}
        return {"receipts": digest_of(found), **released, **expired}
