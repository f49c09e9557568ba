"""The four scores, each against a slow computation derived on its own, and against cases with a closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from models.errors import DataError
from models.tasks.single_label import SingleLabel
from pipeline.progress import QuietProgress
from stages.features.probe import fit_probe, score_head
from stages.transferability.scores import (
    REGULARIZATIONS,
    SMALLEST_CLASS,
    choose_regularization,
    h_score,
    judge_neighbours,
    judge_probe,
    log_me,
    make_folds,
)

TASK = SingleLabel()


def made_up(examples: int, features: int, classes: int = 3, signal: float = 1.0, seed: int = 0) -> Any:
    """Gaussian classes around random centres: float32 (examples, features), int64 (examples,)."""
    random = np.random.default_rng(seed)
    labels = np.arange(examples) % classes
    centres = random.normal(size=(classes, features)) * signal
    made = centres[labels] + random.normal(size=(examples, features)) * np.linspace(0.5, 2, features)
    return made.astype(np.float32), labels


# --- LogME ------------------------------------------------------------------------------------------


def evidence_by_search(features: np.ndarray, target: np.ndarray) -> float:
    """max over α and β of log N(y; 0, I/β + F Fᵀ/α) / n: both searched for, with the dense covariance."""
    from scipy.optimize import minimize
    from scipy.stats import multivariate_normal

    gram, identity = features @ features.T, np.eye(len(features))

    def loss(logs: np.ndarray) -> float:
        alpha, beta = np.exp(np.clip(logs, -30, 30))
        covariance = identity / beta + gram / alpha
        return -float(multivariate_normal(np.zeros(len(target)), covariance).logpdf(target))

    options = {"xatol": 1e-7, "fatol": 1e-9, "maxiter": 2000}
    found = [minimize(loss, (a, b), method="Nelder-Mead", options=options).fun for a in (0.0, 4.0) for b in (0.0, 3.0)]
    return -min(found) / len(target)


def evidence_by_iteration(features: np.ndarray, target: np.ndarray) -> float:
    """The fixed-point iteration of You et al. 2021 (algorithm 1), with matrices instead of eigenvalues."""
    samples, width = features.shape
    alpha = beta = 1.0
    for _ in range(3000):
        precision = alpha * np.eye(width) + beta * features.T @ features
        mean = beta * np.linalg.solve(precision, features.T @ target)
        gamma = beta * np.trace(np.linalg.solve(precision, features.T @ features))
        alpha, beta = gamma / (mean @ mean), (samples - gamma) / ((features @ mean - target) ** 2).sum()
    precision = alpha * np.eye(width) + beta * features.T @ features
    mean = beta * np.linalg.solve(precision, features.T @ target)
    square = beta * ((features @ mean - target) ** 2).sum() + alpha * mean @ mean
    logs = samples * math.log(beta) + width * math.log(alpha) - samples * math.log(2 * math.pi)
    return float((logs - square - np.linalg.slogdet(precision)[1]) / 2 / samples)


@pytest.mark.parametrize("shape", [(30, 4), (16, 24)])
def test_log_me_is_the_largest_evidence(shape: tuple[int, int]) -> None:
    features, labels = made_up(*shape)
    dense = features.astype(np.float64)
    expected = np.mean([evidence_by_search(dense, (labels == label).astype(float)) for label in range(3)])
    assert log_me(features, labels) == pytest.approx(expected, abs=1e-5)


def test_log_me_is_where_the_iteration_of_the_paper_ends() -> None:
    features, labels = made_up(60, 5)
    dense = features.astype(np.float64)
    expected = np.mean([evidence_by_iteration(dense, (labels == label).astype(float)) for label in range(3)])
    assert log_me(features, labels) == pytest.approx(expected, abs=1e-6)


def test_log_me_of_features_that_say_nothing_is_that_of_noise() -> None:
    """y ~ N(0, 1/β) alone: log p / n = −log(2πe share) / 2, with the share of ones of each class."""
    labels = np.array([0] * 10 + [1] * 30)
    expected = np.mean([-math.log(2 * math.pi * math.e * share) / 2 for share in (0.25, 0.75)])
    assert log_me(np.zeros((40, 3), np.float32), labels) == pytest.approx(expected, abs=1e-9)


def test_log_me_knows_neither_scale_nor_rotation() -> None:
    features, labels = made_up(40, 6)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    assert log_me(features * 250, labels) == pytest.approx(log_me(features, labels), abs=1e-5)
    assert log_me(features @ rotation, labels) == pytest.approx(log_me(features, labels), abs=1e-5)


# --- H-score ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(60, 5), (20, 50)])
def test_h_score_by_its_definition(shape: tuple[int, int]) -> None:
    from sklearn.covariance import LedoitWolf

    features, labels = made_up(*shape)
    dense = features.astype(np.float64)
    estimate = LedoitWolf().fit(dense)
    means = np.stack([dense[labels == label].mean(0) for label in labels])  # E[f | y] of each example
    between = np.cov(means, rowvar=False, bias=True)
    expected = np.trace(np.linalg.inv(estimate.covariance_) @ ((1 - estimate.shrinkage_) * between))
    assert 0 < estimate.shrinkage_ < 1
    assert h_score(features, labels) == pytest.approx(expected, rel=1e-6)


def shrinkage_by_loops(features: np.ndarray) -> float:
    """Ledoit & Wolf 2004, equations of section 3.3: b² / d² from sums over examples."""
    centred = features - features.mean(0)
    samples, width = centred.shape
    covariance = centred.T @ centred / samples
    target = np.trace(covariance) / width * np.eye(width)
    spread = ((covariance - target) ** 2).sum()
    noise = sum(((np.outer(row, row) - covariance) ** 2).sum() for row in centred) / samples**2
    return float(min(noise, spread) / spread)


def test_the_shrinkage_inside_the_h_score_is_that_of_ledoit_and_wolf() -> None:
    features, labels = made_up(25, 8)
    dense = features.astype(np.float64)
    alpha = shrinkage_by_loops(dense)
    covariance = np.cov(dense, rowvar=False, bias=True)
    shrunk = (1 - alpha) * covariance + alpha * np.trace(covariance) / 8 * np.eye(8)
    means = np.stack([dense[labels == label].mean(0) for label in labels])
    expected = (1 - alpha) * np.trace(np.linalg.solve(shrunk, np.cov(means, rowvar=False, bias=True)))
    assert h_score(features, labels) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("each", [4, 100])
def test_h_score_of_labels_as_features_has_a_closed_form(each: int) -> None:
    """C balanced one-hot classes: Σ = Σ_B has C − 1 eigenvalues 1/C, its trace over C features is (C − 1)/C², and
    Ledoit and Wolf's α is C(C − 2)/n."""
    classes = 5
    labels = np.arange(classes * each) % classes
    alpha = classes * (classes - 2) / len(labels)
    kept = (1 - alpha) / classes
    expected = (classes - 1) * kept / (kept + alpha * (classes - 1) / classes**2)
    found = h_score(np.eye(classes, dtype=np.float32)[labels], labels)
    assert found == pytest.approx(expected, rel=1e-9)
    assert found < classes - 1


