"""`make gpu-check`: everything of this project that only a machine with a GPU can show, in one run.

Each check starts the pipeline as a user does, in a process and a folder of its own, so that one that fails leaves the
others to run; what several need (a network, its ONNX files, INT8) is prepared once before them. What this GPU or this
environment cannot do at all (TensorRT-RTX knows no data-centre Hopper) is "not possible", with the reason, and no
failure. Device, versions and numbers go to benchmarks/results/gpu-<date>.json.

Without a GPU `--dry-run` goes through the same code with the CPU in the GPU's place, says of each check what was
replaced, and writes nothing: it finds mistakes in the script, and shows nothing of a GPU. No network is needed: the
default recipe has its weights in a package and its data in this repository.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from models.engines.targets import runtime_of, table
from models.errors import MissingCapabilityError
from models.runtimes.gpu import Gpu, gpu_here
from models.runtimes.onnxruntime_session import INSTALL, TENSORRT_RTX
from pipeline.machine import REPORTED_PACKAGES, describe_hardware
from stages.base import PROVIDER_PACKAGES
from stages.environment import version_of, versions_of
from stages.gate import stops
from stages.validate.providers import require_providers

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RECIPE = ROOT / "pipeline" / "recipes" / "vision.yaml"
SECONDS_OF_A_COMMAND = 240
SECONDS_OF_ALL = 600
"""A machine with a GPU is dear: no command is started or goes on after this."""

SECONDS_TO_END = 10.0
"""For what was asked to end: it writes its record before it does. Then it is asked again, and killed."""

EXIT_GATE_FAILED, EXIT_MISSING, NOT_ENDED = 1, MissingCapabilityError.exit_code, -1
OUT_OF_TIME = f"out of time: {SECONDS_OF_ALL} s are for all checks together"

# A head on frozen features: what is measured is the runtimes, and the network only has to be a real one.
# That so few examples leave a small drop possible is no defect of a GPU; one that they show still fails.
QUICK = [
    "finetune.strategy=feature-extraction", "validate.latency_calls=200", "data.max_test_samples=1000",
    "validate.on_inconclusive=pass",
]  # fmt: skip
NEED_NOT_BEAT = "finetune.max_drop_from_probe=1.0"  # one epoch need not: that training runs, and folds, is shown
NO_RECEIPT = "validate.gates.engines=allow-unproven"
NUMBERS = (
    "name", "provider", "precision", "metric", "metric_difference", "agreement", "relative_error", "sqnr_db",
    "latency_ms_p50", "latency_ms_p95", "throughput_per_s", "speedup", "problem", "passed",
)  # fmt: skip
"""What is kept of each run in validate's evidence."""


class CheckFailed(Exception):
    """A check ran and did not hold; the message says how."""


class NotPossible(Exception):
    """This GPU or this environment cannot do what a check is about; the message says why."""


@dataclass
class Result:
    """What one check came to. `replaced` says what the CPU stood in for; then nothing was shown of a GPU."""

    name: str
    status: str
    seconds: float = 0.0
    message: str = ""
    replaced: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass
class Bench:
    """Where the checks work. `gpu` is None in a dry run without one."""

    folder: Path
    config: Path
    settings: Sequence[str]
    dry: bool
    gpu: Gpu | None
    gpus: int
    replaced: str = ""
    said: str = ""
    until: float = field(default_factory=lambda: time.monotonic() + SECONDS_OF_ALL)

    @property
    def device(self) -> str:
        """Where training runs."""
        return "cpu" if self.dry else "cuda"

    @property
    def seconds(self) -> float:
        """How long a command may take."""
        return max(1.0, min(SECONDS_OF_A_COMMAND, self.until - time.monotonic()))

    def instead(self, what: str) -> None:
        """In a dry run: remember what the CPU stands in for."""
        if self.dry:
            self.replaced = what

    def pipeline(self, run: str, *arguments: str, settings: Sequence[str] = (), gates: bool = True) -> None:
        """A command of the pipeline in the run folder `run`.

        Raises:
            CheckFailed: it ended with another code than 0 (or 1, where `gates` says that they may fail).
            NotPossible: it ended with 3: the machine lacks something; or the time of all checks was over.
        """
        asked = [f"device={self.device}", *QUICK, *self.settings, *settings]
        sets = [word for one in asked for word in ("--set", one)]
        command = [*arguments, "-c", str(self.config), "--run-dir", str(self.folder / run), "--quiet", *sets]
        code, said = start(command, self.seconds)
        self.said = last_line(said)
        if code == NOT_ENDED and time.monotonic() >= self.until:
            raise NotPossible(OUT_OF_TIME)
        if code == EXIT_MISSING:
            raise NotPossible(self.said)
        if code and not (code == EXIT_GATE_FAILED and not gates):
            raise CheckFailed(f"pipeline {arguments[0]} ended with {code}: {self.said}")

    def copied(self, source: str, run: str) -> str:
        """A run folder with what another one holds. Raises `CheckFailed` where that one was not made."""
        if not (self.folder / source).is_dir():
            raise CheckFailed(f"what it needs was not made: {source}")
        shutil.copytree(self.folder / source, self.folder / run)
        return run

    def manifest(self, run: str, stage: str) -> dict[str, Any]:
        """A stage's manifest. Raises `CheckFailed` where there is none."""
        file = self.folder / run / stage / "manifest.json"
        if not file.is_file():
            raise CheckFailed(f"{stage} left no result; the last that was said: {self.said}")
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content


