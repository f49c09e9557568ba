"""Is the training as quick as it can be? `make bench-training`.

    python benchmarks/bench_training.py [--rounds 3] [--steps 8] [--epochs 4] [--examples 512]
        [--threads 2] [--recipe vision text]

On the network and the data of each recipe:

- a head trained on features that were computed once, against the same head trained through the frozen backbone: the
  same start, order, batches, epochs and optimizer, so the accuracies must agree; time from nothing, and where the
  cache has the features already;
- a step of LoRA and of full fine-tuning in finetune (preprocessing, forward, backward, optimizer, bookkeeping) against
  a loop of bare PyTorch on the same network, examples and batches. Both take turns in the same run, each with a new
  network; the first steps of a turn are not counted.

Everything goes to benchmarks/results/training-<date>.json. Times are those of this machine, whose load is recorded.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_demo import RESULTS, ROOT, versions

from models.adapters import AdapterSettings, inject_adapters
from models.classifier import hold_batchnorm
from models.registry import pin
from pipeline.config import load_config
from pipeline.progress import QuietProgress
from stages.base import StageContext
from stages.data.load import load_data
from stages.features.compute import compute_features, features_key
from stages.finetune.config import FinetuneConfig
from stages.finetune.rates import parameter_groups
from stages.finetune.setup import Setup, build
from stages.finetune.strategies import train_once
from stages.finetune.training import make_collate

UNCOUNTED = 2
"""Steps at the start of a turn: the optimizer allocates its state."""

HEAD_RATE = 1e-3


class StepClock(QuietProgress):
    """Notes when each step of a training ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Any]:
        """See `stages.base.Progress`."""

        def advance(steps: int = 1) -> None:
            if description == "training":
                self.ends.append(time.perf_counter())

        yield advance


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--steps", type=int, default=8, help="counted steps a turn")
    parser.add_argument("--epochs", type=int, default=4, help="of the head")
    parser.add_argument("--examples", type=int, default=512, help="that the head is trained on")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--recipe", nargs="+", default=["vision", "text"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ["XDG_CACHE_HOME"], folder = (made := tempfile.mkdtemp()), Path(made)
    load_before = os.getloadavg()[0]
    recipes = {}
    for name in arguments.recipe:
        setup = setup_of(name, folder)
        recipes[name] = {
            "backbone": setup.context.backbone.id,
            "features": compare_heads(setup, arguments.epochs, arguments.examples),
            "steps": {
                strategy: compare_steps(setup, strategy, arguments.rounds, arguments.steps, folder / name)
                for strategy in ("lora", "full")
            },
        }
        print_recipe(name, recipes[name])
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.system(), "machine": platform.machine(), "cores": os.cpu_count()},
        "threads": arguments.threads,
        "load_before": round(load_before, 2),
        "load_after": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions(),
        "recipes": recipes,
    }
    file = RESULTS / f"training-{result['date'].replace(':', '')}.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {file.relative_to(ROOT)}")
    return 0


def setup_of(recipe: str, folder: Path) -> Setup:
    """The start of every strategy, as finetune makes it from the recipe; no flips, which a bare loop would not do."""
    config, backbone = load_config(ROOT / "pipeline" / "recipes" / f"{recipe}.yaml", ["finetune.augment=none"])
    log = logging.getLogger("bench")
    context = StageContext(
        output=folder, resume=folder, inputs={}, task=config.task, backbone=pin(backbone),
        data=load_data(config.data, config.task), seed=config.seed, device="cpu", threads=torch.get_num_threads(),
        log=log, progress=QuietProgress(),
    )  # fmt: skip
    torch.manual_seed(0)
    return build(context, config.finetune)


# --- the head -------------------------------------------------------------------------------------


def compare_heads(setup: Setup, epochs: int, count: int) -> dict[str, Any]:
    """Seconds and validation metric of a head on cached features and of the same head through the frozen backbone."""
    data: Any = {name: setup.context.data[name][:count] for name in ("train", "validation")}
    size, wanted = setup.config.batch_size, {name: setup.targets(name)[:count] for name in data}
    model = setup.model.eval()
    key = features_key(["bench"], setup.spec, setup.processing, "cpu")

    def cached(name: Any) -> torch.Tensor:
        features = compute_features(model, setup.processing, data[name], key, "cpu", QuietProgress())
        return torch.from_numpy(features)

    def through(indices: Any, name: Any) -> torch.Tensor:
        arrays = setup.processing.arrays([data[name][index].content for index in indices])
        with torch.no_grad():
            return model.features(*(torch.from_numpy(arrays[spec.name]) for spec in setup.processing.inputs)).float()

    def train(features_of: Any) -> torch.nn.Linear:
        torch.manual_seed(0)
        head = torch.nn.Linear(setup.spec.feature_dim, len(setup.spec.labels))
        optimizer = torch.optim.AdamW(head.parameters(), lr=HEAD_RATE)
        targets = torch.from_numpy(wanted["train"])
        for _ in range(epochs):
            for indices in torch.randperm(len(targets)).split(size):
                loss = setup.task.loss(head(features_of(indices)), targets[indices])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return head

    def judge(head: torch.nn.Linear, features: torch.Tensor) -> float:
        with torch.no_grad():
            return float(setup.task.scores(head(features).numpy(), wanted["validation"]).mean())

    found: dict[str, Any] = {"epochs": epochs, "examples": len(data["train"])}
    for name in ("cached_first", "cached_again"):
        started = time.perf_counter()
        features = cached("train")
        head = train(lambda indices, features=features: features[indices])
        found[name] = {"seconds": round(time.perf_counter() - started, 3)}
    started = time.perf_counter()
    slow = train(lambda indices: through(indices, "train"))
    found["through_backbone"] = {"seconds": round(time.perf_counter() - started, 3)}
    validation = cached("validation")
    found["cached_again"]["metric"] = found["cached_first"]["metric"] = judge(head, validation)
    found["through_backbone"]["metric"] = judge(slow, validation)
    for name in ("cached_first", "cached_again"):
        found[name]["times_faster"] = round(found["through_backbone"]["seconds"] / found[name]["seconds"], 2)
    return found


