"""Frozen features: computed once, found again by content; the probe on them is scikit-learn's, folded exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from models.classifier import Classifier
from models.errors import TrainingError
from models.tasks.single_label import SingleLabel
from stages.data.splits import DataSplits
from stages.features.compute import compute_features, read_cached, remove_oldest
from stages.features.probe import (
    REGULARIZATIONS,
    cross_validate,
    fit_probe,
    outputs_of_neighbours,
    score_head,
)
from stages.finetune import Finetune, FinetuneConfig
from tests.models.tiny import classifier_of, image_backbone
from tests.stages.small_run import QuietProgress, made_up_data, make_context

TASK = SingleLabel()

CONFIG = FinetuneConfig(strategy="feature-extraction")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataSplits:
    """Made-up data, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return made_up_data("image")


def refuse(*inputs: object) -> None:
    raise AssertionError("a forward pass")


def test_another_run_on_the_same_content_computes_nothing(
    tmp_path: Path, data: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Finetune().run(make_context(tmp_path, "out", data), CONFIG)
    monkeypatch.setattr(Classifier, "features", refuse)
    again = Finetune().run(make_context(tmp_path, "another", data), CONFIG)
    assert again.measurements["validation_metric"] == first.measurements["validation_metric"]


@pytest.mark.parametrize("what", ["data", "backbone", "preprocessing", "versions", "file"])
def test_whatever_changes_features_computes_them_again(
    tmp_path: Path, data: DataSplits, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    kind = "text" if what == "preprocessing" else "image"
    data = made_up_data(kind)
    Finetune().run(make_context(tmp_path, "out", data, kind), CONFIG)
    monkeypatch.setattr(Classifier, "features", refuse)
    config = CONFIG
    if what == "data":
        data = replace(data, splits={**data.splits, "train": data["train"][1:]})
    elif what == "backbone":
        file = tmp_path / "backbone-image/model.safetensors"
        save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    elif what == "preprocessing":
        config = CONFIG.model_copy(update={"max_length": 5})
    elif what == "versions":
        monkeypatch.setattr("stages.features.compute.versions_of", lambda packages: {"torch": "9"})
    else:
        for file in (tmp_path / "cache/adapt-to-edge/features").iterdir():
            content = bytearray(file.read_bytes())
            content[-3] ^= 1  # one bit of one number
            file.write_bytes(content)
    with pytest.raises(AssertionError, match="a forward pass"):
        Finetune().run(make_context(tmp_path, "again", data, kind), config)


def test_a_cache_that_cannot_be_written_changes_nothing(
    tmp_path: Path, data: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    result = Finetune().run(make_context(tmp_path, "out", data), CONFIG)
    assert result.measurements["validation_metric"] > 0.5


def test_what_was_used_longest_ago_is_removed(tmp_path: Path) -> None:
    import os

    for age, name in enumerate(("new", "middle", "old")):
        (tmp_path / name).write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    remove_oldest(tmp_path, limit=200)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["middle", "new"]
    assert read_cached(tmp_path / "new", 1) is None  # and what is no cache file is no result


def test_features_that_are_not_finite_are_an_error(data: DataSplits) -> None:
    loaded = image_backbone()
    model, _ = classifier_of(loaded)
    model.backbone.get_parameter("network.conv_stem.weight").data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="NaN or infinite features"):
        compute_features(model, loaded.processing, data["train"], "key", "cpu", QuietProgress())


def blobs(classes: int, count: int, spread: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Features of very different scales, one of them constant, and labels."""
    random = np.random.default_rng(0)
    centres = random.normal(0, 2, (classes, 6))
    labels = np.arange(count) % classes
    features = (centres[labels] + random.normal(0, spread, (count, 6))) * [1, 10, 0.1, 1, 1, 0] + [0, 50, 0, 0, -3, 7]
    return features.astype(np.float32), labels


@pytest.mark.parametrize("classes", [2, 4])
def test_the_probe_equals_scikit_learn_on_standardised_features(classes: int) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_validate
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels = blobs(classes, 120)
    probe = fit_probe(features[:80], labels[:80], classes, TASK)
    line = make_pipeline(StandardScaler(), LogisticRegression(C=probe.regularization, max_iter=300))
    wanted = line.fit(features[:80], labels[:80]).predict_proba(features[80:])
    found = np.exp(features[80:] @ probe.weight.T + probe.bias)
    found /= found.sum(1, keepdims=True)
    np.testing.assert_allclose(found, wanted, atol=5e-3)  # both stop at a tolerance
    folds = cross_validate(
        line, features[:80], labels[:80], cv=StratifiedKFold(5), scoring=("accuracy", "neg_log_loss")
    )
    assert probe.cv_metric == pytest.approx(folds["test_accuracy"].mean(), abs=1 / 80 + 1e-9)
    best = min(probe.table, key=lambda entry: entry["loss"])
    assert best["regularization"] == probe.regularization
    assert best["loss"] == pytest.approx(-folds["test_neg_log_loss"].mean(), rel=0.05)  # scaled in the fold there


def test_regularisation_is_chosen_by_what_the_data_needs() -> None:
    clear, labels = blobs(3, 90, spread=0.3)
    noise = np.random.default_rng(1).normal(size=(90, 200)).astype(np.float32)
    assert fit_probe(clear, labels, 3, TASK).regularization > fit_probe(noise, labels, 3, TASK).regularization


def test_a_class_with_one_example_and_a_split_with_one_of_each() -> None:
    features, _ = blobs(2, 11)
    rare = np.array([0] * 5 + [2] + [1] * 5)
    probe = fit_probe(features, rare, 3, TASK)
    assert len(probe.table) == len(REGULARIZATIONS) and probe.weight.shape == (3, 6)
    single = fit_probe(features[:3], np.array([0, 1, 2]), 3, TASK)
    assert single.cv_metric is None and single.table == [] and not TASK.folds(np.array([0, 1, 2]), 5)
    without = cross_validate(features, np.array([0] * 10 + [1]), 2, TASK)
    assert all(np.isfinite(entry["loss"]) for entry in without)


def test_score_of_a_head() -> None:
    weight, bias = np.eye(2, dtype=np.float32), np.zeros(2, np.float32)
    features = np.array([[9, 0], [0, 9], [9, 0]], np.float32)
    correct, loss = score_head(weight, bias, features, np.array([0, 1, 1]), TASK)
    assert correct.tolist() == [True, True, False]
    assert loss == pytest.approx(3.0, abs=1e-3)


def test_neighbours_vote_by_their_similarity() -> None:
    """Counted one by one."""
    features, labels = blobs(3, 200)
    train, other = features[:120], features[120:]
    voted = outputs_of_neighbours(train, labels[:120], other, int(labels.max()) + 1, TASK).argmax(1)
    cosine = (other / np.linalg.norm(other, axis=1, keepdims=True)) @ (
        train / np.linalg.norm(train, axis=1, keepdims=True)
    ).T
    for row, found in zip(cosine, voted, strict=True):
        nearest = np.argsort(-row)[:20]
        votes = [sum(np.exp(row[at] / 0.07) for at in nearest if labels[at] == label) for label in range(3)]
        assert found == int(np.argmax(votes))
    assert 0.4 < float((voted == labels[120:]).mean()) < 1.0