def start(command: Sequence[str], seconds: float) -> tuple[int, str]:
    """(exit code, what it said) of the pipeline's console script, stopped after so many seconds."""
    program = str(Path(sys.executable).with_name("pipeline"))
    code, out, err = run_group([program, *command], seconds, {**os.environ, "HF_HUB_OFFLINE": "1"})
    if code == NOT_ENDED:
        return code, f"it did not end in {seconds:.0f} s"
    return code, out if command[0] == "doctor" else err


def run_group(command: Sequence[str], seconds: float, environment: Mapping[str, str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a program, which is ended after so many seconds with all that it started."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return NOT_ENDED, "", ""
        finally:
            end_group(process)
        return process.returncode, out, err


def end_group(process: subprocess.Popen[str]) -> None:
    """End a program that leads its process group: as Ctrl-C does, then with SIGTERM; what is left then is killed."""
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=SECONDS_TO_END)
    with suppress(ProcessLookupError):  # most often there is nobody
        os.killpg(process.pid, signal.SIGKILL)


def last_line(text: str) -> str:
    """The last words of a program."""
    return (text.strip().splitlines() or ["(it said nothing)"])[-1][:600]


# --- the checks, in order -----------------------------------------------------------------------------


def doctor(bench: Bench) -> dict[str, Any]:
    """What works on this machine; nothing is broken, and the GPU is seen."""
    code, said = start(["doctor", "--json"], bench.seconds)
    try:
        findings = {one["name"]: one for one in json.loads(said)}
    except json.JSONDecodeError as error:
        raise CheckFailed(f"pipeline doctor ended with {code}: {last_line(said)}") from error
    broken = [f"{name}: {one['message']}" for name, one in findings.items() if one["state"] == "broken"]
    if broken:
        raise CheckFailed("; ".join(broken))
    bench.instead("the GPU, which doctor must find")
    if not bench.dry and findings["GPU"]["state"] != "ok":
        raise CheckFailed(f"the GPU is not seen: {findings['GPU']['message']}")
    names = ("GPU", "cuda provider", "tensorrt-rtx provider", "running engines")
    return {name: f"{findings[name]['state']}: {findings[name]['message']}" for name in names}


def prepare(bench: Bench) -> dict[str, Any]:
    """A network with a trained head, in ONNX (fp32, fp16) and without INT8: what the checks below run."""
    bench.pipeline("base", "all", "--until", "quantize", settings=["quantize.schemes=[]"])
    return {stage: bench.manifest("base", stage)["duration_s"] for stage in ("finetune", "merge-lora", "export")}


def bf16_training(bench: Bench) -> dict[str, Any]:
    """LoRA for one epoch in bf16 on the GPU, folded and compared; every gate of both stages holds."""
    bench.instead("bf16 on CUDA, by fp32 on the CPU")
    precision = "fp32" if bench.dry else "bf16"
    settings = ["finetune.strategy=lora", "finetune.epochs=1", f"finetune.precision={precision}", NEED_NOT_BEAT]
    bench.pipeline("training", "all", "--until", "merge-lora", settings=settings)
    manifest, merged = bench.manifest("training", "finetune"), bench.manifest("training", "merge-lora")
    if manifest["key_parts"]["device"] != bench.device:
        raise CheckFailed(f"it ran on {manifest['key_parts']['device']}")
    return {"seconds": manifest["duration_s"], "device": manifest["key_parts"]["device"], "precision": precision,
            "folded": {gate["name"]: gate["measured"] for gate in merged["gates"]}}  # fmt: skip


def cuda_provider(bench: Bench) -> dict[str, Any]:
    """ONNX Runtime's CUDA provider: outputs against PyTorch, times, beside the CPU's."""
    return on_provider(bench, "base", "cuda", "cuda")


def rtx_provider(bench: Bench) -> dict[str, Any]:
    """The same with the TensorRT-RTX provider, where it is installed and knows the GPU."""
    if not bench.dry and bench.gpu is not None:
        major, minor = map(int, bench.gpu.compute_capability.split("."))
        if (major, minor) not in ((8, 6), (8, 9)) and major < 12:  # what the plugin itself says that it takes
            raise NotPossible(f"the provider takes compute capability 8.6, 8.9 and 12.0 or later; this is {bench.gpu}")
        if version_of(PROVIDER_PACKAGES[0]) is None:
            raise NotPossible(f"it is not installed: {INSTALL[TENSORRT_RTX]}")
    return on_provider(bench, "base", "rtx", "tensorrt-rtx")


def int8_on_gpu(bench: Bench) -> dict[str, Any]:
    """Symmetric INT8 through the CUDA provider: is it right there, and how does its time compare with FP16's?"""
    run = bench.copied("base", "int8")
    settings = ["quantize.schemes=[int8-symmetric]"]
    bench.pipeline(run, "quantize", settings=settings)
    numbers = on_provider(bench, run, "int8-cuda", "cuda", settings)
    times = {
        one["precision"]: one["latency_ms_p50"] for one in numbers["runs"] if one["provider"] == measured_on(bench)
    }
    return numbers | {"times_as_fast_as_fp16": times["fp16"] / times["int8"]}


def measured_on(bench: Bench) -> str:
    """The provider of the check above, which the CPU's stands in for in a dry run."""
    return "cpu" if bench.dry else "cuda"


def on_provider(
    bench: Bench, source: str, run: str, provider: str, settings: Sequence[str] = ("quantize.schemes=[]",)
) -> dict[str, Any]:
    """validate on a provider and on the CPU; the numbers of every run."""
    if bench.dry:
        bench.instead(f"the {provider} provider, by the CPU's")
        providers = "[cpu]"
    else:
        try:
            require_providers([provider])  # type: ignore[list-item]
        except MissingCapabilityError as error:
            raise CheckFailed(str(error)) from error
        providers = f"[{provider}, cpu]"
    bench.copied(source, run)
    bench.pipeline(run, "validate", settings=[*settings, f"validate.providers={providers}"], gates=False)
    return judged(bench, run)


def judged(bench: Bench, run: str) -> dict[str, Any]:
    """The numbers of a validation. Raises `CheckFailed` where a gate failed, with the numbers kept."""
    manifest = bench.manifest(run, "validate")
    found = manifest["measurements"]
    runs = [*found["candidates"], *found["other_runs"], *found["engine_runs"]]
    numbers = {
        "samples": found["samples"],
        "chosen": found["chosen"],
        "reference_latency_ms_p50": found["reference"]["latency_ms_p50"],
        "runs": [{key: one.get(key) for key in NUMBERS} for one in runs],
        "engines": {one["name"]: one["status"] for one in found["engines"] if one["ships_for"]},
        "gates_failed": [
            f"{gate['name']} of {gate['subject']}: {gate['message']}" for gate in manifest["gates"] if stops(gate)
        ],
    }
    if numbers["gates_failed"]:
        failure = CheckFailed("; ".join(numbers["gates_failed"][:3]))
        failure.numbers = numbers  # type: ignore[attr-defined]
        raise failure
    return numbers


def engines(bench: Bench) -> dict[str, Any]:
    """Engines for this very GPU, built, run on the whole test split and so PROVEN."""
    targets = table().targets.items()
    if bench.gpu is None:
        fitting = ["sm86"]
        bench.instead("running the engine, which is only built")
    else:
        fitting = [name for name, one in targets if one.compute_capability == bench.gpu.compute_capability]
    fitting = [name for name in fitting if version_of(runtime_of(table().targets[name]).distribution)]
    if not fitting:
        known = sorted({one.compute_capability for _, one in targets if one.runtime == "tensorrt-rtx"}, key=float)
        raise NotPossible(
            f"no library here builds for {bench.gpu or 'sm86'}: TensorRT-RTX takes compute capability "
            f"{', '.join(known)}, and TensorRT is {version_of('tensorrt') or 'not installed'}"
        )
    runtime = table().targets[fitting[0]].runtime
    settings = [
        "quantize.schemes=[]", f"export.formats=[onnx, {runtime}]", f"export.targets=[{fitting[0]}]",
        *([NO_RECEIPT] if bench.gpu is None else []),
    ]  # fmt: skip
    run = bench.copied("base", "engines")
    bench.pipeline(run, "all", "--until", "validate", settings=settings, gates=False)
    numbers = judged(bench, run)
    if bench.gpu is not None and set(numbers["engines"].values()) != {"PROVEN"}:
        raise CheckFailed(f"not proven: {numbers['engines']}")
    return numbers


def several_gpus(bench: Bench) -> dict[str, Any]:
    """DDP over all GPUs of this machine."""
    processes = bench.gpus
    if bench.dry:
        processes = 2
        bench.instead("two GPUs with NCCL, by two processes with gloo")
    elif processes < 2:
        raise NotPossible(f"there is {processes} GPU")
    settings = ["finetune.strategy=lora", "finetune.epochs=1", f"finetune.launch.processes={processes}",
                f"finetune.batch_size={8 * processes}"]  # fmt: skip
    bench.pipeline("ddp", "finetune", settings=[*settings, NEED_NOT_BEAT], gates=False)
    manifest = bench.manifest("ddp", "finetune")
    failed = [gate["name"] for gate in manifest["gates"] if stops(gate)]
    if "training stays finite" in failed:
        raise CheckFailed("training diverged")
    return {"seconds": manifest["duration_s"], "processes": processes, "gates_failed": failed}


CHECKS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "doctor": doctor,
    "prepare": prepare,
    "bf16 training": bf16_training,
    "cuda provider": cuda_provider,
    "tensorrt-rtx provider": rtx_provider,
    "engines": engines,
    "int8 on the gpu": int8_on_gpu,
    "several gpus": several_gpus,
}


