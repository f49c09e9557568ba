"""Adapters that fold exactly: where they go, how they are stored, how they become plain weights."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.errors import MergeError, ModelError
from models.layers import call_order

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn

    from models.classifier import Classifier

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_SUFFIX = re.compile(r"\.(lora|hada|lokr|ia3|oft|boft|hra)_\w+\..*$")


Method = Literal["lora", "rslora", "dora", "loha", "lokr", "ia3", "oft", "boft", "hra"]

METHODS: dict[Method, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {}),
    "rslora": ("LoraConfig", {"use_rslora": True}),
    "dora": ("LoraConfig", {"use_dora": True}),
    "loha": ("LoHaConfig", {}),
    "lokr": ("LoKrConfig", {}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": 4}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "hra": ("HRAConfig", {}),
}
"""Method → class of peft and its fixed arguments. LoRA: Hu et al. 2021 (arXiv 2106.09685), rsLoRA: Kalajdzievski 2023
(2312.03732), DoRA: Liu et al. 2024 (2402.09353), LoHa and LoKr: Yeh et al. 2023 (2309.14859), IA3: Liu et al. 2022
(2205.05638), OFT: Qiu et al. 2023 (2306.07280), BOFT: Liu et al. 2023 (2311.06243), HRA: Yuan et al. 2024 (2405.17484).
Blocks of four divide the widths of common networks; where one does not fit, peft says so."""

SCALED_BY_B = ("lora", "rslora")
"""Methods whose change of a weight is linear in one matrix, `lora_B`."""

NOT_FOLDABLE: dict[str, str] = {
    **dict.fromkeys(
        ("prompt-tuning", "prefix-tuning", "p-tuning", "multitask-prompt-tuning"),
        "it adds made-up inputs and changes no weight, so there is nothing to fold",
    ),
    **dict.fromkeys(("x-lora", "poly", "lily"), "it mixes adapters by the input, which no single weight can do"),
    **dict.fromkeys(
        ("pissa", "olora"), "it changes the base weights when it starts, so the adapter does not fit the base on disk"
    ),
}
"""Methods of peft that cannot end as plain weights beside an unchanged base, and why."""


@dataclass(frozen=True)
class AdapterSettings:
    """`method` of `METHODS`; for LoRA ΔW = alpha / rank · B · A. IA3, OFT and BOFT have no rank."""

    method: Method
    rank: int
    alpha: float
    dropout: float


def target_modules(
    model: Classifier, inputs: Sequence[torch.Tensor] | None = None, method: Method = "lora"
) -> list[str]:
    """Full paths of the layers that take an adapter: every Linear and ungrouped Conv2d of the backbone, and what is a
    Linear by another name: GPT-2's Conv1D, squeezebert's Conv1d over one position.

    Not the stem (the first convolution), whose filters are general and quantize badly once moved; not
    grouped or depthwise convolutions, which LoRA cannot adapt; not the head, which is trained whole; not
    convolutions that pad or standardise on their own (timm's Conv2dSame, StdConv2d) or are dilated (sknet), where a
    branch beside the layer is not the same as a change of its weight: peft's has no dilation. Explicit
    paths, because peft matches names by suffix (`classifier` would catch `pre_classifier`). For OFT only
    1×1 convolutions: on others it folds to something else without an error (measured: off by the adapter's
    whole effect).

    With example `inputs`, layers whose forward is never called are left out too: some networks read
    `layer.weight` themselves (beit, swin v2), so that an adapter there would be passed by.

    Raises:
        ModelError: the backbone has no such layer.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    called = call_order(model, inputs) if inputs is not None else None
    names: list[str] = []
    stem_seen = False
    for name, module in model.backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            plain = type(module) is nn.Conv2d and module.padding_mode == "zeros" and module.groups == 1
            plain = plain and module.dilation == (1, 1)
            plain = plain and (method != "oft" or module.kernel_size == (1, 1))
            fits, stem_seen = stem_seen and plain, True
        elif isinstance(module, nn.Conv1d):
            fits = module.groups == 1 and module.kernel_size == (1,) and module.stride == (1,)
        else:
            # Attention's out_proj is a subclass of Linear whose weight nn.MultiheadAttention reads directly.
            fits = isinstance(module, nn.Linear | Conv1D)
            fits = fits and type(module).__name__ != "NonDynamicallyQuantizableLinear"
        if fits and (called is None or name in called):
            names.append(f"backbone.{name}")
    if not names:
        raise ModelError(
            f"{method} found no Linear and no ungrouped Conv2d layer in the backbone that it can adapt; "
            "try finetune.strategy: lp-ft"
        )
    return names


def inject_adapters(
    model: Classifier, settings: AdapterSettings, inputs: Sequence[torch.Tensor] | None = None
) -> PeftModel:
    """Wrap the network: adapters in the backbone, the head trained whole and saved with them.

    `inputs` as in `target_modules`. Changes `model` in place.

    Raises:
        ModelError: the backbone has no layer for adapters, or the method does not fit one.
    """
    import peft

    kind, arguments = METHODS[settings.method]
    if kind == "LoraConfig":
        arguments = {**arguments, "r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    elif kind in ("LoHaConfig", "LoKrConfig"):
        arguments = {**arguments, "r": settings.rank, "alpha": settings.alpha, "module_dropout": settings.dropout}
    elif kind == "HRAConfig":
        arguments = {**arguments, "r": settings.rank}
    config = getattr(peft, kind)(
        target_modules=target_modules(model, inputs, settings.method),
        modules_to_save=["task_head"],  # peft matches by suffix: "head" would catch timm's conv_head
        **arguments,
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # peft sets it itself for Conv1D
            adapted: PeftModel = peft.get_peft_model(model, config)
    except (ValueError, AssertionError) as error:
        raise ModelError(f"{settings.method} does not fit this backbone: {error}; try lora.method: lora") from error
    show_attributes(adapted)
    return adapted


def show_attributes(adapted: PeftModel) -> None:
    """Give an adapted layer the plain attributes of the layer in it: some networks read them (davit `kernel_size`)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            for name, value in vars(module.get_base_layer()).items():
                if not name.startswith("_"):
                    vars(module).setdefault(name, value)


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
    show_attributes(adapted)
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
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    merged: Any = adapted.float().get_base_model()
    # Not peft's merge_and_unload, which takes every module that has a `base_layer` for one of its own (timm's dla).
    for name, module in list(merged.named_modules()):
        plain: Any = None
        if isinstance(module, BaseTunerLayer):
            try:
                module.merge(safe_merge=True)
            except ValueError as error:
                message = f"folding the adapter gave a broken weight: {error}; was the training stable?"
                raise MergeError(message) from error
            plain = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            plain = module.modules_to_save["default"]
        if plain is not None:
            parent, _, child = name.rpartition(".")
            setattr(merged.get_submodule(parent), child, plain)
    network: Classifier = merged.eval()
    return network


def adapter_weights(adapted: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what an adapter trains in the backbone (not the head), by name."""
    return {
        name: weight.detach().cpu().clone()
        for name, weight in adapted.named_parameters()
        if weight.requires_grad and "task_head" not in name
    }


def untrained_adapters(adapted: nn.Module, before: dict[str, torch.Tensor]) -> list[str]:
    """Paths of the layers whose adapter still has every weight it started with (`adapter_weights`): they do nothing.

    LoRA's A does not count: weight decay moves it although B, which starts at zero, switches it off.
    """
    moved: dict[str, bool] = {}
    for name, weight in adapter_weights(adapted).items():
        if ".lora_A." in name:
            continue
        layer = ADAPTER_SUFFIX.sub("", name)
        moved[layer] = moved.get(layer, False) or not bool((weight == before[name]).all())
    return [layer for layer, has_moved in moved.items() if not has_moved]


def state_without_adapters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of an adapted network as it was before training: B = 0 and the head that it started with.

    For the methods of `SCALED_BY_B`, whose change is linear in B, a state between this one and `state` has that share
    of the change.
    """
    return {
        name: tensor.new_zeros(tensor.shape)
        if ".lora_B." in name
        else state[name.replace(".modules_to_save.default.", ".original_module.")]
        for name, tensor in state.items()
    }
