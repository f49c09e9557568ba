"""The command line as a user meets it: subprocesses, exit codes, what is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from pipeline import cli
from pipeline.cli import run
from tests.pipeline.tiny_project import pipeline

HEAVY = ("torch", "transformers", "timm", "peft", "onnx", "onnxruntime", "numpy", "pydantic", "sklearn", "datasets")


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys\nfrom pipeline.cli import run\nassert run(['--help']) == 0\n"
        f"print('LOADED', sorted(set(sys.modules) & set({HEAVY!r})))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stdout
    assert "merge-lora" in done.stdout


def test_every_command_of_the_chain_has_the_shared_options() -> None:
    for command in ("finetune", "merge-lora", "export", "quantize", "validate", "package", "all"):
        done = pipeline(command, "--help")
        assert done.returncode == 0
        for option in ("--config", "--set", "--run-dir", "--force", "--dry-run", "--json", "--quiet", "--verbose"):
            assert option in done.stdout, (command, option)


def test_exit_2_lists_every_mistake_and_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text(
        "task: image-clasification\nbackbone: timm:tf_efficientnet_lite00\n"
        "data:\n  source: demo:fashion-mnist\nsead: 1\n"
    )
    done = pipeline("all", cwd=tmp_path)
    assert done.returncode == 2
    assert "3 problems; nothing was run" in done.stderr
    for part in ("pipeline.yaml:1 task", "'image-classification'?", "pipeline.yaml:2 backbone", "pipeline.yaml:5 sead"):
        assert part in done.stderr
    assert not (tmp_path / "runs").exists()
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["all", "--from", "export", "--until", "finetune"],
        ["all", "--from", "nothing"],
        ["nothing"],
        ["all", "--nothing"],
    ],
)
def test_exit_2_on_wrong_usage(arguments: list[str], tmp_path: Path) -> None:
    done = pipeline(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_json_says_what_went_wrong_on_standard_output(tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text("task: nothing\nsead: 1\n")
    done = pipeline("all", "--json", cwd=tmp_path)
    problems = json.loads(done.stdout)["problems"]
    assert done.returncode == 2 and len(problems) == 4
    assert {"place", "message", "hint"} == set(problems[0]) and "pipeline.yaml:2 sead" in problems[-1]["place"]
    (tmp_path / "bundle").mkdir()
    for arguments, code in ((["verify", "bundle"], 4), (["show", "bundle"], 2), (["all", "--nothing"], 2)):
        done = pipeline(*arguments, "--json", cwd=tmp_path)
        assert done.returncode == code == json.loads(done.stdout)["exit_code"]


def test_version() -> None:
    done = pipeline("--version")
    assert done.returncode == 0 and done.stdout.startswith("pipeline 0.")


def test_a_missing_package_is_named_with_its_install_line() -> None:
    from pipeline.cli import missing_package

    assert "pip install scikit-learn;" in str(missing_package(ModuleNotFoundError(name="sklearn.linear_model")))
    assert missing_package(ModuleNotFoundError(name="onnx_ir")).exit_code == 3


def test_exit_2_when_the_file_is_missing(tmp_path: Path) -> None:
    done = pipeline("all", cwd=tmp_path)
    assert done.returncode == 2
    assert "pipeline init" in done.stderr


def test_exit_3_when_cuda_is_asked_for_and_not_there(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    init_here(tmp_path)
    for option in ("--dry-run", "--verbose"):
        done = pipeline("all", "--set", "device=cuda", option, cwd=tmp_path)
        assert done.returncode == 3
        assert "device: auto" in done.stderr and "pip install torch" in done.stderr


def test_exit_4_on_unusable_data(tmp_path: Path) -> None:
    init_here(tmp_path)
    (tmp_path / "empty").mkdir()
    done = pipeline("all", "--set", "data.source=empty", cwd=tmp_path)
    assert done.returncode == 4
    assert "empty" in done.stderr
    assert "Traceback" not in done.stderr


def init_here(folder: Path) -> None:
    """A configuration by `pipeline init`."""
    answers = ("--task", "image-classification", "--backbone", "timm:tf_efficientnet_lite0")
    done = pipeline("init", *answers, "--data", "demo:fashion-mnist", cwd=folder)
    assert done.returncode == 0, done.stderr


def test_init_then_dry_run(tmp_path: Path) -> None:
    init_here(tmp_path)
    assert pipeline("init", "--task", "image-classification", cwd=tmp_path, stdin="").returncode == 2
    done = pipeline("all", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "finetune", "merge-lora", "export", "quantize", "validate", "package"
    ]  # fmt: skip
    assert "there is no result yet" in done.stdout
    plan = json.loads(pipeline("all", "--dry-run", "--json", "--until", "export", cwd=tmp_path).stdout)
    assert [item["stage"] for item in plan] == ["finetune", "merge-lora", "export"]
    assert not (tmp_path / "runs").exists()


def test_init_asks_on_a_terminal(tmp_path: Path) -> None:
    import os
    import pty

    answers = ("image-classification", "timm:tf_efficientnet_lite0", "demo:fashion-mnist")
    master, slave = pty.openpty()
    script = Path(sys.executable).with_name("pipeline")
    process = subprocess.Popen([script, "init"], cwd=tmp_path, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    os.write(master, "".join(f"{answer}\n" for answer in answers).encode())
    assert process.wait(60) == 0, os.read(master, 10_000)
    os.close(master)
    text = (tmp_path / "pipeline.yaml").read_text(encoding="utf-8")
    assert all(answer in text for answer in answers)
    done = pipeline("init", "--task", "x", "--backbone", "y", "--data", "z", cwd=tmp_path)
    assert done.returncode == 2  # the file exists, and three wrong answers: all listed
    assert done.stderr.count("\n  ") == 4 and "exists" in done.stderr, done.stderr
    assert (tmp_path / "pipeline.yaml").read_text(encoding="utf-8") == text


def test_a_single_stage_without_its_input_says_what_to_run(tmp_path: Path) -> None:
    init_here(tmp_path)
    done = pipeline("export", cwd=tmp_path)
    assert done.returncode == 2
    assert "pipeline all --until export" in done.stderr


def test_schema_is_a_schema_with_descriptions_that_accepts_a_config() -> None:
    schema = json.loads(pipeline("schema").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    config = {"task": "image-classification", "backbone": "timm:x", "data": {"source": "demo:fashion-mnist"}}
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "sead": 1}, schema)
    bare = [
        f"{name}.{key}"
        for name, model in {"PipelineConfig": schema, **schema["$defs"]}.items()
        for key, field in model.get("properties", {}).items()
        if "description" not in field
    ]
    assert bare == []


def test_doctor_finds_this_machine_fit() -> None:
    done = pipeline("doctor", "--json")
    findings = {item["name"]: item for item in json.loads(done.stdout)}
    assert findings["torch"]["state"] == "ok"
    assert "CPUExecutionProvider" in findings["execution providers"]["message"]
    assert done.returncode == 0, done.stdout


def test_doctor_says_when_two_runtimes_break_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    import pipeline.doctor as doctor

    monkeypatch.setattr(doctor, "version_of", lambda package: "1.31.1")
    finding = doctor.examine_onnxruntime()
    assert finding.state == "broken"
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in finding.mend
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert doctor.examine_onnxruntime().mend.endswith("pip install onnxruntime")


def test_doctor_says_which_providers_run_and_whether_engines_can(monkeypatch: pytest.MonkeyPatch) -> None:
    import pipeline.doctor as doctor
    from models.errors import MissingCapabilityError
    from models.runtimes.gpu import Gpu
    from stages.validate import providers

    def required(names: list[str]) -> None:
        if names == ["tensorrt-rtx"]:
            raise MissingCapabilityError("it is not installed")

    monkeypatch.setattr(doctor, "has_nvidia_driver", lambda: False)
    assert {one.state for one in doctor.examine_gpu_providers()} == {"absent"}
    monkeypatch.setattr(doctor, "has_nvidia_driver", lambda: True)
    monkeypatch.setattr(providers, "require_providers", required)
    cuda, rtx = doctor.examine_gpu_providers()
    assert (cuda.state, cuda.name) == ("ok", "cuda provider")
    assert (rtx.state, rtx.message) == ("absent", "it is not installed") and "pip install" in rtx.mend
    monkeypatch.setattr(doctor, "gpu_here", lambda: None)
    assert doctor.examine_engines().state == "absent"
    monkeypatch.setattr(doctor, "gpu_here", lambda: Gpu("a GPU", "8.6", 10**9))
    monkeypatch.setattr(doctor, "find_spec", lambda name: name == "tensorrt_rtx" or None)
    assert doctor.examine_engines().message == "for sm86 on a GPU (compute capability 8.6)"
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    missing = doctor.examine_engines()
    assert missing.state == "absent" and missing.mend.startswith("pip install tensorrt-rtx-cu13")


def test_a_runtime_without_its_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninstalling one of the two builds leaves a folder that imports and holds nothing."""
    import types

    import pipeline.doctor as doctor
    from models.errors import MissingCapabilityError
    from models.runtimes.onnxruntime_session import OnnxRuntimeSession

    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    assert doctor.examine_providers().state == "broken"
    assert "--force-reinstall" in doctor.examine_providers().mend
    with pytest.raises(MissingCapabilityError, match="without its files"):
        OnnxRuntimeSession(tmp_path / "model.onnx").__enter__()


