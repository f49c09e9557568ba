"""Progress on standard error: bars on a terminal, a line now and then elsewhere, nothing when quiet."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from stages.base import Advance

LINE_EVERY_S = 15.0


class QuietProgress:
    """Says nothing."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """See `stages.base.Progress`."""
        yield lambda steps=1: None


class BarProgress:
    """A rich progress bar with the time left."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """See `stages.base.Progress`."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as bars:
            bar = bars.add_task(description, total=total)
            yield lambda steps=1: bars.advance(bar, steps)


class LineProgress:
    """One line every `LINE_EVERY_S` seconds, for logs."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """See `stages.base.Progress`."""
        started = last = time.monotonic()
        done = 0

        def advance(steps: int = 1) -> None:
            nonlocal done, last
            done += steps
            now = time.monotonic()
            if now - last >= LINE_EVERY_S and 0 < done < total:
                last = now
                left_s = (now - started) / done * (total - done)
                self.console.print(f"  {description}: {done}/{total}, about {left_s:.0f} s left", highlight=False)

        yield advance
