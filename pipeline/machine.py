"""What this machine is: versions, hardware, the device to train on. Standard library only, unless a GPU is there."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from models.errors import MissingCapabilityError
from models.runtimes.gpu import gpu_here, has_nvidia_driver

REPORTED_PACKAGES = (
    "torch", "torchvision", "timm", "transformers", "peft", "accelerate", "datasets", "onnx", "onnxscript",
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-nv-tensorrt-rtx-cu13", "optimum", "tensorrt-rtx-cu13", "tensorrt",
    "nvidia-modelopt", "numpy",
    "pillow", "tokenizers", "safetensors", "scikit-learn", "pydantic", "typer",
)  # fmt: skip


def resolve_device(asked: str) -> str:
    """`auto`, `cpu` or `cuda` → `cpu` or `cuda`.

    Raises:
        MissingCapabilityError: CUDA was asked for and is not usable.
    """
    if asked == "cpu" or (asked == "auto" and not has_nvidia_driver()):
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked == "auto":
        return "cpu"
    raise MissingCapabilityError(
        "device: cuda was asked for, but PyTorch sees no CUDA device here. "
        "Try `device: auto`, or look at `nvidia-smi`; the CUDA build comes with: pip install torch==2.13.0"
    )


def describe_hardware() -> dict[str, str | int]:
    """Processor, core count, memory in bytes, system; the GPU where there is one."""
    gpu = gpu_here()
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": processor_name(),
        "cores": os.cpu_count() or 0,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        **({"gpu": str(gpu), "gpu_memory_bytes": gpu.memory_bytes} if gpu else {}),
    }


def processor_name() -> str:
    """The processor's model name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