def test_h_score_knows_neither_place_nor_scale_nor_rotation() -> None:
    features, labels = made_up(40, 6)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    assert h_score(7 * (features @ rotation) + 3, labels) == pytest.approx(h_score(features, labels), rel=1e-4)


def test_h_score_of_features_that_do_not_vary_is_zero() -> None:
    assert h_score(np.ones((12, 3), np.float32), np.arange(12) % 3) == 0


@pytest.mark.parametrize("score", [h_score, log_me])
def test_a_score_falls_with_the_signal_and_is_lowest_for_shuffled_labels(score: Any) -> None:
    values = []
    for signal in (2.0, 0.7, 0.2):
        features, labels = made_up(200, 20, signal=signal)
        values.append(score(features, labels))
    values.append(score(features, np.random.default_rng(0).permutation(labels)))
    assert values == sorted(values, reverse=True)


# --- probe ------------------------------------------------------------------------------------------


def test_the_probe_is_the_minimum_of_its_objective() -> None:
    """C Σ cross-entropy + ‖W‖²/2 on standardised features, minimised by scipy from its definition."""
    from scipy.optimize import minimize
    from scipy.special import log_softmax, softmax

    features, labels = made_up(45, 4, signal=0.5)
    scaled = (features - features.mean(0)) / features.std(0)

    def logits(flat: np.ndarray) -> np.ndarray:
        return scaled @ flat[:12].reshape(4, 3) + flat[12:]

    def loss(flat: np.ndarray) -> float:
        return float(-0.3 * log_softmax(logits(flat), 1)[range(45), labels].sum() + (flat[:12] ** 2).sum() / 2)

    found = minimize(loss, np.zeros(15), method="BFGS", options={"gtol": 1e-6})
    expected = softmax(logits(found.x), axis=1)
    probe = fit_probe(features, labels, 3, TASK, 0.3)
    assert softmax(features @ probe.weight.T + probe.bias, axis=1) == pytest.approx(expected, abs=2e-3)


