"""validate: every candidate against the PyTorch reference on held-out data."""

from stages.validate.stage import Validate, ValidateConfig

__all__ = ["Validate", "ValidateConfig"]
