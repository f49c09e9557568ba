"""validate: every candidate against the PyTorch reference on held-out data."""

from stages.validate.config import ValidateConfig
from stages.validate.stage import Validate

__all__ = ["Validate", "ValidateConfig"]
