"""What validate asks of candidates, and how it measures and chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from stages.artifact import digest_of, sha256_of_file
from stages.base import StageConfig
from stages.candidates import FLOATS
from stages.validate.engines import EngineRule
from stages.validate.providers import ProviderName

AGREEMENT_NARROW = 0.94


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
    metric_drop: Literal["observed", "proven"] = Field(
        default="observed",
        description="What max_metric_drop bounds: the drop observed, or the largest one that the samples do not rule "
        "out (one-sided 95 % bound; takes thousands of samples: 8.56·flips/margin²).",
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
    max_relative_error_fp32: float = Field(
        default=1e-3,
        gt=0,
        description="Largest output error of fp32 as a share of the reference's range (ratio).",
    )
    max_relative_error_fp16: float = Field(
        default=2e-2,
        gt=0,
        description="Largest output error of fp16 as a share of the reference's range (ratio).",
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
        default=None, gt=0, description="Limit: largest p95 latency at batch 1 on this machine (milliseconds)."
    )
    max_size_bytes: int | None = Field(
        default=None, gt=0, description="Limit: largest model, with its external weights (bytes)."
    )

    engines: EngineRule = Field(
        default="require-receipt",
        description="Engines run on devices that this machine is not. require-receipt: each that is shipped has the "
        "receipt of a device (receipts) with its digest; allow-unproven: it may be packed without one, and is named "
        "UNPROVEN wherever it is named.",
    )

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
    receipts: tuple[str, ...] = Field(
        default=(), description="Files of `pipeline verify --receipt`, from the devices that engines are built for."
    )
    gates: GatesConfig = Field(default_factory=GatesConfig, description="Thresholds.")

    @field_validator("providers")
    @classmethod
    def each_once(cls, value: tuple[ProviderName, ...]) -> tuple[ProviderName, ...]:
        """A provider that is named twice would be measured twice under one name."""
        if len(set(value)) != len(value):
            raise ValueError("a provider is named twice")
        return value

    def outside(self) -> dict[str, str]:
        """What the receipts hold, wherever they lie."""
        found = [sha256_of_file(Path(file)) if Path(file).is_file() else "missing" for file in self.receipts]
        return {"receipts": digest_of(found)}
