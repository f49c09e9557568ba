"""Labels by their names: what a text encoder says of them, and a map from an image backbone's features to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.tasks import of_length_one
from stages.features.probe import CV_EXAMPLES, FOLDS

if TYPE_CHECKING:
    import numpy as np

    from models.backbones.build import LoadedBackbone
    from models.tasks import Task

BATCH = 64

RIDGES = (1e1, 1e2, 1e3, 1e4, 1e5)
"""Strengths of the regularisation tried, on standardised features."""

SCALES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""Factors of the cosines in the logits tried."""

RAISES = tuple(step / 20 for step in range(41))
"""What is tried to be added to the cosine of a label that no training example has."""

FEWEST = 4
"""Of fewer labels none can play unseen: the others would not tell where names are."""

GROUPS = 10
"""Into so many the labels are shared out, each of which plays unseen once."""

Cosines = Callable[["np.ndarray", "np.ndarray", float], "np.ndarray"]
"""Training examples, held-out ones and a regularisation → float64 (held-out, labels): cosines of the mapped features
with the names, both as the labels of the training examples say."""


@dataclass(frozen=True)
class LabelMap:
    """`weight`: float32 (width, features), `bias`: float32 (width,): from raw features to where the names are.

    The logits are `scale` times the cosines with `names`, float32 (labels, width) of length 1, plus `offsets`, float32
    (labels,). `centre`: float32 (width,), what was taken from the names before they got that length. `metric` is that
    of the chosen regularisation over the folds, None where there were none. `played`: the mean accuracies on seen and
    on unseen labels when each label plays unseen, None where none did.
    """

    weight: np.ndarray
    bias: np.ndarray
    names: np.ndarray
    centre: np.ndarray
    scale: float
    offsets: np.ndarray
    regularization: float
    metric: float | None
    played: tuple[float, float] | None = None


def embed_texts(encoder: LoadedBackbone, texts: Sequence[str], device: str) -> np.ndarray:
    """Features of a text backbone: float32 (texts, width)."""
    import numpy as np
    import torch

    module, parts = encoder.module.to(device).eval(), []
    with torch.inference_mode():
        for start in range(0, len(texts), BATCH):
            arrays = encoder.processing.arrays(list(texts[start : start + BATCH]))
            inputs = (torch.from_numpy(arrays[one.name]).to(device) for one in encoder.processing.inputs)
            parts.append(module(*inputs).float().cpu().numpy())
    encoder.module.to("cpu")
    return np.concatenate(parts)


def embed_labels(encoder: LoadedBackbone, labels: Sequence[str], templates: Sequence[str], device: str) -> np.ndarray:
    """The mean of the features of a label's name in each template: float32 (labels, width) (Radford et al. 2021, arXiv
    2103.00020, section 3.1.4)."""
    texts = [template.replace("{}", label) for label in labels for template in templates]
    found = embed_texts(encoder, texts, device)
    mean: np.ndarray = found.reshape(len(labels), len(templates), -1).mean(axis=1)
    return mean


