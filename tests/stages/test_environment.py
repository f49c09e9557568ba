"""What a machine is taken to be."""

from __future__ import annotations

import os

import pytest

from stages.environment import usable_threads


def test_training_takes_no_more_cores_than_omp_num_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    for asked, given in (("", 4), ("3", 3), ("99", 4), ("0", 1), ("2,1", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert usable_threads() == given
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert usable_threads() == 4
