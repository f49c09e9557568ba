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

from stages.statistics import bound_rank

if TYPE_CHECKING:
    import numpy as np

    from models.runtimes.base import Runtime
    from stages.base import Progress

WARMUP_WINDOW, WARMUP_WINDOWS, WARMUP_SECONDS = 5, 6, 1.0
"""Calls of a window of the warm-up, and the most windows and seconds that it may take."""
SETTLED = 0.1
"""The warm-up ends where the medians of two windows in a row differ by no more than this share of the earlier one."""
TURNS = 10
SETTLE_CALLS = 2
"""Calls at the start of a turn that are not counted: the runtime before leaves its data in the caches, and its
threads spin for a while before they sleep."""

BATCH_CALLS_PER_TURN = 1

LATENCY_SAMPLES = 8
"""Different real samples that the timed calls take in turn."""

PERCENTILES = (50, 90, 95, 99)

TIMES = (
    *(f"latency_ms_p{one}" for one in PERCENTILES), "latency_bounds_ms", "latency_calls", "warmup_calls", "warm",
    "throughput_per_s", "turns_ms", "timed_difference", "timed_problem",
)  # fmt: skip
"""The keys of a runtime's timings; None where there was no sample to run."""

SPARE_CORES = 0.25
"""Other processes may use this much more than the cores that are left over: the system itself needs a little."""


