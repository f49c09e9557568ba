"""Embeddings: the task by hand-computed numbers and against other implementations, its head, its checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.checkpoint import load_checkpoint, save_checkpoint
from models.classifier import UnitHead, make_spec, new_classifier, set_head
from models.errors import DataError
from models.spec import BackboneSpec
from models.tasks.embedding import BLOCK, CLASSES, TEMPERATURE, Embedding
from tests.models.tiny import audio_backbone, image_backbone, inputs_of, logits_of, text_backbone

TASK = Embedding()
# Angles in degrees: the first two are near each other, and so are the next two, of which one has another label.
ANGLES = np.radians([0.0, 10.0, 90.0, 95.0, 200.0])
POINTS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1).astype(np.float32) * np.array(
    [[1], [7], [1], [2], [1]], "f4"
)
TARGETS = np.array([0, 0, 1, 0, 2])


def test_the_nearest_other_example_decides() -> None:
    assert TASK.scores(POINTS, TARGETS).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]  # the last is alone with its label
    found = TASK.more_metrics(POINTS, TARGETS)
    assert found["recall@5"] == pytest.approx(3 / 5)
    # R is 2 for the zeros: places (right, wrong) twice; the fourth has (wrong, right) with precision ½ at place 2.
    assert found["MAP@R"] == pytest.approx((0.5 + 0.5 + 0 + 0.25 + 0) / 5)
    assert TASK.scores(POINTS[:1], TARGETS[:1]).tolist() == [0.0]
    assert TASK.more_metrics(POINTS[:1], TARGETS[:1]) == {"recall@5": 0.0, "MAP@R": 0.0}
    assert TASK.same(POINTS[:1], POINTS[:1]).tolist() == [True]


def test_equally_near_examples_count_by_their_share() -> None:
    targets = np.array([0] * 6 + [1] * 4)
    constant = TASK.best_constant(targets, 7).repeat(10, axis=0)
    assert TASK.scores(constant, targets).tolist() == pytest.approx([5 / 9] * 6 + [3 / 9] * 4)


def test_metrics_are_those_of_a_plain_loop_over_several_blocks() -> None:
    random = np.random.default_rng(0)
    targets = random.integers(0, 300, BLOCK + 40)
    points = (random.normal(size=(300, 12))[targets] + random.normal(size=(len(targets), 12))).astype(np.float32)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    recall, precision = [], []
    for index, one in enumerate(unit):
        near = unit @ one
        near[index] = -2
        order = np.argsort(-near)
        right = targets[order] == targets[index]
        recall.append(right[0])
        count = int((targets == targets[index]).sum()) - 1
        terms = [right[: place + 1].mean() for place in range(count) if right[place]]
        precision.append(sum(terms) / count if count else 0.0)
    assert TASK.scores(points, targets).tolist() == [float(one) for one in recall]
    assert 0.1 < np.mean(recall) < 0.9
    assert TASK.more_metrics(points, targets)["MAP@R"] == pytest.approx(np.mean(precision), abs=1e-6)


def test_the_same_neighbour_or_one_as_near() -> None:
    assert TASK.same(3 * POINTS, POINTS).all()
    turned = POINTS[[2, 1, 0, 3, 4]]  # what lay at 0° and what lay at 90° change places
    assert TASK.same(turned, POINTS).tolist() == [False, False, False, False, True]
    nearly = np.radians([0.0, 10.0, 20.2, 95.0, 200.0])
    points = np.stack([np.cos(nearly), np.sin(nearly)], axis=1)
    moved = np.stack(
        [np.cos(nearly + np.radians([0, 0.3, 0, 0, 0])), np.sin(nearly + np.radians([0, 0.3, 0, 0, 0]))], 1
    )
    assert np.argmax(points[1] @ points[[0, 2]].T) != np.argmax(moved[1] @ moved[[0, 2]].T)
    assert TASK.same(moved, points).all()


def supervised_contrastive(points: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Equation 2 of Khosla et al. 2020, term by term."""
    points = points / points.norm(dim=1, keepdim=True)
    losses = []
    for i in range(len(points)):
        others = [a for a in range(len(points)) if a != i]
        positives = [p for p in others if targets[p] == targets[i]]
        below = sum(torch.exp(points[i] @ points[a] / TEMPERATURE) for a in others)
        terms = [torch.log(torch.exp(points[i] @ points[p] / TEMPERATURE) / below) for p in positives]
        if terms:
            losses.append(-torch.stack(terms).mean())
    return torch.stack(losses).mean()


