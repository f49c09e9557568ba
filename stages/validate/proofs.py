"""What validate says of its own gates (the self-test), and of where the error comes from (the drift)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from models.tasks import task_of
from stages.validate.drift import DriftSetup, measure_drift
from stages.validate.judge import Judge, rows_of, spread_over
from stages.validate.notes import REFERENCE
from stages.validate.self_test import SelfTest, run_self_test

if TYPE_CHECKING:
    import numpy as np

    from models.checkpoint import Checkpoint
    from stages.base import StageContext
    from stages.validate.config import ValidateConfig
    from stages.validate.gates import Scene
    from stages.validate.metrics import Outputs
    from stages.validate.stage import Measured


def judge_of(
    context: StageContext,
    config: ValidateConfig,
    checkpoint: Checkpoint,
    scene: Scene,
    reference: Outputs,
    targets: np.ndarray,
    indices: Sequence[int],
) -> Judge:
    """The gates over some of the test samples. `reference` and `targets` are those of all of them."""
    test, places = context.data["test"], list(indices)
    return Judge(
        config,
        replace(scene, samples=len(places)),
        task_of(checkpoint.spec.task),
        targets[places],
        rows_of(reference, places),
        [test[index] for index in places],
        checkpoint.spec,
        context.seed,
    )


def self_test_of(
    context: StageContext,
    config: ValidateConfig,
    checkpoint: Checkpoint,
    candidates: Sequence[Measured],
    scene: Scene,
    reference: Outputs,
    targets: np.ndarray,
) -> dict[str, Any] | None:
    """What the gates make of known defects in this model; None where nobody asked for it."""
    if not config.self_test and config.gates.min_mutation_score is None:
        return None
    test = context.data["test"]
    indices = spread_over(len(test), config.self_test_samples)
    base = next((one.path for one in candidates if one.candidate.precision == "fp32"), None)
    if base is None or not indices:
        problem = "there is no FP32 candidate to put defects into" if indices else "there is not one sample"
        return {"problem": problem, "samples": len(indices), "defects": [], "controls": []}
    setup = SelfTest(
        base,
        checkpoint,
        [test[index] for index in indices],
        tuple(dict.fromkeys(one.candidate.precision for one in candidates)),
        config.batch_size,
        context.threads,
        context.progress,
    )
    return run_self_test(setup, judge_of(context, config, checkpoint, scene, reference, targets, indices))


def drift_of(
    context: StageContext,
    config: ValidateConfig,
    checkpoint: Checkpoint,
    candidates: Sequence[Measured],
    scene: Scene,
    outputs: Mapping[str, Outputs],
    targets: np.ndarray,
    evidence: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Where the error of each candidate on the first provider comes from; None where no samples are given to it."""
    if not config.drift_samples:
        return None
    indices = spread_over(len(context.data["test"]), config.drift_samples)
    finetuned = context.inputs.get("finetune")
    setup = DriftSetup(
        finetuned.folder if finetuned else None,
        checkpoint,
        {
            one.name: (one.candidate.precision, one.path, f"{one.artifact.stage}/{one.candidate.file}")
            for one in candidates
            if one.provider == config.providers[0]
        },
        outputs,
        REFERENCE,
        context.data["test"],
        indices,
        config.batch_size,
        context.threads,
        context.progress,
    )
    judge = judge_of(context, config, checkpoint, scene, outputs[REFERENCE], targets, indices)
    failed, elsewhere = split_failed(evidence["candidates"], config.providers[0])
    return measure_drift(setup, judge, failed, elsewhere, evidence["engines"], context.output)


def split_failed(candidates: Sequence[Mapping[str, Any]], deciding: str) -> tuple[list[str], dict[str, Sequence[str]]]:
    """(the candidates that failed on the provider whose outputs the drift has, those that failed on other ones only,
    with the names of these)."""
    failed = {one["name"]: one["failed_on"] for one in candidates if one["failed_on"]}
    here = [name for name, providers in failed.items() if deciding in providers]
    return here, {name: providers for name, providers in failed.items() if deciding not in providers}
