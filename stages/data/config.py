"""The `data` section of `pipeline.yaml`."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from stages.base import StageConfig


class DataConfig(StageConfig):
    """Where labelled examples come from. Train, validation, calibration and test are disjoint by content."""

    source: str = Field(
        min_length=1,
        description="demo:<name>, a folder (one folder per label, or train/validation/calibration/test folders "
        "of such), a CSV, JSONL or Parquet file, or hf:<dataset>@<revision>.",
    )
    image_column: str = Field(default="image", description="Column with image paths (relative to the file) or images.")
    audio_column: str = Field(
        default="audio", description="Column with the paths of recordings (relative to the file) or recordings."
    )
    text_column: str = Field(default="text", description="Column with texts.")
    text_pair_column: str | None = Field(
        default=None, description="Column with the second text of each example, where the network compares two."
    )
    label_column: str = Field(
        default="label",
        description='Column with labels; of a multilabel task lists, or texts with ";" between the labels; of a '
        "regression numbers.",
    )
    label_names: dict[str, str] = Field(
        default={},
        description="Label in the data: its name in answers, reports and bundles, e.g. {0: shirt, 1: coat}. The others "
        "keep theirs. Not for regression and image-text.",
    )
    split_column: str | None = Field(default=None, description="Column that names each row's split, if there is one.")
    validation_fraction: float = Field(
        default=0.15, gt=0, lt=1, description="Share of the examples for validation where the source has no such split."
    )
    calibration_fraction: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Share of the examples for calibrating INT8 where the source has no such split.",
    )
    test_fraction: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="Share of the examples held out for validate where the source has no such split.",
    )
    max_train_samples: int | None = Field(
        default=None, ge=1, description="Use only so many training examples (number), the classes in proportion."
    )
    max_validation_samples: int | None = Field(
        default=None, ge=1, description="Use only so many validation examples (number), the classes in proportion."
    )
    max_calibration_samples: int | None = Field(
        default=None, ge=1, description="Use only so many calibration examples (number), the classes in proportion."
    )
    max_test_samples: int | None = Field(
        default=None, ge=1, description="Use only so many test examples (number), the classes in proportion."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the split; the same content goes to the same split.")
    on_error: Literal["fail", "skip"] = Field(
        default="fail",
        description="What to do with an example that cannot be read, has two labels or is in two splits: "
        "fail, or leave it out and say so.",
    )

    @field_validator("label_names", mode="before")
    @classmethod
    def read_numbers(cls, value: Any) -> Any:
        """Labels that YAML reads as numbers are texts here, as in the data."""
        if not isinstance(value, dict):
            return value
        numbers = {key for key in value if isinstance(key, int | float) and not isinstance(key, bool)}
        return {str(key) if key in numbers else key: name for key, name in value.items()}

    @model_validator(mode="after")
    def check_names(self) -> Self:
        """A name says something, and two labels with one name would be one label."""
        if empty := [label for label, name in self.label_names.items() if not name.strip()]:
            raise ValueError(f"label_names gives {empty[0]!r} an empty name; leave it out, and it keeps its own")
        twice = [name for name, count in Counter(self.label_names.values()).items() if count > 1]
        if twice:
            labels = " and ".join(repr(label) for label, name in self.label_names.items() if name == twice[0])
            raise ValueError(
                f"label_names gives {labels} the same name {twice[0]!r}; expected a name of its own for each"
            )
        return self

    @model_validator(mode="after")
    def check_fractions(self) -> Self:
        """Something must be left to train on."""
        total = self.validation_fraction + self.calibration_fraction + self.test_fraction
        if total >= 1:
            raise ValueError(
                f"validation_fraction + calibration_fraction + test_fraction is {total:.2f}; "
                "it must be below 1 so that examples are left for train"
            )
        return self
