"""Backbone ids: `timm:<name>`, `hf:<org>/<repo>@<revision>`, a local folder, or an image and a text backbone as
`<id>+<id>`.

`resolve` touches neither the network nor torch; `pin` asks the hub for a commit, and `load_backbone` for weights.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from models.backbones.build import LoadedBackbone, build_backbone, check_finite, measure_feature_dim
from models.backbones.packaged import find_packaged
from models.errors import ConfigError, ModelError, Problem
from models.spec import BackboneSpec, TaskName
from models.tasks import MODALITY_OF_TASK

if TYPE_CHECKING:
    from models.modalities import Processing

PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")


def resolve(backbone_id: str) -> BackboneSpec:
    """Where a backbone comes from.

    Raises:
        ConfigError: no known prefix and no folder, an unknown name (with near ones), or a folder that
            cannot be used.
    """
    prefix, colon, name = backbone_id.partition(":")
    folder = Path(backbone_id).expanduser()
    if "+" in backbone_id and not os.path.isdir(folder):
        return resolve_dual(backbone_id)
    if colon and prefix == "timm":
        return resolve_timm(backbone_id, name)
    if colon and prefix == "hf":
        return resolve_hf(backbone_id, name)
    if os.path.isdir(folder):  # pathlib raises for a name that no file system takes
        return resolve_folder(backbone_id, folder)
    hint = "expected timm:<name>, hf:<org>/<repo>@<revision> or a local folder; for image-text two of them, image+text"
    bare = name or prefix
    if "/" in bare and not bare.startswith((".", "/")):
        hint += f"; for the hub write hf:{bare}"
    elif bare.split(".")[0] in timm_names()[0]:
        hint += f"; for timm write timm:{bare}"
    raise ConfigError([Problem("backbone", f"{backbone_id!r} has no known prefix and is no folder", hint)])


def resolve_timm(backbone_id: str, name: str) -> BackboneSpec:
    """A network of timm; its weights come from an installed package or the hub."""
    packaged = packaged_spec(backbone_id, "timm", name)
    if packaged:
        return packaged
    known, tags = timm_names()
    bare, _, tag = name.partition(".")
    problem = hint = ""
    if bare not in known:
        near = difflib.get_close_matches(bare, sorted(known), 3, 0.6)
        problem = f"timm has no network {bare!r}"
        hint = f"near names: {', '.join(f'timm:{one}' for one in near)}" if near else "see timm.list_models()"
    elif tag and name not in tags and (there := [one for one in sorted(tags) if one.startswith(f"{bare}.")]):
        problem = f"timm has no weights {tag!r} for {bare}"
        hint = f"there are {', '.join(f'timm:{one}' for one in there)}"
    if problem:
        raise ConfigError([Problem("backbone", problem, hint)])
    return BackboneSpec(backbone_id, "timm", name, None, None, "hub", f"timm:{name}")


def resolve_hf(backbone_id: str, name: str) -> BackboneSpec:
    """A repository of the hub; a packaged copy is used where one is installed."""
    repository, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository):
        raise ConfigError([Problem("backbone", f"{name!r} is no repository", "expected hf:<org>/<repo>@<revision>")])
    packaged = packaged_spec(backbone_id, "hf", repository)
    return packaged or BackboneSpec(
        backbone_id, "hf", repository, revision or None, None, "hub", f"hf:{repository}@{revision or 'main'}"
    )


def resolve_dual(backbone_id: str) -> BackboneSpec:
    """An image backbone and a text backbone, each by its own id, that are put together."""
    image, text = (resolve(one) for one in backbone_id.split("+", 1))
    if text.library == "timm":
        hint = "write <image backbone>+<text backbone>, the second an hf: encoder or a folder"
        raise ConfigError([Problem("backbone", f"{text.id} takes images, and stands where the text's belongs", hint)])
    return join(backbone_id, (image, text))


def join(backbone_id: str, parts: tuple[BackboneSpec, BackboneSpec]) -> BackboneSpec:
    """The two as one backbone."""
    digest = hashlib.sha256(" ".join(part.weights_digest for part in parts).encode()).hexdigest()
    name, weights = ("+".join(part.name.rsplit("/", 1)[-1] for part in parts), "; ".join(one.weights for one in parts))
    return BackboneSpec(backbone_id, "dual", name, None, None, weights, digest, parts)


def packaged_spec(backbone_id: str, library: Literal["timm", "hf"], name: str) -> BackboneSpec | None:
    """The backbone of an installed package that carries its weights, or None."""
    packaged = find_packaged(backbone_id)
    if packaged is None:
        return None
    entry, path, version = packaged
    folder = str(path.parent) if entry.layout == "hf-folder" else None
    digest = digest_of_folder(path.parent) if folder else digest_of_file(path)
    return BackboneSpec(backbone_id, library, name, None, folder, f"package {entry.distribution}=={version}", digest)


def check_task(spec: BackboneSpec, task: TaskName) -> None:
    """Raises `ConfigError` where it is known without loading anything that the backbone cannot do the task."""
    if (spec.library == "dual") != (MODALITY_OF_TASK[task] == "image-text"):
        # A folder may hold a network with two towers: loading it will say so.
        if spec.library == "hf":
            return
        hint = "write <image backbone>+<text backbone>" if spec.library == "timm" else "take one of the two"
        if spec.library == "dual" and task == "image-classification":
            hint += ", or let the text backbone read the names of the labels (finetune.initial_head: label-names)"
        message = f"{spec.id} takes {'images' if spec.library == 'timm' else 'images and texts'}, the task is {task}"
        raise ConfigError([Problem("backbone", message, hint)])
    own = spec.folder is not None and (Path(spec.folder) / "model.json").is_file()
    if spec.library == "timm" and not own and MODALITY_OF_TASK[task] not in ("image", "image-text"):
        message = f"{spec.id} takes images, the task is {task}"
        raise ConfigError([Problem("backbone", message, "use an hf: encoder, or change the task")])


def check_label_names(spec: BackboneSpec, task: TaskName) -> None:
    """Raises `ConfigError` where it is known without loading anything that the names of the labels cannot be a head."""
    if task != "image-classification":
        hint = "leave finetune.initial_head: label-names and finetune.strategy: flyp out"
        raise ConfigError([Problem("task", f"label names are a head of image-classification only, not {task}", hint)])
    if spec.library == "timm":
        hint = (
            f"for a language model to read them write {spec.id}+hf:sentence-transformers/all-MiniLM-L6-v2; or take a "
            "dual encoder (hf:google/siglip-base-patch16-224)"
        )
        raise ConfigError([Problem("backbone", f"{spec.id} has no text tower for the names of the labels", hint)])


def pin(spec: BackboneSpec) -> BackboneSpec:
    """The same backbone with the commit that its hub weights have now; others come back as they are.

    The commit is that of a small file which the hub, or its local cache, gives for the revision asked for. Where
    neither can be had the backbone stays unpinned: loading it will say so.

    Raises:
        ConfigError: the hub has no such repository or revision.
    """
    if spec.parts:
        image, text = (pin(part) for part in spec.parts)
        return join(spec.id, (image, text))
    if spec.weights != "hub":
        return spec
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    repository = hub_repository(spec)
    if repository is None:
        return spec
    try:
        file = hf_hub_download(repository, "config.json", revision=spec.revision)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        asked = f"{repository}@{spec.revision}" if spec.revision else repository
        hint = "check its name; for a private or gated one log in with `hf auth login`"
        raise ConfigError(
            [Problem("backbone", f"the hub has no {asked}, as far as this machine can see", hint)]
        ) from error
    except (EntryNotFoundError, OSError):
        return spec
    commit = Path(file).parent.name
    return replace(spec, revision=commit, weights=f"hub {repository} @{commit}", weights_digest=commit)


def hub_repository(spec: BackboneSpec) -> str | None:
    """The repository of the weights; None where timm has none for that name."""
    if spec.library == "hf":
        return spec.name
    import timm

    found = timm.get_pretrained_cfg(spec.name)
    return found.hf_hub_id if found else None


def resolve_folder(backbone_id: str, folder: Path) -> BackboneSpec:
    """A folder as transformers or timm saves it, or a checkpoint of this project; safetensors only.

    Raises:
        ConfigError: there is no config.json or model.json, or only pickles.
    """
    weights = sorted(folder.glob("*.safetensors"))
    own = (folder / "model.json").is_file()
    name = folder.name
    library: Literal["timm", "hf", "dual"] = "hf"
    problem = hint = ""
    if not own and not (folder / "config.json").is_file():
        problem, hint = "holds no config.json", "expected a Hugging Face folder or a checkpoint of this project"
    elif not weights:
        pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES]
        problem = f"holds no safetensors{f', only {pickles[0]}' if pickles else ''}"
        hint = "pickles can run code and are never read; convert with safetensors.torch.save_file"
    elif not own:
        try:
            values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if "auto_map" in values:
                problem, hint = "asks for code of its own (auto_map)", "trust_remote_code is off"
            elif "architecture" in values and "model_type" not in values:  # timm's form
                name, library = values["architecture"], "timm"
                if name not in timm_names()[0]:
                    problem, hint = f"timm has no network {name!r}", "see timm.list_models()"
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            problem, hint = f"config.json is no JSON: {error}", "download the folder again"
    if problem:
        raise ConfigError([Problem("backbone", f"{backbone_id}: {problem}", hint)])
    if own:
        library = library_of_checkpoint(backbone_id, folder)
    return BackboneSpec(backbone_id, library, name, None, str(folder.resolve()), "folder", digest_of_folder(folder))


def library_of_checkpoint(backbone_id: str, folder: Path) -> Literal["timm", "hf", "dual"]:
    """The library of the backbone in a checkpoint of this project. Raises `ConfigError`."""
    from models.checkpoint import load_spec

    try:
        return load_spec(folder).backbone.library
    except ModelError as error:
        hint = "expected a checkpoint of this project"
        raise ConfigError([Problem("backbone", f"{backbone_id}: {error}", hint)]) from error


def load_backbone(
    spec: BackboneSpec,
    task: TaskName,
    image_size: int | None,
    max_length: int | None,
    pretrained: bool = True,
    max_seconds: float | None = None,
    pairs: bool = False,
) -> LoadedBackbone:
    """Build the backbone for a task, with its weights unless `pretrained` is False (the scratch baseline).

    What an example is made into: images of `image_size` pixels, texts (or with `pairs` two of them) of at most
    `max_length` tokens, clips of `max_seconds`; None is the backbone's own, and what is not of the task's modality
    says nothing.

    Raises:
        ModelError: the weights do not fit or hold NaN.
        MissingCapabilityError: the weights cannot be had on this machine.
    """
    from models.backbones.from_hf import load_hf
    from models.backbones.from_timm import load_timm
    from models.backbones.hf_dual import own_head

    modality = MODALITY_OF_TASK[task]
    if spec.folder and (Path(spec.folder) / "model.json").is_file():
        return from_own_checkpoint(spec, modality, image_size, max_length, max_seconds, pretrained, pairs)
    check_task(spec, task)
    processing: Processing
    if spec.library == "dual":
        from models.backbones.dual import load_dual

        module, architecture, processing = load_dual(spec, image_size, max_length, pretrained)
    elif spec.library == "timm":
        module, architecture, processing = load_timm(spec, image_size, pretrained)
    else:
        module, architecture, processing = load_hf(
            spec, modality, image_size, max_length, max_seconds, pretrained, pairs
        )
    check_finite(module, spec.id)
    head = own_head(architecture) if modality == "image-text" else None
    return LoadedBackbone(module, measure_feature_dim(module, processing), architecture, processing, head)


def from_own_checkpoint(
    spec: BackboneSpec,
    modality: str,
    image_size: int | None,
    max_length: int | None,
    max_seconds: float | None,
    pretrained: bool,
    pairs: bool,
) -> LoadedBackbone:
    """The backbone inside a checkpoint that this project wrote; its preprocessing stays as it was, and so do the
    projections of an image-text one, with their temperature as the architecture's `scale`.

    Raises:
        ModelError: it is of another modality, or another size or length is asked for.
    """
    from models.checkpoint import load_checkpoint
    from models.classifier import PairHead

    checkpoint = load_checkpoint(Path(str(spec.folder)))
    processing = checkpoint.processing
    if processing.kind != modality:
        raise ModelError(f"{spec.id} takes {processing.kind}, the task wants {modality}")
    if getattr(processing, "pairs", False) != pairs:
        takes, given = ("two texts", "one") if not pairs else ("one text", "two")
        raise ModelError(f"{spec.id} takes {takes} an example, the data has {given} (data.text_pair_column)")
    for key, asked, own in (
        ("image_size", image_size, getattr(getattr(processing, "image", processing), "size", None)),
        ("max_length", max_length, getattr(getattr(processing, "text", processing), "max_length", None)),
        ("max_seconds", max_seconds, getattr(processing, "seconds", None)),
    ):
        if own is not None and asked not in (None, own):
            raise ModelError(f"the checkpoint was made for {own}, finetune.{key} is {asked}; leave it out")
    architecture, head = checkpoint.spec.architecture, checkpoint.model.task_head
    if not pretrained:
        return LoadedBackbone(build_backbone(architecture), checkpoint.spec.feature_dim, architecture, processing)
    state = None
    if isinstance(head, PairHead):
        state, architecture = head.state_dict(), {**architecture, "scale": head.scale}
    return LoadedBackbone(checkpoint.model.backbone, checkpoint.spec.feature_dim, architecture, processing, state)


@cache
def timm_names() -> tuple[frozenset[str], frozenset[str]]:
    """The names that timm registers, and the names with a tag that it has weights for.

    Read from its source: importing timm takes seconds. Some networks make their tags up as they go: those have none
    here.
    """
    found = find_spec("timm")
    if found is None:
        raise ModuleNotFoundError("No module named 'timm'", name="timm")
    names: set[str] = set()
    tags: set[str] = set()
    for folder in found.submodule_search_locations or ():
        for file in (Path(folder) / "models").glob("*.py"):
            text = file.read_text(encoding="utf-8")
            names.update(re.findall(r"@register_model\s+def (\w+)\(", text))
            tags.update(re.findall(r"""["'](\w+\.\w+)["']\s*:""", text))
    return frozenset(names), frozenset(tags)


TEXT_SUFFIXES = (".json", ".txt", ".model")
"""Configuration and tokenizer files beside the weights: vocab.txt, merges.txt, sentencepiece models."""


def digest_of_folder(folder: Path) -> str:
    """SHA-256 over the names and digests of the files that decide what a backbone and its tokenizer are."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", *TEXT_SUFFIXES)]
    return hashlib.sha256("".join(f"{path.name} {digest_of_file(path)}\n" for path in files).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256 as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