# --- running them -------------------------------------------------------------------------------------


def check_all(bench: Bench, names: Sequence[str]) -> list[Result]:
    """Every check, whatever became of the ones before it."""
    results = []
    for name in names:
        bench.replaced = ""
        started = time.monotonic()
        result = Result(name, "passed")
        try:
            if started >= bench.until:
                raise NotPossible(OUT_OF_TIME)
            result.numbers = CHECKS[name](bench)
        except NotPossible as error:
            result.status, result.message = "not possible", str(error)
        except CheckFailed as error:
            result.status, result.message = "failed", str(error)
            result.numbers = getattr(error, "numbers", {})
        except (OSError, KeyError, ValueError) as error:  # a defect of this script: the other checks still run
            result.status, result.message = "failed", f"defect of the check: {error!r}"
        result.seconds, result.replaced = round(time.monotonic() - started, 1), bench.replaced
        results.append(result)
        print(line_of(result), flush=True)
    return results


def line_of(result: Result) -> str:
    """One line for a person, and one a measured run."""
    said = "; ".join(
        part for part in (result.message, f"replaced: {result.replaced}" if result.replaced else "") if part
    )
    if "times_as_fast_as_fp16" in result.numbers:
        said = f"INT8 is {result.numbers['times_as_fast_as_fp16']:.2f}× as fast as FP16. {said}"
    lines = [f"{result.status:<13} {result.name:<22} {result.seconds:>6.1f} s  {said}".rstrip()]
    for run in result.numbers.get("runs", []):
        if run["latency_ms_p50"] is not None:
            lines.append(
                f"{'':<14}{run['name']:<40} {run['latency_ms_p50']:>8.3f} ms  {run['speedup']:.2f}× PyTorch there, "
                f"agreement {run['agreement']:.4f}, error {run['relative_error']:.1e} of the range"
            )
    return "\n".join(lines)


