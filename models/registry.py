"""Backbone ids: `timm:<name>`, `hf:<org>/<repo>@<revision>`, or a local folder.

`resolve` touches neither the network nor torch; `load_backbone` does.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.backbones.packaged import find_packaged
from models.errors import ConfigError, ModelError, Problem
from models.modalities import MODALITY_OF_TASK
from models.spec import BackboneSpec, Task

if TYPE_CHECKING:
    import torch

    from models.modalities import Processing

PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")


@dataclass(frozen=True)
class LoadedBackbone:
    """A backbone in memory. `module.forward(*inputs)` gives float32 (batch, feature_dim)."""

    module: torch.nn.Module
    feature_dim: int
    architecture: dict[str, Any]
    processing: Processing


def resolve(backbone_id: str) -> BackboneSpec:
    """Where a backbone comes from.

    Raises:
        ConfigError: no known prefix and no folder, an unknown name (with near ones), or a folder that
            cannot be used.
    """
    prefix, colon, name = backbone_id.partition(":")
    if colon and prefix == "timm":
        return resolve_timm(backbone_id, name)
    if colon and prefix == "hf":
        return resolve_hf(backbone_id, name)
    folder = Path(backbone_id).expanduser()
    if folder.is_dir():
        return resolve_folder(backbone_id, folder)
    hint = "expected timm:<name>, hf:<org>/<repo>@<revision> or a local folder"
    bare = name or prefix
    if "/" in bare and not bare.startswith((".", "/")):
        hint += f"; for the hub write hf:{bare}"
    elif bare.split(".")[0] in timm_names():
        hint += f"; for timm write timm:{bare}"
    raise ConfigError([Problem("backbone", f"{backbone_id!r} has no known prefix and is no folder", hint)])


def resolve_timm(backbone_id: str, name: str) -> BackboneSpec:
    """A network of timm; its weights come from an installed package or the hub."""
    packaged = find_packaged(backbone_id)
    if packaged:
        entry, path, version = packaged
        weights = f"package {entry.distribution}=={version}"
        return BackboneSpec(backbone_id, "timm", name, None, None, weights, digest_of_file(path))
    known = timm_names()
    bare = name.split(".")[0]
    if bare not in known:
        near = difflib.get_close_matches(bare, sorted(known), 3, 0.6)
        hint = f"near names: {', '.join(f'timm:{one}' for one in near)}" if near else "see timm.list_models()"
        raise ConfigError([Problem("backbone", f"timm has no network {bare!r}", hint)])
    return BackboneSpec(backbone_id, "timm", name, None, None, "hub", f"timm:{name}")


def resolve_hf(backbone_id: str, name: str) -> BackboneSpec:
    """A repository of the hub; a packaged copy is used where one is installed."""
    repository, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository):
        raise ConfigError([Problem("backbone", f"{name!r} is no repository", "expected hf:<org>/<repo>@<revision>")])
    packaged = find_packaged(backbone_id)
    if packaged:
        entry, path, version = packaged
        weights = f"package {entry.distribution}=={version}"
        return BackboneSpec(backbone_id, "hf", repository, None, str(path.parent), weights, digest_of_file(path))
    commit = revision or cached_commit(repository)
    return BackboneSpec(backbone_id, "hf", repository, commit, None, f"hub @{commit or 'main'}", commit or "main")


def resolve_folder(backbone_id: str, folder: Path) -> BackboneSpec:
    """A Hugging Face folder, or a checkpoint of this project; safetensors only.

    Raises:
        ConfigError: there is no config.json or model.json, or only pickles.
    """
    weights = sorted(folder.glob("*.safetensors"))
    own = (folder / "model.json").is_file()
    problem = hint = ""
    if not own and not (folder / "config.json").is_file():
        problem, hint = "holds no config.json", "expected a Hugging Face folder or a checkpoint of this project"
    elif not weights:
        pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES]
        problem = f"holds no safetensors{f', only {pickles[0]}' if pickles else ''}"
        hint = "pickles can run code and are never read; convert with safetensors.torch.save_file"
    elif not own:
        try:
            if "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
                problem, hint = "asks for code of its own (auto_map)", "trust_remote_code is off"
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            problem, hint = f"config.json is no JSON: {error}", "download the folder again"
    if problem:
        raise ConfigError([Problem("backbone", f"{backbone_id}: {problem}", hint)])
    library: Literal["timm", "hf"] = library_of_checkpoint(backbone_id, folder) if own else "hf"
    names = [*weights, *sorted(folder.glob("*.json"))]
    digest = hashlib.sha256("".join(digest_of_file(path) for path in names).encode()).hexdigest()
    return BackboneSpec(backbone_id, library, folder.name, None, str(folder.resolve()), "folder", digest)


def library_of_checkpoint(backbone_id: str, folder: Path) -> Literal["timm", "hf"]:
    """The library of the backbone in a checkpoint of this project. Raises `ConfigError`."""
    from models.checkpoint import load_spec

    try:
        return load_spec(folder).backbone.library
    except ModelError as error:
        hint = "expected a checkpoint of this project"
        raise ConfigError([Problem("backbone", f"{backbone_id}: {error}", hint)]) from error


def load_backbone(
    spec: BackboneSpec, task: Task, image_size: int | None, max_length: int | None, pretrained: bool = True
) -> LoadedBackbone:
    """Build the backbone for a task, with its weights unless `pretrained` is False (the scratch baseline).

    Raises:
        ModelError: the weights do not fit or hold NaN.
        MissingCapabilityError: the weights cannot be had on this machine.
    """
    from models.backbones.from_hf import load_hf
    from models.backbones.from_timm import load_timm

    modality = MODALITY_OF_TASK[task]
    if spec.folder and (Path(spec.folder) / "model.json").is_file():
        return from_own_checkpoint(spec, modality, image_size, pretrained)
    if spec.library == "timm":
        if modality != "image":
            found = f"{spec.id} takes images, the task is {task}"
            raise ConfigError([Problem("backbone", found, "use an hf: encoder")])
        module, architecture, processing = load_timm(spec, image_size, pretrained)
    else:
        module, architecture, processing = load_hf(spec, modality, image_size, max_length, pretrained)
    check_finite(module, spec.id)
    return LoadedBackbone(module, measure_feature_dim(module, processing), architecture, processing)


def from_own_checkpoint(spec: BackboneSpec, modality: str, image_size: int | None, pretrained: bool) -> LoadedBackbone:
    """The backbone inside a checkpoint that this project wrote; its preprocessing stays as it was."""
    from models.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(Path(str(spec.folder)))
    if checkpoint.processing.kind != modality:
        raise ConfigError([Problem("backbone", f"{spec.id} takes {checkpoint.processing.kind}s, not {modality}s")])
    size = getattr(checkpoint.processing, "size", None)
    if image_size not in (None, size):
        hint = f"leave it out or write {size}"
        raise ConfigError([Problem("finetune.image_size", f"the checkpoint takes {size} px, not {image_size}", hint)])
    architecture = checkpoint.spec.architecture
    module = checkpoint.model.backbone if pretrained else build_backbone(architecture)
    return LoadedBackbone(module, checkpoint.spec.feature_dim, architecture, checkpoint.processing)


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
    except KeyError as error:
        raise ModelError(f"the stored architecture has no {error}; it was not written by this project") from error
    raise ModelError(f"unknown library {architecture.get('library')!r}; expected timm or hf")


def measure_feature_dim(module: torch.nn.Module, processing: Processing) -> int:
    """The width of the features, measured on two made-up inputs."""
    import numpy as np
    import torch

    contents: list[Any] = ["a text", "another"] if processing.kind == "text" else [np.zeros((32, 32, 3), np.uint8)] * 2
    arrays = processing.arrays(contents)
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
    """Raises `ModelError` naming the first weight that holds NaN or infinity."""
    import torch

    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{name}: the weight {key} holds NaN or infinity; damaged file, or diverged training?")


@cache
def timm_names() -> frozenset[str]:
    """The names that timm registers, read from its source: importing timm takes seconds."""
    found = find_spec("timm")
    if found is None or not found.submodule_search_locations:
        return frozenset()
    names: set[str] = set()
    for file in (Path(found.submodule_search_locations[0]) / "models").glob("*.py"):
        names.update(re.findall(r"@register_model\s+def (\w+)\(", file.read_text(encoding="utf-8")))
    return frozenset(names)


def cached_commit(repository: str) -> str | None:
    """The commit that `main` of a repository has in the local hub cache, or None."""
    from huggingface_hub.constants import HF_HUB_CACHE

    reference = Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "refs" / "main"
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None


def digest_of_file(path: Path) -> str:
    """SHA-256 as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
