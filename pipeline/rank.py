"""`pipeline rank`: which of several backbones fits the data, and what each would cost. It writes no run."""

from __future__ import annotations

import gc
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import ConfigError, DataError, ModelError, PipelineError, Problem, StageError
from models.registry import check_task, pin, resolve
from models.tasks import FEATURES, MODALITY_OF_TASK, task_of
from models.tasks.single_label import SingleLabel
from pipeline.config import PipelineConfig, load_config, make_config
from pipeline.machine import REPORTED_PACKAGES, describe_hardware, resolve_device
from pipeline.report.formats import (
    MISSING,
    format_bytes,
    format_duration,
    format_interval,
    format_ms,
    format_number,
    format_percent,
    format_points,
    format_ratio,
)
from stages.artifact import write_json
from stages.base import Progress
from stages.data.load import load_data
from stages.environment import usable_threads, versions_of
from stages.features.compute import compute_features, features_key
from stages.transferability.cost import Cost, measure_cost
from stages.transferability.ranking import (
    CONFIDENCE,
    SCORES,
    Candidate,
    Difference,
    Ranked,
    SmallerIsEnough,
    agreement,
    rank,
    where_smaller_is_enough,
    winners,
)

if TYPE_CHECKING:
    import numpy as np

    from models.spec import BackboneSpec, TaskName
    from stages.data.splits import DataSplits
    from stages.transferability.scores import Fold

SCHEMA_VERSION = 1
DEFAULT_CONFIG = Path("pipeline.yaml")
WIDTH = 200
"""Columns where the output is no terminal: a log is not to lose half of a table."""


@dataclass(frozen=True)
class Measured:
    """What came of one backbone: scored and measured, or the error that kept it from that."""

    spec: BackboneSpec
    candidate: Candidate | None = None
    cost: Cost | None = None
    features: int = 0
    error: PipelineError | None = None


# --- what is asked for ------------------------------------------------------------------------------


def read_request(
    backbones: Sequence[str],
    file: Path | None,
    options: Mapping[str, Any],
    settings: Sequence[str],
    output: Path | None,
) -> tuple[PipelineConfig, list[BackboneSpec]]:
    """The configuration and the backbones to rank. `options` (dotted key → value or None) win over the file.

    Raises:
        ConfigError: with every problem of the ids, the file and the options.
    """
    problems: list[Problem] = []
    if output and not output.absolute().parent.is_dir():
        problems.append(Problem(f"--output {output}", "its folder is not there", "make it, or name another file"))
    resolved: dict[str, BackboneSpec] = {}
    for backbone in dict.fromkeys(backbones):
        try:
            resolved[backbone] = resolve(backbone)
        except ConfigError as error:
            problems += [Problem(f"backbone {backbone}", item.message, item.hint) for item in error.problems]
    given = {key: value for key, value in options.items() if value is not None}
    try:
        config = read_config(file, next(iter(resolved), None), given, settings)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    if not isinstance(task_of(config.task), SingleLabel):
        problems.append(problem_of_task(config.task))
    for spec in resolved.values():
        try:
            check_task(spec, config.task)
        except ConfigError as error:
            problems += [Problem(f"backbone {spec.id}", item.message, item.hint) for item in error.problems]
    if problems:
        raise ConfigError(problems)
    return config, list(resolved.values())


def problem_of_task(task: TaskName) -> Problem:
    """Why backbones are not ranked for a task without logits of single classes, and what to write instead."""
    modality = MODALITY_OF_TASK[task]
    if FEATURES.get(modality) == task:
        problem = f"rank judges by how well a linear model tells the labels apart; {task} has embeddings in its place"
        return Problem("task", problem, f"write {modality}-classification, which reads the same labels")
    return Problem("task", f"rank compares by single classes; {task} has none", "take a classification task")


