"""Latency and throughput of several runtimes, measured in turns, with a look at what else the machine was doing.

Turns make a slow drift hit all alike, so ratios are taken turn by turn. What they cannot mend is a machine with
more to do than it has cores: PyTorch's threads wait for each other and become hundreds of times slower where
ONNX Runtime's do not. So the work of others is measured, and a report says when there was too much of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from models.runtimes.base import Runtime
    from stages.base import Progress

WARMUP = 5
TURNS = 10
SETTLE_CALLS = 2
"""Calls at the start of a turn that are not counted: the runtime before leaves its data in the caches, and its
threads spin for a while before they sleep."""

BATCH_CALLS_PER_TURN = 1

LATENCY_SAMPLES = 8
"""Different real samples that the timed calls take in turn."""

TIMES = ("latency_ms_p50", "latency_ms_p95", "throughput_per_s", "turns_ms")
"""The keys of a runtime's timings; None where there was no sample to run."""

SPARE_CORES = 0.25
"""Other processes may use this much more than the cores that are left over: the system itself needs a little."""


def measure_latency(
    runtimes: Mapping[str, Runtime],
    singles: Sequence[Mapping[str, np.ndarray]],
    batch: Mapping[str, np.ndarray],
    calls: int,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """`latency_ms_p50`, `latency_ms_p95` at batch 1 and `throughput_per_s` at the batch's size, per runtime, and
    `turns_ms`, the median of each turn.

    `calls` at batch 1 are timed for each, in `TURNS` turns; every runtime sees the same samples, and the
    order changes from turn to turn. Copies in and out count; preprocessing does not.
    """
    import numpy as np

    turns_ms: dict[str, list[list[float]]] = {name: [] for name in runtimes}
    batch_ms: dict[str, list[float]] = {name: [] for name in runtimes}
    for runtime in runtimes.values():
        for index in range(WARMUP):
            runtime.infer(singles[index % len(singles)])
        runtime.infer(batch)
    names = list(runtimes)
    with progress.task("latency", TURNS * len(names)) as advance:
        for turn in range(TURNS):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                turn_calls = calls // TURNS + (turn < calls % TURNS)
                turns_ms[name].append(timed_turn(runtimes[name], singles, turn_calls, turn * calls))
                batch_ms[name] += [timed_ms(runtimes[name], batch) for _ in range(BATCH_CALLS_PER_TURN)]
                advance()
    size = len(next(iter(batch.values())))
    return {
        name: {
            "latency_ms_p50": float(np.percentile(np.concatenate(turns_ms[name]), 50)),
            "latency_ms_p95": float(np.percentile(np.concatenate(turns_ms[name]), 95)),
            "throughput_per_s": size / float(np.median(batch_ms[name])) * 1000,
            "turns_ms": [float(np.median(turn)) for turn in turns_ms[name]],
        }
        for name in names
    }


def timed_turn(runtime: Runtime, singles: Sequence[Mapping[str, np.ndarray]], calls: int, offset: int) -> list[float]:
    """Milliseconds of `calls` calls, after the ones that settle the machine."""
    for index in range(SETTLE_CALLS):
        runtime.infer(singles[(offset + index) % len(singles)])
    return [timed_ms(runtime, singles[(offset + index) % len(singles)]) for index in range(calls)]


def timed_ms(runtime: Runtime, inputs: Mapping[str, np.ndarray]) -> float:
    """Wall time of one call in milliseconds."""
    started = time.perf_counter_ns()
    runtime.infer(inputs)
    return (time.perf_counter_ns() - started) / 1e6


def speedup_of(before_ms: Sequence[float], after_ms: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """How many times faster, turn by turn: the median of the ratios, and their second and last but one.

    Of ten turns those two enclose the median with 97.9 % confidence (order statistics: 1 − 2 · 11 / 2¹⁰).
    """
    import numpy as np

    ratios = sorted(before / after for before, after in zip(before_ms, after_ms, strict=True))
    return float(np.median(ratios)), (ratios[1], ratios[-2])


class OtherWork:
    """How many cores other processes kept busy between entry and exit (Linux; None elsewhere)."""

    def __init__(self) -> None:
        self.cores: float | None = None

    def __enter__(self) -> OtherWork:
        self.started = cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        ended = cpu_seconds()
        if self.started and ended and (elapsed := ended[2] - self.started[2]) > 0:
            busy, own = ended[0] - self.started[0], ended[1] - self.started[1]
            self.cores = max(0.0, (busy - own) / elapsed)


def cpu_seconds() -> tuple[float, float, float] | None:
    """(all cores busy, this process busy, wall time) in seconds, from proc(5); None where there is no such file."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields)
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    times = os.times()
    return busy, times.user + times.system, time.monotonic()


def is_disturbed(others: float | None, threads: int) -> bool:
    """Whether the threads of a runtime and the work of others were more than the machine has cores for."""
    return others is not None and others + threads > (os.cpu_count() or 1) + SPARE_CORES
