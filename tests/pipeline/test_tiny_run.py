"""Whole runs of a tiny project through the console script: exit codes, resuming, what a change re-runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pipeline.report import contradictions, report_schema, validate_run
from stages import STAGES
from tests.pipeline.tiny_project import command, environment, make_project, pipeline

RUN = Path("runs/pipeline")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a finished run. To be copied, not changed."""
    folder = make_project(tmp_path_factory.mktemp("project"))
    done = pipeline("all", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    # Standard output is the record and nothing else: what `jq` is fed with.
    assert validate_run(json.loads(done.stdout)) == []
    return folder


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of the project and its run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "project"))


def record_of(project: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((project / RUN / "run.json").read_text(encoding="utf-8"))
    return found


def plan_of(project: Path, *options: str) -> dict[str, str]:
    """Stage → why it would run, empty where it is fresh."""
    done = pipeline("all", "--dry-run", "--json", *options, cwd=project)
    assert done.returncode == 0, done.stderr
    return {one["stage"]: "" if one["fresh"] else one["reason"] for one in json.loads(done.stdout)}


def digests_of(project: Path) -> dict[str, str]:
    """Stage → digest of its artifact, for the stages that measure no time."""
    stages = ("finetune", "merge-lora", "export", "quantize")
    manifests = {name: json.loads((project / RUN / name / "manifest.json").read_text()) for name in stages}
    return {name: json.dumps(manifest["files"], sort_keys=True) for name, manifest in manifests.items()}


def test_a_copied_run_is_fresh_wherever_it_lies(project: Path) -> None:
    assert set(plan_of(project).values()) == {""}


def test_a_run_and_its_bundle_do_not_differ(finished: Path) -> None:
    done = pipeline("diff", str(RUN), str(RUN / "package" / "bundle"), "--json", cwd=finished)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["gates"] == []  # of validate, the only ones that a bundle holds
    assert {one["change"] for one in found["numbers"]} == {0}
    assert {one["split"]: one["same"] for one in found["data"]}["test"] is True


def test_the_reports_of_a_real_run_hold_their_schemas(finished: Path) -> None:
    report = json.loads((finished / RUN / "report.json").read_text(encoding="utf-8"))
    assert contradictions(report, report_schema()) == []
    assert report["verdict"] == "pass"
    statement = json.loads((finished / RUN / "test-result.intoto.json").read_text(encoding="utf-8"))
    assert statement["predicate"]["result"] == "PASSED"
    for one in statement["subject"]:
        assert hashlib.sha256((finished / RUN / one["name"]).read_bytes()).hexdigest() == one["digest"]["sha256"]


def test_force_runs_what_is_fresh(project: Path) -> None:
    assert set(plan_of(project, "--force").values()) - {""}
    done = pipeline("export", "--force", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "export     runs: --force" in done.stderr
    # The same bytes again: nothing that follows runs.
    assert set(plan_of(project).values()) == {""}


def test_another_label_reruns_what_reads_that_split(project: Path) -> None:
    (project / "photos/test/red/002.png").rename(project / "photos/test/green/002.png")
    plan = plan_of(project)
    assert [name for name, reason in plan.items() if reason] == ["validate", "package"]
    assert "data.test changed" in plan["validate"]
    (project / "photos/train/red/002.png").rename(project / "photos/train/green/002.png")
    assert all(plan_of(project).values())


def test_another_weight_of_the_backbone_reruns_everything(project: Path) -> None:
    from tests.models.tiny import edit_json

    edit_json(project / "backbone/model.json", labels=["x", "y", "z"])
    plan = plan_of(project)
    assert all(plan.values()) and "backbone.weights changed" in plan["finetune"]


def test_another_spelling_of_the_backbones_folder_changes_nothing(finished: Path) -> None:
    assert set(plan_of(finished, "--set", f"backbone={finished / 'backbone'}").values()) == {""}


def test_exit_1_keeps_everything_to_look_at(project: Path) -> None:
    done = pipeline("all", "--set", "validate.gates.max_size_bytes=10", cwd=project)
    assert done.returncode == 1
    assert "gate a candidate can ship failed" in done.stderr and "is above 10 bytes" in done.stderr
    record = record_of(project)
    statuses = {stage["name"]: stage["status"] for stage in record["stages"]}
    assert record["status"] == "gate-failed" and statuses["validate"] == "gate-failed"
    assert statuses["package"] != "ran"
    assert "Not shipped" in (project / RUN / "report.md").read_text(encoding="utf-8")
    cases = ElementTree.parse(project / RUN / "junit.xml").getroot()
    assert cases.findall(".//failure")
    again = pipeline("all", "--set", "validate.gates.max_size_bytes=10", cwd=project)
    assert again.returncode == 1  # fresh, and still a failure


def test_a_limit_chooses_among_the_candidates(project: Path) -> None:
    fp16 = (project / RUN / "export/onnx-fp16.onnx").stat().st_size
    done = pipeline("all", "--set", f"validate.gates.max_size_bytes={fp16}", cwd=project)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((project / RUN / "package/bundle/bundle.json").read_text())
    assert manifest["chosen"] != "onnx-fp32"
    report = (project / RUN / "report.md").read_text(encoding="utf-8")
    assert "Left out by validate: **onnx-fp32**" in report


def test_a_gate_that_a_candidate_fails_ends_the_run(project: Path) -> None:
    done = pipeline("all", "--set", "validate.gates.min_sqnr_db=500", cwd=project)
    assert done.returncode == 1 and "gate SQNR failed for onnx-fp32" in done.stderr


def test_exit_4_names_the_corrupt_image_and_skip_goes_on(project: Path) -> None:
    bad = project / "photos/test/red/002.png"
    bad.write_bytes(b"no image")
    done = pipeline("all", cwd=project)
    assert done.returncode == 4
    assert "photos/test/red/002.png" in done.stderr and "data.on_error: skip" in done.stderr
    assert "Traceback" not in done.stderr
    assert [name for name, why in plan_of(project, "--set", "data.on_error=skip").items() if why] == [
        "validate",
        "package",
    ]


def test_what_is_left_out_is_said_everywhere(project: Path) -> None:
    (project / "photos/test/red/002.png").write_bytes(b"no image")
    done = pipeline("all", "--set", "data.on_error=skip", cwd=project)
    assert done.returncode == 0, done.stderr
    report = (project / RUN / "report.md").read_text(encoding="utf-8")
    for text in (done.stderr, record_of(project)["data_notes"][0], report):
        assert "002" in text and "skipped" in text


def test_reports_are_of_the_last_run(project: Path) -> None:
    """A failure replaces the good report, and mending what failed replaces the bad one, though nothing is run again."""
    picture = project / "photos/test/red/002.png"
    good = picture.read_bytes()
    picture.write_bytes(b"no image")
    done = pipeline("all", "--json", cwd=project)
    record = json.loads(done.stdout)
    assert done.returncode == 4 and record == record_of(project) and validate_run(record) == []
    assert record["status"] == "failed" and "002.png" in record["stages"][0]["error"]
    assert "Not shipped" in (project / RUN / "report.md").read_text(encoding="utf-8")
    assert ElementTree.parse(project / RUN / "junit.xml").getroot().findall(".//error")
    picture.write_bytes(good)
    done = pipeline("all", cwd=project)
    assert done.returncode == 0 and " runs" not in done.stderr
    assert (record_of(project)["status"], record_of(project)["bundle"]) == ("passed", "package/bundle")
    assert "Ready to ship" in (project / RUN / "report.md").read_text(encoding="utf-8")


def test_a_part_of_the_chain_reports_all_of_it(project: Path) -> None:
    assert pipeline("export", "--force", cwd=project).returncode == 0
    record = record_of(project)
    assert {stage["name"]: stage["status"] for stage in record["stages"]} == {
        "finetune": "fresh", "merge-lora": "fresh", "export": "ran", "quantize": "fresh", "validate": "fresh",
        "package": "fresh",
    }  # fmt: skip
    assert record["bundle"] == "package/bundle" and all(stage["digest"] for stage in record["stages"])
    done = pipeline("export", "--set", "export.opset=19", cwd=project)
    assert done.returncode == 0, done.stderr
    stages = {stage["name"]: stage for stage in record_of(project)["stages"]}
    assert stages["package"]["status"] == "not-run" and "inputs.export changed" in stages["validate"]["reason"]
    assert record_of(project)["bundle"] is None
    shown = json.loads(pipeline("show", str(RUN / "package"), "--json", cwd=project).stdout)
    assert shown["inputs_current"] == "no: export changed since"


def test_every_manifest_holds_the_io_spec(finished: Path) -> None:
    for name in STAGES:
        manifest = json.loads((finished / RUN / name / "manifest.json").read_text())
        assert [one["name"] for one in manifest["io"]["inputs"]] == ["image"]


def test_a_dry_run_stops_where_the_run_would(project: Path) -> None:
    strict = ("--set", "validate.gates.min_sqnr_db=500")
    assert pipeline("all", *strict, cwd=project).returncode == 1
    done = pipeline("all", "--dry-run", "--json", *strict, cwd=project)
    last = json.loads(done.stdout)[-1]
    assert last["stage"] == "validate" and last["fresh"] and "failed: the run stops here" in last["reason"]


def test_folders_of_the_user_are_never_replaced(project: Path) -> None:
    for stage in ("package", "export"):
        (project / "work" / stage).mkdir(parents=True)
        (project / "work" / stage / "mine.txt").write_text("mine")
    for options in ((), ("--dry-run",)):
        done = pipeline("all", "--run-dir", "work", *options, cwd=project)
        assert done.returncode == 2 and "2 problems" in done.stderr and "is in the way" in done.stderr
    assert (project / "work/package/mine.txt").read_text() == "mine"
    assert not (project / "work/finetune").exists()


def test_a_dry_run_refuses_what_the_run_would(project: Path) -> None:
    options = ("export", "--set", "finetune.epochs=7")
    dry, real = pipeline(*options, "--dry-run", cwd=project), pipeline(*options, cwd=project)
    assert dry.returncode == real.returncode == 2
    assert dry.stderr == real.stderr and "finetune: is stale (config.epochs changed from 2 to 7)" in dry.stderr
    assert record_of(project)["status"] == "passed"


def test_exit_2_leaves_nothing(tmp_path: Path, finished: Path) -> None:
    shutil.copyfile(finished / "pipeline.yaml", tmp_path / "pipeline.yaml")
    text = ("--set", "task=text-classification", "--set", "data.source=demo:wordnet-topics")
    for backbone, message in (("timm:resnet18", "takes images"), ("timm:resnet18.nope", "no weights 'nope'")):
        done = pipeline("all", *text, "--set", f"backbone={backbone}", cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline.yaml"]


def test_threads_are_part_of_what_uses_them(finished: Path) -> None:
    plan = plan_of(finished, "--set", "threads=2")
    assert plan["finetune"] == ""  # training has finetune.threads of its own
    assert "threads changed from 1 to 2" in plan["merge-lora"] and plan["package"]


def test_from_and_until(project: Path) -> None:
    done = pipeline("all", "--from", "export", "--until", "quantize", "--force", cwd=project)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stderr.splitlines() if " runs: " in line] == ["export", "quantize"]


def test_quiet_says_nothing(project: Path) -> None:
    done = pipeline("all", "--quiet", cwd=project)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_two_runs_on_one_folder_do_not_mix(project: Path) -> None:
    first = subprocess.Popen(command("all", "--force"), cwd=project, stderr=subprocess.DEVNULL, env=environment())
    try:
        wait_for(project / RUN / ".scratch/finetune")
        second = pipeline("all", "--force", cwd=project)
        assert second.returncode == 2
        assert "another run is at work in this folder" in second.stderr
        assert first.wait(300) == 0
    finally:
        first.kill()
        first.wait()
    assert set(plan_of(project).values()) == {""}


@pytest.mark.parametrize(
    ("path", "kind", "parts"),
    [
        ("", "run", ["Ready to ship", "merge-lora"]),
        ("merge-lora", "artifact", ["checkpoint/model.safetensors", "merged equals adapted", "files_intact: yes"]),
        ("package/bundle", "bundle", ["chosen", "golden"]),
        ("package/backbone-image-classification.tar", "bundle", ["chosen", "golden"]),
    ],
)
def test_show_tells_lineage_numbers_and_gates(finished: Path, path: str, kind: str, parts: list[str]) -> None:
    done = pipeline("show", str(RUN / path), cwd=finished)
    assert done.returncode == 0, done.stderr
    assert [part for part in parts if part not in done.stdout] == []
    assert json.loads(pipeline("show", str(RUN / path), "--json", cwd=finished).stdout)["kind"] == kind


def test_show_says_which_file_was_touched(project: Path) -> None:
    (project / RUN / "export/onnx-fp16.onnx").write_bytes(b"")
    found = json.loads(pipeline("show", str(RUN / "export"), "--json", cwd=project).stdout)
    assert found["files_intact"] == "onnx-fp16.onnx has changed"


def wait_for(path: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def interrupted(project: Path, signal_number: int, after: Path) -> subprocess.Popen[str]:
    """`pipeline all` in a new folder, stopped by a signal once `after` is there."""
    process = subprocess.Popen(command("all"), cwd=project, stderr=subprocess.PIPE, text=True, env=environment())
    try:
        wait_for(project / RUN / after)
        process.send_signal(signal_number)
        process.wait(120)
    finally:
        process.kill()
    return process


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_exit_130_and_the_next_run_resumes(finished: Path, project: Path, signal_number: int) -> None:
    shutil.rmtree(project / RUN)
    process = interrupted(project, signal_number, Path("finetune/manifest.json"))
    assert process.returncode == 130
    assert process.stderr is not None and "the same command goes on from here" in process.stderr.read()
    assert record_of(project)["status"] == "interrupted"
    done = pipeline("all", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "finetune   fresh" in done.stderr
    assert digests_of(project) == digests_of(finished)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kill_at_any_moment_leaves_a_state_that_resumes(finished: Path, project: Path) -> None:
    """SIGKILL at growing moments of one and the same run; what comes out in the end is what comes out undisturbed."""
    shutil.rmtree(project / RUN)
    killed = 0
    for step in range(20):
        process = subprocess.Popen(command("all"), cwd=project, stderr=subprocess.DEVNULL, env=environment())
        try:
            process.wait(2.0 + 1.9 * step)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
            check_no_torn_artifact(project)
            continue
        break
    assert process.returncode == 0 and killed >= 3
    assert digests_of(project) == digests_of(finished)
    with_run = sorted(path.name for path in (project / RUN).iterdir())
    assert set(STAGES) <= set(with_run)


def check_no_torn_artifact(project: Path) -> None:
    """Whatever is there under a stage's name is whole, and whatever report is there can be read."""
    from stages.artifact import read_artifact, verify_files

    for name in STAGES:
        folder = project / RUN / name
        if folder.exists():
            artifact = read_artifact(name, folder)
            assert artifact is not None and verify_files(artifact) == ""
    if (project / RUN / "run.json").exists():
        assert validate_run(record_of(project)) == []
