"""Training in several processes: `accelerate launch` starts them, DistributedDataParallel or FSDP joins them.

The parent writes what a training needs into the folder of the training, the processes (`stages.finetune.worker`) leave
there what `train` would have left, and the parent takes the best weights from it. So every strategy trains this way,
a run resumes this way, and nothing but files passes from one side to the other.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models import errors
from models.errors import MissingCapabilityError, PipelineError, TrainingError
from stages.data.splits import Example
from stages.environment import usable_threads

if TYPE_CHECKING:
    import torch

    from models.classifier import Classifier
    from models.modalities import Processing
    from stages.base import StageContext
    from stages.finetune.config import LaunchConfig
    from stages.finetune.setup import Setup
    from stages.finetune.training import Trained, TrainingPlan

REQUEST, CONTENTS, OUTPUT = "request.json", "contents.bin", "output.log"
EVENT = "@event "
"""Begins a line on standard output that is for the parent; every other line is a library's."""

GRACE_S = 10.0
"""Between asking the processes to end and ending them."""


def train_in_processes(
    model: torch.nn.Module, base: Classifier, setup: Setup, plan: TrainingPlan, folder: Path, launch: LaunchConfig
) -> Trained:
    """As `stages.finetune.training.train`, in `plan.processes` processes that share each batch.

    `model` is `base` itself or peft's wrapper, whose untrained network `base` is.

    Raises:
        Diverged: the loss is not finite.
        MissingCapabilityError: fewer GPUs than processes, or batch norm that several CPU processes cannot share.
        TrainingError: as `train`; or a process died, and why.
    """
    from stages.finetune.training import Recorder, last_complete_checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(folder, plan)
    # Here, where nobody else looks: it removes what is incomplete.
    last = last_complete_checkpoint(folder / "trainer")
    if not (last and recorder.should_stop()):
        refuse_what_cannot_be_shared(model, plan, setup.context, launch)
        request = folder / "launch"
        write_request(request, model, base, setup, plan)
        command = launch_command(request, plan, launch, setup.context.device)
        if launch.config_file:
            setup.context.log.info(
                "%-10s on every other machine, with a config file of its own: %s", "", " ".join(command)
            )
        run_processes(command, request, setup.context)
        raise_outcome(request, Recorder(folder, plan).history)
        recorder = Recorder(folder, plan)
    return recorder.restore_best(model)


def refuse_what_cannot_be_shared(
    model: torch.nn.Module, plan: TrainingPlan, context: StageContext, launch: LaunchConfig
) -> None:
    """Raises `MissingCapabilityError`: see `train_in_processes`."""
    import torch

    from models.classifier import moving_batchnorms

    if context.device == "cuda" and launch.config_file is None and plan.processes > torch.cuda.device_count():
        raise MissingCapabilityError(
            f"finetune.launch.processes: {plan.processes}, but this machine has {torch.cuda.device_count()} GPUs; "
            "ask for as many processes, or write device: cpu"
        )
    if context.device == "cpu" and plan.processes > 1 and not plan.hold_batchnorm and moving_batchnorms(model):
        raise MissingCapabilityError(
            "batch norm with moving statistics is not trained in several CPU processes: PyTorch's SyncBatchNorm needs "
            "GPUs, and without it each process would see a part of the batch; try finetune.initial_head: probe (which "
            "holds the statistics), finetune.strategy: lora or lp-ft, or finetune.launch.processes: 1"
        )


def write_request(folder: Path, model: torch.nn.Module, base: Classifier, setup: Setup, plan: TrainingPlan) -> None:
    """Write the network, the examples and the plan; outcomes of an earlier try are removed."""
    from models.adapters import save_adapter
    from stages.artifact import write_json

    folder.mkdir(exist_ok=True)
    for outcome in folder.glob("outcome-*.json"):
        outcome.unlink()
    setup.save(base, folder / "network")
    if model is not base:
        network: Any = model
        save_adapter(network.to("cpu"), folder / "adapter")
    data, config = setup.context.data, setup.config
    with (folder / CONTENTS).open("wb") as stream:
        examples = {
            name: [describe_example(one, setup.processing, stream) for one in data[name]]
            for name in ("train", "validation")
        }
    write_json(
        folder / REQUEST,
        {
            "adapted": model is not base,
            "trained": [name for name, one in model.named_parameters() if one.requires_grad],
            "plan": asdict(plan),
            "device": setup.context.device,
            "threads": config.threads or usable_threads(),  # torchrun sets OMP_NUM_THREADS=1 in the processes
            "labels": list(data.labels),
            "examples": examples,
        },
    )


def describe_example(example: Example, processing: Processing, stream: Any) -> dict[str, Any]:
    """An example as JSON; what is neither text nor path goes into `stream`, from `start` on, `size` bytes."""
    content: Any = example.content
    described = {"label": example.label, "digest": example.digest, "origin": example.origin}
    if isinstance(content, str | tuple):
        return described | {"text": content}
    if isinstance(content, Path):
        return described | {"path": str(content.resolve())}
    data = content if isinstance(content, bytes) else processing.to_file(content)[1]
    start = stream.tell()
    stream.write(data)
    return described | {"start": start, "size": len(data)}


