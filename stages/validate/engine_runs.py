"""Engines that are for the GPU of this machine, run here on the whole test split.

What was run here needs no receipt: it stands beside the receipts of other devices, under the target that this GPU is,
with the kind "run here". Where there is no GPU, or none that an engine is for, nothing is run and nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.engines.targets import EngineRuntime, runtime_of, target_of
from models.errors import RuntimeInferenceError
from models.runtimes.gpu import Gpu, gpu_here
from models.tasks import task_of
from stages.base import StageContext
from stages.engines import UNPROVEN
from stages.gate import GateResult
from stages.latency import TIMES, measure_latency, speedup_of
from stages.validate.notes import REFERENCE

if TYPE_CHECKING:
    import numpy as np

    from models.checkpoint import Checkpoint
    from models.runtimes.base import Runtime
    from stages.validate.metrics import Outputs

ENGINE = "engine"
"""The provider of such a run, where others have that of ONNX Runtime."""

RUN_HERE = "run here"
DEVICE = "cuda"


def open_engine(file: Path, sha256: str, runtime: EngineRuntime) -> Runtime:
    """The runtime of an engine on this machine's GPU."""
    from models.runtimes.tensorrt_engine import TensorRtEngine

    return TensorRtEngine(file, sha256, runtime)


def target_here(entry: Mapping[str, Any], gpu: Gpu | None) -> str | None:
    """The target of an engine that this machine is: the same compute capability, and engine and library are here."""
    if gpu is None or entry["file"] is None:
        return None
    for target in map(target_of, entry["targets"]):
        if target.compute_capability == gpu.compute_capability and find_spec(runtime_of(target).library):
            return target.name
    return None


def run_engines(
    context: StageContext,
    checkpoint: Checkpoint,
    engines: Sequence[dict[str, Any]],
    outputs: dict[str, Outputs],
    targets: np.ndarray,
    batch_size: int,
    latency_calls: int,
) -> list[dict[str, Any]]:
    """An entry for each engine that is for this GPU, as those of candidates; its evidence goes beside the receipts.

    `outputs` are those of the reference and of the candidates, to which those of the engines are added, `targets` what
    every test example should give.

    Raises:
        IntegrityError: an engine is not the one that was built.
    """
    gpu, rows = gpu_here(), []
    for entry in engines:
        target = target_here(entry, gpu)
        if target is not None:
            rows.append(run_engine(context, checkpoint, entry, target, outputs, targets, batch_size, latency_calls))
            if not rows[-1]["problem"]:
                entry["receipts"][target] = evidence_of(entry, rows[-1], target, str(gpu), outputs, len(targets))
    return rows


def run_engine(
    context: StageContext,
    checkpoint: Checkpoint,
    entry: Mapping[str, Any],
    target: str,
    outputs: dict[str, Outputs],
    targets: np.ndarray,
    batch_size: int,
    latency_calls: int,
) -> dict[str, Any]:
    """Outputs on the whole test split against the reference's, and times in turns with PyTorch on the same GPU.

    An engine that does not load or run is an entry with a `problem`, which no gate passes.
    """
    from models.runtimes.torch_eager import TorchEager
    from stages.validate.metrics import Outputs, collect_outputs, compare, first_outputs

    file = context.inputs[entry["stage"]].file(entry["file"])
    size = min([batch_size, *(int(shapes[-1][0]) for shapes in entry["profile"].values())])
    test, io, processing = context.data["test"], checkpoint.spec.io, checkpoint.processing
    times: dict[str, Any] = dict.fromkeys((*TIMES, "speedup", "speedup_interval"))
    version = None
    try:
        with open_engine(file, entry["sha256"], runtime_of(target_of(target))) as engine, ExitStack() as stack:
            version = getattr(engine, "library_version", entry["library_version"])
            found = collect_outputs(engine, processing, test, io, size, context.progress, entry["name"])
            if test and found.values is not None:
                eager = stack.enter_context(TorchEager(checkpoint.model, io, DEVICE, context.threads))
                singles = [processing.arrays([one.content]) for one in test[:8]]
                batch = processing.arrays([one.content for one in test[:size]])
                both: dict[str, Runtime] = {REFERENCE: eager, ENGINE: engine}
                earlier = first_outputs({ENGINE: found}, io, size)
                measured = measure_latency(both, singles, batch, latency_calls, context.progress, earlier)
                times |= measured[ENGINE]
                ratio = speedup_of(measured[REFERENCE]["turns_ms"], measured[ENGINE]["turns_ms"])
                times |= {"speedup": ratio[0], "speedup_interval": ratio[1]}
    except RuntimeInferenceError as error:
        found = Outputs(None, str(error))
    name = f"{entry['name']} on {target}"
    outputs[name] = found
    return {
        "name": name,
        "engine": entry["name"],
        "candidate": entry["candidate"],
        "precision": entry["precision"],
        "provider": ENGINE,
        "library_version": version,
        "sha256": entry["sha256"],
        "digest": entry["sha256"],
        "size_bytes": entry["size_bytes"],
        **compare(found, outputs[REFERENCE], targets, task_of(checkpoint.spec.task)),
        "candidate_error": error_against(found, outputs.get(entry["candidate"], Outputs(None, "not run here"))),
        **times,
    }


def error_against(found: Outputs, candidate: Outputs) -> float | None:
    """The largest difference from the engine's candidate; None where there is nothing to compare."""
    import numpy as np

    if found.values is None or candidate.values is None or found.values.shape != candidate.values.shape:
        return None
    return float(np.abs(found.values.astype("f8") - candidate.values).max())


def evidence_of(
    entry: Mapping[str, Any],
    row: Mapping[str, Any],
    target: str,
    device: str,
    outputs: Mapping[str, Outputs],
    samples: int,
) -> dict[str, Any]:
    """What a receipt says, found here: `relative_error` against the engine's candidate, as a share of the range of the
    reference's outputs, as for a receipt."""
    error, span = row["candidate_error"], row["logit_range"]
    return {
        "kind": RUN_HERE,
        "engine": entry["name"],
        "target": target,
        "engine_sha256": entry["sha256"],
        "onnx_sha256": entry["onnx_sha256"],
        "library_version": row["library_version"],
        "device": device,
        "samples": samples,
        "max_abs_error": error,
        "relative_error": error / span if error is not None and span else None,
        "latency_ms_p50": row["latency_ms_p50"],
        "latency_ms_p95": row["latency_ms_p95"],
    }


def engine_run_gates(
    rows: Sequence[dict[str, Any]],
    engines: Sequence[dict[str, Any]],
    check: Callable[[dict[str, Any]], list[GateResult]],
) -> list[GateResult]:
    """`check`, the gates of a candidate, of every engine that was run; those of the shipped ones count. An engine that
    does not hold them is not PROVEN, whatever its parity."""
    gates: list[GateResult] = []
    shipped = {entry["name"]: entry for entry in engines if entry["ships_for"]}
    for row in rows:
        results = check(row)
        row["passed"] = not any(result.stops for result in results)
        if row["engine"] in shipped:
            gates += results
            if not row["passed"]:
                shipped[row["engine"]]["status"] = UNPROVEN
    return gates
