"""finetune: adapt a pretrained backbone to labelled data."""

from stages.finetune.config import FinetuneConfig
from stages.finetune.stage import Finetune

__all__ = ["Finetune", "FinetuneConfig"]
