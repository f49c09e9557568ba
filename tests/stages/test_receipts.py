"""Receipts: the bundle's script with a stand-in for trtexec that really runs the graph, and what validate makes of it.

What is real here: the script, the shell, the raw golden files, ONNX Runtime in place of TensorRT. The form of trtexec's
files is that of its source (exportJSONOutput, exportJSONTrace).
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models.bundle import open_bundle
from models.engines.receipt import make_receipt, read_receipt, version_in
from models.errors import ConfigError, IntegrityError
from pipeline.cli import run
from stages.artifact import Artifact, sha256_of_file
from stages.engines import read_engines
from stages.export import Export, ExportConfig
from stages.package import Package, PackageConfig
from stages.validate import Validate, ValidateConfig
from stages.validate.engines import EngineRule, add_receipts, engine_gates
from tests.stages.chain import artifact_of, context_of, made, temporary_folder

TASK: Any = "text-classification"
NAME = "onnx-fp32.jetson-orin-jp6"

STAND_IN = """#!{python}
import json, os, sys
from pathlib import Path
import numpy as np
import onnxruntime
flags = dict(one.lstrip("-").partition("=")[::2] for one in sys.argv[1:])
print("&&&& RUNNING TensorRT.trtexec [TensorRT v{version}] [b1] # trtexec")
with open(os.environ["SEEN"], "a") as seen:
    seen.write(" ".join(sys.argv[1:]) + "\\n")
if "onnx" in flags:
    Path(flags["saveEngine"]).write_bytes(Path(flags["onnx"]).read_bytes())
elif "loadEngine" in flags:
    session = onnxruntime.InferenceSession(flags["loadEngine"], providers=["CPUExecutionProvider"])
    shapes = dict(one.split(":") for one in flags["shapes"].split(","))
    inputs = {{}}
    for one in flags["loadInputs"].split(","):
        name, _, path = one.partition(":")
        values = np.frombuffer(Path(path).read_bytes(), np.int64)
        inputs[name] = values.reshape([int(size) for size in shapes[name].split("x")])
    (output,) = session.run(None, inputs)
    output = output + float(os.environ.get("WRONG_BY", "0"))
    name = session.get_outputs()[0].name
    found = [{{"name": name, "dimensions": "x".join(map(str, output.shape)), "values": output.ravel().tolist()}}]
    Path(flags["exportOutput"]).write_text(json.dumps(found).replace("NaN", "nan"))
    times = [{{"computeMs": 1.0, "latencyMs": 1.0 + index / 10}} for index in range(20)]
    Path(flags["exportTimes"]).write_text(json.dumps(times))