def read_config(
    file: Path | None, backbone: str | None, given: Mapping[str, Any], settings: Sequence[str]
) -> PipelineConfig:
    """The file with the options laid over it, or the options alone where they name task and data.

    Raises:
        ConfigError: something is wrong, or missing.
    """
    laid_over = [*settings, *(f"{key}={json.dumps(value)}" for key, value in given.items())]
    if file or (DEFAULT_CONFIG.is_file() and not {"task", "data.source"} <= given.keys()):
        return load_config(file or DEFAULT_CONFIG, laid_over)[0]
    missing = [option for option, key in (("--task", "task"), ("--data", "data.source")) if key not in given]
    if missing:
        hint = f"give it, or a configuration file with -c (there is no {DEFAULT_CONFIG} here)"
        raise ConfigError([Problem(option, "is missing", hint) for option in missing])
    # Any backbone will do: the configuration wants one, and those to rank are looked at by themselves.
    values: dict[str, Any] = {"backbone": backbone} if backbone else {"backbone": "timm:resnet18"}
    return make_config(values, {}, Path("command line"), laid_over)[0]


# --- the work ---------------------------------------------------------------------------------------


def rank_backbones(
    config: PipelineConfig, specs: Sequence[BackboneSpec], log: logging.Logger, progress: Progress
) -> dict[str, Any]:
    """Score and measure each backbone on the train split; the record of it (see `record_of`).

    A backbone that fails is in the record with its reason, and the others go on.

    Raises:
        DataError: the data cannot be used, or has too few examples for cross-validation.
        MissingCapabilityError: the device asked for is not there.
    """
    import numpy as np
    import torch

    from stages.transferability.scores import make_folds

    device = resolve_device(config.device)
    data = load_data(config.data, config.task)
    for note in data.notes:
        log.warning("%-10s %s", "data", note)
    labels = np.array([one.label for one in data["train"]], np.int64)
    folds = make_folds(labels, config.seed)
    torch.set_num_threads(config.finetune.threads or usable_threads())
    measured = []
    for number, spec in enumerate(specs, 1):
        log.info("%-10s %d of %d: %s", "rank", number, len(specs), spec.id)
        try:
            measured.append(measure(spec, config, data, labels, folds, device, progress))
        except DataError:
            raise  # of the data, which every backbone sees
        except PipelineError as error:
            log.error("%-10s %s is left out: %s", "", spec.id, error)
            measured.append(Measured(spec, error=error))
        gc.collect()  # one network in memory at a time
    return record_of(config, data, labels, len(folds), device, measured)


def measure(
    spec: BackboneSpec,
    config: PipelineConfig,
    data: DataSplits,
    labels: np.ndarray,
    folds: Sequence[Fold],
    device: str,
    progress: Progress,
) -> Measured:
    """Features once, four scores of them, then the costs. Raises `PipelineError` where the backbone does not do."""
    import numpy as np

    from models.classifier import make_spec, new_classifier
    from models.registry import load_backbone
    from stages.inputs import are_text_pairs
    from stages.transferability.scores import h_score, judge_neighbours, judge_probe, log_me

    spec = pin(spec)
    with translated_errors(spec):
        loaded = load_backbone(
            spec, config.task, config.finetune.image_size, config.finetune.max_length, True,
            config.finetune.max_seconds, are_text_pairs(config.task, data["train"]),
        )  # fmt: skip
        model = new_classifier(loaded, len(data.labels))
        described = make_spec(config.task, spec, loaded, data.labels)
        key = features_key([spec.weights_digest], described, loaded.processing, device)
        features = compute_features(model, loaded.processing, data["train"], key, device, progress)
    if not np.ptp(features, axis=0).any():
        raise ModelError(f"{spec.id} gives every example the same features; are its weights those of this network?")
    probe = judge_probe(features, labels, folds, config.seed, progress, spec.id)
    scores = {
        "probe": probe.accuracy,
        "knn": judge_neighbours(features, labels, folds).accuracy,
        "h_score": h_score(features, labels),
        "log_me": log_me(features, labels),
    }
    with translated_errors(spec):
        batch_size = config.finetune.batch_size
        cost = measure_cost(model, loaded.processing, data["train"], batch_size, device, config.threads)
    return Measured(spec, Candidate(spec.id, cost.parameters, scores, probe.correct), cost, features.shape[1])


