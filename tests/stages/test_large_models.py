"""Weights beside the graph, through the whole chain: a tiny network above a lowered limit, and one of 3 GB."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto

import models.onnx_files as onnx_files
from models.bundle import open_bundle
from models.errors import IntegrityError
from models.process_memory import peak_memory_bytes, reset_peak_memory
from stages.artifact import Artifact
from stages.base import StageContext
from stages.export import Export, ExportConfig
from stages.package import Package, PackageConfig
from stages.quantize import Quantize, QuantizeConfig
from stages.quantize.bench import Workbench
from stages.quantize.schemes import Plan
from stages.quantize.stage import BACKENDS, NO_REPAIRS
from stages.validate import Validate, ValidateConfig
from tests.models.tiny import BERT, saved_checkpoint, text_backbone
from tests.stages.chain import artifact_of, context_of, made, temporary_folder, test_split

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


def test_weights_beside_the_graph_go_through_the_whole_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 has 26 kB of weights in this network, and INT8 above 3 kB."""
    small = made(TASK)["export"]  # made below the limit
    monkeypatch.setattr(onnx_files, "LARGEST_FILE_BYTES", 3_000)
    monkeypatch.setattr(onnx_files, "SMALLEST_OUTSIDE_BYTES", 256)
    artifacts = run_chain(tmp_path, {"merge-lora": made(TASK)["merge-lora"]}, ExportConfig())
    for name in ("export", "quantize"):
        paths = sorted(artifacts[name].folder.glob("*.onnx"))
        assert len(paths) == 2
        for path in paths:
            assert locations(path) == {f"{path.name}.data"}
            onnx.checker.check_model(str(path), full_check=True)
    for name in ("onnx-fp32.onnx", "onnx-fp16.onnx"):  # nothing but the place has changed
        assert not (small.folder / f"{name}.data").exists()
        assert numbers_of(onnx.load(artifacts["export"].file(name))) == numbers_of(onnx.load(small.file(name)))
    check_bundle(artifacts["package"].folder / "bundle")


@pytest.mark.parametrize(
    ("backend", "kept", "left", "said"),
    [
        ("onnxruntime", ["int8-dynamic"], "fp8", "is not made of a graph above 2 GB, int8-dynamic, int8-static"),
        ("modelopt", [], "fp8", "modelopt takes no graph above 2 GB"),
    ],
)
def test_a_scheme_for_smaller_graphs_is_left_out_and_the_others_stay(
    backend: str, kept: list[str], left: str, said: str, tmp_path: Path, low_limit: None, monkeypatch: Any
) -> None:
    monkeypatch.setitem(BACKENDS["onnxruntime"], "fp8", refuse)
    config = QuantizeConfig.model_validate({"backend": backend, "schemes": [left, *kept], **LOOSE})
    result = Quantize().run(context_at(tmp_path, light_export()), config)
    out, *others = result.measurements["candidates"]
    assert not out["accepted"] and said in out["reason"] and any(said in note for note in result.notes)
    assert [one["name"] for one in others if one["accepted"]] == [f"onnx-{one}" for one in kept]
    (gate,) = result.gates
    assert gate.passed == bool(kept) and (kept or said in gate.message)


def test_the_search_runs_on_graphs_without_their_weights(tmp_path: Path, low_limit: None) -> None:
    """A budget that no INT8 is inside of: every rung is tried, and what is shown is the best of them."""
    asked = {"schemes": ["int8-symmetric"], "max_metric_drop": 0.0, "min_agreement": 1.0, "min_int8_share": 0.99}
    result = Quantize().run(context_at(tmp_path, light_export()), QuantizeConfig.model_validate(asked))
    (candidate,) = result.measurements["candidates"]
    ranked, tried = candidate["sensitivity"], candidate["tried"]
    assert len(ranked) > 4 and all(one["harm"] >= 0 for one in ranked) and ranked[0]["harm"] > 0
    shares = [one["narrow_share"] for one in tried]
    assert len(tried) > 2 and shares == sorted(shares, reverse=True) and shares[0] > 1.5 * shares[-1]


