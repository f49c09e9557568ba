"""The advice to unfreeze more: given with its evidence, and not without."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from stages.finetune import Finetune, FinetuneConfig
from stages.finetune.advice import FAR_GAIN, LOW_CKA, advise, note_on_batches, share_with_positive
from stages.finetune.notes import notes_of
from tests.stages.small_run import made_up_data, make_context


def measured(**changes: Any) -> dict[str, Any]:
    """As MiniLM on the senses of words with adapters."""
    values: dict[str, Any] = {
        "strategy": "lora", "validation_metric": 0.8318, "probe_validation_metric": 0.6875, "diverged": None,
        "gain_over_probe": {"difference": 0.1443, "low": 0.1137, "high": 0.175, "confidence": 0.95},
        "forgetting": [
            {"layer": "layer.4", "cka": 0.94, "movement": 0.01}, {"layer": "layer.5", "cka": 0.8, "movement": 0.02}
        ],
        "against_raw": {"warning": ""}, "backbone_learning_rates": [5e-4, 5e-4], "head_learning_rate": 1e-3,
    }  # fmt: skip
    return {**values, **changes}


def test_far_data_are_told_with_the_evidence_and_what_to_do() -> None:
    (said,) = advise(measured())
    for part in ("0.8318", "0.6875", "+0.1443", "layer.5", "CKA 0.80", "Unfreeze more", "finetune.strategy: lp-ft"):
        assert part in said


def test_where_all_weights_learn_the_lower_layers_may_learn_faster() -> None:
    slow = measured(strategy="lp-ft", backbone_learning_rates=[1e-5, 9e-4])
    (said,) = advise(slow)
    assert "100 times more slowly" in said and "finetune.layer_rate_ratio: 10" in said
    assert advise(measured(strategy="full", backbone_learning_rates=[1e-4, 9e-4])) == []  # nothing is left to unfreeze


@pytest.mark.parametrize(
    "changes",
    [
        {"gain_over_probe": {"difference": 0.1, "low": FAR_GAIN - 1e-6, "high": 0.2, "confidence": 0.95}},
        {"forgetting": [{"layer": "top", "cka": LOW_CKA, "movement": 0.1}]},
        {"forgetting": []},
        {"forgetting": [{"layer": "top", "cka": None, "movement": 0.1}]},
        {"gain_over_probe": None},
        {"diverged": "the loss is nan"},
        {"against_raw": None, "gain_over_probe": None},
    ],
    ids=["small gain", "alike", "not measured", "no CKA", "no gain", "diverged", "nothing"],
)
def test_it_is_silent_without_evidence(changes: dict[str, Any]) -> None:
    assert advise(measured(**changes)) == []


def test_transfer_that_does_not_pay_says_unfreeze_more_once(tmp_path: Path) -> None:
    # Colours: the mean of a channel tells them to a linear model, random features less so.
    data = made_up_data("image", counts={"train": 36, "validation": 150})
    result = Finetune().run(make_context(tmp_path, "out", data), FinetuneConfig(strategy="feature-extraction"))
    found = result.measurements
    assert found["against_raw"]["gain"]["high"] < 0
    (said,) = found["advice"]
    assert "Unfreeze more" in said and said == found["against_raw"]["warning"]
    assert sum("Unfreeze more" in note for note in notes_of(found)) == 1


def test_the_share_with_a_positive_is_that_of_all_batches() -> None:
    labels = [0, 0, 0, 1, 1, 2, 3]
    for size in (2, 3, 5, 7, 9):
        batches = list(combinations(labels, min(size, len(labels))))
        found = [batch.count(label) > 1 for batch in batches for label in batch]
        assert share_with_positive(labels, size) == pytest.approx(sum(found) / len(found))
    assert share_with_positive(labels, 1) == 0


def test_batches_that_teach_little_say_how_large_they_must_be() -> None:
    many = [index // 4 for index in range(2000)]
    assert note_on_batches(many, 32).startswith("in a batch of 32 5% of the examples have")
    assert note_on_batches(many, 32).endswith("write finetune.batch_size: 512")
    assert share_with_positive(many, 256) < 0.5 <= share_with_positive(many, 512)
    assert "teach nothing" not in note_on_batches(many, 512)
    assert note_on_batches(list(range(50)), 8).endswith("give more examples a label in common")


@pytest.mark.parametrize("strategy", ["lora", "feature-extraction"])
def test_training_of_embeddings_notes_its_batches(strategy: Any, tmp_path: Path) -> None:
    context = replace(make_context(tmp_path, "out", made_up_data("image")), task="image-features")
    result = Finetune().run(context, FinetuneConfig(strategy=strategy, epochs=1, batch_size=6))
    said = [note for note in result.notes if "in a batch of 6 " in note]
    assert len(said) == (strategy == "lora")
