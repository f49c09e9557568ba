"""The chain. A literal table: nothing is imported until a stage is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.base import Stage

STAGES: dict[str, str] = {
    "finetune": "stages.finetune:Finetune",
    "merge-lora": "stages.merge_lora:MergeLora",
    "export": "stages.export:Export",
    "quantize": "stages.quantize:Quantize",
    "validate": "stages.validate:Validate",
    "package": "stages.package:Package",
}
"""Name → "module:Class", in the order of the chain."""


def load_stage(name: str) -> Stage:
    """The stage of that name. Its module is light: heavy libraries load when it runs."""
    module, _, attribute = STAGES[name].partition(":")
    stage: Stage = getattr(import_module(module), attribute)()
    return stage


def section_of(stage: str) -> str:
    """The key of a stage's section in `pipeline.yaml` (`merge-lora` → `merge_lora`)."""
    return stage.replace("-", "_")