@pytest.fixture
def low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts as large: this network has 26 kB of weights in fp32, and above 3 kB in INT8."""
    monkeypatch.setattr(onnx_files, "LARGEST_FILE_BYTES", 3_000)
    monkeypatch.setattr(onnx_files, "SMALLEST_OUTSIDE_BYTES", 256)


@functools.cache
def light_export() -> dict[str, Artifact]:
    """What quantize reads, its weights beside its graph: made under the lowered limit."""
    inputs = {"merge-lora": made(TASK)["merge-lora"]}
    context = context_at(temporary_folder() / "export", inputs)
    Export().run(context, ExportConfig(precisions=("fp32",)))
    return inputs | {"export": artifact_of("export", context.output)}


def refuse(bench: Workbench) -> Plan:
    """In place of a plan, which calibrates."""
    raise AssertionError("it was planned")


def numbers_of(model: onnx.ModelProto) -> dict[str, bytes]:
    """The bytes of every weight."""
    return {one.name: onnx.numpy_helper.to_array(one).tobytes() for one in model.graph.initializer}


def run_chain(folder: Path, artifacts: dict[str, Artifact], export: ExportConfig) -> dict[str, Artifact]:
    """export → quantize → validate → package; every artifact by its stage."""
    gates = {"min_samples": 24, "min_sqnr_db": -50, "min_agreement_int8": 0, **LOOSE}
    stages: list[tuple[str, Any, Any]] = [
        ("export", Export, export),
        ("quantize", Quantize, QuantizeConfig.model_validate({"calibration_samples": 8, **LOOSE})),
        ("validate", Validate, ValidateConfig.model_validate({"latency_calls": 20, "gates": gates})),
        ("package", Package, PackageConfig(name="large", include="all-passed")),
    ]
    for name, stage, config in stages:
        context = context_at(folder / name, artifacts)
        reset_peak_memory()
        result = stage().run(context, config)
        assert (NO_REPAIRS in result.notes) == (name == "quantize")
        assert all(gate.passed for gate in result.gates), [gate.message for gate in result.gates]
        artifacts[name] = artifact_of(name, context.output)
        artifacts[name].manifest["peak_memory_bytes"] = peak_memory_bytes()
    return artifacts


def check_bundle(bundle: Path) -> None:
    """It verifies, holds the weights as plain files, and does not verify with one bit of them changed."""
    weights = sorted((bundle / "model").glob("*.data"))
    assert weights and not any(path.is_symlink() or path.stat().st_nlink > 1 for path in weights)
    with open_bundle(bundle) as opened:
        assert all(check.ok for check in opened.verify().checks)
    with weights[0].open("r+b") as stream:
        first = stream.read(1)
        stream.seek(0)
        stream.write(bytes([first[0] ^ 1]))
    with pytest.raises(IntegrityError, match=weights[0].name):
        open_bundle(bundle)


@pytest.mark.large
@pytest.mark.timeout(3 * 3600)
def test_a_network_of_3_gb_takes_about_three_times_its_size(tmp_path: Path) -> None:
    """BERT with 4 layers of width 4096: 3.26 GB in FP32."""
    wide = {"hidden_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 16, "intermediate_size": 16384}
    saved_checkpoint(tmp_path / "merge-lora" / "checkpoint", text_backbone({**BERT, **wide, "vocab_size": 2000}))
    size = (tmp_path / "merge-lora" / "checkpoint" / "model.safetensors").stat().st_size
    assert size > 3e9
    artifacts = {"merge-lora": artifact_of("merge-lora", tmp_path / "merge-lora")}
    artifacts = run_chain(tmp_path, artifacts, ExportConfig())
    peaks = {name: artifacts[name].manifest["peak_memory_bytes"] / size for name in ("export", "quantize")}
    # Measured: 2.84 and 3.13. Three times is the aim, which quantize misses (docs/decisions/0017-large-models.md).
    assert peaks["export"] <= 3 and peaks["quantize"] <= 3.3, peaks
    check_bundle(artifacts["package"].folder / "bundle")
