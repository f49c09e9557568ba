"""The run folder: held by one process at a time, and what the operating system refuses there said in words."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.errors import ConfigError, Problem, StageError
from pipeline import interrupts

LOCK = ".lock"
NEARLY_FULL_BYTES = 256 * 2**10
"""With less than this left, any failure is put down to the disk: onnx's shape inference writes half a file without a
word, and what reads it then says that it is corrupt (onnx 1.23)."""


@contextmanager
def lock_folder(run_dir: Path) -> Iterator[None]:
    """Hold the run folder for one process. The lock goes with the process, also after `kill -9`.

    Raises:
        ConfigError: another process holds it, or a file stands in its place.
    """
    from filelock import FileLock, Timeout

    with translated_system_errors("run", run_dir):
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            problem = Problem(str(run_dir), "a file is in the way of the run's folder", "name another --run-dir")
            raise ConfigError([problem]) from None
        lock = FileLock(run_dir / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                [
                    Problem(
                        str(run_dir), "another run is at work in this folder", "wait for it, or name another --run-dir"
                    )
                ]
            ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def translated_system_errors(stage: str, run_dir: Path) -> Iterator[None]:
    """Turn what the operating system refuses into an error with the next thing to try.

    Raises:
        StageError: a full disk, no permission, no memory, any other I/O error.
    """
    try:
        yield
    except MemoryError as error:
        raise StageError(f"{stage}: out of memory; try a smaller batch size or image size") from error
    except ConfigError:
        raise
    except Exception as error:
        if interrupts.asked():
            raise KeyboardInterrupt from error
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
            raise StageError(f"{stage}: out of memory on the GPU; try a smaller batch size or image size") from error
        free = shutil.disk_usage(run_dir if run_dir.exists() else Path.cwd()).free
        if is_full_disk(error) or free < NEARLY_FULL_BYTES:
            raise StageError(
                f"{stage}: the disk is full ({free / 1e6:.1f} MB free at {run_dir}); nothing was committed. "
                f"Free some space or name another --run-dir; the next run resumes here. What failed: {error}"
            ) from error
        if isinstance(error, OSError):
            raise StageError(f"{stage}: {os.strerror(error.errno) if error.errno else error}: {error}") from error
        raise


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or what it comes from, is a full disk: each library that writes has its own words for it.

    safetensors raises `SafetensorError` ("No space left on device"), torch.save `RuntimeError` ("file write
    failed"), numpy an `OSError` without a number ("… requested and … written").
    """
    while error is not None:
        words = str(error)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return True
        if "No space left on device" in words or "file write failed" in words:
            return True
        if " requested and " in words and " written" in words:
            return True
        error = error.__cause__ or error.__context__
    return False
