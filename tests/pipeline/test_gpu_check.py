"""The script of `make gpu-check`, dry: the same code on the CPU, each check for itself, and nothing written."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from models.runtimes.gpu import Gpu
from pipeline.cli import run
from tests.pipeline.tiny_project import make_project
from tests.scripts import load_script


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with the pipeline's command line called in this process: quicker, and the same code."""
    module = load_script("gpu_check")

    def start(command: Sequence[str], seconds: float) -> tuple[int, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(list(command))
        return code, out.getvalue() if command[0] == "doctor" else err.getvalue()

    monkeypatch.setattr(module, "start", start)
    return module


def bench_of(script: ModuleType, folder: Path, gpu: Gpu | None = None) -> Any:
    return script.Bench(folder, folder / "pipeline.yaml", [], gpu is None, gpu, int(gpu is not None))


@pytest.mark.slow
def test_the_dry_run_goes_through_the_checks_and_writes_nothing(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project, before = make_project(tmp_path), set(script.RESULTS.iterdir())
    checks = ["doctor", "prepare", "cuda provider", "engines"]
    only = [word for name in checks for word in ("--only", name)]
    code = script.main(["--dry-run", "--config", str(project / "pipeline.yaml"), *only])
    said = capsys.readouterr().out
    assert code == 0, said
    lines = [line for line in said.splitlines() if not line.startswith(" ")]
    assert [line.split()[0] for line in lines[:4]] == ["passed"] * 4
    assert "replaced: the cuda provider, by the CPU's" in lines[2] and "onnx-fp16" in said
    assert set(script.RESULTS.iterdir()) == before


def test_a_check_that_fails_leaves_the_others_to_run(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(bench: Any) -> dict[str, Any]:
        raise KeyError("latency")

    monkeypatch.setattr(script, "CHECKS", {"one": broken, **script.CHECKS, "last": lambda bench: {"value": 1}})
    names = ["one", "cuda provider", "last"]
    first, second, last = script.check_all(bench_of(script, tmp_path), names)
    assert first.status == "failed" and "defect" in first.message
    assert second.status == "failed" and "was not made: base" in second.message  # nothing was prepared
    assert last.status == "passed" and last.numbers == {"value": 1}
    assert "failed        one" in capsys.readouterr().out
    assert script.main(["--dry-run", "--only", "cuda provider"]) == 1
    bench = bench_of(script, tmp_path)
    bench.until = 0.0
    assert [(one.status, one.message) for one in script.check_all(bench, names)] == [
        ("not possible", script.OUT_OF_TIME)
    ] * 3


def test_training_that_diverges_is_a_failure_on_several_gpus_too(script: ModuleType, tmp_path: Path) -> None:
    bench = bench_of(script, tmp_path)
    bench.pipeline = lambda *_, **__: None
    gate = {"name": "not below its linear probe", "verdict": "fail"}
    bench.manifest = lambda run, stage: {"gates": [gate], "duration_s": 1.0}
    assert script.several_gpus(bench)["gates_failed"] == [gate["name"]]
    gate["name"] = "training stays finite"
    with pytest.raises(script.CheckFailed, match="diverged"):
        script.several_gpus(bench)


def test_int8_is_compared_with_fp16_on_the_provider(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    times = (("fp16", "cuda", 3.0), ("int8", "cuda", 2.0), ("fp16", "cpu", 7.0), ("int8", "cpu", 1.0))
    runs = [dict(zip(("precision", "provider", "latency_ms_p50"), one, strict=True)) for one in times]
    monkeypatch.setattr(script, "on_provider", lambda *_: {"runs": runs})
    bench = bench_of(script, tmp_path, Gpu("a GPU", "8.6", 10**9))
    bench.pipeline = lambda *_, **__: None
    numbers = script.int8_on_gpu(bench)
    assert numbers["times_as_fast_as_fp16"] == 1.5
    said = script.line_of(script.Result("int8 on the gpu", "passed", numbers={"times_as_fast_as_fp16": 1.5}))
    assert "INT8 is 1.50× as fast as FP16" in said


def test_a_gate_that_fails_is_a_failed_check_that_keeps_its_numbers(script: ModuleType, tmp_path: Path) -> None:
    bench = bench_of(script, tmp_path)
    row = {"name": "onnx-fp32", "provider": "cuda", "latency_ms_p50": None, "problem": "the CPU would run Gelu"}
    gate = {"name": "comparable outputs", "subject": "onnx-fp32", "verdict": "fail", "message": "1 is above 0"}
    found = {"samples": 9, "chosen": None, "reference": {"latency_ms_p50": 1.0}, "candidates": [row], "other_runs": [],
             "engine_runs": [], "engines": []}  # fmt: skip
    bench.manifest = lambda run, stage: {"gates": [gate], "measurements": found}
    with pytest.raises(script.CheckFailed, match="comparable outputs of onnx-fp32: 1 is above 0") as caught:
        script.judged(bench, "cuda")
    assert caught.value.numbers["runs"][0]["problem"] == "the CPU would run Gelu"


def test_what_a_gpu_cannot_do_is_no_failure(script: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(script, "version_of", lambda name: None if name == "tensorrt" else "1.7.1.116")
    bench = bench_of(script, tmp_path, Gpu("NVIDIA H100", "9.0", 80 * 10**9))
    rtx, engines, ddp = script.check_all(bench, ["tensorrt-rtx provider", "engines", "several gpus"])
    assert rtx.status == "not possible" and "8.6, 8.9 and 12.0 or later; this is NVIDIA H100" in rtx.message
    assert engines.status == "not possible" and "7.5, 8.0, 8.6, 8.9, 12.0, 12.1" in engines.message
    assert ddp.status == "not possible" and "1 GPU" in ddp.message


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_provider_that_does_not_start_is_a_failure_and_without_a_gpu_nothing_is_shown(
    script: ModuleType, tmp_path: Path
) -> None:
    assert script.main([]) == 3
    bench = bench_of(script, tmp_path, Gpu("a GPU", "8.6", 10**9))
    (tmp_path / "base").mkdir()
    (result,) = script.check_all(bench, ["cuda provider"])
    assert result.status == "failed" and "pip install onnxruntime-gpu" in result.message


def test_the_pipeline_is_started_as_a_user_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """`start` itself, which the tests above go around."""
    module = load_script("gpu_check")
    seen: dict[str, Any] = {}

    def started(command: list[str], seconds: float, environment: dict[str, str]) -> tuple[int, str, str]:
        seen.update(command=command, timeout=seconds)
        return 3, "out", "one\nerror: no provider\n"

    monkeypatch.setattr(module, "run_group", started)
    assert module.start(["validate", "--quiet"], 9.0) == (3, "one\nerror: no provider\n")
    assert Path(seen["command"][0]).is_file() and seen["timeout"] == 9.0
    bench = module.Bench(Path(), Path("recipe.yaml"), ["a.b=1"], False, None, 1)
    with pytest.raises(module.NotPossible, match="no provider"):
        bench.pipeline("run", "validate", settings=["c.d=2"])
    assert 0 < seen["timeout"] <= module.SECONDS_OF_A_COMMAND
    bench.until = 0.0  # all the time is spent
    assert bench.seconds == 1.0
    command = " ".join(seen["command"])
    assert "validate -c recipe.yaml --run-dir run --quiet --set device=cuda" in command
    assert command.endswith("--set a.b=1 --set c.d=2")
    monkeypatch.setattr(module, "run_group", lambda *_: (module.NOT_ENDED, "", ""))
    with pytest.raises(module.NotPossible, match="out of time"):  # it was cut short, and shows nothing
        bench.pipeline("run", "validate")
    bench.until = 1e12
    with pytest.raises(module.CheckFailed, match="it did not end in 240 s"):
        bench.pipeline("run", "validate")


@pytest.mark.parametrize("deaf", [False, True])
def test_what_does_not_end_is_ended_with_all_that_it_started(
    deaf: bool, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that leaves a file on Ctrl-C, or listens to nothing; and a child that never listens."""
    monkeypatch.setattr(script, "SECONDS_TO_END", 0.5)
    child = "import signal, time; [signal.signal(one, signal.SIG_IGN) for one in (2, 15)]; time.sleep(60)"
    program = f"""
import pathlib, signal, subprocess, sys, time
if {deaf}:
    [signal.signal(one, signal.SIG_IGN) for one in (2, 15)]
child = subprocess.Popen([sys.executable, "-c", {child!r}])
pathlib.Path("pid").write_text(str(child.pid))
try:
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path("asked").touch()
"""
    monkeypatch.chdir(tmp_path)
    assert script.run_group([sys.executable, "-c", program], 3.0, os.environ) == (script.NOT_ENDED, "", "")
    assert Path("asked").exists() is not deaf
    assert is_gone(int(Path("pid").read_text()))
    assert script.run_group([sys.executable, "-c", "print(1)"], 30.0, os.environ) == (0, "1\n", "")


def is_gone(pid: int) -> bool:
    """Whether a process ends within five seconds; one that nobody waits for has ended too."""
    for _ in range(50):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False