def read_examples(described: Sequence[dict[str, Any]], contents: bytes, processing: Processing) -> Iterator[Example]:
    """The inverse of `describe_example`."""
    for one in described:
        content: Any
        if "text" in one:
            content = tuple(one["text"]) if isinstance(one["text"], list) else one["text"]
        elif "path" in one:
            content = Path(one["path"])
        else:
            content = processing.from_file(contents[one["start"] : one["start"] + one["size"]])
        label = tuple(one["label"]) if isinstance(one["label"], list) else one["label"]
        yield Example(content, label, one["digest"], one["origin"])


def launch_command(request: Path, plan: TrainingPlan, launch: LaunchConfig, device: str) -> list[str]:
    """`accelerate launch` with the user's configuration file, or with one written beside the request: without any,
    accelerate would take the one of this user's other projects."""
    import yaml

    from stages.finetune.training import choose_precision

    file = Path(launch.config_file) if launch.config_file else request / "accelerate.yaml"
    if launch.config_file is None:
        own = {
            "compute_environment": "LOCAL_MACHINE",
            "distributed_type": "MULTI_GPU",  # on CPUs too: MULTI_CPU starts one process, and leaves the others to MPI
            "num_processes": plan.processes,
            "num_machines": 1,
            "machine_rank": 0,
            "main_process_port": 0,
            "use_cpu": False,
        }
        file.write_text(yaml.safe_dump(own), encoding="utf-8")
    precision = choose_precision(plan.precision, device)
    return [
        *(sys.executable, "-P", "-m", "accelerate.commands.launch"),
        *("--config_file", str(file.resolve())),
        *("--num_processes", str(plan.processes)),
        *("--mixed_precision", "no" if precision == "fp32" else precision),
        *("-m", "stages.finetune.worker", str(request.resolve())),
    ]


def run_processes(command: Sequence[str], request: Path, context: StageContext) -> None:
    """Run to the end; progress and log lines of the first process become this one's.

    However this ends, no process is left behind.

    Raises:
        TrainingError: it ended with another code than 0, and no process has written why.
    """
    # The working folder is no place to import from: torchrun's `python -m` would put it first.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    lines: list[str] = []
    try:
        with ExitStack() as bars, (request / OUTPUT).open("w", encoding="utf-8") as log:
            advance: Any = None
            assert started.stdout is not None
            for line in started.stdout:
                if line.startswith(EVENT):
                    event = json.loads(line.removeprefix(EVENT))
                    if "steps" in event:
                        advance(event["steps"])
                    elif "task" in event:
                        advance = bars.enter_context(context.progress.task(event["task"], event["total"]))
                    else:
                        context.log.log(event["level"], "%s", event["message"])
                elif line.strip():
                    lines.append(line.rstrip())
                    log.write(line)
                    context.log.debug("%s", line.rstrip())
        code = started.wait()
    finally:
        end_group(started)
    if code and not list(request.glob("outcome-*.json")):
        raise TrainingError(
            f"a training process died: {reason_of(lines, code)}; all that it said is in {request / OUTPUT}"
        )


def end_group(started: subprocess.Popen[str]) -> None:
    """End the launcher and all that it started, politely at first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(started.pid, number)
        with suppress(subprocess.TimeoutExpired):
            started.wait(GRACE_S)
    if started.stdout is not None:
        started.stdout.close()


def reason_of(lines: Sequence[str], code: int) -> str:
    """Why a process died without a word of its own, from what the launcher and Python said."""
    ended = re.search(r"exitcode\s*: (-?\d+)", "\n".join(lines))  # the launcher names the first to end first
    if ended and int(ended[1]) < 0:
        return f"ended by {signal.Signals(-int(ended[1])).name} (SIGKILL is what a machine out of memory sends)"
    said = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    own = [line for line in said if "ChildFailedError" not in line and "CalledProcessError" not in line]
    return (own or said or [f"exit code {code}"])[0].strip()


def raise_outcome(request: Path, history: list[dict[str, float]]) -> None:
    """Raise what a process has written before it ended: the first of them, the others followed from it.

    Raises:
        Diverged: that was it.
        PipelineError: of the class that the process raised.
    """
    from stages.finetune.training import Diverged

    found = [json.loads(file.read_text(encoding="utf-8")) for file in request.glob("outcome-*.json")]
    if not found:
        return
    first = min(found, key=lambda one: float(one["time"]))
    if first["error"] == Diverged.__name__:
        diverged = Diverged(first["message"], first["step"])
        diverged.history = history
        raise diverged
    kind = getattr(errors, first["error"])
    assert issubclass(kind, PipelineError)
    raise kind(first["message"])


class ForwardedLog(logging.Handler):
    """Prints each record as an event for the parent."""

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        tell({"level": record.levelno, "message": record.getMessage()})


def tell(event: dict[str, Any]) -> None:
    """An event, on a line of its own whatever another process has begun to write."""
    sys.stdout.write(f"\n{EVENT}{json.dumps(event)}\n")
    sys.stdout.flush()