def fit_label_map(features: np.ndarray, targets: np.ndarray, names: np.ndarray, seen: int, task: Task) -> LabelMap:
    """Ridge regression from features to the embeddings of the label names (Frome et al. 2013, DeViSE, and
    Romera-Paredes & Torr 2015, ESZSL, use such maps), which are centred first: names have much in common.

    `features`: float32 (examples, features); `targets`: int64 (examples,), below `seen`; `names`: float32 (labels,
    width), of which those from `seen` on have no examples. Regularisation and scale are chosen by the loss
    over folds; where no label has two examples, over folds of labels, each told from those of its fold.

    A network trained on some labels hardly ever answers with another: on Fashion-MNIST with one of ten labels unseen,
    EfficientNet-Lite0 and MiniLM name it for none of its images. So the cosines of unseen labels are raised (Chao et
    al. 2016, arXiv 1605.04253, calibrated stacking) by what gives the best harmonic mean of the accuracies on seen and
    unseen labels (Xian et al. 2017, arXiv 1707.00600) when each group of seen labels plays unseen.
    """
    import numpy as np
    from sklearn.linear_model import Ridge
    from threadpoolctl import threadpool_limits

    mean, deviation = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    deviation = np.where(deviation < 1e-6, 1.0, deviation)
    inputs = (features - mean) / deviation

    def centred(known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        centre = names[known].mean(0, dtype=np.float64)
        return of_length_one(names - centre), centre

    def cosines(train: np.ndarray, held_out: np.ndarray, strength: float) -> np.ndarray:
        places, _ = centred(np.unique(targets[train]))
        fitted = Ridge(alpha=strength, solver="cholesky").fit(inputs[train], places[targets[train]])
        return np.asarray(of_length_one(fitted.predict(inputs[held_out])) @ places.T)

    with threadpool_limits(1, "blas"):  # see `stages.features.probe.fit_head`
        chosen, scale, metric = choose_ridge(cosines, targets, seen, task)
        raised, played = choose_raise(cosines, targets, seen, chosen) if seen < len(names) else (0.0, None)
        places, centre = centred(np.arange(seen))
        fitted = Ridge(alpha=chosen, solver="cholesky").fit(inputs, places[targets])
    scaled = fitted.coef_ / deviation
    offsets = np.where(np.arange(len(names)) < seen, 0.0, scale * raised)
    weight, bias = scaled.astype(np.float32), (fitted.intercept_ - scaled @ mean).astype(np.float32)
    where = places.astype(np.float32), centre.astype(np.float32)
    return LabelMap(weight, bias, *where, scale, offsets.astype(np.float32), chosen, metric, played)


def choose_ridge(cosines: Cosines, targets: np.ndarray, seen: int, task: Task) -> tuple[float, float, float | None]:
    """The regularisation and the scale with the smallest loss over the folds, and the metric of both there."""
    import numpy as np
    import torch

    folds = [(*fold, np.arange(seen)) for fold in task.folds(targets[:CV_EXAMPLES], FOLDS)]
    folds = folds or list(folds_of_labels(targets, seen))
    losses = np.zeros((len(RIDGES), len(SCALES)))
    metrics = np.zeros(len(RIDGES))
    for train, held_out, candidates in folds:
        wanted = np.searchsorted(candidates, targets[held_out])
        for row, strength in enumerate(RIDGES):
            found = cosines(train, held_out, strength)[:, candidates]
            metrics[row] += task.scores(found, wanted).mean() / len(folds)
            for column, scale in enumerate(SCALES):
                losses[row, column] += float(task.loss(torch.from_numpy(scale * found), torch.from_numpy(wanted)))
    best = np.unravel_index(losses.argmin(), losses.shape)
    return RIDGES[best[0]], SCALES[best[1]], float(metrics[best[0]]) if folds else None


def folds_of_labels(targets: np.ndarray, seen: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(training, held-out, labels): a group of labels whose examples are held out; none for fewer than `FEWEST`."""
    import numpy as np

    for group in np.array_split(np.arange(seen), min(GROUPS, seen // 2)) if seen >= FEWEST else ():
        held_out = np.isin(targets, group)
        yield np.flatnonzero(~held_out), np.flatnonzero(held_out), group


def choose_raise(
    cosines: Cosines, targets: np.ndarray, seen: int, strength: float
) -> tuple[float, tuple[float, float] | None]:
    """What to add to the cosines of unseen labels; nothing where fewer than `FEWEST` labels are seen. Every other
    example is trained on, the rest tried: and with it the accuracies of `LabelMap.played`."""
    import numpy as np

    if seen < FEWEST:
        return 0.0, None

    first = np.arange(len(targets)) % 2 == 0
    means, played = np.zeros(len(RAISES)), list[np.ndarray]()
    for group in np.array_split(np.arange(seen), min(GROUPS, seen)):
        plays_unseen = np.isin(targets, group)
        train, tried = np.flatnonzero(first & ~plays_unseen), np.flatnonzero(~first)
        if len(np.unique(targets[train])) < 2 or not plays_unseen[tried].any():
            continue
        found, unseen = cosines(train, tried, strength)[:, :seen], plays_unseen[tried]
        played.append(np.zeros((len(RAISES), 2)))
        for index, raised in enumerate(RAISES):
            lifted = found.copy()
            lifted[:, group] += raised
            right = lifted.argmax(1) == targets[tried]
            accuracies = right[~unseen].mean(), right[unseen].mean()
            played[-1][index] = accuracies
            means[index] += 2 * accuracies[0] * accuracies[1] / max(sum(accuracies), 1e-12)
    best = int(means.argmax())
    if not played:
        return RAISES[best], None
    on_seen, on_unseen = np.mean(played, axis=0)[best]
    return RAISES[best], (float(on_seen), float(on_unseen))
