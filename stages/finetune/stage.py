"""finetune: adapt a pretrained backbone to labelled data.

Reads: the train and validation splits, the backbone's weights.
Writes: `base/` and `adapter/` (lora), or `checkpoint/`; `history.json`.
Gates: training stays finite; the validation metric beats the best constant answer (the majority class); training
does not fall below the linear probe.
Fails when: memory runs out, or an adapter is left untrained.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from models.tasks import FEATURES
from stages.artifact import write_json
from stages.base import NETWORK_PACKAGES, PROCESSING_PACKAGES, MachinePart, StageContext, StageResult
from stages.data.splits import SplitName
from stages.finetune.config import FinetuneConfig
from stages.finetune.notes import notes_of
from stages.gate import Gate, GateResult
from stages.statistics import gain_of

if TYPE_CHECKING:
    from stages.finetune.ladder import Rung
    from stages.finetune.setup import FrozenResult, Setup
    from stages.finetune.strategies import Attempt


class Finetune:
    """See the module's docstring."""

    name = "finetune"
    config_type = FinetuneConfig
    consumes: tuple[str, ...] = ()
    splits: tuple[SplitName, ...] = ("train", "validation")
    packages = (*NETWORK_PACKAGES, *PROCESSING_PACKAGES, "torchvision", "peft", "accelerate", "scikit-learn", "scipy")
    machine: tuple[MachinePart, ...] = ("device",)

    def run(self, context: StageContext, config: FinetuneConfig) -> StageResult:
        """Probe, then train where the strategy asks for it."""
        from stages.finetune.advice import advise, note_on_batches
        from stages.finetune.ladder import climb
        from stages.finetune.quantization import describe, train_for_int8
        from stages.finetune.setup import build, seed_everything, with_frozen_result
        from stages.finetune.strategies import make_attempt
        from stages.finetune.transfer import compare_with_direct, compare_with_raw, compare_with_scratch

        seed_everything(context, config)
        setup = build(context, config)
        strategy = "full" if config.strategy == "auto" and config.from_scratch else config.strategy
        if not config.from_scratch or strategy == "feature-extraction" or config.initial_head == "probe":
            setup = with_frozen_result(setup)
        raw = None if config.from_scratch else compare_with_raw(setup)
        if raw and raw.warning:
            context.log.warning("%-10s %s", "", raw.warning)
        notes = []
        if context.task in FEATURES.values() and strategy != "feature-extraction":
            notes.append(note_on_batches([one.label for one in context.data["train"]], config.batch_size))
            context.log.info("%-10s %s", "", notes[0])
        rungs: list[Rung] = []
        if strategy == "auto":
            attempt, rungs = climb(setup, context.resume)
        else:
            attempt = make_attempt(strategy, setup, context.resume)
        strategys, aware = attempt, None  # the comparisons are between strategies
        if config.quantization_aware.epochs:
            attempt, aware = train_for_int8(attempt, setup, context.resume / "int8")
        save(attempt, setup)
        measurements = describe_result(attempt, rungs, setup)
        measurements["quantization_aware"] = describe(aware)
        measurements["against_raw"] = (
            {"curve": raw.curve, "gain": vars(raw.gain), "warning": raw.warning} if raw else None
        )
        measurements["against_scratch"] = compare_with_scratch(setup, strategys, context.resume)
        measurements["against_direct"] = compare_with_direct(setup, strategys, context.resume)
        measurements["advice"] = advise(measurements)
        # Without the seconds: the same training gives the same bytes, so nothing that follows runs again.
        epochs = [{key: entry[key] for key in entry if key != "seconds"} for entry in attempt.history]
        write_json(context.output / "history.json", {"epochs": epochs})
        return StageResult(check(measurements, config), measurements, (*notes, *notes_of(measurements)))


def save(attempt: Attempt, setup: Setup) -> None:
    """Write the network, unless training diverged: then there is nothing that anybody should load."""
    from models.adapters import save_adapter
    from models.classifier import Classifier

    output, network = setup.context.output, attempt.network
    if attempt.diverged:
        return
    if isinstance(network, Classifier):
        setup.save(network, output / "checkpoint")
    else:
        setup.save(setup.start(attempt.strategy), output / "base")
        save_adapter(network, output / "adapter")


