"""finetune: adapt a pretrained backbone to labelled data."""

from stages.finetune.stage import Finetune, FinetuneConfig

__all__ = ["Finetune", "FinetuneConfig"]
