"""Execution providers and engines on a GPU, where there is none: what is refused, and what validate makes of evidence.

ONNX Runtime's CPU provider stands in for a GPU's: sessions, outputs and times are real, only the name is not.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import stages.validate.engine_runs as engine_runs
from models.errors import MissingCapabilityError, RuntimeInferenceError
from models.runtimes import onnxruntime_session
from models.runtimes.gpu import Gpu
from models.runtimes.onnxruntime_session import CPU, OnnxRuntimeSession
from pipeline.cli import run
from stages.artifact import Artifact
from stages.base import StageResult
from stages.export import Export, ExportConfig
from stages.validate import Validate, ValidateConfig
from stages.validate.engines import choose_engines
from stages.validate.providers import DEVICES, PROVIDERS, require_providers
from tests.pipeline.tiny_project import make_project
from tests.stages.chain import artifact_of, context_of, made, temporary_folder

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="the rtx extra is not installed")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
TEXT: Any = "text-classification"
STAND_IN = "StandInExecutionProvider"
GATES = {"min_samples": 24, "max_metric_drop": 0.2, "min_agreement_int8": 0.8}


class Session(OnnxRuntimeSession):
    """On the stand-in: the CPU's provider under that name, which does not run INT8 and answers FP16 wrongly."""

    def __enter__(self) -> Session:
        self.wrong = self.provider == STAND_IN and "fp16" in self.model.name
        if self.provider == STAND_IN and "int8" in self.model.name:
            raise RuntimeInferenceError("the CPU would run DynamicQuantizeLinear")
        self.provider = CPU
        super().__enter__()
        return self

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = super().infer(inputs)
        return {name: -value if self.wrong else value for name, value in found.items()}


def measured(result: StageResult) -> tuple[dict[str, Any], set[tuple[str, str]]]:
    """(the evidence, the gates that failed: name and subject)."""
    return result.measurements, {(gate.name, gate.subject) for gate in result.gates if not gate.passed}


# --- what is refused ----------------------------------------------------------------------------------


@needs_no_gpu
@pytest.mark.parametrize(("name", "line"), [("cuda", "onnxruntime-gpu"), ("tensorrt-rtx", "onnxruntime-ep-nv-")])
def test_a_provider_that_is_not_here_is_a_missing_capability(name: Any, line: str) -> None:
    """ONNX Runtime lists CUDA here, and would run on the CPU without a word."""
    with pytest.raises(MissingCapabilityError, match=f"asks for {name}, which does not run.*pip install {line}"):
        require_providers(["cpu", name])


@needs_no_gpu
def test_a_missing_provider_is_known_before_anything_runs(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    asked = ["-c", str(project / "pipeline.yaml"), "--run-dir", str(tmp_path / "run"), "--quiet"]
    asked += ["--set", "validate.providers=[cpu, cuda]"]
    assert run(["all", *asked]) == run(["all", "--dry-run", *asked]) == 3
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("names", [["cuda", "cuda"], [], ["gpu"]])
def test_a_wrong_list_of_providers_is_refused(names: list[str]) -> None:
    with pytest.raises(ValidationError):
        ValidateConfig.model_validate({"providers": names})


# --- several providers --------------------------------------------------------------------------------


def test_every_candidate_is_measured_on_every_provider_and_the_first_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROVIDERS, "cuda", CPU)
    monkeypatch.setitem(DEVICES, "cuda", "cpu")
    config = ValidateConfig.model_validate({"latency_calls": 20, "gates": GATES, "providers": ["cuda", "cpu"]})
    result = Validate().run(context_of(tmp_path, made(TEXT), TEXT), config)
    evidence, failed = measured(result)
    assert not failed
    names = ["onnx-fp32", "onnx-fp16", "onnx-int8-dynamic"]
    assert [(one["name"], one["provider"]) for one in evidence["candidates"]] == [(name, "cuda") for name in names]
    assert [(one["candidate"], one["provider"]) for one in evidence["other_runs"]] == [(name, "cpu") for name in names]
    assert evidence["provider"] == "cuda" and evidence["chosen"] in names
    assert {gate.subject for gate in result.gates} >= {*names, *(f"{name} on cpu" for name in names)}
    for one in [*evidence["candidates"], *evidence["other_runs"]]:
        assert one["passed"] and one["latency_ms_p50"] > 0 and one["speedup"] > 0
    assert any("onnx-fp32 on cpu: accuracy" in note for note in result.notes)