def test_the_loss_is_supervised_contrastive() -> None:
    torch.manual_seed(0)
    points, targets = torch.randn(9, 4, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3])
    torch.testing.assert_close(TASK.loss(points, targets), supervised_contrastive(points, targets))
    many = torch.randn(BLOCK + 9, 3, dtype=torch.float64)
    labels = torch.arange(len(many)) % 7
    whole = TASK.loss(many, labels)
    logits = torch.nn.functional.normalize(many, dim=1)
    logits = (logits @ logits.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    right = (labels[:, None] == labels[None]) & ~torch.eye(len(many), dtype=torch.bool)
    torch.testing.assert_close(
        whole, -torch.stack([row[own].mean() for row, own in zip(logits.log_softmax(1), right, strict=True)]).mean()
    )


@pytest.mark.parametrize("count", [1, 4])
def test_a_batch_without_a_pair_teaches_nothing(count: int) -> None:
    points = torch.randn(count, 3, requires_grad=True)
    loss = TASK.loss(points, torch.arange(count))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0.0 and points.grad is not None and not points.grad.any()


def made_up(count: int, classes: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Features, mean 0 and deviation 1, in which labels differ in six directions of little variance."""
    random = np.random.default_rng(5)
    targets = np.arange(count) % classes
    signal = random.normal(size=(classes, 6))[targets] @ random.normal(size=(6, width)) * 0.3
    noise = random.normal(size=(count, 8)) @ random.normal(size=(8, width)) + 0.3 * random.normal(size=(count, width))
    features = signal + noise
    return (features - features.mean(0)) / features.std(0), targets


def test_the_closed_form_brings_labels_together_and_serves_new_ones() -> None:
    features, targets = made_up(480, 12, 24)
    seen = targets < 6
    weight, bias = TASK.fit_head(features[seen][:120], targets[seen][:120], 24, 10.0, 1e-4)
    assert (weight.shape, bias.any()) == ((24, 24), False)
    for kept, gain in ((seen, 0.2), (~seen, 0.05)):
        before = TASK.scores(features[kept][120:], targets[kept][120:]).mean()
        assert TASK.scores(features[kept][120:] @ weight.T, targets[kept][120:]).mean() > before + gain
    assert np.linalg.matrix_rank(weight) == 24  # no direction is lost
    assert np.linalg.norm(features[seen][:120] @ weight.T, axis=1).mean() == pytest.approx(24**0.5)


def test_without_strength_the_features_stay_as_they_are() -> None:
    features, targets = made_up(60, 3, 8)
    weight, _ = TASK.fit_head(features, targets, 8, 1e-9, 1e-4)
    np.testing.assert_allclose(weight.T @ weight / (weight**2).sum() * 8, np.eye(8), atol=1e-5)


@pytest.mark.parametrize("width", [10, 40])
def test_more_and_fewer_features_than_outputs(width: int) -> None:
    features, targets = made_up(120, 4, width)
    weight, _ = TASK.fit_head(features, targets, 20, 1.0, 1e-4)
    assert weight.shape == (20, width)
    assert ((weight != 0).any(axis=1).sum(), (weight != 0).any(axis=0).sum()) == (min(width, 20), min(width, 20))
    assert np.isfinite(TASK.scores(features @ weight.T, targets)).all()


def test_labels_are_those_of_classification() -> None:
    assert TASK.labels(["b", "a", "b"]) == ("a", "b")
    assert TASK.describe(TASK.target("b", {"a": 0, "b": 1}), ("a", "b")) == "b"
    with pytest.raises(DataError):
        TASK.read(["a", "b"])
    assert len(TASK.folds(np.arange(30) % 3, 5)) == 3 and len(CLASSES.folds(np.arange(30) % 3, 5)) == 5


@pytest.mark.parametrize("backbone", [image_backbone, text_backbone, audio_backbone])
def test_a_checkpoint_gives_the_same_embeddings_of_length_one(tmp_path: Path, backbone: object) -> None:
    loaded = backbone()  # type: ignore[operator]
    spec = make_spec(
        f"{loaded.processing.kind}-features",
        BackboneSpec("x:y", loaded.architecture["library"], "y", None, None, "random", "0"),
        loaded,
        ("a", "b"),
    )  # type: ignore[arg-type]
    assert (spec.io.outputs[0].name, spec.io.width) == ("embedding", loaded.feature_dim)
    model = new_classifier(loaded, spec.io.width, TASK.embeds).eval()
    assert isinstance(model.task_head, UnitHead)
    torch.manual_seed(0)
    weight, bias = torch.randn(spec.io.width, spec.io.width), torch.randn(spec.io.width)
    set_head(model, weight, bias)
    save_checkpoint(tmp_path, model, spec, loaded.processing)
    inputs = inputs_of(loaded)
    found = logits_of(load_checkpoint(tmp_path).model, inputs)
    assert torch.equal(found, logits_of(model, inputs))
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(model.features(*inputs) @ weight.T + bias, dim=1)
    torch.testing.assert_close(found, expected)
    answers = TASK.answers(found.numpy(), spec.labels)
    assert np.array_equal(np.array([one.embedding for one in answers], np.float32), found.numpy())
    assert all(one.score == pytest.approx(1.0, abs=1e-5) for one in answers)
