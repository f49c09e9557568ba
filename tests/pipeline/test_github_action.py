"""action.yml and its script, without GitHub: `pipeline` and `gh` are stubs on the PATH that write down their calls."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.report.markdown import render_markdown
from tests.pipeline.report_run import gate_failed_run, passing_run

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "github_action.py"
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS = ACTION["runs"]["steps"]

PIPELINE = """#!{python}
import json, os, pathlib, sys
here = pathlib.Path(__file__).parent
(here / "asked.json").write_text(json.dumps({{"arguments": sys.argv[1:], "token": os.environ.get("GH_TOKEN")}}))
print("::error::a class name in the log", file=sys.stderr)
print((here / "said.txt").read_text())
sys.exit(int((here / "code.txt").read_text()))
"""
GH = """#!{python}
import json, pathlib, sys
here = pathlib.Path(__file__).parent
body = json.load(sys.stdin)["body"] if "--input" in sys.argv else None
with open(here / "gh.jsonl", "a") as stream:
    stream.write(json.dumps({{"arguments": sys.argv[1:], "body": body}}) + "\\n")
if (here / "refused.txt").exists():
    sys.exit("HTTP 403: Resource not accessible by integration\\n::error::from GitHub")
if body is None:
    print((here / "comments.jsonl").read_text())
"""


class Job:
    """A job of GitHub Actions with stubs in its `bin`."""

    def __init__(self, folder: Path, said: object, code: int) -> None:
        self.bin, self.output, self.summary = folder / "bin", folder / "output", folder / "summary.md"
        self.bin.mkdir()
        for name, text in (("pipeline", PIPELINE), ("gh", GH)):
            (self.bin / name).write_text(text.format(python=sys.executable))
            (self.bin / name).chmod(0o755)
        (self.bin / "said.txt").write_text(said if isinstance(said, str) else json.dumps(said))
        (self.bin / "code.txt").write_text(str(code))
        self.comments(())
        event = folder / "event.json"
        event.write_text(json.dumps({"pull_request": {"number": 7}}))
        self.environment = {
            **os.environ, "PATH": f"{self.bin}:/usr/bin:/bin",
            "INPUT_CONFIG": "my pipeline.yaml", "INPUT_RUN_DIR": "runs/ci", "INPUT_COMMENT": "true",
            "INPUT_OPTIONS": "--set 'data.source=my photos'",
            "INPUT_COMMENT_AUTHOR": "github-actions[bot]", "GH_TOKEN": "secret", "GITHUB_REPOSITORY": "o/r",
            "GITHUB_EVENT_NAME": "pull_request", "GITHUB_EVENT_PATH": str(event), "GITHUB_OUTPUT": str(self.output),
            "GITHUB_STEP_SUMMARY": str(self.summary), "GITHUB_SERVER_URL": "https://github.example",
            "GITHUB_RUN_ID": "42", "GITHUB_WORKFLOW": "model", "GITHUB_JOB": "build",
        }  # fmt: skip

    def comments(self, found: tuple[dict[str, Any], ...]) -> None:
        """What `gh api … --jq` prints of the comments that are there."""
        (self.bin / "comments.jsonl").write_text("\n".join(map(json.dumps, found)))

    def run(self, **changes: str) -> subprocess.CompletedProcess[str]:
        """The action's script."""
        return subprocess.run(
            [sys.executable, "-P", str(SCRIPT)], env={**self.environment, **changes}, capture_output=True, text=True
        )  # fmt: skip

    @property
    def asked(self) -> dict[str, Any]:
        """How the pipeline was called."""
        found: dict[str, Any] = json.loads((self.bin / "asked.json").read_text())
        return found

    @property
    def calls(self) -> list[dict[str, Any]]:
        """How `gh` was called."""
        file = self.bin / "gh.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def outputs(self) -> dict[str, str]:
        """The outputs of the step, as GitHub reads them."""
        lines, found = iter(self.output.read_text().splitlines()), {}
        for line in lines:
            name, end = line.split("<<")
            found[name] = "\n".join(iter(lambda: next(lines), end))
        return found


