"""The drift waterfall: adapted → merged → ONNX as written → optimised → each precision → engine, on the same samples.

Each step is held against the one that it was made of, and against the start. Where a candidate fails, the first step
that its gates refuse is named, then the first layer (`first_layer`), with a script that shows the same numbers
(`reproduce`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import RuntimeInferenceError
from stages.validate.drift.first_layer import find_first_layer
from stages.validate.drift.reproduce import write_reproduction
from stages.validate.judge import Judge, rows_of
from stages.validate.metrics import Outputs, collect_outputs

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint
    from models.runtimes.base import Runtime
    from stages.base import Progress
    from stages.data.splits import Example

ADAPTED, MERGED, WRITTEN = "adapted", "merged", "onnx, as written"
"""The steps before there are candidates."""

SHOWN = (
    "relative_error", "max_abs_error", "sqnr_db", "agreement", "metric", "metric_difference", "kl", "cosine", "problem",
)  # fmt: skip
"""What is kept of each comparison."""

LAYER_SAMPLES = 4
"""On which the nodes are compared: every tensor of both graphs is in memory."""

REPRODUCED_SAMPLES = 8
"""Whose inputs lie beside the script."""


@dataclass(frozen=True)
class DriftSetup:
    """The artifacts and the samples. `finetuned` is finetune's folder, where it is known; `candidates` maps each name
    to its precision, its file and the file's place in the run; `outputs` are theirs and the reference's on all test
    samples, by name. `indices` are the samples that are looked at.
    """

    finetuned: Path | None
    checkpoint: Checkpoint
    candidates: Mapping[str, tuple[str, Path, str]]
    outputs: Mapping[str, Outputs]
    reference: str
    examples: Sequence[Example]
    indices: Sequence[int]
    batch_size: int
    threads: int
    progress: Progress


def measure_drift(
    setup: DriftSetup,
    judge: Judge,
    failed: Sequence[str],
    elsewhere: Mapping[str, Sequence[str]],
    engines: Sequence[Mapping[str, Any]],
    folder: Path,
) -> dict[str, Any]:
    """The waterfall as plain values; `failed` are the candidates whose gates are not all passed, `elsewhere` those that
    failed on other providers only, whose outputs are not among these. For the first a folder `reproduce` is written
    below `folder`.

    Raises:
        RuntimeInferenceError: the FP32 graph does not run.
    """
    started = time.monotonic()
    outputs = step_outputs(setup)
    start = next(iter(outputs))
    parents = parents_of(setup, outputs)
    steps = []
    for name, parent in parents.items():
        before = None if parent is None else judge.numbers(outputs[name], outputs[parent])
        since = judge.numbers(outputs[name], outputs[start])
        precision = setup.candidates[name][0] if name in setup.candidates else "fp32"
        steps.append(
            {
                "name": name,
                "after": parent,
                "precision": precision,
                "status": "measured",
                "from_before": None if before is None else {key: before[key] for key in SHOWN},
                "from_start": {key: since[key] for key in SHOWN},
            }
        )
    for engine in engines:
        steps.append(engine_step(engine))
    found: dict[str, Any] = {"samples": len(setup.indices), "start": start, "steps": steps, "broken": []}
    for name in failed:
        found["broken"].append(explain(name, setup, judge, outputs, parents))
    found["broken"] += [
        {"candidate": name, "step": None, "gates": [], "layer": None, "reason": f"failed on {', '.join(names)} only"}
        for name, names in elsewhere.items()
    ]
    if failed and setup.indices and setup.candidates:
        found["reproduce"] = reproduction(setup, failed, found["broken"], folder / "reproduce")
    return found | {"seconds": round(time.monotonic() - started, 1)}


def step_outputs(setup: DriftSetup) -> dict[str, Outputs]:
    """What each step makes of the samples, in the order of the chain.

    The merged network and the candidates have run already; the adapted network and the graph without optimizations have
    not. The adapted network is missing where there is no adapter.
    """
    from models.adapters import load_adapted
    from models.runtimes.onnxruntime_session import OnnxRuntimeSession
    from models.runtimes.torch_eager import TorchEager

    found = {}
    io, known = setup.checkpoint.spec.io, setup.outputs
    if setup.finetuned is not None and (setup.finetuned / "adapter").is_dir():
        adapted = load_adapted(setup.finetuned / "base", setup.finetuned / "adapter")
        found[ADAPTED] = run(TorchEager(adapted, io, "cpu", setup.threads), setup, f"drift: {ADAPTED}")
    found[MERGED] = rows_of(known[setup.reference], setup.indices)
    written = next((path for precision, path, _ in setup.candidates.values() if precision == "fp32"), None)
    if written is not None:
        session = OnnxRuntimeSession(written, threads=setup.threads, optimization="none")
        found[WRITTEN] = run(session, setup, f"drift: {WRITTEN}")
    return found | {name: rows_of(known[name], setup.indices) for name in setup.candidates}


def run(runtime: Runtime, setup: DriftSetup, description: str) -> Outputs:
    """The outputs of a runtime on the samples."""
    checkpoint, examples = setup.checkpoint, [setup.examples[index] for index in setup.indices]
    with runtime as opened:
        return collect_outputs(
            opened, checkpoint.processing, examples, checkpoint.spec.io, setup.batch_size, setup.progress, description
        )


def parents_of(setup: DriftSetup, outputs: Mapping[str, Outputs]) -> dict[str, str | None]:
    """Step → what it was made of: a chain up to the FP32 candidate, of which the other precisions are made."""
    parents: dict[str, str | None] = {}
    before: str | None = None
    first = next((name for name, (precision, _, _) in setup.candidates.items() if precision == "fp32"), None)
    for name in outputs:
        if name in setup.candidates and name != first:
            parents[name] = first or before
            continue
        parents[name] = before
        before = name
    return parents


def engine_step(engine: Mapping[str, Any]) -> dict[str, Any]:
    """An engine: what its run here or the receipts of devices say of it, which ran other samples, or that there is
    none."""
    errors = [one["relative_error"] for one in engine["receipts"].values() if one.get("relative_error") is not None]
    numbers = {**dict.fromkeys(SHOWN), "relative_error": max(errors)} if errors else None
    return {
        "name": engine["name"],
        "after": engine["candidate"],
        "precision": engine["precision"],
        "status": engine["status"],
        "from_before": numbers,
        "from_start": None,
    }


def explain(
    name: str,
    setup: DriftSetup,
    judge: Judge,
    outputs: Mapping[str, Outputs],
    parents: Mapping[str, str | None],
) -> dict[str, Any]:
    """The first step on the way to a candidate that its own gates refuse, and the first layer where it is a graph.

    Refused is what fails or has no evidence. What the samples leave open names no step: few enough leave it open of the
    start against itself. Nor does what the gates refuse there too, except where the start has no outputs at all.
    """
    way: list[str] = []
    at: str | None = name
    while at is not None:
        way.insert(0, at)
        at = parents[at]
    precision = setup.candidates[name][0]
    start = outputs[way[0]]
    refused = {
        step: {
            (one.name, one.verdict)
            for one in judge.verdicts(step, precision, judge.numbers(outputs[step], start))
            if one.verdict in ("fail", "error")
        }
        for step in way
    }
    always = refused[way[0]] if start.values is not None else set()
    red = {step: sorted(gate for gate, _ in found - always) for step, found in refused.items()}
    first = next((step for step in way if red[step]), None)
    found: dict[str, Any] = {"candidate": name, "step": first, "gates": red.get(first or "", []), "layer": None}
    if first is None:
        none = f"on these {len(setup.indices)} samples no step is refused"
        return found | {"reason": f"{none}: the gates saw it on more, or leave it open"}
    before = parents[first]
    if before is None:
        return found | {"reason": f"there is nothing to compare with: {outputs[first].problem or 'no evidence'}"}
    if first not in setup.candidates or before not in setup.candidates:
        return found | {"reason": f"{first} is compared with {before} as a whole: there are no two graphs"}
    examples = [setup.examples[index] for index in setup.indices[:LAYER_SAMPLES]]
    inputs = setup.checkpoint.processing.arrays([one.content for one in examples])
    try:
        layer = find_first_layer(
            setup.candidates[before][1],
            setup.candidates[first][1],
            inputs,
            [one.name for one in setup.checkpoint.spec.io.outputs],
            limit_of(judge, setup.candidates[first][0]),
            setup.threads,
        )
    except RuntimeInferenceError as error:
        return found | {"reason": f"the nodes cannot be compared: {str(error).partition(chr(10))[0][:300]}"}
    return found | {"layer": layer, "reason": ""}


def reproduction(
    setup: DriftSetup, failed: Sequence[str], broken: Sequence[dict[str, Any]], folder: Path
) -> dict[str, Any]:
    """The folder for those that failed, with the FP32 graph that they are made of (see `reproduce`)."""
    from models.runtimes.torch_eager import TorchEager
    from models.spec import side_by_side

    checkpoint = setup.checkpoint
    examples = [setup.examples[index] for index in setup.indices[:REPRODUCED_SAMPLES]]
    inputs = checkpoint.processing.arrays([one.content for one in examples])
    with TorchEager(checkpoint.model, checkpoint.spec.io, "cpu", setup.threads) as reference:
        wanted = side_by_side(reference.infer(inputs))
    files: list[tuple[str, Path, str, bool]] = []
    for name, (precision, path, place) in setup.candidates.items():
        if precision == "fp32":
            files.append((WRITTEN if len(files) == 0 else f"{name}, as written", path, place, False))
        if precision == "fp32" or name in failed:
            files.append((name, path, place, True))
    outputs = [one.name for one in checkpoint.spec.io.outputs]
    return write_reproduction(folder, files, inputs, outputs, wanted, drift_findings(broken), setup.threads)


def drift_findings(broken: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each candidate that failed: the first step, then the first layer."""
    lines = []
    for one in broken:
        step = f"the first step that its gates refuse is {one['step']}" if one["step"] else "no step is refused"
        gates = f" ({', '.join(one['gates'])})" if one["gates"] else ""
        lines.append(f"{one['candidate']}: {step}{gates}" + (f"; {one['reason']}" if one["reason"] else ""))
        if one["layer"]:
            lines.append(f"{one['candidate']}: {layer_finding(one['layer'])}")
    return lines


