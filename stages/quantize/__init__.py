"""quantize: INT8 candidates that stay inside their accuracy budget."""

from stages.quantize.stage import Quantize, QuantizeConfig

__all__ = ["Quantize", "QuantizeConfig"]