def test_the_probe_never_sees_what_it_is_judged_on() -> None:
    """With more features than examples it can learn any labels by heart; held out, random ones stay random."""
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(200, 400)).astype(np.float32), random.permutation(np.arange(200) % 2)
    probe = fit_probe(features, labels, 2, TASK, 1.0)
    assert score_head(probe.weight, probe.bias, features, labels, TASK)[0].all()
    judged = judge_probe(features, labels, make_folds(labels, 0), 0, QuietProgress(), "x")
    assert 0.35 < judged.accuracy < 0.65  # ± 4 standard deviations


def test_the_probe_is_judged_fold_by_fold() -> None:
    features, labels = made_up(60, 6, signal=0.4)
    folds = make_folds(labels, 0)
    judged = judge_probe(features, labels, folds, 0, QuietProgress(), "x")
    for learn, judge in folds:
        strength = choose_regularization(features[learn], labels[learn], 3, 0)
        probe = fit_probe(features[learn], labels[learn], 3, TASK, strength)
        expected, _ = score_head(probe.weight, probe.bias, features[judge], labels[judge], TASK)
        assert (judged.correct[judge] == expected).all()
    assert judged.accuracy == judged.correct.mean()


def test_regularisation_is_strong_for_noise_and_weak_for_signal() -> None:
    random = np.random.default_rng(0)
    labels = np.arange(120) % 3
    noise = random.normal(size=(120, 60)).astype(np.float32)
    assert choose_regularization(noise, labels, 3, 0) == REGULARIZATIONS[0]
    clear, labels = made_up(120, 10, signal=3.0)
    assert choose_regularization(clear, labels, 3, 0) >= 1.0


def test_a_rare_class_is_no_obstacle() -> None:
    features, labels = made_up(40, 5, classes=2)
    labels[0] = 2  # one example: in some folds there is nothing of it to learn from, in one nothing to judge
    folds = make_folds(labels, 0)
    judged = judge_probe(features, labels, folds, 0, QuietProgress(), "x")
    assert not judged.correct[0] and judged.accuracy > 0.5
    assert not judge_neighbours(features, labels, folds).correct[0]
    assert math.isfinite(h_score(features, labels)) and math.isfinite(log_me(features, labels))


# --- neighbours -------------------------------------------------------------------------------------


def test_neighbours_vote_as_in_the_definition() -> None:
    features, labels = made_up(90, 6, signal=0.6)
    folds = make_folds(labels, 0)
    judged = judge_neighbours(features, labels, folds)
    unit = features.astype(np.float64)
    unit /= np.sqrt((unit**2).sum(1, keepdims=True))
    for learn, judge in folds:
        for one in judge:
            cosines = sorted(((float(unit[one] @ unit[other]), int(labels[other])) for other in learn), reverse=True)
            votes = [0.0, 0.0, 0.0]
            for cosine, label in cosines[:20]:
                votes[label] += math.exp(cosine / 0.07)
            assert judged.correct[one] == (votes.index(max(votes)) == labels[one])
    assert 0.4 < judged.accuracy < 1


# --- folds ------------------------------------------------------------------------------------------


def test_folds_are_disjoint_stratified_and_the_same_again() -> None:
    labels = np.array([0] * 50 + [1] * 25 + [2] * 10)
    folds = make_folds(labels, 3)
    assert sorted(np.concatenate([judge for _, judge in folds])) == list(range(85))
    for learn, judge in folds:
        assert not set(learn) & set(judge) and len(learn) + len(judge) == 85
        assert np.bincount(labels[judge]).tolist() == [10, 5, 2]
    for (_, one), (_, again), (_, other) in zip(folds, make_folds(labels, 3), make_folds(labels, 4), strict=True):
        assert (one == again).all() and (one != other).any()


def test_too_few_examples_are_refused() -> None:
    enough = [0] * SMALLEST_CLASS + [1] * SMALLEST_CLASS
    folds = make_folds(np.array(enough), 0)
    features, _ = made_up(len(enough), 3, classes=2)
    judge_probe(features, np.array(enough), folds, 0, QuietProgress(), "x")  # the smallest that is taken works
    with pytest.raises(DataError, match="two classes with 4 examples"):
        make_folds(np.array([*enough[1:], 2]), 0)
    with pytest.raises(DataError, match="in 1 classes"):
        make_folds(np.zeros(30, np.int64), 0)