@contextmanager
def translated_errors(spec: BackboneSpec) -> Iterator[None]:
    """What PyTorch raises in a network that cannot take these inputs here. Raises `ModelError`."""
    try:
        yield
    except MemoryError as error:
        raise ModelError(f"{spec.id}: out of memory; try fewer pixels (--image-size)") from error
    except (RuntimeError, ValueError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{spec.id} does not run here: {text}") from error


# --- what came of it --------------------------------------------------------------------------------


def record_of(
    config: PipelineConfig,
    data: DataSplits,
    labels: np.ndarray,
    folds: int,
    device: str,
    measured: Sequence[Measured],
) -> dict[str, Any]:
    """The ranking as plain values: `rows` in their order, those without a result last, and what it says in words."""
    candidates = [one.candidate for one in measured if one.candidate]
    ranked = rank(candidates) if candidates else []
    smaller = where_smaller_is_enough(candidates)
    by_id = {one.spec.id: one for one in measured}
    majority = max(Counter(labels.tolist()).values()) / len(labels)
    return {
        "schema_version": SCHEMA_VERSION,
        "task": config.task,
        "data": {
            "source": config.data.source,
            "split": "train",
            "fingerprint": data.fingerprints["train"],
            "examples": len(labels),
            "classes": len(data.labels),
            "majority": majority,
            "notes": list(data.notes),
        },
        "image_size": config.finetune.image_size,
        "max_length": config.finetune.max_length,
        "seed": config.seed,
        "device": device,
        "folds": folds,
        "confidence": CONFIDENCE,
        "rows": [
            *(row_of(by_id[one.candidate.name], one) for one in ranked),
            *(row_of(one, None) for one in measured if one.error),
        ],
        "agreement_with_probe": agreement(candidates) if len(candidates) > 1 else {},
        "smaller_is_enough": [
            {"smaller": one.smaller.name, "larger": one.larger.name, "difference": asdict(one.difference)}
            for one in smaller
        ],
        "findings": list(findings(ranked, smaller, by_id, len(labels), majority)),
        "versions": versions_of((*REPORTED_PACKAGES, "scipy")),
        "hardware": describe_hardware(),
    }


def row_of(one: Measured, ranked: Ranked | None) -> dict[str, Any]:
    """One backbone as plain values."""
    return {
        "backbone": one.spec.id,
        "weights": one.spec.weights,
        "weights_digest": one.spec.weights_digest,
        "place": ranked.place if ranked else None,
        "to_best": asdict(ranked.to_best) if ranked else None,
        "to_place": asdict(ranked.to_place) if ranked else None,
        "features": one.features or None,
        "scores": dict(one.candidate.scores) if one.candidate else None,
        "ranks": ranked.ranks if ranked else None,
        "mean_rank": ranked.mean_rank if ranked else None,
        "cost": asdict(one.cost) if one.cost else None,
        "error": str(one.error) if one.error else None,
        "exit_code": one.error.exit_code if one.error else 0,
    }


def findings(
    ranked: Sequence[Ranked],
    smaller: Sequence[SmallerIsEnough],
    by_id: Mapping[str, Measured],
    examples: int,
    majority: float,
) -> Iterator[str]:
    """What the numbers say, a sentence each."""
    tied = [one.candidate.name for one in ranked if one.place == 1]
    if len(tied) > 1:
        yield f"{examples} examples cannot tell the first {len(tied)} apart; more could"
    if len(ranked) > 1:
        best = winners([one.candidate for one in ranked])
        if not set.intersection(*(set(names) for names in best.values())):
            said = "; ".join(f"{SCORES[score]}: {', '.join(names)}" for score, names in best.items())
            yield f"the scores disagree about the best: {said}"
    for one in smaller:
        times = format_ratio(one.larger.parameters / one.smaller.parameters).rstrip("×")
        sizes = f"{one.smaller.name} is {times} times smaller than {one.larger.name}"
        if one.difference.tied:
            yield f"the larger is not shown to be better: {sizes} and tied with it, {describe(one.difference)}"
        else:
            yield f"the larger is not the better: {sizes} and more accurate, {describe(one.difference)}"
    if ranked and ranked[0].candidate.scores["probe"] <= majority:
        yield f"no backbone beats the majority class, which alone gives {format_percent(majority)}"
    for name in (one.candidate.name for one in ranked):
        cost = by_id[name].cost
        if cost and cost.problem:
            yield f"{name} {cost.problem}"
    if any(one.cost and one.cost.disturbed for one in by_id.values()):
        yield "other processes wanted the same cores: the times are too long; run again on an idle machine"


def describe(difference: Difference) -> str:
    """A difference of accuracies and the interval that it may lie in."""
    return f"{format_points(difference.value)} ({format_interval((difference.low, difference.high))})"


def exit_code_of(record: Mapping[str, Any]) -> int:
    """0 if at least one backbone was ranked, else the code of the first one's error."""
    codes = [row["exit_code"] for row in record["rows"]]
    return 0 if 0 in codes else codes[0]


def write_record(file: Path, record: dict[str, Any]) -> None:
    """The record as JSON. Raises `StageError` where the file cannot be written."""
    try:
        write_json(file, record)
    except OSError as error:
        raise StageError(f"{file} cannot be written: {error.strerror or error}; name another --output") from error


# --- on the terminal --------------------------------------------------------------------------------


def print_ranking(record: dict[str, Any]) -> None:
    """Fit, cost and findings for a person."""
    from rich.console import Console
    from rich.text import Text

    from pipeline.report.markup import terminal_text
    from pipeline.report.terminal import plain_table

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    rows = record["rows"]
    ranked = [row for row in rows if row["place"]]
    if ranked:
        heads = ("place", "backbone", *SCORES.values(), "mean rank", "to the most accurate")
        console.print(plain_table(heads, [fit_cells(row, rows) for row in ranked], numeric=(0, 2, 3, 4, 5, 6)))
        console.print()
        heads = ("backbone", "parameters", "FLOPs", "latency p50", "feature pass", "epoch", "training memory")
        console.print(plain_table(heads, [cost_cells(row) for row in ranked], numeric=range(1, 7)))
        console.print()
        console.print(Text(terminal_text(explanation(record), 600)), soft_wrap=True)
    for row in rows:
        if row["error"]:
            line = f"not ranked: {row['backbone']}: {row['error']}"
            console.print(Text(terminal_text(line, 600), style="red"), soft_wrap=True)
    for line in record["findings"]:
        console.print(Text(terminal_text(line, 600)), soft_wrap=True)


def fit_cells(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], str]:
    """A line of the first table: `=` marks a place that is shared."""
    shared = sum(other["place"] == row["place"] for other in rows) > 1
    scores, to_best = row["scores"], Difference(**row["to_best"])
    most = max(other["scores"]["probe"] for other in rows if other["scores"])
    cells = [
        f"{row['place']}{'=' if shared else ''}",
        row["backbone"],
        format_percent(scores["probe"]),
        format_percent(scores["knn"]),
        f"{scores['h_score']:.2f}",
        f"{scores['log_me']:.3f}",
        f"{row['mean_rank']:.1f}",
        MISSING if scores["probe"] == most else describe(to_best),
    ]
    return cells, "bold" if row["place"] == 1 else ""


