"""What is measured of each candidate beside its outputs and times: slices, calibration, other metrics, memory; and how
many samples the margin takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.tasks import task_of
from stages.statistics import samples_needed

if TYPE_CHECKING:
    import numpy as np

    from models.checkpoint import Checkpoint
    from models.tasks import Task
    from stages.base import StageContext
    from stages.candidates import Candidate
    from stages.validate.config import ValidateConfig
    from stages.validate.metrics import Outputs


def planned_samples(context: StageContext, config: ValidateConfig, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """How many test samples the margin takes, told before anything runs: 8.56 ψ / margin², ψ the share of flips.

    The pilot is what quantize saw on the validation split: the candidate with the most answers that differ, each of
    which flips right and wrong at most. Without one nothing is taken to flip.
    """
    flips = {one.name: 1 - one.measurements["agreement"] for one in candidates if "agreement" in one.measurements}
    pilot = max(flips, key=lambda name: flips[name], default=None)
    metrics = [one.measurements["reference_metric"] for one in candidates if "reference_metric" in one.measurements]
    margin = config.gates.margin_of(metrics[0] if metrics else None)
    margin = config.gates.max_metric_drop if margin is None else margin
    plan = {
        "margin": margin,
        "pilot": pilot,
        "pilot_flip_rate": flips[pilot] if pilot else None,
        "needed": samples_needed(flips[pilot] if pilot else 0.0, margin),
        "samples": len(context.data["test"]),
    }
    context.log.info("%-10s %s", "", plan_in_words(plan))
    return plan


def plan_in_words(plan: Mapping[str, Any]) -> str:
    """One sentence."""
    if plan["needed"] is None:
        return "no number of samples proves that there is no drop at all (a margin of 0)"
    basis = f"at {pilot}'s flip rate of {plan['pilot_flip_rate']:.2%} on validation" if (pilot := plan["pilot"]) else ""
    return (
        f"to prove that a drop is at most {plan['margin']:.4g} takes about {plan['needed']} samples "
        f"{basis or 'even where no answer flips'}; the test split has {plan['samples']}"
    )


def add_further(
    context: StageContext,
    config: ValidateConfig,
    checkpoint: Checkpoint,
    outputs: Mapping[str, Outputs],
    reference: Outputs,
    targets: np.ndarray,
    files: Mapping[str, Path],
    entries: Sequence[dict[str, Any]],
) -> None:
    """Fill in what the entries of the candidates lack. `outputs` and `files`: by the name of a candidate. Where a
    candidate's outputs are no evidence, nothing is known of them; of the memory of another provider than the CPU's
    neither.

    Raises:
        RuntimeInferenceError: the process that measures memory failed.
    """
    from stages.validate.slices import slices_of

    spec = checkpoint.spec
    slices, task = slices_of(context.data["test"], spec.labels, spec.task), task_of(spec.task)
    for entry in entries:
        found = None if entry["problem"] else outputs[entry["name"]].values
        entry |= further_numbers(found, reference.values, targets, task, config, slices, context.seed)
        on_cpu = entry["provider"] == "cpu"
        entry["peak_memory_bytes"] = memory_of(context, config, checkpoint, files[entry["name"]]) if on_cpu else None


def further_numbers(
    found: np.ndarray | None,
    wanted: np.ndarray | None,
    targets: np.ndarray,
    task: Task,
    config: ValidateConfig,
    slices: Mapping[str, Sequence[int]],
    seed: int,
    gated_only: bool = False,
) -> dict[str, Any]:
    """Slices, drops of other metrics and calibration of `found` against `wanted`, float32 (samples, outputs), None
    where either is no evidence. `gated_only`: of what no gate asks for nothing is computed."""
    from stages.validate.bootstrap import further_drops
    from stages.validate.calibration import CALIBRATION, calibration
    from stages.validate.slices import slice_table

    numbers: dict[str, Any] = {"slices": None, "further_drops": None, **dict.fromkeys(CALIBRATION)}
    if found is None or wanted is None:
        return numbers
    gates, critical = config.gates, config.critical_slices
    if not gated_only or gates.max_slice_drop is not None or critical:
        scores, before, margin = task.scores(found, targets), task.scores(wanted, targets), gates.max_slice_drop or 0.0
        numbers["slices"] = slice_table(scores, before, slices, margin, gates.min_slice_samples, critical)
    if not gated_only or gates.max_drops:
        numbers["further_drops"] = further_drops(found, wanted, targets, task, gates.max_drops, seed)
    if not gated_only or gates.max_ece_increase is not None or gates.max_nll_increase is not None:
        numbers |= calibration(found, wanted, targets, task, seed)
    return numbers


def memory_of(context: StageContext, config: ValidateConfig, checkpoint: Checkpoint, file: Path) -> int | None:
    """Peak memory at batch 1, where there is a limit on it: each takes the start of a process."""
    from models.runtimes.peak_memory import peak_memory_of

    if config.gates.max_memory_bytes is None or not context.data["test"]:
        return None
    inputs = checkpoint.processing.arrays([context.data["test"][0].content])
    return peak_memory_of(file, inputs, context.threads)
