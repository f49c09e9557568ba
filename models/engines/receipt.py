"""What a device says of an engine: `receipt.json`, made of what the bundle's script left there.

The script (models/engines/script.py) runs trtexec on the golden inputs; here its outputs are compared with the golden
outputs, and every digest is taken. Numpy and the standard library only: this runs on the device.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import ConfigError, IntegrityError

if TYPE_CHECKING:
    import numpy as np

    from models.bundle import Bundle

RECEIPT_SCHEMA_VERSION = 1
PROOF_ENGINE, PROOF_NAME, PROOF_LOG, PROOF_DEVICE = "engine", "name.txt", "trtexec.log", "device.txt"
RUNS = ("golden", "first")
"""The runs of the script: all golden inputs at once, and the first alone (whose times are those of batch 1)."""


@dataclass(frozen=True)
class Receipt:
    """An engine on a device. Times in ms; `max_abs_error` against the golden outputs, which may differ by
    `tolerance`; digests are SHA-256."""

    bundle: str
    engine: str
    target: str
    engine_sha256: str
    onnx_sha256: str
    library_version: str
    device: str
    samples: int
    max_abs_error: float | None
    tolerance: float
    latency_ms_p50: float
    latency_ms_p95: float
    schema_version: int = RECEIPT_SCHEMA_VERSION

    @property
    def within(self) -> bool:
        """Whether the outputs are the golden ones, within their tolerance."""
        return self.max_abs_error is not None and self.max_abs_error <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def read_receipt(path: Path) -> Receipt:
    """A receipt from its file.

    Raises:
        ConfigError: there is no such file.
        IntegrityError: it is no receipt.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        receipt = Receipt(**value)
    except OSError as error:
        raise ConfigError(f"the receipt {path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise IntegrityError(f"{path} is no receipt of `pipeline verify`: {error}") from error
    if receipt.schema_version != RECEIPT_SCHEMA_VERSION:
        raise IntegrityError(f"{path} has schema version {receipt.schema_version}; {RECEIPT_SCHEMA_VERSION} is read")
    return receipt


def make_receipt(bundle: Bundle, proof: Path, target: str | None) -> Receipt:
    """The receipt of what the bundle's script left in `proof`.

    Raises:
        ConfigError: the folder is not the script's, or `target` is missing or not the engine's.
        IntegrityError: the engine is not the bundle's, or a file cannot be read as trtexec writes it.
    """
    name = read_text(proof / PROOF_NAME).strip()
    entries = {one["name"]: one for one in bundle.manifest.get("engines", [])}
    if name not in entries:
        raise ConfigError(f"{proof} is about the engine {name!r}; the bundle has {', '.join(entries) or 'none'}")
    entry = entries[name]
    targets = entry["targets"]
    if target is None and len(targets) == 1:
        target = targets[0]
    if target is None or target not in targets:
        raise ConfigError(f"say with --target which device this is; {name} is for {', '.join(targets)}")
    digest = sha256_of(proof / PROOF_ENGINE)
    if entry["sha256"] is not None and digest != entry["sha256"]:
        raise IntegrityError(f"{proof / PROOF_ENGINE} is not the bundle's {name}: its SHA-256 differs")
    model = bundle.manifest["models"][entry["candidate"]]
    wanted = bundle.golden_array(model["golden_outputs"])
    outputs = [one.name for one in bundle.io.outputs]
    errors = [error_of(read_outputs(proof / f"{run}.outputs.json", outputs), wanted) for run in RUNS]
    times = read_times(proof / "first.times.json")
    return Receipt(
        bundle=bundle.digest,
        engine=name,
        target=target,
        engine_sha256=digest,
        onnx_sha256=entry["onnx_sha256"],
        library_version=version_in(read_text(proof / PROOF_LOG)),
        device=" ".join(read_text(proof / PROOF_DEVICE).split()),
        samples=entry["golden_samples"],
        max_abs_error=max(errors) if all(map(math.isfinite, errors)) else None,
        tolerance=float(model["golden_tolerance"]),
        latency_ms_p50=quantile(times, 0.5),
        latency_ms_p95=quantile(times, 0.95),
    )


def error_of(found: np.ndarray, golden: np.ndarray) -> float:
    """The largest difference from the first golden outputs, NaN where it is none that can be compared."""
    import numpy as np

    wanted = golden[: len(found)]
    if found.shape != wanted.shape or not found.size:
        return math.nan
    return float(np.abs(found.astype("f8") - wanted).max())


def read_outputs(path: Path, names: Sequence[str]) -> np.ndarray:
    """float64 (batch, width): what `trtexec --exportOutput` wrote, side by side in the order of `names`.

    Raises:
        IntegrityError: it is not of that form, or an output is missing.
    """
    import numpy as np

    try:
        text = re.sub(r"-?\bnan\b", "NaN", re.sub(r"(-?)\binf\b", r"\1Infinity", read_text(path)))  # as C++ prints them
        found: Mapping[str, Any] = {one["name"]: one for one in json.loads(text)}
        arrays = []
        for name in names:
            shape = [int(size) for size in str(found[name]["dimensions"]).split("x")]
            arrays.append(np.array(found[name]["values"], np.float64).reshape(shape))
        return np.concatenate(arrays, axis=1)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path} is not what trtexec --exportOutput writes: {error!r}") from error


def read_times(path: Path) -> list[float]:
    """Milliseconds of each run, as `trtexec --exportTimes` wrote them. Raises `IntegrityError`."""
    try:
        times = [float(one["latencyMs"]) for one in json.loads(read_text(path))]
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} is not what trtexec --exportTimes writes: {error!r}") from error
    if not times or not all(map(math.isfinite, times)):
        raise IntegrityError(f"{path} holds no times")
    return times


def quantile(values: Sequence[float], share: float) -> float:
    """The value that so large a share of the values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def version_in(log: str) -> str:
    """`10.3.0` from trtexec's banner `[TensorRT v100300]`. Raises `IntegrityError` where there is none."""
    found = re.search(r"\[TensorRT[^\]]*? v(\d+)(\d\d)(\d\d)\]", log)
    if not found:
        raise IntegrityError("trtexec.log does not say which version of TensorRT ran")
    return ".".join(str(int(part)) for part in found.groups())


def read_text(path: Path) -> str:
    """A file of the script. Raises `ConfigError` where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read; name the folder that the bundle's script has filled") from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as hex. Raises `ConfigError` where there is none."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read; name the folder that the bundle's script has filled") from error
