"""Folds for tasks whose examples have no classes to be held in proportion."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def plain_folds(examples: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Consecutive folds of (training, held-out) indices; none below two examples."""
    import numpy as np
    from sklearn.model_selection import KFold

    return list(KFold(min(count, examples)).split(np.empty(examples))) if examples > 1 else []