def test_a_run_that_passes_is_summarized_commented_and_offered(tmp_path: Path) -> None:
    job = Job(tmp_path, passing_run(), 0)
    done = job.run()
    assert done.returncode == 0, done.stderr
    assert job.asked == {
        "arguments": [
            "all", "--json", "-c", "my pipeline.yaml", "--run-dir", "runs/ci", "--set", "data.source=my photos"
        ],
        "token": None,
    }  # fmt: skip
    assert "\n::notice title=Ready to ship%3A onnx-int8-static::" in done.stdout
    assert job.summary.read_text() == render_markdown(passing_run()) + "\n"
    assert job.outputs == {
        "exit-code": "0", "run-dir": "runs/ci", "verdict": "pass", "bundle": "runs/ci/package/fashion-mnist.tar",
    }  # fmt: skip
    looked, posted = job.calls
    assert looked["arguments"][:3] == ["api", "--paginate", "repos/o/r/issues/7/comments?per_page=100"]
    assert posted["arguments"] == ["api", "--method", "POST", "repos/o/r/issues/7/comments", "--input", "-"]
    assert re.match(r"<!-- adapt-to-edge [0-9a-f]{32} -->\n## ✅", posted["body"])
    assert "(https://github.example/o/r/actions/runs/42)" in posted["body"]


def test_a_failed_gate_fails_the_job_and_offers_no_bundle(tmp_path: Path) -> None:
    job = Job(tmp_path, gate_failed_run(), 1)
    done = job.run()
    assert done.returncode == 1
    assert "\n::error title=Gate validate%3A max_metric_drop [onnx-int8-static]::0.034 is above 0.01" in done.stdout
    assert (job.outputs["verdict"], job.outputs["bundle"]) == ("fail", "")
    assert "❌" in job.summary.read_text()


def test_its_own_earlier_comment_is_updated_and_no_other(tmp_path: Path) -> None:
    job = Job(tmp_path, passing_run(), 0)
    job.run()
    body = job.calls[-1]["body"]
    mine = {"id": 11, "body": body, "login": "github-actions[bot]"}
    theirs = {"id": 9, "body": body, "login": "somebody"}
    job.comments((theirs, {"id": 10, "body": f"> {body}", "login": mine["login"]}))
    job.run()
    assert job.calls[-1]["arguments"][2] == "POST"
    job.comments((theirs, mine))
    job.run()
    assert job.calls[-1]["arguments"] == ["api", "--method", "PATCH", "repos/o/r/issues/comments/11", "--input", "-"]
    job.run(INPUT_CONFIG="another.yaml")  # another report: a comment of its own
    assert job.calls[-1]["arguments"][2] == "POST"


@pytest.mark.parametrize(
    "changes",
    [{"INPUT_COMMENT": "false"}, {"GITHUB_EVENT_NAME": "push"}, {"GITHUB_EVENT_PATH": "nowhere"}],
    ids=["not asked", "no pull request", "no event"],
)
def test_no_comment_where_none_is_wanted(changes: dict[str, str], tmp_path: Path) -> None:
    job = Job(tmp_path, passing_run(), 0)
    assert job.run(**changes).returncode == 0
    assert job.calls == []


@pytest.mark.parametrize("case", ["refused", "no gh"])
def test_a_comment_that_cannot_be_made_changes_nothing(case: str, tmp_path: Path) -> None:
    job = Job(tmp_path, passing_run(), 0)
    if case == "refused":
        (job.bin / "refused.txt").touch()
    else:
        (job.bin / "gh").unlink()
    done = job.run(PATH=str(job.bin))
    assert done.returncode == 0
    (warning,) = [line for line in done.stdout.splitlines() if line.startswith("::warning")]
    assert ("pull-requests: write" if case == "refused" else "gh is not installed") in warning
    assert not re.search("^::error", done.stdout.rpartition("::warning")[2], re.MULTILINE)


def test_a_configuration_that_is_wrong_is_told_problem_by_problem(tmp_path: Path) -> None:
    problems = [{"place": "pipeline.yaml:1 task", "message": "'x'\n::error::y", "hint": "try, this"}] * 30
    job = Job(tmp_path, {"ok": False, "exit_code": 2, "problems": problems}, 2)
    done = job.run()
    assert done.returncode == 2
    errors = re.findall("^::error title=pipeline.yaml%3A1 task::(.*)$", done.stdout, re.MULTILINE)
    assert errors == ["'x'%0A::error::y%0Atry, this"] * 10
    summary = job.summary.read_text()
    assert summary.startswith("## ❌ The pipeline did not run: usage or configuration")
    assert summary.count("\n- pipeline.yaml") == 20 and "- 10 more in the log" in summary
    assert job.outputs["verdict"] == "none"


def test_the_real_pipeline_is_understood(tmp_path: Path) -> None:
    job = Job(tmp_path, "", 0)
    (job.bin / "pipeline").unlink()
    (job.bin / "pipeline").symlink_to(Path(sys.executable).with_name("pipeline"))
    (tmp_path / "pipeline.yaml").write_text("task: image-clasification\nsead: 1\n")
    done = job.run(INPUT_CONFIG=str(tmp_path / "pipeline.yaml"), INPUT_OPTIONS="")
    assert done.returncode == 2, done.stderr
    assert "image-clasification" in job.summary.read_text()
    assert len(re.findall("^::error title=", done.stdout, re.MULTILINE)) >= 2


