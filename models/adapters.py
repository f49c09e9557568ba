"""LoRA adapters: where they go, how they are stored, how they are folded into the base weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import MergeError, ModelError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn

    from models.classifier import Classifier

ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraSettings:
    """Hu et al. 2021 (arXiv 2106.09685): ΔW = alpha / rank · B · A."""

    rank: int
    alpha: float
    dropout: float


def target_modules(model: Classifier, inputs: Sequence[torch.Tensor] | None = None) -> list[str]:
    """Full paths of the layers that take an adapter: every Linear and ungrouped Conv2d of the backbone.

    Not the stem (the first convolution), whose filters are general and quantize badly once moved; not
    grouped or depthwise convolutions, which LoRA cannot adapt; not the head, which is trained whole; not
    convolutions that pad or standardise on their own (timm's Conv2dSame, StdConv2d), where a branch
    beside the layer is not the same as a change of its weight. Explicit paths, because peft matches
    names by suffix (`classifier` would catch `pre_classifier`).

    With example `inputs`, layers whose forward is never called are left out too: some networks read
    `layer.weight` themselves (beit, swin v2), so that an adapter there would be passed by.

    Raises:
        ModelError: the backbone has no such layer.
    """
    from torch import nn

    called = called_modules(model, inputs) if inputs is not None else None
    names: list[str] = []
    stem_seen = False
    for name, module in model.backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            plain = type(module) is nn.Conv2d and module.padding_mode == "zeros" and module.groups == 1
            fits, stem_seen = stem_seen and plain, True
        else:
            # Attention's out_proj is a subclass of Linear whose weight nn.MultiheadAttention reads directly.
            fits = isinstance(module, nn.Linear) and type(module).__name__ != "NonDynamicallyQuantizableLinear"
        if fits and (called is None or module in called):
            names.append(f"backbone.{name}")
    if not names:
        raise ModelError(
            "LoRA found no Linear and no ungrouped Conv2d layer in the backbone; try finetune.strategy: full"
        )
    return names


def called_modules(model: Classifier, inputs: Sequence[torch.Tensor]) -> set[nn.Module]:
    """The modules whose forward runs when the network sees `inputs` (positional, batch first)."""
    import torch

    called: set[nn.Module] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in model.backbone.modules()
    ]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(*inputs)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return called


def inject_lora(model: Classifier, settings: LoraSettings, inputs: Sequence[torch.Tensor] | None = None) -> PeftModel:
    """Wrap the network: adapters in the backbone, the head trained whole and saved with them.

    `inputs` as in `target_modules`. Changes `model` in place.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # fractions work as well
        lora_dropout=settings.dropout,
        target_modules=target_modules(model, inputs),
        modules_to_save=["task_head"],  # peft matches by suffix: "head" would catch timm's conv_head
    )
    return get_peft_model(model, config)


def save_adapter(adapted: PeftModel, folder: Path) -> None:
    """`adapter_model.safetensors` and `adapter_config.json`; the base's weights are not in it."""
    # Embeddings take no adapter; looking whether they were resized would ask the hub.
    adapted.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card; the bundle has a real one
    config = folder / "adapter_config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    # Sets are written in random order, and a path of this machine is nobody's business: bytes must repeat.
    values["base_model_name_or_path"] = "../base"
    values["target_modules"] = sorted(values["target_modules"])
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_adapted(base: Path, adapter: Path) -> PeftModel:
    """The adapted network as somebody else would load it: from disk, in eval mode.

    Raises:
        ModelError: the base or the adapter cannot be read, its weights are not those that its
            configuration asks for, or the adapter holds NaN.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    from models.backbones.build import check_finite
    from models.checkpoint import load_checkpoint

    # Without the file peft would look for a pickle, then ask the hub.
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{adapter / ADAPTER_WEIGHTS} is missing; run finetune again")
    try:
        adapted = PeftModel.from_pretrained(load_checkpoint(base).model, str(adapter), is_trainable=False)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"the adapter in {adapter} cannot be loaded: {error}") from error
    check_keys(adapted, adapter)
    check_finite(adapted, str(adapter))
    return adapted.eval()


def check_keys(adapted: PeftModel, adapter: Path) -> None:
    """Raises `ModelError` where the file lacks weights or has others: peft only warns and keeps random ones."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as stored:
        found = set(stored.keys())
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if found != wanted:
        lacking, extra = sorted(wanted - found), sorted(found - wanted)
        raise ModelError(
            f"{adapter / ADAPTER_WEIGHTS} lacks {len(lacking)} weights {lacking[:2]} and has {len(extra)} others "
            f"{extra[:2]}; the adapter was not written for this base"
        )


def fold(adapted: PeftModel) -> Classifier:
    """The plain network with the adapters folded in, in fp32 (`safe_merge` looks for NaN).

    Uses `adapted` up: its layers become those of the result. A half-precision merge would round small
    updates away, so cast last.

    Raises:
        MergeError: a folded weight is not finite.
    """
    try:
        merged: Any = adapted.float().merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise MergeError(f"folding the adapter gave a broken weight: {error}; was the training stable?") from error
    network: Classifier = merged.eval()
    return network


def untrained_adapters(adapted: nn.Module) -> list[str]:
    """Names of the adapters whose B matrix is still all zeros: they change nothing."""
    return [
        name
        for name, weight in adapted.named_parameters()
        if ".lora_B." in name and not bool(weight.detach().count_nonzero())
    ]