"""


@functools.cache
def chain() -> dict[str, Artifact]:
    """The tiny chain with engines that a Jetson has to build, through validate and package."""
    root, artifacts = temporary_folder(), made(TASK)
    config = ExportConfig.model_validate(
        {"formats": ["tensorrt"], "targets": ["jetson-orin-jp6"], "precisions": ["fp32"], "opset": 23}
    )
    result = Export().run(context_of(root / "export", {"merge-lora": artifacts["merge-lora"]}, TASK), config)
    assert result.measurements["opset"] == 20
    artifacts = artifacts | {"export": artifact_of("export", root / "export")}
    gates = validate(artifacts, root / "validate", "allow-unproven")
    assert all(gate["verdict"] == "pass" for gate in gates)
    artifacts = artifacts | {"validate": artifact_of("validate", root / "validate")}
    Package().run(context_of(root / "package", artifacts, TASK), PackageConfig(name="tiny"))
    return artifacts | {"package": artifact_of("package", root / "package")}


def judged(rule: EngineRule, *receipts: Path) -> tuple[list[str], dict[str, Any]]:
    """(the gates that fail, the engine's entry) of what validate found before, with receipts."""
    evidence = json.loads(chain()["validate"].file("evidence.json").read_text())
    add_receipts(evidence["engines"], evidence["candidates"], receipts)
    gates = engine_gates(evidence["engines"], ["jetson-orin-jp6"], rule)
    return [gate.name for gate in gates if not gate.passed], evidence["engines"][0]


def validate(artifacts: dict[str, Artifact], folder: Path, engines: str, *receipts: Path) -> list[dict[str, Any]]:
    """The gates of validate's run with receipts."""
    gates = {"min_samples": 24, "max_metric_drop": 0.2, "min_agreement_int8": 0.8, "engines": engines}
    values = {"latency_calls": 20, "gates": gates, "receipts": list(map(str, receipts))}
    result = Validate().run(context_of(folder, artifacts, TASK), ValidateConfig.model_validate(values))
    return [gate.to_dict() for gate in result.gates]


def prove(folder: Path, version: str = "100300", wrong_by: float = 0.0) -> tuple[Path, list[str]]:
    """Run the bundle's script; what it left, and the command lines that it gave trtexec."""
    folder.mkdir()
    program = folder / "trtexec"
    program.write_text(STAND_IN.format(python=sys.executable, version=version))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    script = chain()["package"].folder / f"bundle/engines/{NAME}.sh"
    environment = os.environ | {"TRTEXEC": str(program), "SEEN": str(folder / "seen"), "WRONG_BY": str(wrong_by)}
    done = subprocess.run(["sh", script, folder / "an output"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "an output", (folder / "seen").read_text().splitlines()


def receipt_in(folder: Path, **settings: Any) -> Path:
    """A receipt by way of the command line."""
    proof, _ = prove(folder, **settings)
    bundle = chain()["package"].folder / "bundle"
    code = run(["verify", str(bundle), "--proof", str(proof), "--receipt", str(folder / "receipt.json")])
    assert code == (1 if settings.get("wrong_by") else 0)
    return folder / "receipt.json"


@functools.cache
def good_receipt() -> Path:
    """Of a device that answers as it should."""
    return receipt_in(temporary_folder() / "device")


def test_what_is_built_on_the_device_has_no_file_yet() -> None:
    (engine,) = read_engines(chain()["export"])
    assert (engine.name, engine.file, engine.sha256) == (NAME, None, None)
    assert engine.onnx_sha256 == sha256_of_file(chain()["export"].file(engine.source))
    with open_bundle(chain()["package"].folder / "tiny.tar") as opened:
        (entry,) = opened.manifest["engines"]
        assert entry["file"] is None and entry["status"] == "UNPROVEN"
        assert opened.manifest["files"][entry["source"]] == entry["onnx_sha256"]


@pytest.mark.parametrize(("version", "typed"), [("100300", True), ("110401", False)])
def test_the_script_gives_each_version_its_flags(tmp_path: Path, version: str, typed: bool) -> None:
    _, (_, build, golden, first) = prove(tmp_path / "device", version)
    assert ("--stronglyTyped" in build) is ("--useCudaGraph" in golden) is ("--useSpinWait" in first) is typed
    assert ("--loadRefOutputs=logits:" in golden) is ("--accuracyAlgorithm=lInf" in first) is not typed
    assert "--noTF32" in build and "--skipInference" in build
    assert "--minShapes=input_ids:1x1,attention_mask:1x1" in build and "--maxShapes=input_ids:32x16" in build
    assert "--shapes=input_ids:8x" in golden and "--shapes=input_ids:1x" in first


def test_another_version_is_refused_by_the_script(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="expected trtexec of TensorRT 10 or 11, found version '8'"):
        prove(tmp_path / "device", "80502")


def test_a_receipt_proves_an_engine(tmp_path: Path) -> None:
    file = good_receipt()
    receipt = read_receipt(file)
    assert (receipt.engine, receipt.target, receipt.library_version) == (NAME, "jetson-orin-jp6", "10.3.0")
    assert receipt.max_abs_error is not None and receipt.max_abs_error <= receipt.tolerance
    assert (receipt.latency_ms_p50, receipt.latency_ms_p95, receipt.samples) == (1.9, 2.8, 8)
    gates = validate(chain(), tmp_path / "with", "require-receipt", file)
    assert all(gate["verdict"] == "pass" for gate in gates)
    (entry,) = json.loads((tmp_path / "with/evidence.json").read_text())["engines"]
    assert entry["status"] == "PROVEN" and entry["receipts"]["jetson-orin-jp6"]["engine_sha256"]
    failed, without = judged("require-receipt")
    assert failed == ["engine has a receipt"] and without["status"] == "UNPROVEN"


@pytest.mark.parametrize("wrong_by", [1e3, float("nan")])
def test_a_receipt_of_wrong_outputs_fails_also_where_none_is_required(tmp_path: Path, wrong_by: float) -> None:
    file = receipt_in(tmp_path / "device", wrong_by=wrong_by)
    failed, entry = judged("allow-unproven", file)
    assert failed == ["engine parity"] and entry["status"] == "UNPROVEN"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("onnx_sha256", "0" * 64, "another ONNX file"),
        ("engine", "onnx-fp64.sm1", "which this run has not"),
        ("target", "sm86", "which this run has not"),
        ("library_version", "10.13.0", "jetson-orin-jp6 has 10.3"),
        ("schema_version", 99, "schema version 99"),
        ("unheard_of", 1, "is no receipt"),
    ],
)
def test_a_receipt_of_something_else_is_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    file = tmp_path / "receipt.json"
    file.write_text(json.dumps(json.loads(good_receipt().read_text()) | {key: value}))
    with pytest.raises(IntegrityError, match=message):
        judged("require-receipt", file)


def test_what_the_script_did_not_leave_is_named(tmp_path: Path) -> None:
    proof, _ = prove(tmp_path / "device")
    with open_bundle(chain()["package"].folder / "bundle") as opened:
        with pytest.raises(ConfigError, match=r"for jetson-orin-jp6"):
            make_receipt(opened, proof, "sm86")
        outputs = proof / "golden.outputs.json"
        shutil.copy(outputs, tmp_path / "kept")
        outputs.write_text("[]")
        with pytest.raises(IntegrityError, match="not what trtexec --exportOutput writes"):
            make_receipt(opened, proof, None)
        outputs.unlink()
        with pytest.raises(ConfigError, match="the folder that the bundle's script has filled"):
            make_receipt(opened, proof, None)
        shutil.copy(tmp_path / "kept", outputs)
        (proof / "first.times.json").write_text("[]")
        with pytest.raises(IntegrityError, match="holds no times"):
            make_receipt(opened, proof, None)
    with pytest.raises(IntegrityError, match="does not say which version"):
        version_in("nothing")
    assert version_in("&&&& RUNNING TensorRT.trtexec [TensorRT v110401] [b35] # trtexec") == "11.4.1"
