"""Engines through the stages: built of what export and quantize made, listed by validate as UNPROVEN, packed whole."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError

import models.onnx_files as onnx_files
from models.bundle import open_bundle
from models.errors import ConfigError, EngineError, IntegrityError
from stages.artifact import Artifact, sha256_of_file, write_json
from stages.candidates import Candidate, read_candidates, write_candidates
from stages.engines import (
    EngineBuildConfig,
    EngineRequest,
    build_engines,
    load_graph,
    plan_engines,
    read_engines,
    request_engines,
)
from stages.export import Export, ExportConfig
from stages.export.stage import opset_for
from stages.package import Package, PackageConfig
from stages.quantize import Quantize, QuantizeConfig
from stages.validate import Validate, ValidateConfig
from stages.validate.engines import choose_engines
from tests.models.tiny import TIMM, image_backbone, saved_checkpoint
from tests.stages.chain import artifact_of, context_of, made, temporary_folder

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="the rtx extra is not installed")
TASK: Any = "text-classification"
ASKED: dict[str, Any] = {"formats": ["onnx", "tensorrt-rtx"], "targets": ["sm75", "sm86", "sm89"]}


def validate_config(engines: str) -> ValidateConfig:
    gates = {"min_samples": 24, "max_metric_drop": 0.2, "min_agreement_int8": 0.8, "engines": engines}
    return ValidateConfig.model_validate({"latency_calls": 20, "objective": "size", "gates": gates})


@functools.cache
def with_engines() -> dict[str, Artifact]:
    """The tiny chain with engines of every candidate."""
    root, before = temporary_folder(), made(TASK)
    context = context_of(root / "export", {"merge-lora": before["merge-lora"]}, TASK)
    result = Export().run(context, ExportConfig.model_validate(ASKED))
    assert all(gate.passed for gate in result.gates)
    artifacts = before | {"export": artifact_of("export", root / "export")}
    folder = root / "quantize"
    context = context_of(folder, artifacts, TASK)
    candidates = read_candidates(before["quantize"])
    for candidate in candidates:
        if candidate.accepted:
            (folder / candidate.file).write_bytes(before["quantize"].file(candidate.file).read_bytes())
    write_candidates(folder, candidates)
    build_engines(context, request_of("sm86"), candidates, [])
    return artifacts | {"quantize": artifact_of("quantize", folder)}


def request_of(*targets: str) -> EngineRequest:
    return EngineRequest(targets, {"batch": (1, 2, 4), "sequence": (1, 8, 16)}, EngineBuildConfig())


@functools.cache
def validated(engines: str) -> tuple[dict[str, Artifact], list[dict[str, Any]]]:
    """The same with validate's artifact, and its gates."""
    folder = temporary_folder()
    context = context_of(folder, with_engines(), TASK)
    result = Validate().run(context, validate_config(engines))
    return with_engines() | {"validate": artifact_of("validate", folder)}, [gate.to_dict() for gate in result.gates]


