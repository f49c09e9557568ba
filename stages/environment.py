"""What of this installation decides results: versions of libraries, the code itself; and where the user's cache is."""

from __future__ import annotations

import os
from functools import cache
from importlib import metadata
from pathlib import Path

from stages.artifact import digest_of, sha256_of_file

ROOT = Path(__file__).resolve().parent.parent

INSTALL_MODELOPT = (
    "pip install 'nvidia-modelopt>=0.47' 'onnx-graphsurgeon>=0.6.1' onnxslim onnxconverter-common lief cppimport"
)
"""ModelOpt bare and what its ONNX part imports: its own extra `onnx` holds ONNX Runtime at 1.24 and onnx at 1.21."""


def version_of(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions_of(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed versions of those of `packages` that are installed."""
    return {package: version for package in packages if (version := version_of(package))}


@cache
def digest_of_code(*folders: str) -> str:
    """Digest of the code in top-level folders, tables of it included: another version of it makes other results."""
    endings = ("*.py", "*.yaml")
    files = sorted(path for folder in folders for ending in endings for path in (ROOT / folder).rglob(ending))
    return digest_of({path.relative_to(ROOT).as_posix(): sha256_of_file(path) for path in files})


def user_cache() -> Path:
    """`$XDG_CACHE_HOME/adapt-to-edge`. What is in there only saves time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "adapt-to-edge"


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_threads() -> int:
    """Threads of training: one a core, at most OMP_NUM_THREADS where that is a number."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(usable_cores(), max(int(asked), 1)) if asked.isdecimal() else usable_cores()
