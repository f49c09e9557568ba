"""The GPU of this machine, as PyTorch sees it. PyTorch is imported only where a driver is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Gpu:
    """`compute_capability` as NVIDIA writes it ("8.6"); memory in bytes."""

    name: str
    compute_capability: str
    memory_bytes: int

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability})"


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver is loaded here (a cheap look, also under WSL; no library is imported)."""
    return any(Path(path).exists() for path in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg"))


def gpu_here() -> Gpu | None:
    """The first GPU that PyTorch can use, or None, also where there is no PyTorch that works."""
    if not has_nvidia_driver():
        return None
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return Gpu(found.name, f"{found.major}.{found.minor}", found.total_memory)
