"""Features of a frozen backbone: computed once, kept in the user's cache under the digest of all that makes them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import TrainingError
from models.spec import ModelSpec
from stages.artifact import digest_of
from stages.base import NETWORK_PACKAGES, PROCESSING_PACKAGES
from stages.environment import digest_of_code, user_cache, versions_of
from stages.inputs import batches

if TYPE_CHECKING:
    import numpy as np

    from models.classifier import Classifier
    from models.modalities import Processing
    from stages.base import Progress
    from stages.data.splits import Example

BATCH = 32
MAX_CACHE_BYTES = 4 << 30
"""What was not used for longest is removed above this."""


def features_key(weights: Sequence[str], spec: ModelSpec, processing: Processing, device: str) -> str:
    """Digest of all but the examples that makes features: weights, architecture, preprocessing, code, libraries.

    `weights` are the digests of all that the backbone's weights come from.
    """
    return digest_of(
        {
            "weights": list(weights),
            "architecture": spec.architecture,
            "processing": repr(processing),
            "device": device,
            "packages": versions_of((*NETWORK_PACKAGES, *PROCESSING_PACKAGES)),
            "code": digest_of_code("models"),
        }
    )


def compute_features(
    model: Classifier,
    processing: Processing,
    examples: Sequence[Example],
    key: str,
    device: str,
    progress: Progress,
    description: str = "features",
) -> np.ndarray:
    """float32 (examples, features) of the frozen backbone: one forward pass an example, or none where the cache has
    them. `key` is `features_key`. Moves `model` to `device`, in eval mode.

    Raises:
        TrainingError: a feature is NaN or infinite.
    """
    import numpy as np
    import torch

    file = user_cache() / "features" / f"{digest_of([key, *(example.digest for example in examples)])}.safetensors"
    stored = read_cached(file, len(examples))
    if stored is not None:
        return stored
    model = model.to(device).eval()
    parts = []
    with progress.task(description, len(examples)) as advance, torch.inference_mode():
        for arrays, count in batches(processing, examples, BATCH):
            inputs = [torch.from_numpy(arrays[spec.name]).to(device) for spec in processing.inputs]
            parts.append(model.features(*inputs).float().cpu().numpy())
            advance(count)
    features = np.concatenate(parts)
    if not np.isfinite(features).all():
        raise TrainingError("the frozen backbone gives NaN or infinite features; its weights or the inputs are broken")
    write_cached(file, features)
    return features


def read_cached(file: Path, examples: int) -> np.ndarray | None:
    """The features in a file of the cache; None where it is missing, damaged, or not for so many examples."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as stored:
            features: np.ndarray = stored.get_tensor("features")
            digest = (stored.metadata() or {}).get("sha256")
        file.touch()
    except (OSError, SafetensorError):
        return None
    whole = digest == hashlib.sha256(features.tobytes()).hexdigest()
    return features if whole and features.ndim == 2 and len(features) == examples else None


def write_cached(file: Path, features: np.ndarray) -> None:
    """Keep features by one rename. The cache only saves time: not being able to write it changes no result."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": features}, temporary, {"sha256": hashlib.sha256(features.tobytes()).hexdigest()})
        temporary.replace(file)
        remove_oldest(file.parent)
    except (OSError, SafetensorError):
        with suppress(OSError):
            temporary.unlink()


def remove_oldest(folder: Path, limit: int = MAX_CACHE_BYTES) -> None:
    """Remove the files used longest ago until `limit` bytes are left."""
    files = sorted(((one.stat(), one) for one in folder.iterdir()), key=lambda item: item[0].st_mtime, reverse=True)
    total = 0
    for stat, one in files:
        total += stat.st_size
        if total > limit:
            one.unlink(missing_ok=True)
