"""Weights beside the graph, through the whole chain: a tiny network above a lowered limit, and one of 3 GB."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto

import models.onnx_files as onnx_files
from stages.artifact import Artifact
from stages.base import StageContext
from stages.export import Export, ExportConfig
from stages.quantize import Quantize, QuantizeConfig
from tests.stages.chain import artifact_of, context_of, made, test_split

TASK = "text-classification"
LOOSE: dict[str, Any] = {"max_metric_drop": 1.0, "min_agreement": 0.0}


def context_at(folder: Path, artifacts: dict[str, Artifact]) -> StageContext:
    """Made-up texts in every split that a stage reads."""
    examples = test_split(TASK, 64)
    context = context_of(folder / "out", artifacts, TASK, examples[:48])
    splits = {"train": (), "validation": examples[:48], "calibration": examples[48:], "test": examples[:48]}
    (folder / "resume").mkdir()
    return replace(context, resume=folder / "resume", data=replace(context.data, splits=splits))


def locations(path: Path) -> set[str]:
    """The files that a graph names."""
    model = onnx.load(path, load_external_data=False)
    return {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }


@pytest.mark.parametrize("keep_float", ["none", "auto"])
def test_weights_beside_the_graph_go_through_the_whole_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_float: str
) -> None:
    artifacts = {"merge-lora": made(TASK)["merge-lora"]}
    # fp32 has 26 kB of weights in this network; INT8 above 3 kB, too, where nodes stay in floating point.
    monkeypatch.setattr(onnx_files, "LARGEST_FILE_BYTES", 3_000)
    monkeypatch.setattr(onnx_files, "SMALLEST_OUTSIDE_BYTES", 256)
    budget = LOOSE if keep_float == "none" else {"max_metric_drop": 0.0, "min_agreement": 1.0, "min_int8_share": 0.0}
    stages: list[tuple[str, Any, Any]] = [
        ("export", Export, ExportConfig()),
        ("quantize", Quantize, QuantizeConfig.model_validate({"keep_float": keep_float, **budget})),
    ]
    for name, stage, config in stages:
        context = context_at(tmp_path / name, artifacts)
        result = stage().run(context, config)
        assert name == "quantize" or all(gate.passed for gate in result.gates), result.gates
        artifacts[name] = artifact_of(name, context.output)
        for path in context.output.glob("*.onnx"):
            assert locations(path) == {f"{path.name}.data"}, path
            onnx.checker.check_model(str(path), full_check=True)
    same = made(TASK)
    for name in ("onnx-fp32.onnx", "onnx-fp16.onnx"):
        large, small = (onnx.load(where["export"].file(name)) for where in (artifacts, same))
        values = [{one.name: onnx.numpy_helper.to_array(one).tobytes() for one in model.graph.initializer}
                  for model in (large, small)]  # fmt: skip
        assert values[0] == values[1]


def test_a_small_graph_is_one_file(tmp_path: Path) -> None:
    names = set(made(TASK)["export"].manifest["files"])
    assert names == {"candidates.json", "onnx-fp32.onnx", "onnx-fp16.onnx"}