def test_what_a_provider_does_not_run_or_answers_wrongly_fails_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_session, "OnnxRuntimeSession", Session)
    monkeypatch.setitem(PROVIDERS, "cuda", STAND_IN)
    monkeypatch.setitem(DEVICES, "cuda", "cpu")
    config = ValidateConfig.model_validate({"latency_calls": 20, "gates": GATES, "providers": ["cpu", "cuda"]})
    evidence, failed = measured(Validate().run(context_of(tmp_path, made(TEXT), TEXT), config))
    assert {("comparable outputs", "onnx-int8-dynamic on cuda"), ("SQNR", "onnx-fp16 on cuda")} <= failed
    assert {subject for _, subject in failed} == {"onnx-int8-dynamic on cuda", "onnx-fp16 on cuda"}
    problems = {one["name"]: one["problem"] for one in evidence["other_runs"]}
    assert problems["onnx-int8-dynamic on cuda"] == "the CPU would run DynamicQuantizeLinear"
    assert next(one for one in evidence["other_runs"] if one["problem"])["latency_ms_p50"] is None
    assert {one["name"]: one["passed"] for one in evidence["candidates"]} == {
        "onnx-fp32": True, "onnx-fp16": False, "onnx-int8-dynamic": False,
    }  # fmt: skip
    assert evidence["chosen"] == "onnx-fp32"


# --- engines on the GPU that they are for -------------------------------------------------------------


@functools.cache
def with_engine(*precisions: str) -> dict[str, Artifact]:
    """The tiny chain with an engine of FP32 and of the precisions, for GPUs of compute capability 8.6 and 8.9."""
    root, before = temporary_folder(), made(TEXT)
    asked = {"formats": ["tensorrt-rtx"], "targets": ["sm86", "sm89"], "precisions": ["fp32", *precisions]}
    context = context_of(root / "export", {"merge-lora": before["merge-lora"]}, TEXT)
    Export().run(context, ExportConfig.model_validate(asked))
    return before | {"export": artifact_of("export", root / "export")}


class EngineStandIn(OnnxRuntimeSession):
    """ONNX Runtime runs the file that an engine is built from; outputs are off by `wrong_by`."""

    library_version = "1.7.1.116"
    wrong_by = 0.0

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: value + self.wrong_by for name, value in super().infer(inputs).items()}


def validate_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capability: str, wrong_by: float = 0.0, precisions: Any = ()
) -> tuple[dict[str, Any], set[tuple[str, str]]]:
    """Validate on a machine with a GPU of this compute capability, whose engines answer `wrong_by` more."""

    def opened(file: Path, sha256: str, runtime: Any) -> EngineStandIn:
        assert file.suffix == ".engine" and runtime.library == "tensorrt_rtx" and len(sha256) == 64
        stand_in = EngineStandIn(with_engine(*precisions)["export"].file("onnx-fp32.onnx"))
        stand_in.wrong_by = wrong_by
        return stand_in

    monkeypatch.setattr(engine_runs, "gpu_here", lambda: Gpu("a GPU", capability, 10**9))
    monkeypatch.setattr(engine_runs, "open_engine", opened)
    monkeypatch.setattr(engine_runs, "DEVICE", "cpu")
    config = ValidateConfig.model_validate({"latency_calls": 20, "gates": GATES})
    return measured(Validate().run(context_of(folder, with_engine(*precisions), TEXT), config))


