"""One of the processes of a training: `accelerate launch -m stages.finetune.worker FOLDER` (see `launch.py`)."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import PipelineError, TrainingError
from stages.base import Advance, StageContext
from stages.data.splits import DataSplits
from stages.finetune.launch import CONTENTS, REQUEST, ForwardedLog, read_examples, tell

if TYPE_CHECKING:
    from stages.finetune.training import TrainingPlan


class ToldProgress:
    """Tells the parent; the other processes say nothing."""

    def __init__(self, first: bool) -> None:
        self.first = first

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """See `stages.base.Progress`."""
        if self.first:
            tell({"task": description, "total": total})
        yield lambda steps=1: tell({"steps": steps}) if self.first else None


def main(folder: Path) -> int:
    """Train what `folder` describes. What stops this process is written there for the parent."""
    from stages.artifact import write_json
    from stages.finetune.training import Diverged

    rank = int(os.environ.get("RANK", "0"))
    outcome: dict[str, Any]
    try:
        work(folder, rank)
        return 0
    except Diverged as error:
        outcome = {"error": type(error).__name__, "message": str(error), "step": error.step}
    except PipelineError as error:
        outcome = {"error": type(error).__name__, "message": str(error)}
    write_json(folder / f"outcome-{rank}.json", {**outcome, "time": time.time()})
    return 1


def work(folder: Path, rank: int) -> None:
    """Rebuild the network and the data, and train."""
    import torch
    from accelerate import PartialState

    from models.adapters import load_adapted
    from models.checkpoint import load_checkpoint
    from stages.finetune.training import fit

    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    plan = plan_from_dict(request["plan"])
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, request["threads"] // here))
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != plan.processes:
        raise TrainingError(
            f"accelerate started {started} processes instead of {plan.processes}; in the file of "
            "finetune.launch.config_file write distributed_type: MULTI_GPU (on CPUs too) or FSDP"
        )
    checkpoint = load_checkpoint(folder / "network")
    model: Any = checkpoint.model
    if request["adapted"]:
        model = load_adapted(folder / "network", folder / "adapter")
    if plan.processes > 1 and not plan.hold_batchnorm and request["device"] == "cuda":
        from timm.layers.norm_act import convert_sync_batchnorm

        model = convert_sync_batchnorm(model)
    trained = set(request["trained"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in trained
    contents = (folder / CONTENTS).read_bytes()
    examples, validation = (
        tuple(read_examples(request["examples"][name], contents, checkpoint.processing))
        for name in ("train", "validation")
    )
    log = logging.getLogger("stages.finetune.worker")
    log.propagate = False
    if rank == 0:
        log.addHandler(ForwardedLog())
        log.setLevel(logging.INFO)
    else:
        log.addHandler(logging.NullHandler())
    context = StageContext(
        output=folder,
        resume=folder.parent,
        inputs={},
        task=checkpoint.spec.task,
        backbone=checkpoint.spec.backbone,
        data=DataSplits(tuple(request["labels"]), {"train": examples, "validation": validation}, {}),
        seed=plan.seed,
        device=request["device"],
        threads=torch.get_num_threads(),
        log=log,
        progress=ToldProgress(rank == 0),
    )
    fit(model, checkpoint.processing, examples, validation, plan, context, folder.parent)
    PartialState().wait_for_everyone()


def plan_from_dict(values: dict[str, Any]) -> TrainingPlan:
    """The `TrainingPlan` of which `values` is the `asdict`."""
    from models.layers import Layer
    from stages.finetune.rates import Rates
    from stages.finetune.training import TrainingPlan

    rates = values["rates"]
    layers = tuple(Layer(one["name"], tuple(one["parameters"])) for one in rates["layers"])
    return TrainingPlan(**{**values, "rates": Rates(rates["head"], layers, tuple(rates["by_layer"]))})


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads abort a process that ends as others do, now and then (2 of 8 tries): all is written, so just end.
    os._exit(code)
