"""Checkpoints: `model.safetensors`, `model.json` and the files of the preprocessing. No pickles, no network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import ModelError
from models.modalities import Processing, processing_from_dict
from models.spec import ModelSpec
from models.tasks import task_of

if TYPE_CHECKING:
    from models.classifier import Classifier

WEIGHTS = "model.safetensors"
SPEC = "model.json"


@dataclass(frozen=True)
class Checkpoint:
    """A network in eval mode, fp32, with what describes it and its preprocessing."""

    model: Classifier
    spec: ModelSpec
    processing: Processing


def save_checkpoint(folder: Path, model: Classifier, spec: ModelSpec, processing: Processing) -> None:
    """Write the three parts into `folder` (made where it is missing). Weights are stored as they are."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    stored = replace(spec, processing=processing.save(folder))
    (folder / SPEC).write_text(json.dumps(stored.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    # Tied weights share memory, which safetensors refuses: each name gets its own copy.
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def load_spec(folder: Path) -> ModelSpec:
    """The specification in a checkpoint folder.

    Raises:
        ModelError: it is missing or not readable.
    """
    try:
        return ModelSpec.from_dict(json.loads((folder / SPEC).read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / SPEC} is no readable model description: {error}") from error


def load_checkpoint(folder: Path) -> Checkpoint:
    """Rebuild the network and load its weights, key by key.

    Raises:
        ModelError: a file is missing or damaged, keys or shapes differ, or a weight is NaN or infinite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from models.backbones.build import build_backbone, check_finite
    from models.classifier import Classifier, make_head

    spec = load_spec(folder)
    if spec.io.outputs != task_of(spec.task).outputs(spec.labels, int(spec.io.outputs[0].dims[1])):
        raise ModelError(f"{folder / SPEC} does not fit itself: {len(spec.labels)} labels, outputs {spec.io.outputs}")
    head = make_head(spec.architecture, spec.feature_dim, spec.io.width, task_of(spec.task).embeds)
    model = Classifier(build_backbone(spec.architecture), head)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS} cannot be read as safetensors: {error}") from error
    except RuntimeError as error:
        raise ModelError(f"{folder / WEIGHTS} does not fit the network it names: {error}") from error
    check_finite(model, str(folder))
    return Checkpoint(model.float().eval(), spec, processing_from_dict(spec.processing, folder))


@contextmanager
def weights_given_back(model: Classifier) -> Iterator[None]:
    """Inside, the weights lie in memory of their own; afterwards that is free again, whoever still refers to it.

    onnxscript's rewrite rules keep the last graph that they saw, with all of its weights, for as long as the process
    lives, and so does a map of torch.export. The network cannot be run any more afterwards.
    """
    import mmap

    import torch

    tensors = [one for one in (*model.parameters(), *model.buffers()) if one.numel()]
    sizes = [-(-one.numel() * one.element_size() // 64) * 64 for one in tensors]
    memory = mmap.mmap(-1, max(sum(sizes), 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    begin = 0
    for one, size in zip(tensors, sizes, strict=True):
        place = torch.frombuffer(memory, dtype=one.dtype, count=one.numel(), offset=begin).view(one.shape)
        place.copy_(one.detach())
        one.data = place  # what it had before is free
        begin += size
    try:
        yield
    finally:
        model.to("meta")
        memory.madvise(mmap.MADV_DONTNEED)
