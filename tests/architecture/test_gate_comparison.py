"""docs/gate-comparison.md and the rules behind it: what `make gate-comparison` measured is what the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from models.tasks import task_of
from stages.validate.self_test.defects import CONTROLS, DEFECTS
from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def comparison() -> ModuleType:
    """benchmarks/gate_comparison.py, which is no package."""
    return load_script("gate_comparison")


@pytest.fixture(scope="module")
def results(comparison: ModuleType) -> dict[str, Any]:
    """What was measured."""
    found: dict[str, Any] = json.loads(comparison.RESULTS.read_text(encoding="utf-8"))
    return found


def test_the_page_is_made_of_what_was_measured(comparison: ModuleType, results: dict[str, Any]) -> None:
    assert comparison.PAGE.read_text(encoding="utf-8") == comparison.page(results), "run `make gate-comparison`"


def test_every_variant_has_a_row_for_each_backbone(comparison: ModuleType, results: dict[str, Any]) -> None:
    text = comparison.PAGE.read_text(encoding="utf-8")
    names = {one.name for one in (*DEFECTS, *CONTROLS)}
    for recipe, title in comparison.BACKBONES.items():
        rows = results[recipe]["rows"]
        assert names <= {row["name"] for row in rows}
        assert sum(row["place"] == "candidate" for row in rows) >= 3
        judged = [row for row in rows if row["kind"] != "none"]
        assert len(judged) >= 14
        section = text.split(f"## {title}\n")[1].split("\n## ")[0]
        table = section.split("| variant |")[1]
        lines = [line for line in table.splitlines() if re.match(r"\| (?!-)", line) and "ours, FP32" not in line]
        assert len(lines) == len(judged)
        assert all(set(row["peers"]) == set(comparison.PEERS) for row in judged)


def arrays(*values: float) -> dict[str, np.ndarray]:
    return {"logits": np.array([values], np.float32)}


def test_optimum_compares_names_shapes_and_values(comparison: ModuleType) -> None:
    wanted = arrays(1, 2)
    assert not comparison.optimum_objects(wanted, arrays(1.0005, 2), 1e-3)
    assert comparison.optimum_objects(wanted, arrays(1.0005, 2), 1e-4)
    assert comparison.optimum_objects(wanted, {"other": wanted["logits"]}, 1e-3)
    assert comparison.optimum_objects(wanted, arrays(1, 2, 3), 1e-3)
    assert comparison.optimum_objects(wanted, arrays(np.nan, 2), 1e-3)


def test_torch_warns_at_its_limits_and_passes_nan(comparison: ModuleType) -> None:
    wanted = arrays(1, 2)
    assert not comparison.torch_objects(wanted, arrays(1.004, 2))
    assert comparison.torch_objects(wanted, arrays(1.006, 2))
    assert comparison.torch_objects(arrays(0.001), arrays(0.0012))  # a fifth of it
    assert not comparison.torch_objects(wanted, {"other": wanted["logits"]})
    assert not comparison.torch_objects(arrays(np.nan, 2), arrays(np.nan, 2))


def test_mlperf_looks_at_the_metric_alone(comparison: ModuleType) -> None:
    class Judge:
        task = task_of("image-classification")
        targets = np.zeros(100, np.int64)

    right = np.tile(np.array([[1.0, 0.0]], np.float32), (100, 1))
    wrong = right.copy()
    wrong[:2] = wrong[:2, ::-1]
    assert not comparison.mlperf_objects({"logits": right}, {"logits": right / 100}, Judge)
    assert comparison.mlperf_objects({"logits": right}, {"logits": wrong}, Judge)
    wrong[0] = right[0]
    assert not comparison.mlperf_objects({"logits": right}, {"logits": wrong}, Judge)
    assert comparison.mlperf_objects({"logits": right}, {"other": right}, Judge)


def test_polygraphy_takes_a_renamed_output_for_the_one_that_is_missing(comparison: ModuleType) -> None:
    pytest.importorskip("polygraphy")
    wanted = arrays(1, 2)
    assert not comparison.polygraphy_objects(wanted, arrays(1, 2))
    assert comparison.polygraphy_objects(wanted, arrays(1.0001, 2))
    assert not comparison.polygraphy_objects(wanted, {"other": wanted["logits"]})


def test_a_defect_is_stopped_where_its_loosest_gates_stop_it(comparison: ModuleType) -> None:
    peers = dict.fromkeys(comparison.PEERS, True)
    fail, left_open = [["agreement", "fail"]], [["accuracy drop", "inconclusive"]]
    said = {"fp32": fail, "fp16": left_open, "int8": []}
    row = {"kind": "defect", "proven": said, "observed": {"fp32": fail, "int8": []}, "peers": peers}
    assert comparison.cells_of(row) == ["✓", "?", "–", "–", "✓", "✓", "✓", "✓"]
    good = {"kind": "good", "proven": {"int8": left_open}, "observed": {"fp32": fail, "int8": []}, "peers": peers}
    assert comparison.cells_of(good) == ["", "", "?", "**!**", "**!**", "**!**", "**!**", "**!**"]
    assert comparison.sum_of(["✓", "?", "–"]) == "2 of 3 (1 ?)"
    assert not comparison.caught_in_all(row, "proven")


def test_single_inputs_do_not_see_the_preprocessing(comparison: ModuleType) -> None:
    """What others give tensors to is the graph; the samples go through what is wrong before it."""
    from stages.validate.self_test.run import outputs_of
    from stages.validate.self_test.subject import Mutant
    from tests.stages.test_self_test import setup_of

    setup, _ = setup_of("text-classification")
    dummy = {
        "input_ids": np.array([[1, 5, 6, 7], [1, 8, 9, 4]], np.int64),
        "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0]], np.int64),
    }
    recorder = comparison.Recorder(dummy, dummy)
    reverse = Mutant(inputs=lambda given: {name: value[:, ::-1].copy() for name, value in given.items()})
    plain = recorder(Mutant(), setup, "self-test: unchanged")
    turned = recorder(reverse, setup, "self-test 1/30: reverse")
    assert np.array_equal(plain.values, outputs_of(Mutant(), setup, "").values)
    assert np.array_equal(turned.values, outputs_of(reverse, setup, "").values)
    assert not np.allclose(plain.values, turned.values, atol=1e-6)
    kept = recorder.kept
    assert set(kept) == {"unchanged", "reverse"} and not kept["reverse"].errors
    assert np.array_equal(kept["unchanged"].dummy["logits"], kept["reverse"].dummy["logits"])