# --- steps ----------------------------------------------------------------------------------------


def compare_steps(setup: Setup, strategy: Any, rounds: int, steps: int, folder: Path) -> dict[str, Any]:
    """Seconds of a step here and in a bare loop, in turns; the ratio of the medians and of each turn."""
    size = setup.config.batch_size
    data = setup.context.data
    few: dict[Any, Any] = {
        "train": data["train"][: (steps + UNCOUNTED) * size],
        "validation": data["validation"][:size],
    }
    settings = {**setup.config.model_dump(), "strategy": strategy, "initial_head": "random", "epochs": 1}
    # Of another strategy than the recipe's, the defaults.
    if strategy != setup.config.strategy:
        settings |= {"backbone_learning_rate": None, "head_learning_rate": None}
    config = FinetuneConfig.model_validate(settings)
    ours: list[float] = []
    bare: list[float] = []
    ratios = []
    for turn in range(rounds):
        here = []
        sides = [(ours, finetune_steps), (bare, bare_steps)]
        for kept, measure in sides if turn % 2 == 0 else reversed(sides):
            context = replace(setup.context, data=replace(data, splits=few), progress=StepClock())
            start = replace(setup, context=context, config=config)
            torch.manual_seed(0)
            found = measure(strategy, start, folder / f"{strategy}-{turn}")
            kept += found
            here.append((kept is ours, statistics.median(found)))
        medians = dict(here)
        ratios.append(round(medians[True] / medians[False], 3))
    return {
        "batch_size": size,
        "finetune_step_s": round(statistics.median(ours), 4),
        "bare_step_s": round(statistics.median(bare), 4),
        "ratio": round(statistics.median(ours) / statistics.median(bare), 3),
        "ratio_of_each_turn": ratios,
        "finetune_steps_s": [round(one, 4) for one in ours],
        "bare_steps_s": [round(one, 4) for one in bare],
    }


def network_of(strategy: Any, setup: Setup) -> Any:
    """As `stages.finetune.strategies` makes it."""
    chosen = setup.config.lora
    if strategy == "lora":
        settings = AdapterSettings(chosen.method, chosen.rank, chosen.alpha, chosen.dropout)
        return inject_adapters(setup.start(strategy), settings, setup.example_inputs)
    return setup.start(strategy)


def finetune_steps(strategy: Any, setup: Setup, folder: Path) -> list[float]:
    """Seconds of each counted step of the stage's own training."""
    train_once(strategy, network_of(strategy, setup), setup, setup.rates(strategy), folder)
    clock = setup.context.progress
    assert isinstance(clock, StepClock)
    return np.diff(clock.ends)[UNCOUNTED - 1 :].tolist()


def bare_steps(strategy: Any, setup: Setup, folder: Path) -> list[float]:
    """Seconds of each counted step of a loop as anybody would write it."""
    model, rates = network_of(strategy, setup), setup.rates(strategy)
    names = [spec.name for spec in setup.processing.inputs]
    if setup.holds_batchnorm(strategy):
        hold_batchnorm(model)
    # One rate would be two groups (decay or none); the rates by layer are part of what is trained.
    optimizer = torch.optim.AdamW(parameter_groups(model, rates, setup.config.weight_decay), lr=rates.head)
    # The order of the stage's training, so that batches of texts are equally long.
    examples, order = list(setup.context.data["train"]), torch.Generator().manual_seed(setup.context.seed)
    loader = torch.utils.data.DataLoader(
        examples, batch_size=setup.config.batch_size, sampler=torch.utils.data.RandomSampler(examples, generator=order),
        collate_fn=make_collate(setup.processing, setup.task, len(setup.spec.labels)),
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(loader))
    model.train()
    ends = []
    for batch in loader:
        loss = setup.task.loss(model(*(batch[name] for name in names)), batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss.item()
        ends.append(time.perf_counter())
    return np.diff(ends)[UNCOUNTED - 1 :].tolist()


def print_recipe(name: str, found: dict[str, Any]) -> None:
    """The figures of one recipe for a person."""
    heads = found["features"]
    print(f"{name}: {found['backbone']}, a head for {heads['epochs']} epochs on {heads['examples']} examples")
    for key in ("cached_first", "cached_again", "through_backbone"):
        row = heads[key]
        print(f"  {key:<18}{row['seconds']:>8.2f} s   metric {row['metric']:.4f}   {row.get('times_faster', 1)}×")
    for strategy, row in found["steps"].items():
        print(
            f"  {strategy:<18}{row['finetune_step_s']:>8.3f} s a step of {row['batch_size']}, bare "
            f"{row['bare_step_s']:.3f} s: {row['ratio']:.3f} (turns {row['ratio_of_each_turn']})"
        )


if __name__ == "__main__":
    sys.exit(main())
