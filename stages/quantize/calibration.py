"""The range of every activation over the calibration split, batch by batch; ONNX Runtime collects, four ways to choose.

Memory does not grow with the data: of a batch either two numbers a tensor are kept (minmax) or its histogram (the
others), and the batch is let go before the next one is made.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.errors import QuantizeError
from models.onnx_files import is_light
from stages.quantize.qdq import QUANTIZED_OPS, quantizable_nodes

if TYPE_CHECKING:
    import numpy as np
    from onnxruntime.quantization.calibrate import TensorsData

Method = Literal["minmax", "entropy", "percentile", "mse"]

BATCH_SIZES: dict[Method, int] = {"minmax": 32, "entropy": 4, "percentile": 4, "mse": 4}
"""Examples in a batch. Histograms take every activation out of the graph at once; minmax does not."""

BINS = {"entropy": 512, "percentile": 2048, "mse": 2048}
"""Of a histogram at first; it widens where a later batch has larger values. The time of entropy is quadratic in it."""

ENTROPY_STEPS = 128
"""Of the histogram that entropy compares with the true one, as in TensorRT: the magnitudes of 8 bits with a sign."""

SHARES = 81
"""Ranges that mse tries, from the whole one down to a fifth of it."""


def calibrate_ranges(
    path: Path,
    scratch: Path,
    batches: Iterator[dict[str, np.ndarray]],
    advance: Callable[[], object],
    method: Method = "minmax",
    percentile: float = 99.999,
    symmetric: bool = False,
) -> TensorsData:
    """The range of every activation over all batches; calls `advance` after each.

    minmax: smallest and largest value. percentile: without the (100 − percentile) % at both ends. entropy: the range
    whose 8-bit histogram has the least KL divergence from the true one (Migacz 2017, "8-bit inference with TensorRT").
    mse: the range with the least squared rounding and clipping error (Wu et al. 2020, arXiv:2004.09602), `symmetric`
    as the quantizer will make it.

    Raises:
        QuantizeError: there is no batch, or an activation overflows.
    """
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime has no types
        def __init__(self, batch: dict[str, np.ndarray]) -> None:
            self.left = [batch]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    with contextlib.redirect_stdout(io.StringIO()):  # its histograms print what they do
        calibrator = calibrator_of(path, scratch / "calibration.onnx", method, percentile)
        found = 0
        for batch in batches:
            calibrator.collect_data(Reader(batch))
            found += 1
            advance()
        if not found:
            raise QuantizeError("the calibration split is empty; raise data.calibration_fraction")
        if method == "entropy":
            merge_bins(calibrator.collector.histogram_dict, BINS[method])
        ranges = ranges_of_least_error(calibrator, symmetric) if method == "mse" else calibrator.compute_data()
    for name, one in ranges.items():
        bounds = one.lowest.item(), one.highest.item()
        if not all(map(math.isfinite, bounds)):
            raise QuantizeError(f"calibration met {bounds} in {name}: the network overflows on real data")
    return ranges


def calibrator_of(path: Path, augmented: Path, method: Method, percentile: float) -> Any:
    """ONNX Runtime's calibrator of a file, as its `create_calibrator` makes it, on what can be quantized only.

    By operator type alone it would take every addition: that of a transformer's mask holds -3.4e38, which no histogram
    has room for.
    """
    import onnx
    from onnxruntime.quantization.calibrate import EntropyCalibrater, MinMaxCalibrater, PercentileCalibrater

    bins = {"num_bins": BINS[method]} if method in BINS else {}
    make: dict[Method, Callable[..., Any]] = {
        "minmax": MinMaxCalibrater,
        "entropy": partial(EntropyCalibrater, num_quantized_bins=ENTROPY_STEPS),
        "percentile": partial(PercentileCalibrater, percentile=percentile),
        "mse": PercentileCalibrater,  # only its histograms are used
    }
    calibrator = make[method](path, QUANTIZED_OPS, str(augmented), **bins)
    graph = onnx.load(str(path), load_external_data=False)
    if is_light(graph):
        calibrator.model = graph  # in place of the whole one; its shapes are inferred already
    nodes = quantizable_nodes(calibrator.model, "onnxruntime")
    wanted = {name for node in nodes for name in (*node.input, *node.output)}
    tensors, infos = calibrator.select_tensors_to_calibrate(calibrator.model)
    calibrator.select_tensors_to_calibrate = lambda _: (tensors & wanted, infos)
    calibrator.augment_graph()
    calibrator.create_inference_session()
    return calibrator


def merge_bins(histograms: dict[str, Any], most: int) -> None:
    """At most about `most` bins a histogram, in place: an outlier in a late batch gives it a hundred times as many."""
    import numpy as np

    for name, (counts, edges, *rest) in histograms.items():
        factor = -(-len(counts) // most)
        if factor > 1:
            margin = -len(counts) % (2 * factor) // 2  # symmetric about zero, before and after
            width = edges[1] - edges[0]
            merged = np.pad(counts, margin).reshape(-1, factor).sum(1)
            end = edges[-1] + margin * width
            histograms[name] = (merged, np.linspace(-end, end, len(merged) + 1, dtype=edges.dtype), *rest)


def ranges_of_least_error(calibrator: Any, symmetric: bool) -> TensorsData:
    """The ranges of mse, from the histograms that ONNX Runtime has collected."""
    import numpy as np
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import TensorsData

    ranges = {}
    for name, (counts, edges, lowest, highest, _) in calibrator.collector.get_histogram_dict().items():
        bounds = least_error(counts, edges, float(lowest), float(highest), symmetric)
        ranges[name] = tuple(np.array(bound, np.float32) for bound in bounds)
    return TensorsData(CalibrationMethod.MinMax, ranges)


def least_error(
    counts: np.ndarray, edges: np.ndarray, lowest: float, highest: float, symmetric: bool
) -> tuple[float, float]:
    """The share of a range, widened to hold zero, whose 256 steps have the least squared error over a histogram."""
    import numpy as np

    centres = (edges[1:] + edges[:-1]) / 2.0
    low, high = min(lowest, 0.0), max(highest, 0.0)
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    best, least = (low, high), math.inf
    for share in np.linspace(1.0, 0.2, SHARES) if high > low else ():
        step = share * (high - low) / 255
        rounded = np.clip(np.round(centres / step), round(low * share / step), round(high * share / step)) * step
        error = float((counts * np.square(rounded - centres)).sum())
        if error < least:
            best, least = (float(low * share), float(high * share)), error
    return best