# --- configuration ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"formats": ["onnx", "tensorrt-rtx"]}, "needs a device: name one in export.targets"),
        ({"targets": ["sm86"]}, "add tensorrt-rtx to export.formats"),
        ({"formats": ["tensorrt-rtx"], "targets": ["sm68"]}, "did you mean .*sm86"),
        ({"formats": ["tensorrt"], "targets": ["jetson-orin-jp5"]}, "take JetPack 6"),
        ({"formats": ["tensorrt-rtx"], "targets": ["sm86", "sm86"]}, "stands twice"),
        ({"profile": {"batch": [8, 4, 16]}}, "smallest ≤ usual ≤ largest"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_runs(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ExportConfig.model_validate(values)


def test_the_opset_is_lowered_to_what_the_targets_read() -> None:
    assert opset_for(23, ["sm86"]) == 23
    assert opset_for(23, ["sm86", "jetson-orin-jp6"]) == 20
    assert opset_for(18, ["jetson-orin-jp6"]) == 18


@needs_rtx
def test_the_profile_follows_from_the_inputs_and_the_file() -> None:
    from models.checkpoint import load_checkpoint
    from stages.export.parity import tried_inputs

    checkpoint = load_checkpoint(made(TASK)["merge-lora"].folder / "checkpoint")
    context = context_of(temporary_folder(), {}, TASK)
    shapes, build = tried_inputs(checkpoint, context), EngineBuildConfig()
    found = request_engines(["sm86"], {"batch": (1, 1, 4)}, build, checkpoint.spec.io, shapes).profile
    low, usual, high = found["sequence"]
    assert found["batch"] == (1, 1, 4)
    assert low == 1 < usual < high == checkpoint.processing.max_length  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"export\.profile\.length.*batch, sequence"):
        request_engines(["sm86"], {"length": (1, 2, 3)}, build, checkpoint.spec.io, shapes)


# --- export and quantize ------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 3])
def test_a_graph_whose_weights_are_in_a_second_file_is_planned_and_not_mended(
    zero: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only zero points are read: what is not 0 would have to be mended, in the weights."""
    monkeypatch.setattr(onnx_files, "LARGEST_FILE_BYTES", 1000)
    monkeypatch.setattr(onnx_files, "SMALLEST_OUTSIDE_BYTES", 1)
    constants = {"scale": np.float32(0.1), "zero": np.int8(zero), "w": np.ones((32, 32), np.float32)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], "dequantize"),
        helper.make_node("MatMul", ["d", "w"], ["y"], "product"),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 32]) for name in "xy")
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "graph", [x], [y], tensors)
    path = tmp_path / "onnx-int8-static.onnx"
    opset = helper.make_opsetid("", 20)
    onnx_files.save_graph(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    model = load_graph(path)
    assert onnx_files.is_light(model)
    plans, left_out = plan_engines(model, Candidate(path.stem, path.name, "int8", 1), request_of("sm86", "sm89"))
    if zero:
        assert plans == [] and [one.targets for one in left_out] == [("sm86",), ("sm89",)]
        assert "in a second file, where nothing is mended" in left_out[0].reason
        assert "zero points of 0 only" in left_out[0].reason
    else:
        assert left_out == [] and [(one.graph, one.mended) for one in plans] == [(None, ())]


@needs_rtx
def test_targets_share_an_engine_unless_a_graph_differs() -> None:
    engines = {one.name: one for one in read_engines(with_engines()["export"])}
    assert {name: one.targets for name, one in engines.items()} == {
        "onnx-fp32.sm75": ("sm75",),
        "onnx-fp32.sm86-sm89": ("sm86", "sm89"),
        "onnx-fp16.sm75": ("sm75",),
        "onnx-fp16.sm86-sm89": ("sm86", "sm89"),
    }
    turing = engines["onnx-fp32.sm75"]
    assert turing.mends and turing.mended_error is not None and 0 < turing.mended_error < 2e-2
    assert engines["onnx-fp32.sm86-sm89"].mends == () and engines["onnx-fp16.sm75"].mends == ()


@needs_rtx
def test_the_fingerprint_says_what_an_engine_is_and_where_it_comes_from() -> None:
    export = with_engines()["export"]
    for engine in read_engines(export):
        found = json.loads(export.file(engine.fingerprint).read_text())
        assert engine.file and found["sha256"] == sha256_of_file(export.file(engine.file)) == engine.sha256
        assert found["onnx_sha256"] == sha256_of_file(export.file(engine.source))
        assert found["compute_capabilities"] == [f"SM{name[2:]}" for name in engine.targets]
        assert found["library_version"] and found["profile"]["input_ids"][0] == [1, 1]


@needs_rtx
def test_what_a_target_does_not_take_is_left_out_with_the_module(tmp_path: Path) -> None:
    """INT8 with scales found at run time, which the parser does not read."""
    artifacts = with_engines()
    assert read_engines(artifacts["quantize"]) == ()
    context = context_of(tmp_path, artifacts, TASK)
    name = "onnx-int8-dynamic"
    (tmp_path / f"{name}.onnx").write_bytes(artifacts["quantize"].file(f"{name}.onnx").read_bytes())
    report = build_engines(context, request_of("sm86"), [Candidate(name, f"{name}.onnx", "int8", 1)], [])
    (left,) = report.left_out
    assert left.targets == ("sm86",) and "run time" in left.reason and "int8-static" in left.reason
    assert any(one.operator == "DynamicQuantizeLinear" for one in left.findings)
    assert any("no engine for sm86" in note for note in report.notes())


@needs_rtx
def test_export_fails_where_a_target_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import stages.export.stage as module

    exporter = module.export_onnx

    def with_an_odd_operator(*arguments: Any) -> tuple[onnx.ModelProto, str]:
        """The same network, and an operator that the parser does not know beside it."""
        model, attention = exporter(*arguments)
        matrix = helper.make_tensor("square", TensorProto.FLOAT, (2, 2), [1.0, 0.0, 0.0, 1.0])
        one = helper.make_node("Det", ["square"], ["one"], "volume")
        one.metadata_props.add(key="module", value="task_head")
        output = model.graph.output[0].name
        last = next(node for node in model.graph.node if output in node.output)
        last.output[0] = "before"
        model.graph.initializer.append(matrix)
        model.graph.node.extend([one, helper.make_node("Mul", ["before", "one"], [output], "times_one")])
        return model, attention

    monkeypatch.setattr(module, "export_onnx", with_an_odd_operator)
    artifacts = {"merge-lora": made(TASK)["merge-lora"]}
    config = ExportConfig.model_validate({**ASKED, "targets": ["sm86"], "precisions": ["fp32"]})
    with pytest.raises(EngineError, match="no engine can be built for sm86.*Det volume of task_head"):
        Export().run(context_of(tmp_path, artifacts, TASK), config)


# --- validate and package -----------------------------------------------------------------------------


@needs_rtx
def test_an_engine_without_a_receipt_is_unproven_and_no_pass() -> None:
    artifacts, gates = validated("require-receipt")
    failed = [gate for gate in gates if gate["verdict"] == "fail"]
    assert failed and {gate["name"] for gate in failed} == {"engine has a receipt"}
    assert all("UNPROVEN" in gate["message"] and "allow-unproven" in gate["message"] for gate in failed)
    evidence = json.loads(artifacts["validate"].file("evidence.json").read_text())
    assert {one["status"] for one in evidence["engines"]} == {"UNPROVEN"}


@needs_rtx
def test_each_target_ships_the_engine_of_the_best_candidate_that_has_one() -> None:
    artifacts, gates = validated("allow-unproven")
    assert all(gate["verdict"] == "pass" for gate in gates)
    assert not any("receipt" in gate["name"] for gate in gates)  # what is not proven has no gate that passes
    evidence = json.loads(artifacts["validate"].file("evidence.json").read_text())
    shipped = {target: one["candidate"] for one in evidence["engines"] for target in one["ships_for"]}
    assert set(shipped) == set(ASKED["targets"])
    engines = [{**one, "ships_for": []} for one in evidence["engines"]]
    context = context_of(temporary_folder(), with_engines(), TASK)
    order = ["onnx-int8-dynamic", "onnx-fp32", "onnx-fp16"]
    choose_engines(context, engines, order, "accuracy")  # the best has no engine
    assert {one["candidate"] for one in engines if one["ships_for"]} == {"onnx-fp32"}
    engines = [{**one, "ships_for": []} for one in engines]
    for objective in ("size", "latency"):  # the size of the engines, not of their ONNX files
        engines = [{**one, "ships_for": []} for one in engines]
        choose_engines(context, engines, order, objective)
        assert {one["candidate"] for one in engines if one["ships_for"]} == {"onnx-fp16"}
    engines = [{**one, "ships_for": [], "receipts": {}} for one in engines]
    for one in engines:  # a device has proven one, and found another to be wrong
        error = {"onnx-fp16.sm86-sm89": 0.01, "onnx-fp16.sm75": 0.5}.get(one["name"])
        one["receipts"] = {} if error is None else {one["targets"][0]: {"relative_error": error}}
    choose_engines(context, engines, order, "latency")
    shipped = {target: one["candidate"] for one in engines for target in one["ships_for"]}
    assert shipped == {"sm75": "onnx-fp32", "sm86": "onnx-fp16", "sm89": "onnx-fp16"}


@needs_rtx
def test_a_target_without_an_engine_fails_the_gate(tmp_path: Path) -> None:
    artifacts, _ = validated("allow-unproven")
    folder = tmp_path / "export"
    folder.mkdir()
    for name in artifacts["export"].manifest["files"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(artifacts["export"].file(name).read_bytes())
    listed = json.loads((folder / "engines.json").read_text())
    listed["engines"] = [one for one in listed["engines"] if "sm75" not in one["targets"]]
    write_json(folder / "engines.json", listed)
    context = context_of(tmp_path / "out", with_engines() | {"export": artifact_of("export", folder)}, TASK)
    result = Validate().run(context, validate_config("allow-unproven"))
    assert [gate.subject for gate in result.gates if not gate.passed] == ["sm75"]


@needs_rtx
@pytest.mark.parametrize("chosen", ["onnx-fp16", "onnx-int8-dynamic"])
def test_the_bundle_holds_the_engines_with_their_digests(tmp_path: Path, chosen: str) -> None:
    """Also where the chosen candidate has none, and those of another are shipped."""
    artifacts, _ = validated("allow-unproven")
    evidence = json.loads(artifacts["validate"].file("evidence.json").read_text())
    (tmp_path / "validate").mkdir()
    write_json(tmp_path / "validate/evidence.json", evidence | {"chosen": chosen})
    artifacts = artifacts | {"validate": artifact_of("validate", tmp_path / "validate")}
    result = Package().run(context_of(tmp_path / "out", artifacts, TASK), PackageConfig(name="tiny"))
    assert all(gate.passed for gate in result.gates)
    assert any("UNPROVEN" in note for note in result.notes)
    with open_bundle(tmp_path / "out/tiny.tar") as opened:
        engines = opened.manifest["engines"]
        assert {target for one in engines for target in one["targets"]} == {"sm75", "sm86", "sm89"}
        for one in engines:
            assert opened.manifest["files"][one["file"]] == one["sha256"] == sha256_of_file(opened.file(one["file"]))
            assert f"engines/{one['name']}.json" in opened.manifest["files"] and one["status"] == "UNPROVEN"
            # An engine comes with the file that it is built from, whose golden outputs are its own.
            assert one["candidate"] in opened.manifest["models"]
        assert not any(name.endswith("model.plan") for name in opened.manifest["files"])
    assert "UNPROVEN" in (tmp_path / "out/bundle/README.md").read_text()


@needs_rtx
def test_an_engine_that_was_changed_is_refused(tmp_path: Path) -> None:
    artifacts, _ = validated("allow-unproven")
    folder = tmp_path / "export"
    for name in artifacts["export"].manifest["files"]:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(artifacts["export"].file(name).read_bytes())
    engine = next(one for one in read_engines(artifacts["export"]) if one.name == "onnx-fp16.sm75")
    assert engine.file
    data = bytearray((folder / engine.file).read_bytes())
    data[len(data) // 2] ^= 1  # what the library's own check of validity misses
    (folder / engine.file).write_bytes(data)
    changed = artifacts | {"export": replace(artifacts["export"], folder=folder)}
    with pytest.raises(IntegrityError, match="has changed since export wrote it"):
        Validate().run(context_of(tmp_path / "validate", changed, TASK), validate_config("allow-unproven"))
    with pytest.raises(IntegrityError, match="not the engine that validate listed"):
        Package().run(context_of(tmp_path / "package", changed, TASK), PackageConfig(name="tiny"))


@needs_rtx
@pytest.mark.slow
def test_a_real_network_has_an_engine_in_every_precision(tmp_path: Path) -> None:
    """EfficientNet-Lite0 with random weights at 64 px: export and quantize, each with the engines of its own files."""
    lite = {**TIMM, "name": "tf_efficientnet_lite0"}
    saved_checkpoint(tmp_path / "merge-lora/checkpoint", image_backbone(lite, 64))
    artifacts = {"merge-lora": artifact_of("merge-lora", tmp_path / "merge-lora")}
    config = ExportConfig.model_validate({**ASKED, "profile": {"batch": [1, 1, 4]}})
    Export().run(context_of(tmp_path / "export", artifacts), config)
    artifacts["export"] = artifact_of("export", tmp_path / "export")
    context = context_of(tmp_path / "quantize", artifacts)
    examples = context.data["validation"][:16]
    splits = dict.fromkeys(("train", "validation", "calibration", "test"), examples)
    context = replace(context, data=replace(context.data, splits=splits))
    settings = {"schemes": ["int8-symmetric"], "keep_float": "none", "max_metric_drop": 1, "min_agreement": 0}
    result = Quantize().run(context, QuantizeConfig.model_validate(settings))
    artifacts["quantize"] = artifact_of("quantize", tmp_path / "quantize")
    engines = {one.name: one for stage in ("export", "quantize") for one in read_engines(artifacts[stage])}
    assert set(engines) == {
        f"onnx-{precision}.{targets}"
        for precision in ("fp32", "fp16", "int8-symmetric")
        for targets in ("sm75", "sm86-sm89")
    }
    sizes = {name: engines[f"onnx-{name}.sm86-sm89"].size_bytes or 0 for name in ("fp32", "fp16", "int8-symmetric")}
    # The INT8 engine is larger than the FP16 one (9.8 against 7.5 MB), unlike their ONNX files.
    assert 0 < sizes["fp16"] < sizes["int8-symmetric"] < sizes["fp32"]
    assert engines["onnx-int8-symmetric.sm86-sm89"].mends == ()  # that layout is the one that the parser reads
    assert len(result.measurements["engines"]) == 2