def report_of(results: Sequence[Result], config: Path) -> dict[str, Any]:
    """What is written down."""
    import torch

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": config.name,
        "machine": describe_hardware(),
        "cuda": torch.version.cuda,
        "versions": versions_of(REPORTED_PACKAGES),
        "checks": [asdict(result) for result in results],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, write, print; 0 where nothing failed, 1 where something did, 3 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="the CPU in place of the GPU; nothing is written")
    parser.add_argument("--config", type=Path, default=RECIPE, help="the recipe (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of the pipeline")
    parser.add_argument("--only", action="append", choices=list(CHECKS), help="this check (repeatable; default: all)")
    asked = parser.parse_args(arguments)
    gpu = gpu_here()
    if gpu is None and not asked.dry_run:
        print("there is no GPU here; --dry-run goes through the checks on the CPU", file=sys.stderr)
        return EXIT_MISSING
    gpus = 0
    if gpu is not None:
        import torch

        gpus = torch.cuda.device_count()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        bench = Bench(
            Path(folder), asked.config.resolve(), asked.set, asked.dry_run, None if asked.dry_run else gpu, gpus
        )
        results = check_all(bench, asked.only or list(CHECKS))
    failed = [result.name for result in results if result.status == "failed"]
    if asked.dry_run:
        print("a dry run: nothing was shown of a GPU, and nothing was written")
    else:
        report = report_of(results, asked.config)
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"gpu-{report['date'].replace(':', '')}.json"
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"written to {file.relative_to(ROOT)}")
    print(f"failed: {', '.join(failed)}" if failed else "nothing failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
