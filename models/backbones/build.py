"""Backbones in memory: built from a stored architecture, measured, and looked through for broken weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.errors import ModelError

if TYPE_CHECKING:
    import torch

    from models.modalities import Processing


@dataclass(frozen=True)
class LoadedBackbone:
    """A backbone in memory. `module.forward(*inputs)` gives float32 (batch, feature_dim). `head`: the state of its own
    projections, where it has some (see `models.classifier.PairHead`)."""

    module: torch.nn.Module
    feature_dim: int
    architecture: dict[str, Any]
    processing: Processing
    head: dict[str, torch.Tensor] | None = None


def build_backbone(architecture: dict[str, Any]) -> torch.nn.Module:
    """The module with random weights, from the architecture stored in a checkpoint. Needs no network.

    Raises:
        ModelError: the architecture is of an unknown library, or not complete.
    """
    from models.backbones.from_hf import build_hf
    from models.backbones.from_timm import make_module

    try:
        if architecture.get("library") == "timm":
            name, arguments = architecture["name"], architecture["arguments"]
            return make_module(name, arguments, architecture["mean"], architecture["std"])
        if architecture.get("library") == "hf":
            return build_hf(architecture)
        if architecture.get("library") == "dual":
            from models.backbones.dual import build_dual

            return build_dual(architecture)
        if architecture.get("library") == "mapped":
            from models.backbones.mapped import build_mapped

            return build_mapped(architecture)
    except KeyError as error:
        raise ModelError(f"the stored architecture has no {error}; it was not written by this project") from error
    raise ModelError(f"unknown library {architecture.get('library')!r}; expected timm, hf, dual or mapped")


def measure_feature_dim(module: torch.nn.Module, processing: Processing) -> int:
    """The width of the features, measured on two made-up inputs."""
    import torch

    arrays = processing.arrays(processing.examples())
    module.eval()
    try:
        with torch.inference_mode():
            features = module(*(torch.from_numpy(arrays[tensor.name]) for tensor in processing.inputs))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, AssertionError) as error:
        names = ", ".join(f"{tensor.name} {tensor.dims}" for tensor in processing.inputs)
        raise ModelError(
            f"the backbone does not run on {names}: {error}; expected a plain encoder and a size that it takes"
        ) from error
    if features.dim() != 2:
        raise ModelError(f"the backbone gave features of shape {tuple(features.shape)}; expected (batch, features)")
    return int(features.shape[1])


def check_finite(module: torch.nn.Module, name: str) -> None:
    """Raises `ModelError` naming the first weight that holds NaN or infinity.

    A buffer may hold infinity: bounds that clip nothing (gemma4_vit) are no damage, but batch norm's statistics are.
    """
    import torch

    learned = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for key, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        statistics = key.rpartition(".")[2] in ("running_mean", "running_var")
        broken = ~torch.isfinite(tensor) if key in learned or statistics else torch.isnan(tensor)
        if bool(broken.any()):
            raise ModelError(f"{name}: the weight {key} holds NaN or infinity; damaged file, or diverged training?")