def measure_latency(
    runtimes: Mapping[str, Runtime],
    singles: Sequence[Mapping[str, np.ndarray]],
    batch: Mapping[str, np.ndarray],
    calls: int,
    progress: Progress,
    earlier: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Per runtime, single-stream (one example a call, one call after the other): `latency_ms_p50` … `p99`, by
    percentile `latency_bounds_ms` (the upper bound at 99 % confidence of `bound_rank`, None where the calls are too
    few) and `turns_ms`, the median of each turn. Offline: `throughput_per_s` at the batch's size.

    `calls` at batch 1 are timed for each, in `TURNS` turns; every runtime sees the same samples, and the
    order changes from turn to turn. Copies in and out count; preprocessing does not. Before, each is warmed up until
    its times settle (`warm`: they did).

    What the timed calls answer is compared with what the runtime said before it was timed: of the batch with `earlier`
    (runtime → output → array), where it is there. `timed_difference` is the largest difference of any timed call, as a
    share of the range of the outputs of the batch; None where an answer is no number or has another shape, and
    `timed_problem` says so.
    """
    import numpy as np

    turns_ms: dict[str, list[list[float]]] = {name: [] for name in runtimes}
    batch_ms: dict[str, list[float]] = {name: [] for name in runtimes}
    warmed: dict[str, dict[str, Any]] = {}
    answers: dict[str, Answers] = {}
    for name, runtime in runtimes.items():
        warmed[name], before = warm_up(runtime, singles)
        first = runtime.infer(batch)
        known = (earlier or {}).get(name)
        answers[name] = Answers([*before, dict(first if known is None else known)])
        answers[name].add(len(singles), first)
    names = list(runtimes)
    with progress.task("latency", TURNS * len(names)) as advance:
        for turn in range(TURNS):
            first_name = turn % len(names)
            for name in names[first_name:] + names[:first_name]:
                turn_calls = calls // TURNS + (turn < calls % TURNS)
                given: list[tuple[int, Mapping[str, np.ndarray]]] = []
                turns_ms[name].append(timed_turn(runtimes[name], singles, turn_calls, turn * calls, given))
                for _ in range(BATCH_CALLS_PER_TURN):
                    spent, found = timed_call(runtimes[name], batch)
                    batch_ms[name].append(spent)
                    given.append((len(singles), found))
                for index, found in given:
                    answers[name].add(index, found)
                advance()
    size = len(next(iter(batch.values())))
    return {
        name: {
            **percentiles_of([spent for turn_ms in turns_ms[name] for spent in turn_ms]),
            **warmed[name],
            "throughput_per_s": size / float(np.median(batch_ms[name])) * 1000,
            "turns_ms": [float(np.median(turn_ms)) for turn_ms in turns_ms[name]],
            "timed_difference": None if answers[name].problem else answers[name].largest,
            "timed_problem": answers[name].problem,
        }
        for name in names
    }


def percentiles_of(times_ms: Sequence[float]) -> dict[str, Any]:
    """The percentiles of single calls, their upper bounds, and how many calls they are of."""
    import numpy as np

    found: dict[str, Any] = {f"latency_ms_p{one}": float(np.percentile(times_ms, one)) for one in PERCENTILES}
    ranks = {one: bound_rank(len(times_ms), one / 100) for one in PERCENTILES}
    ordered = sorted(times_ms)
    found["latency_bounds_ms"] = {
        f"p{one}": float(ordered[rank - 1]) if rank is not None else None for one, rank in ranks.items()
    }
    return {**found, "latency_calls": len(times_ms)}


def warm_up(
    runtime: Runtime, singles: Sequence[Mapping[str, np.ndarray]]
) -> tuple[dict[str, Any], list[Mapping[str, np.ndarray]]]:
    """Call until the median of a window of `WARMUP_WINDOW` calls is within `SETTLED` of that of the one before, or the
    limits are reached; (`warmup_calls` and `warm`, the outputs of each of `singles`)."""
    import numpy as np

    outputs: list[Mapping[str, np.ndarray]] = []
    times: list[float] = []
    warm, started = False, time.monotonic()
    while not warm or len(outputs) < len(singles):
        spent, found = timed_call(runtime, singles[len(times) % len(singles)])
        times.append(spent)
        if len(outputs) < len(singles):
            outputs.append(found)
        if len(times) >= 2 * WARMUP_WINDOW and len(times) % WARMUP_WINDOW == 0:
            before, after = (np.median(part) for part in np.split(np.array(times[-2 * WARMUP_WINDOW :]), 2))
            warm = bool(abs(after - before) <= SETTLED * before)
        long = len(times) >= WARMUP_WINDOW * WARMUP_WINDOWS or time.monotonic() - started > WARMUP_SECONDS
        if long and len(outputs) == len(singles):
            break
    return {"warmup_calls": len(times), "warm": warm}, outputs


class Answers:
    """Outputs of timed calls against those of the same inputs before. `expected`: those of each single, then those of
    the batch, by whose range differences are measured."""

    def __init__(self, expected: Sequence[Mapping[str, np.ndarray]]) -> None:
        import numpy as np

        self.expected, self.largest, self.problem = expected, 0.0, ""
        values = np.concatenate([np.asarray(one, np.float64).ravel() for one in expected[-1].values()])
        finite = values[np.isfinite(values)]
        spread = float(np.ptp(finite)) if finite.size else 0.0
        self.scale = spread or (float(np.abs(finite).max()) if finite.size else 0.0) or 1.0

    def add(self, index: int, found: Mapping[str, np.ndarray]) -> None:
        """The outputs of a call on the inputs at a place of `expected`."""
        import numpy as np

        for name, wanted in self.expected[index].items():
            if name not in found or found[name].shape != wanted.shape:
                shape = found[name].shape if name in found else None
                self.problem = self.problem or f"{name} had shape {wanted.shape} before, and {shape} while timed"
                continue
            difference = np.abs(np.asarray(found[name], np.float64) - wanted)
            if not np.isfinite(difference).all():
                self.problem = self.problem or f"{name} has values that are NaN or infinite"
                continue
            self.largest = max(self.largest, float(difference.max(initial=0.0)) / self.scale)


def timed_turn(
    runtime: Runtime,
    singles: Sequence[Mapping[str, np.ndarray]],
    calls: int,
    offset: int,
    given: list[tuple[int, Mapping[str, np.ndarray]]] | None = None,
) -> list[float]:
    """Milliseconds of `calls` calls, after the ones that settle the machine. `given` gets (place in `singles`, outputs)
    of each."""
    for index in range(SETTLE_CALLS):
        runtime.infer(singles[(offset + index) % len(singles)])
    times = []
    for index in range(calls):
        place = (offset + index) % len(singles)
        spent, found = timed_call(runtime, singles[place])
        times.append(spent)
        if given is not None:
            given.append((place, found))
    return times


def timed_call(runtime: Runtime, inputs: Mapping[str, np.ndarray]) -> tuple[float, Mapping[str, np.ndarray]]:
    """(wall time of one call in milliseconds, its outputs)."""
    started = time.perf_counter_ns()
    found = runtime.infer(inputs)
    return (time.perf_counter_ns() - started) / 1e6, found


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
