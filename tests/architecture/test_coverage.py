"""docs/coverage.md and the table behind it: what `make sweep` measures is what there is, and the page says so."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import timm

from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    """benchmarks/sweep.py, which is no package."""
    return load_script("sweep")


def test_every_family_of_timm_is_in_the_table_by_one_of_its_members(sweep: ModuleType) -> None:
    found = {one.name: one.member for one in sweep.architectures() if one.library == "timm"}
    assert set(found) == set(timm.list_modules())
    assert all(member in timm.list_models(module=family) for family, member in found.items())


def test_every_audio_encoder_that_is_known_is_in_the_table(sweep: ModuleType) -> None:
    from models.backbones.hf_audio import FORMS

    assert {one.name for one in sweep.architectures() if one.modality == "audio"} == set(FORMS)


def test_the_page_has_a_measured_row_for_each_architecture(sweep: ModuleType) -> None:
    text = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    rows = {section.partition("\n")[0]: re.findall(r"^\| ([\w-]+) \|", section, re.MULTILINE) for section in sections}
    wanted: dict[str, list[str]] = {}
    for one in sweep.architectures():
        wanted.setdefault(f"{sweep.LIBRARIES[one.library]}: {one.modality}", []).append(one.name)
    assert {title: names[2:] for title, names in rows.items()} == wanted  # behind the head of the table
    assert "| not measured |" not in text


def test_a_page_tells_what_holds_and_why_the_rest_does_not(sweep: ModuleType) -> None:
    first, second = sweep.architectures()[:2]
    cells = dict.fromkeys(sweep.COLUMNS, ("yes", ""))
    cells["INT8"] = ("no", "a reason")
    rows = {first.key: {"date": "2026-01-01", "cells": cells, "size": 64, "parameters": 1_500_000}}
    text = sweep.page([first, second], rows)
    assert f"| {first.name} | {first.member}, 1.5 M, 64 px | ✓ | ✓ | ✓ | ✓ | ✗ | ✓ |" in text
    assert f"- {first.name}, INT8: a reason" in text
    assert "| timm: image | 2 | 1 | 1 | 1 | 1 | 1 | 0 | 1 |" in text
    assert f"| {second.name} | {second.member} | not measured |" in text


@pytest.mark.parametrize("key", ["timm image efficientnet", "hf text bert"])
def test_one_architecture_goes_through(sweep: ModuleType, key: str) -> None:
    (architecture,) = (one for one in sweep.architectures() if one.key == key)
    cells: dict[str, tuple[str, str]] = {}
    sweep.measure(architecture, lambda column, verdict, detail: cells.update({column: (verdict, detail)}))
    assert set(cells) == {"facts", *sweep.COLUMNS}
    assert {column: cells[column][0] for column in sweep.COLUMNS[:-1]} == dict.fromkeys(sweep.COLUMNS[:-1], "yes")


def test_a_backbone_that_cannot_be_had_is_a_reason_not_a_crash(sweep: ModuleType) -> None:
    cells: dict[str, tuple[str, str]] = {}
    sewn = sweep.Architecture("t5", "hf", "image", "t5", {"d_model": 16, "num_layers": 1, "d_ff": 16, "vocab_size": 8})
    sweep.measure(sewn, lambda column, verdict, detail: cells.update({column: (verdict, detail)}))
    assert cells["finetune"][0] == "no" and "does not run on image" in cells["finetune"][1]
    assert set(cells) == {"finetune"}