@needs_rtx
def test_an_engine_that_ran_here_needs_no_receipt_and_one_gpu_proves_one_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence, failed = validate_on(tmp_path, monkeypatch, "8.6")
    assert {name for name, _ in failed} == {"engine has a receipt"}
    assert {subject.rpartition(" on ")[2] for _, subject in failed} == {"sm89"}
    (engine,), (ran,) = evidence["engines"], evidence["engine_runs"]
    found = engine["receipts"]["sm86"]
    assert found["kind"] == "run here" and found["device"] == "a GPU (compute capability 8.6)"
    assert found["samples"] == evidence["samples"] and found["engine_sha256"] == engine["sha256"]
    assert 0 <= found["relative_error"] < 1e-6 and found["latency_ms_p50"] > 0
    assert ran["passed"] and ran["provider"] == "engine" and ran["speedup"] > 0 and ran["metric"] is not None
    assert engine["status"] == "UNPROVEN"  # nothing has run it on sm89
    assert json.dumps(evidence)


@needs_rtx
def test_an_engine_that_answers_wrongly_here_fails_and_is_not_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence, failed = validate_on(tmp_path, monkeypatch, "8.9", wrong_by=10.0)
    (engine,) = evidence["engines"]
    assert ("engine parity", f"{engine['name']} on sm89") in failed
    assert ("output error", f"{engine['name']} on sm89") in failed
    assert engine["status"] == "UNPROVEN" and not evidence["engine_runs"][0]["passed"]


@needs_rtx
def test_an_engine_of_what_did_not_run_here_is_compared_with_the_reference_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime has no BF16 on a CPU: there are no outputs of the candidate."""
    evidence, _ = validate_on(tmp_path, monkeypatch, "8.6", precisions=("bf16",))
    ran = {one["candidate"]: one for one in evidence["engine_runs"]}
    assert set(ran) == {"onnx-fp32", "onnx-bf16"}
    assert ran["onnx-bf16"]["candidate_error"] is None and ran["onnx-bf16"]["agreement"] == 1.0
    (engine,) = (one for one in evidence["engines"] if one["candidate"] == "onnx-bf16")
    assert not engine["ships_for"] and engine["receipts"]["sm86"]["relative_error"] is None
    assert evidence["chosen"] not in (None, "onnx-bf16")


@needs_rtx
def test_an_engine_for_another_gpu_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evidence, failed = validate_on(tmp_path, monkeypatch, "9.0")
    assert evidence["engine_runs"] == [] and evidence["engines"][0]["receipts"] == {}
    assert {name for name, _ in failed} == {"engine has a receipt"}


@needs_rtx
@pytest.mark.parametrize(("objective", "chosen"), [("latency", "fast and large"), ("size", "small")])
def test_engines_that_were_timed_here_are_chosen_by_their_time(objective: str, chosen: str) -> None:
    engines = [
        {"name": name, "candidate": name, "targets": ["sm86"], "tolerance": 0.1, "size_bytes": size, "ships_for": [],
         "receipts": {"sm86": {"kind": "run here", "relative_error": 0.0, "latency_ms_p50": ms}}}
        for name, size, ms in (("small", 1, 2.0), ("fast and large", 2, 1.0))
    ]  # fmt: skip
    context = context_of(temporary_folder(), with_engine(), TEXT)
    choose_engines(context, engines, ["small", "fast and large"], objective)
    assert [one["name"] for one in engines if one["ships_for"]] == [chosen]
    engines = [{**one, "ships_for": []} for one in engines]
    engines[1]["receipts"] = {"sm86": {"kind": "receipt", "relative_error": 0.0, "latency_ms_p50": 1.0}}
    choose_engines(context, engines, ["small", "fast and large"], "latency")  # another device's time is no evidence
    assert [one["name"] for one in engines if one["ships_for"]] == ["small"]


def test_an_engine_without_its_library_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    entry, gpu = {"file": "engines/one.rtx.engine", "targets": ["sm86", "sm89"]}, Gpu("a GPU", "8.9", 10**9)
    monkeypatch.setattr(engine_runs, "find_spec", lambda name: object())
    assert engine_runs.target_here(entry, gpu) == "sm89"
    assert engine_runs.target_here(entry | {"file": None}, gpu) is None  # it is to be built on its device
    assert engine_runs.target_here(entry, None) is None
    monkeypatch.setattr(engine_runs, "find_spec", lambda name: None)
    assert engine_runs.target_here(entry, gpu) is None