def describe_result(attempt: Attempt, rungs: list[Rung], setup: Setup) -> dict[str, Any]:
    """The measurements of the stage."""
    from stages.finetune.cost import actual_cost
    from stages.finetune.forgetting import measure_forgetting
    from stages.finetune.setup import count

    data, frozen, task = setup.context.data, setup.frozen, setup.task
    targets = setup.targets("validation")
    constant = task.best_constant(setup.targets("train"), setup.spec.io.width)
    gain = None
    if frozen is not None and attempt.scores is not None and attempt.strategy != "feature-extraction":
        gain = dataclasses.asdict(gain_of(attempt.scores, frozen.scores, 0.95))
    trained = [row["rate"] for row in attempt.rates[1:] if row["trained"]]
    return {
        "strategy": attempt.strategy,
        "metric": task.metric,
        "validation_metric": attempt.metric,
        "constant_baseline": float(task.scores(constant.repeat(len(targets), axis=0), targets).mean()),
        "constant": task.constant,
        "probe_validation_metric": float(frozen.scores.mean()) if frozen else None,
        "given_head": given_head_of(frozen),
        "knn_validation_metric": frozen.knn_metric if frozen else None,
        "probe_regularization": frozen.probe.regularization if frozen else None,
        "probe_regularizations": frozen.probe.table if frozen else [],
        "gain_over_probe": gain,
        "seconds": {"frozen": frozen.seconds if frozen else None, "training": attempt.seconds},
        "ladder": [dataclasses.asdict(rung) for rung in rungs],
        "wise_ft": attempt.wise,
        "learning_rate_test": range_test_of(attempt),
        "forgetting": measure_forgetting(attempt, setup),
        "best_epoch": attempt.best_epoch,
        "diverged": attempt.diverged,
        "cost": {
            "estimated": dataclasses.asdict(attempt.estimate) if attempt.estimate else None,
            "actual": actual_cost(attempt, setup),
        },
        "trainable_parameters": attempt.trainable_parameters,
        "total_parameters": attempt.total_parameters or count(setup.model),
        "backbone_learning_rates": [min(trained), max(trained)] if trained else None,
        "head_learning_rate": attempt.rates[0]["rate"] if attempt.rates else None,
        "layer_rates": attempt.rates,
        "samples": {name: len(data[name]) for name in Finetune.splits},
        "truncated": setup.processing.count_truncated([one.content for one in data["train"]]),
        "history": attempt.history,
        "history_metric": attempt.history_metric or task.metric,
    }


def given_head_of(frozen: FrozenResult | None) -> dict[str, Any] | None:
    """What the head that no training made reaches, and its gain over the probe, as plain values."""
    if frozen is None or frozen.given is None:
        return None
    given = frozen.given
    return {
        "kind": given.kind,
        "validation_metric": float(given.scores.mean()),
        "starts": given.starts,
        "mistaken_for_unseen": given.mistaken,
        "played_unseen": dict(zip(("seen", "unseen"), given.played, strict=True)) if given.played else None,
        "gain_over_probe": dataclasses.asdict(gain_of(given.scores, frozen.scores, 0.95)),
    }


def range_test_of(attempt: Attempt) -> dict[str, Any] | None:
    """The learning rate test as plain values."""
    found = attempt.range_test
    if found is None:
        return None
    return {"curve": found.curve, "lowest": found.lowest, "proposed": found.proposed, "warning": found.warning}


def check(measured: dict[str, Any], config: FinetuneConfig) -> tuple[GateResult, ...]:
    """The stage's gates."""
    found, probe = measured["validation_metric"], measured["probe_validation_metric"]
    constant, samples, metric = measured["constant_baseline"], measured["samples"]["validation"], measured["metric"]
    aware = measured["quantization_aware"]
    trained = measured["strategy"] != "feature-extraction" or bool(aware)
    # A rare class leaves little room: half of it must be enough, or a perfect network fails.
    threshold = min(constant + config.min_gain_over_majority, (1 + constant) / 2)
    gates = [
        Gate(f"beats the {measured['constant']}", "at least", threshold, metric).check(
            "network", found, samples, f"the {measured['constant']} alone gives {constant:.3f}"
        )
    ]
    if trained:
        diverged = measured["diverged"] or (aware and aware["diverged"])
        finite = Gate("training stays finite", "at most", 0.0, "losses that are NaN or infinite")
        gates.insert(0, finite.check("network", float(bool(diverged)), detail=diverged or ""))
    if trained and probe is not None:
        floor = probe - config.max_drop_from_probe
        gates.append(
            Gate("not below its linear probe", "at least", floor, metric).check(
                "network", found, samples, f"the probe gives {probe:.3f}"
            )
        )
    if trained and (given := measured["given_head"]) and given["starts"]:
        floor = given["validation_metric"] - config.max_drop_from_probe
        gates.append(
            Gate("not below where it started", "at least", floor, metric).check(
                "network", found, samples, f"{given['kind']} gives {given['validation_metric']:.3f}"
            )
        )
    if aware:
        floor = aware["float_metric"]["before"] - config.max_drop_from_probe
        gates.append(
            Gate("not below where INT8 training started", "at least", floor, metric).check("network", found, samples)
        )
    return tuple(gates)