def test_a_pipeline_that_says_nothing_still_fails_the_job(tmp_path: Path) -> None:
    job = Job(tmp_path, "Traceback (most recent call last)", 4)
    done = job.run()
    assert done.returncode == 4
    assert "::error title=pipeline%3A exit code 4::a stage failed" in done.stdout


@pytest.mark.parametrize(
    ("case", "code", "said"),
    [("open quote", 2, "title=options::No closing quotation%0A"), ("no pipeline", 3, "pipeline is not on the PATH")],
)
def test_what_cannot_be_started_is_annotated_and_has_outputs(case: str, code: int, said: str, tmp_path: Path) -> None:
    job = Job(tmp_path, passing_run(), 0)
    if case == "no pipeline":
        (job.bin / "pipeline").unlink()
    done = job.run(INPUT_OPTIONS="--set 'a=b" if case == "open quote" else "", PATH=str(job.bin))
    assert (done.returncode, done.stderr) == (code, "")
    assert said in done.stdout and "did not run" in job.summary.read_text()
    assert job.outputs == {"exit-code": str(code), "run-dir": "runs/ci", "verdict": "none", "bundle": ""}


def test_a_plan_is_no_failure(tmp_path: Path) -> None:
    job = Job(tmp_path, [{"stage": "finetune", "fresh": False, "reason": "there is no result yet"}], 0)
    done = job.run()
    assert done.returncode == 0
    assert "::error title" not in done.stdout
    assert "there is no result yet" in done.stdout
    assert job.outputs["bundle"] == ""


def test_nothing_of_the_log_is_a_workflow_command(tmp_path: Path) -> None:
    out = Job(tmp_path, "::error::said", 4).run().stdout.splitlines()
    stopped = re.fullmatch("::stop-commands::([0-9a-f]{32})", out[0])
    assert stopped
    assert out.index("::error::said") < out.index(f"::{stopped[1]}::")


def test_the_summary_leaves_out_what_github_would_drop_all_of(tmp_path: Path) -> None:
    job = Job(tmp_path, passing_run(), 0)
    job.summary.write_bytes(b"x" * (2**20 - 100))
    job.run()
    assert job.summary.stat().st_size == 2**20 - 100


# --- action.yml -----------------------------------------------------------------------------------


def test_the_script_gets_every_input_that_it_reads() -> None:
    (step,) = [step for step in STEPS if step.get("id") == "run"]
    read = set(re.findall(r"\b(?:INPUT_[A-Z_]+|GH_TOKEN)\b", SCRIPT.read_text(encoding="utf-8")))
    assert read == set(step["env"]) - {"ACTION_PATH"}
    used = set(re.findall(r"inputs\.([a-z-]+)", (ROOT / "action.yml").read_text(encoding="utf-8")))
    assert used == set(ACTION["inputs"])
    written = set(re.findall(r"steps\.run\.outputs\.([a-z-]+)", (ROOT / "action.yml").read_text(encoding="utf-8")))
    assert written == set(ACTION["outputs"])


def test_no_input_is_pasted_into_a_shell_and_every_action_is_pinned() -> None:
    for step in STEPS:
        if "run" in step:
            assert "${{" not in step["run"]
            assert step["shell"] == "bash"
        else:
            assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"])
    assert all("description" in one for one in (*ACTION["inputs"].values(), *ACTION["outputs"].values()))


def test_samples_of_the_test_split_are_uploaded_only_where_that_is_asked_for() -> None:
    """reproduce/ holds real inputs; whoever may read a repository's artifacts may read them."""
    assert ACTION["inputs"]["upload-samples"]["default"] == "false"
    uploads = {step["name"]: step for step in STEPS if "upload-artifact" in step.get("uses", "")}
    asked = [name for name, step in uploads.items() if "inputs.upload-samples == 'true'" in step["if"]]
    assert asked == ["Upload what reproduces a failure"]
    prefix = "${{ steps.run.outputs.run-dir }}/"
    paths = [path.removeprefix(prefix) for path in uploads["Upload the report"]["with"]["path"].split("\n") if path]
    assert [path for path in paths if path.startswith("validate")] == [
        "validate/evidence.json", "validate/manifest.json",
    ]  # fmt: skip
    assert uploads[asked[0]]["with"]["path"] == f"{prefix}validate/reproduce/"
