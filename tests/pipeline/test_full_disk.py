"""A disk that is really full, at growing sizes: exit code 4, nothing torn, and the next run resumes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError

from models.errors import StageError, TrainingError
from pipeline.folder import is_full_disk, translated_system_errors
from tests.pipeline.test_tiny_run import check_no_torn_artifact
from tests.pipeline.tiny_project import make_project, pipeline


def errors() -> Iterator[Exception]:
    """What the libraries raise when a write fails."""
    yield OSError(28, "No space left on device")
    yield OSError("129280 requested and 65504 written")  # numpy
    yield SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    try:
        raise RuntimeError(
            "[enforce fail at inline_container.cc:668] . unexpected pos; file write failed"
        )  # torch.save
    except RuntimeError as error:
        wrapped = TrainingError("training stopped")
        wrapped.__cause__ = error
        yield wrapped


@pytest.mark.parametrize("error", list(errors()), ids=lambda error: type(error).__name__)
def test_every_librarys_words_for_a_full_disk_are_known(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"export: the disk is full .* the next run resumes"), \
         translated_system_errors("export", tmp_path):  # fmt: skip
        raise error


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    assert not is_full_disk(OSError(13, "Permission denied"))
    with pytest.raises(StageError, match="Permission denied"), translated_system_errors("export", tmp_path):
        raise OSError(13, "Permission denied")
    with pytest.raises(ZeroDivisionError), translated_system_errors("export", tmp_path):
        raise ZeroDivisionError


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 100 kB large at first."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or resize(disk, 100):
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def resize(disk: Path, kilobytes: int) -> int:
    """Mount it, or change its size; mount's exit code."""
    options = f"size={kilobytes}k" + (",remount" if os.path.ismount(disk) else "")
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True).returncode


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_disk_that_fills_up_in_any_stage(small_disk: Path, tmp_path: Path) -> None:
    project = make_project(tmp_path)
    (project / "runs").symlink_to(small_disk)
    failed_in = set()
    for kilobytes in (100, 1_300, 2_600, 50_000):
        assert resize(small_disk, kilobytes) == 0
        done = pipeline("all", cwd=project)
        if done.returncode == 0:
            break
        assert done.returncode == 4, done.stderr[-2000:]
        assert "the disk is full" in done.stderr and "Traceback" not in done.stderr, done.stderr[-3000:]
        failed_in.add(done.stderr.rpartition("\nerror: ")[2].split(":")[0])
        check_no_torn_artifact(project)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(failed_in) >= 2, failed_in
    assert pipeline("verify", "runs/pipeline/package/bundle", cwd=project).returncode == 0
