"""What action.yml does: run the pipeline, and tell GitHub how it ended.

    python -P scripts/github_action.py

Reads its inputs from the environment, where no shell sees them: INPUT_CONFIG, INPUT_RUN_DIR, INPUT_OPTIONS,
INPUT_COMMENT, INPUT_COMMENT_AUTHOR, GH_TOKEN, and what GitHub Actions sets. Prints annotations, writes the job summary,
comments on the pull request (its own earlier comment is updated), and ends with the exit code of the pipeline. What
GitHub refuses is said as a warning and changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.report import render
from pipeline.report.github import escape_data, escape_property
from pipeline.report.markup import markdown_text

COMMENT_CHARACTERS = 65_536
SUMMARY_BYTES = 2**20
MEANINGS = {
    2: "usage or configuration; nothing was run",
    3: "this machine lacks a package, a provider or a device",
    4: "a stage failed",
    130: "interrupted",
}


def main() -> int:
    """Run, report; the pipeline's exit code."""
    environment = dict(os.environ)
    command = ["pipeline", "all", "--json", "-c", environment["INPUT_CONFIG"]]
    command += ["--run-dir", environment["INPUT_RUN_DIR"]]
    try:
        code, said = run([*command, *shlex.split(environment.get("INPUT_OPTIONS", ""))], environment)
    except ValueError as error:  # of shlex
        problem = {"place": "options", "message": str(error), "hint": "write them as in a shell, every quote closed"}
        code, said = 2, {"problems": [problem]}
    except FileNotFoundError:
        code, said = 3, {"error": "the command pipeline is not on the PATH; with `install: false` install the package"}
    record = said if isinstance(said, dict) and "stages" in said else None
    write_outputs(record, code, environment)
    text = render(record, "markdown") if record else without_record(code, said)
    annotate(code, said, record)
    write_summary(text, environment)
    if environment.get("INPUT_COMMENT") == "true":
        comment(text, environment)
    return code