def cost_cells(row: Mapping[str, Any]) -> tuple[list[str], str]:
    """A line of the second table."""
    cost = row["cost"]
    return [
        row["backbone"],
        format_count(cost["parameters"]),
        format_count(cost["flops"]),
        format_ms(cost["latency_ms_p50"]),
        format_duration(cost["feature_pass_s"]),
        format_duration(cost["epoch_s"]),
        format_bytes(cost["training_memory_bytes"]),
    ], "bold" if row["place"] == 1 else ""


def format_count(value: float) -> str:
    """A large count: 3 400 000 → `3.40 M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{format_number(value / size)} {unit}"
    return f"{value:.0f}"


def explanation(record: Mapping[str, Any]) -> str:
    """What the columns are."""
    data = record["data"]
    cost = next(row["cost"] for row in record["rows"] if row["cost"])
    return (
        f"{data['examples']} training examples of {data['source']}, {data['classes']} classes; linear probe and kNN by "
        f"{record['folds']}-fold cross-validation. Places by the probe; = is a tie: the {record['confidence']:.0%} "
        f"interval of the difference holds zero. Times on this machine ({record['device']}): one "
        f"example in PyTorch (threads: {cost['threads']}), one pass over the examples for features, one epoch of "
        f"full fine-tuning at batch size {cost['batch_size']}, with its memory as an estimate."
    )
