"""Examples → arrays, in batches: the one way that stages feed networks and runtimes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from models.tasks import MODALITY_OF_TASK

if TYPE_CHECKING:
    import numpy as np

    from models.modalities import Processing
    from models.runtimes.base import Runtime
    from models.spec import TaskName
    from stages.base import Progress
    from stages.data.splits import Example


def are_text_pairs(task: TaskName, examples: Sequence[Example]) -> bool:
    """Whether each example is two texts that the network compares."""
    return MODALITY_OF_TASK[task] == "text" and isinstance(examples[0].content, tuple)


def batches(
    processing: Processing, examples: Sequence[Example], batch_size: int
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """(inputs, how many) for consecutive examples."""
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        yield processing.arrays([one.content for one in part]), len(part)


def predict(
    runtime: Runtime,
    processing: Processing,
    examples: Sequence[Example],
    batch_size: int,
    progress: Progress,
    description: str,
) -> np.ndarray:
    """float32 (examples, outputs): a runtime's outputs side by side."""
    import numpy as np

    from models.spec import side_by_side

    outputs = []
    with progress.task(description, len(examples)) as advance:
        for inputs, count in batches(processing, examples, batch_size):
            outputs.append(side_by_side(runtime.infer(inputs)))
            advance(count)
    return np.concatenate(outputs)
