"""Ctrl-C and SIGTERM. What is between them and us may lose them or make another error of them: ask `asked`.

Seen: safetensors turned a KeyboardInterrupt inside of it into `ValueError: could not determine the shape of object`.
"""

from __future__ import annotations

import signal

_seen: list[int] = []


def asked() -> bool:
    """Whether somebody wanted this process to stop."""
    return bool(_seen)


def install() -> None:
    """Have both signals raise `KeyboardInterrupt`, and remember that they came."""

    def interrupt(number: int, _frame: object) -> None:
        _seen.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
