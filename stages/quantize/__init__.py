"""quantize: candidates of lower precision that stay inside their budget."""

from stages.quantize.stage import Quantize, QuantizeConfig

__all__ = ["Quantize", "QuantizeConfig"]
