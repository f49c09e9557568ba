"""Image–text retrieval: pictures and texts as points of one space, near each other where they belong together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from models.errors import DataError
from models.spec import TensorSpec
from models.tasks import Answer, Label, Target, of_length_one

if TYPE_CHECKING:
    import numpy as np
    import torch

WIDTH = 128
"""Of the embeddings where the backbone brings no projections. On the emoji 64, 128 and 256 retrieve equally well."""

TEMPERATURE = 0.1
"""Where the contrastive loss starts, before it learns its own, and that of the loss by which the regularisation of the
closed form is chosen (.1: Chen et al. 2020, SimCLR, arXiv 2002.05709; CLIP starts at .07). On the emoji .1 chooses the
same C = 1 at 64, 96 and 128 pixels with 3, 5 and 10 folds; .05 chooses C = 10 at 64, a start from which training loses.
"""

CV_FOLDS = 3
"""Each fit is a decomposition of all features; more folds choose the same regularisation on the emoji."""


class Retrieval:
    """See the module's docstring. Targets: int64 (examples,), equal where the texts are equal.

    The outputs of an example are the embeddings of its image and of its text side by side. The metric is recall at 1
    among all pairs of a split: a picture finds its text, and a text its picture, each half of the score of a pair.
    """

    metric: ClassVar[str] = "recall@1"
    further_metrics: ClassVar[Mapping[str, int]] = {
        "recall@1 image to text": 1,
        "recall@1 text to image": 1,
        "recall@5": 1,
    }
    constant: ClassVar[str] = "one answer for all"
    fewest_labels: ClassVar[int] = 0
    reading: ClassVar[str] = (
        "Both have length 1: their dot product says how well an image and a text fit, which is of use only beside that "
        "of other images or texts."
    )
    embeds: ClassVar[int] = 2

    def read(self, value: Any) -> Label:
        """The text. Raises `DataError` for none."""
        if not isinstance(value, str) or not value.strip():
            raise DataError("is empty" if value in (None, "") else f"holds {type(value).__name__}; expected a text")
        return value

    def labels(self, found: Iterable[Label]) -> tuple[str, ...]:
        """None: a text is an input here."""
        return ()

    def target(self, label: Label, indices: Mapping[str, int]) -> Target:
        """The text."""
        assert isinstance(label, str)
        return label

    def describe(self, target: Target, labels: tuple[str, ...]) -> str:
        """The text."""
        return str(target)

    def outputs(self, labels: tuple[str, ...], width: int | None) -> tuple[TensorSpec, ...]:
        """Two embeddings."""
        dims = ("batch", width or WIDTH)
        return TensorSpec("image_embedding", "float32", dims), TensorSpec("text_embedding", "float32", dims)

    def targets(self, targets: Sequence[Target], outputs: int) -> np.ndarray:
        """int64 (examples,): 8 bytes of the SHA-256 of each text."""
        import numpy as np

        digests = [hashlib.sha256(str(one).encode()).digest()[:8] for one in targets]
        return np.array([int.from_bytes(one, "big", signed=True) for one in digests], np.int64)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """InfoNCE in both directions (Radford et al. 2021, CLIP, arXiv 2103.00020), equal texts being equally right.

        The lengths of the embeddings carry the inverse temperature: the product of the mean lengths of both sides.
        """
        import torch

        images, texts = outputs.chunk(2, dim=1)
        scale = images.norm(dim=1).mean() * texts.norm(dim=1).mean()
        images = torch.nn.functional.normalize(images, dim=1)
        logits = scale * images @ torch.nn.functional.normalize(texts, dim=1).T
        right = (targets[:, None] == targets[None]).to(logits.dtype)
        right = right / right.sum(dim=1, keepdim=True)  # symmetric: of rows and of columns
        ways = torch.nn.functional.cross_entropy(logits, right), torch.nn.functional.cross_entropy(logits.T, right)
        return (ways[0] + ways[1]) / 2

    def scores(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """0, ½ or 1: how many of the two ways find what belongs to the example."""
        import numpy as np

        near = similarities(outputs)
        found = (targets[near.argmax(1)] == targets).astype(np.float64)
        return np.asarray((found + (targets[near.argmax(0)] == targets)) / 2)

    def more_metrics(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Recall at 1 of each way, and at 5 of both."""
        return {name: float(found.mean()) for name, found in self.more_scores(outputs, targets).items()}

    def more_scores(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
        """All of them, of each pair."""
        import numpy as np

        near, own = similarities(outputs), targets[:, None] == targets[None]
        ways = {"image to text": near, "text to image": near.T}
        scores = {
            f"recall@1 {name}": np.asarray(targets[way.argmax(1)] == targets, np.float64) for name, way in ways.items()
        }
        best = [np.argsort(-way, axis=1, kind="stable")[:, :5] for way in ways.values()]
        hits = [np.take_along_axis(own, five, axis=1).any(axis=1) for five in best]
        return scores | {"recall@5": np.mean(hits, axis=0)}

    def same(self, outputs: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Whether the image finds the same text, and the text the same image."""
        near, before = similarities(outputs), similarities(others)
        same: np.ndarray = (near.argmax(1) == before.argmax(1)) & (near.argmax(0) == before.argmax(0))
        return same

    def best_constant(self, targets: np.ndarray, outputs: int) -> np.ndarray:
        """One point for all: the first is everybody's nearest."""
        import numpy as np

        return np.ones((1, outputs), np.float32)

    def fit_head(
        self, features: np.ndarray, targets: np.ndarray, outputs: int, strength: float, tolerance: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Canonical correlation analysis (Hotelling 1936) with a ridge of 10 / `strength` (Vinod 1976): the projections
        of both halves of `features` under which what belongs together correlates most, each direction weighted by the
        root of its correlation (Gong et al. 2014, arXiv 1212.4522). In closed form, where a contrastive loss takes
        hundreds of steps.

        The lengths are such that `loss` works at `TEMPERATURE`.
        """
        import numpy as np

        halves = np.split(features.astype(np.float64), 2, axis=1)
        bases = [np.linalg.svd(half / len(half) ** 0.5, full_matrices=False) for half in halves]
        gains = [values**2 + 10 / strength for _, values, _ in bases]
        left, right = ((base[0] * base[1] / gain**0.5) for base, gain in zip(bases, gains, strict=True))
        rotations = np.linalg.svd(left.T @ right, full_matrices=False)
        kept = min(outputs // 2, len(rotations[1]))
        weights = []
        for (_, _, directions), gain, rotation in zip(bases, gains, (rotations[0], rotations[2].T), strict=True):
            weights.append((directions.T / gain**0.5) @ (rotation[:, :kept] * rotations[1][:kept] ** 0.5))
        lengths = [np.linalg.norm(half @ weight, axis=1).mean() for half, weight in zip(halves, weights, strict=True)]
        weight = np.zeros((outputs, features.shape[1]))
        for index, (one, length) in enumerate(zip(weights, lengths, strict=True)):
            rows, columns = index * outputs // 2, index * len(one)
            weight[rows : rows + kept, columns : columns + len(one)] = one.T / (max(length, 1e-12) * TEMPERATURE**0.5)
        return weight, np.zeros(outputs)

    def folds(self, targets: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Plain folds: the examples are shuffled already."""
        from models.tasks.folds import plain_folds

        return plain_folds(len(targets), min(count, CV_FOLDS))

    def vote(self, weights: np.ndarray, targets: np.ndarray, outputs: int) -> np.ndarray:
        """Pairs have no neighbours of whom one could ask for an answer."""
        raise NotImplementedError("see `embeds`")

    def answers(self, outputs: np.ndarray, labels: tuple[str, ...]) -> list[Answer]:
        """How well each image and its text fit: their cosine."""
        import numpy as np

        return [Answer(f"{cosine:.4f}", float(cosine), {}) for cosine in np.diag(similarities(outputs))]


def similarities(outputs: np.ndarray) -> np.ndarray:
    """Cosines of each image (rows) with each text (columns) of outputs side by side: float64 (examples, examples)."""
    import numpy as np

    images, texts = map(of_length_one, np.split(outputs.astype(np.float64), 2, axis=1))
    return np.asarray(images @ texts.T)
