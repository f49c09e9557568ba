"""How much memory this process takes and has taken (Linux: proc(5); elsewhere the peak alone, by getrusage(2))."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Literal


def memory_of_process(field: Literal["VmRSS", "VmHWM"]) -> int | None:
    """`VmRSS` (now) or `VmHWM` (the peak since the start, or the last reset) of this process, in bytes; None without
    /proc."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def peak_memory_bytes() -> int:
    """Peak resident memory of this process since the start, or the last reset. What getrusage(2) says in the place of
    /proc knows no reset, and on Linux starts at the size of the process that made this one."""
    unit = 1 if sys.platform == "darwin" else 1024
    return memory_of_process("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory() -> None:
    """Start measuring the peak memory of this process anew (Linux: proc(5), clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # elsewhere the peak is that of the whole process so far