def run(command: list[str], environment: Mapping[str, str]) -> tuple[int, Any]:
    """The exit code and the JSON that the pipeline prints, None where it prints none. Its log is this process's.

    Nothing in the log is taken for a workflow command meanwhile, and the pipeline does not get the token.
    """
    token = secrets.token_hex(16)
    print(f"::stop-commands::{token}", flush=True)
    print("$ " + shlex.join(command), flush=True)
    try:
        child = {name: value for name, value in environment.items() if name != "GH_TOKEN"}
        done = subprocess.run(command, env=child, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        said = read_said(done.stdout)
        if not isinstance(said, dict):
            print(done.stdout)  # the plan of --dry-run, or nothing that is known here
    finally:
        print(f"::{token}::", flush=True)
    return done.returncode, said


def read_said(text: str) -> Any:
    """The JSON in a text, None where there is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def problems_of(code: int, said: Any) -> list[tuple[str, str]]:
    """(title, message) of what went wrong where there is no record of a run; none where nothing did (`--dry-run`)."""
    if code == 0:
        return []
    found = said.get("problems") if isinstance(said, dict) else None
    if isinstance(found, list):
        return [(str(one.get("place")), f"{one.get('message')}\n{one.get('hint') or ''}") for one in found]
    error = said.get("error") if isinstance(said, dict) else None
    return [(f"pipeline: exit code {code}", str(error or MEANINGS.get(code, "see the log")))]


def without_record(code: int, said: Any) -> str:
    """Markdown for a pipeline that ended before it had anything to report."""
    if code == 0:
        return "## The pipeline ran nothing\n\nThe plan of `--dry-run` is in the log.\n"
    lines = [f"- {markdown_text(title)}: {markdown_text(message)}" for title, message in problems_of(code, said)]
    more = [f"- {len(lines) - 20} more in the log"] if len(lines) > 20 else []
    head = f"## ❌ The pipeline did not run: {MEANINGS.get(code, 'see the log')}"
    return "\n".join([head, "", *lines[:20], *more]) + "\n"


def annotate(code: int, said: Any, record: dict[str, Any] | None) -> None:
    """Annotations of the run, or of what kept it from running."""
    if record:
        print(render(record, "github"), end="", flush=True)
        return
    for title, message in problems_of(code, said)[:10]:
        print(f"::error title={escape_property(title)}::{escape_data(message)}", flush=True)


def write_summary(text: str, environment: Mapping[str, str]) -> None:
    """The job summary; what does not fit beside what the step wrote before is left out, for GitHub drops all of it."""
    file = environment.get("GITHUB_STEP_SUMMARY")
    if not file:
        return
    written = Path(file).stat().st_size if Path(file).exists() else 0
    if written + len(text.encode()) + 1 <= SUMMARY_BYTES:
        with open(file, "a", encoding="utf-8", newline="\n") as stream:
            stream.write(f"{text}\n")


def write_outputs(record: dict[str, Any] | None, code: int, environment: Mapping[str, str]) -> None:
    """`exit-code`, `run-dir`, `verdict` and `bundle` (the tar; empty where nothing may ship) for the steps behind."""
    report = json.loads(render(record, "json")) if record else {}
    run_dir = environment["INPUT_RUN_DIR"]
    tar = (report.get("bundle") or {}).get("tar") if code == 0 else None
    values = {
        "exit-code": str(code),
        "run-dir": run_dir,
        "verdict": report.get("verdict") or "none",
        "bundle": f"{run_dir}/{tar}" if tar else "",
    }
    if file := environment.get("GITHUB_OUTPUT"):
        with open(file, "a", encoding="utf-8", newline="\n") as stream:
            for name, value in values.items():
                end = f"end-{secrets.token_hex(16)}"
                stream.write(f"{name}<<{end}\n{value}\n{end}\n")


# --- the comment ----------------------------------------------------------------------------------------


def comment(text: str, environment: Mapping[str, str]) -> None:
    """Comment on the pull request that this run is about, or update the comment that it made before."""
    number = pull_request_of(environment)
    if number is None:
        return
    if shutil.which("gh") is None:
        warn("gh is not installed on this runner; without it there is no comment on the pull request")
        return
    marker = marker_of(environment)
    issues = f"repos/{environment['GITHUB_REPOSITORY']}/issues"
    try:
        earlier = own_comment(f"{issues}/{number}/comments", marker, environment["INPUT_COMMENT_AUTHOR"])
        body = json.dumps({"body": f"{marker}\n{text}{link_to_run(environment)}"[:COMMENT_CHARACTERS]})
        if earlier is None:
            gh("--method", "POST", f"{issues}/{number}/comments", "--input", "-", stdin=body)
        else:
            gh("--method", "PATCH", f"{issues}/comments/{earlier}", "--input", "-", stdin=body)
    except (subprocess.CalledProcessError, ValueError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        mend = "The job needs `permissions: pull-requests: write`; pull requests from forks do not have it."
        warn(f"no comment on the pull request: {said}\n{mend}")


def pull_request_of(environment: Mapping[str, str]) -> int | None:
    """The number of the pull request, None where the workflow runs for something else."""
    file = Path(environment.get("GITHUB_EVENT_PATH", ""))
    if not environment.get("GITHUB_EVENT_NAME", "").startswith("pull_request") or not file.is_file():
        return None
    number = json.loads(file.read_text(encoding="utf-8")).get("pull_request", {}).get("number")
    return number if isinstance(number, int) else None


def marker_of(environment: Mapping[str, str]) -> str:
    """The hidden first line of the comment: one for each workflow, job, configuration and run folder. No name stands in
    it, so that none can end it."""
    names = ("GITHUB_WORKFLOW", "GITHUB_JOB", "INPUT_CONFIG", "INPUT_RUN_DIR")
    about = "\0".join(environment.get(name, "") for name in names)
    return f"<!-- adapt-to-edge {hashlib.sha256(about.encode()).hexdigest()[:32]} -->"


def own_comment(path: str, marker: str, author: str) -> int | None:
    """The id of the comment that begins with the marker and is ours: somebody else's is left alone."""
    lines = gh("--paginate", f"{path}?per_page=100", "--jq", ".[] | {id, body, login: .user.login} | @json")
    for one in map(json.loads, filter(None, lines.splitlines())):
        if str(one["body"]).startswith(marker) and one["login"] == author:
            return int(one["id"])
    return None


def link_to_run(environment: Mapping[str, str]) -> str:
    """Where the artifacts with the whole report are."""
    parts = [environment.get(name, "") for name in ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_RUN_ID")]
    return f"\n[Log and whole report]({parts[0]}/{parts[1]}/actions/runs/{parts[2]})\n" if all(parts) else ""


def gh(*arguments: str, stdin: str | None = None) -> str:
    """What `gh api` prints. Raises `CalledProcessError` where it fails."""
    done = subprocess.run(["gh", "api", *arguments], input=stdin, capture_output=True, text=True, encoding="utf-8")
    done.check_returncode()
    return done.stdout


def warn(message: str) -> None:
    """A warning annotation."""
    print(f"::warning title=adapt-to-edge::{escape_data(message)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