def test_a_missing_module_of_our_own_is_a_defect_not_a_package_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.cli import report

    assert report(ModuleNotFoundError("No module named 'stages.lost'", name="stages.lost"), False) == 4
    assert "pip install" not in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "other"}', "\x00"])
def test_show_refuses_a_torn_record(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    done = pipeline("show", str(tmp_path))
    assert done.returncode == 2 and "is not the record of a run" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("key", ["data.source", "backbone"])
def test_a_name_that_no_file_system_takes_is_not_there(tmp_path: Path, key: str) -> None:
    (tmp_path / "pipeline.yaml").write_text("task: image-classification\nbackbone: timm:resnet18\ndata: {source: x}\n")
    done = pipeline("all", "--dry-run", "--set", f"{key}={'a' * 5000}", cwd=tmp_path)
    assert done.returncode == 2 and key in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_in_the_place_of_the_run_folder_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text(
        "task: image-classification\nbackbone: timm:tf_efficientnet_lite0\ndata: {source: demo:fashion-mnist}\n"
    )
    done = pipeline("finetune", "--run-dir", "pipeline.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "a file is in the way" in done.stderr


def test_a_reader_that_closes_the_pipe_is_no_failed_gate() -> None:
    program = [str(Path(sys.executable).with_name("pipeline")), "schema"]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(120) == 0
    assert process.stderr.read() == b""


def test_show_refuses_what_is_nothing_of_ours(tmp_path: Path) -> None:
    assert pipeline("show", str(tmp_path)).returncode == 2


@pytest.mark.parametrize("command", ["validate", "all"])
def test_the_self_test_is_asked_for_where_the_result_is_packed_too(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[str], list[str]]] = []
    monkeypatch.setattr(cli, "run_stages", lambda names, _, settings, *rest: asked.append((names, settings)))
    assert run([command, "--set", "seed=1"]) == run([command, "--set", "seed=1", "--self-test"]) == 0
    assert [settings for _, settings in asked] == [["seed=1"], ["seed=1", "validate.self_test=true"]]
    assert ("package" in asked[1][0]) is (command == "all")
