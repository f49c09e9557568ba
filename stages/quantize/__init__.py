"""quantize: INT8 candidates that stay inside their budget."""

from stages.quantize.stage import Quantize, QuantizeConfig

__all__ = ["Quantize", "QuantizeConfig"]