def layer_finding(layer: Mapping[str, Any]) -> str:
    """What the comparison of nodes says, in a sentence."""
    if missing := layer["missing_outputs"]:
        return f"the output {missing[0]} of the FP32 graph is not in its graph"
    first = layer["first"]
    if first is not None:
        own = "not finite" if first["own"] is None else f"{first['own']:.3g} of what it gives"
        return f"the first node with an error of its own is {named(first)}: {own}, at most {layer['limit']:.3g} may be"
    if not layer["largest"]:
        return "the graphs have no tensor in common"
    most = layer["largest"][0]
    return (
        f"no node alone is above {layer['limit']:.3g} of what it gives; the largest is {named(most)}, {most['own']:.3g}"
    )


def named(node: Mapping[str, Any]) -> str:
    """A node, with the module that it comes from."""
    where = f", module {node['module']}" if node["module"] else ""
    return f"{node['node'] or node['tensor']} ({node['operator']}{where})"


def limit_of(judge: Judge, precision: str) -> float:
    """How much noise a single node may add, as a share of what it gives: no more than the gates take of the outputs.

    Of floating point the largest error of an output as a share of its range; of others the share of noise at the least
    SQNR.
    """
    gates = judge.config.gates
    return float(gates.ceilings.get(precision, 10 ** (-gates.min_sqnr_db / 20)))
