"""Feature extraction: features computed once, a linear probe on them, folded exactly into the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import TrainingError
from stages.artifact import digest_of
from stages.inputs import batches

if TYPE_CHECKING:
    import numpy as np

    from models.classifier import Classifier
    from models.modalities import Processing
    from stages.base import StageContext
    from stages.data.splits import Example

REGULARIZATIONS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Inverse strengths C tried for the probe, on standardised features."""


@dataclass(frozen=True)
class Probe:
    """`weight`: float32 (classes, features); `bias`: float32 (classes,). Works on raw features."""

    weight: np.ndarray
    bias: np.ndarray
    regularization: float
    validation_accuracy: float
    table: list[dict[str, float]]


def compute_features(
    model: Classifier, processing: Processing, examples: Sequence[Example], context: StageContext, key: str
) -> np.ndarray:
    """float32 (examples, features): one forward pass each, kept in `context.resume` under the content's digest."""
    import numpy as np
    import torch

    digests = digest_of([key, *(example.digest for example in examples)])
    file: Path = context.resume / f"features-{digests[:16]}.npy"
    if file.is_file():
        stored: np.ndarray = np.load(file, allow_pickle=False)
        if stored.shape[0] == len(examples):
            return stored
    model = model.to(context.device).eval()
    parts = []
    with context.progress.task("features", len(examples)) as advance, torch.inference_mode():
        for arrays, labels in batches(processing, examples, 32):
            inputs = [torch.from_numpy(arrays[spec.name]).to(context.device) for spec in processing.inputs]
            parts.append(model.features(*inputs).float().cpu().numpy())
            advance(len(labels))
    features = np.concatenate(parts)
    if not np.isfinite(features).all():
        raise TrainingError("the frozen backbone gives NaN or infinite features; its weights or the inputs are broken")
    temporary = file.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        np.save(stream, features, allow_pickle=False)
    temporary.replace(file)
    return features


def fit_probe(
    train: np.ndarray, train_labels: np.ndarray, validation: np.ndarray, validation_labels: np.ndarray, classes: int
) -> Probe:
    """Multinomial logistic regression, C chosen on the validation split, scaler folded into the weights.

    `train`, `validation`: float32 (examples, features); their labels int64 (examples,). Every class is in
    `train_labels`; `validation_labels` may lack some.

    C is chosen by log loss: by accuracy it picks overconfident heads, which leave training no gradient.
    Accuracy and loss are those of the folded head, so they are what the network itself will give.

    With x' = (x − μ)/σ and logits W x' + b, the same logits on raw x are (W/σ) x + (b − W μ/σ).
    """
    import warnings

    import numpy as np
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, deviation = train.mean(0), train.std(0)
    deviation = np.where(deviation < 1e-6, 1.0, deviation)
    best: Probe | None = None
    table = []
    for regularization in REGULARIZATIONS:
        regression = LogisticRegression(C=regularization, max_iter=300)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            regression.fit((train - mean) / deviation, train_labels)
        weight, bias = full_coefficients(regression, classes)
        scaled = weight / deviation
        folded = scaled.astype(np.float32), (bias - scaled @ mean).astype(np.float32)
        accuracy, loss = score_head(*folded, validation, validation_labels)
        table.append({"regularization": regularization, "validation_accuracy": accuracy, "validation_loss": loss})
        if loss <= min(entry["validation_loss"] for entry in table):
            best = Probe(*folded, regularization, accuracy, table)
    assert best is not None
    return best


def score_head(weight: np.ndarray, bias: np.ndarray, features: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Accuracy and mean cross-entropy (nats) of a linear head."""
    from scipy.special import log_softmax

    logits = features @ weight.T + bias
    chosen = log_softmax(logits, axis=1)[range(len(labels)), labels]
    return float((logits.argmax(1) == labels).mean()), float(-chosen.mean())


def full_coefficients(regression: object, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(classes, features) and (classes,): two classes have one row in scikit-learn, the logit of class 1."""
    import numpy as np

    weight, bias = regression.coef_, regression.intercept_  # type: ignore[attr-defined]
    if weight.shape[0] == classes:
        return weight, bias
    return np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])


def put_into_head(model: Classifier, probe: Probe) -> None:
    """Copy the probe into the network's head."""
    import torch

    with torch.no_grad():
        model.task_head.weight.copy_(torch.from_numpy(probe.weight))
        model.task_head.bias.copy_(torch.from_numpy(probe.bias))
