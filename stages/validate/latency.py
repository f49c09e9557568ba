"""Latency and throughput of several runtimes, measured in turns so that a busy machine slows all alike."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

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


def measure_latency(
    runtimes: Mapping[str, Runtime],
    singles: Sequence[Mapping[str, np.ndarray]],
    batch: Mapping[str, np.ndarray],
    calls: int,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """`latency_ms_p50`, `latency_ms_p95` at batch 1 and `throughput_per_s` at the batch's size, per runtime.

    `calls` at batch 1 are timed for each, in `TURNS` turns; every runtime sees the same samples, and the
    order changes from turn to turn. Copies in and out count; preprocessing does not.
    """
    import numpy as np

    single_ms: dict[str, list[float]] = {name: [] for name in runtimes}
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
                single_ms[name] += timed_turn(runtimes[name], singles, turn_calls, turn * calls)
                batch_ms[name] += [timed_ms(runtimes[name], batch) for _ in range(BATCH_CALLS_PER_TURN)]
                advance()
    size = len(next(iter(batch.values())))
    return {
        name: {
            "latency_ms_p50": float(np.percentile(single_ms[name], 50)),
            "latency_ms_p95": float(np.percentile(single_ms[name], 95)),
            "throughput_per_s": size / float(np.median(batch_ms[name])) * 1000,
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
