"""The accuracy budget: what a variant has lost, whether that is too much, and the search for one that is inside."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.graph import products_of, shares_of
from models.onnx_files import files_of, is_light, load_weights, save_graph, size_of_file
from stages.candidates import Candidate, check_label
from stages.quantize.bench import (
    BATCH_SIZE,
    Workbench,
    guarded,
    modules_of,
    one_example,
    rank_nodes,
    sensitivity_of,
)
from stages.quantize.qdq import compute_nodes
from stages.quantize.schemes import KINDS, Backend, Plan, Scheme
from stages.quantize.search import fewest, rungs_for
from stages.statistics import smallest_cosine

if TYPE_CHECKING:
    import onnx

    from stages.quantize.stage import QuantizeConfig


ABOVE_2_GB: tuple[Scheme, ...] = ("int8-dynamic", "int8-static", "int8-symmetric")
"""Schemes whose quantizers leave the weights of a large graph in their file."""


def make_candidate(bench: Workbench, scheme: Scheme, backend: Backend) -> Candidate:
    """A scheme planned and searched; left out before that where its backend does not make it of so large a graph."""
    reason = too_large_for(bench, scheme)
    if reason:
        name = f"onnx-{scheme}"
        return Candidate(name, f"{name}.onnx", KINDS[scheme].precision, 0, accepted=False, reason=reason)
    return search_precisions(bench, scheme, backend[scheme](bench))


def too_large_for(bench: Workbench, scheme: Scheme) -> str:
    """Why a graph above 2 GB is not quantized so, or nothing."""
    if not is_light(bench.model):
        return ""
    if bench.config.backend != "onnxruntime":
        return f"{bench.config.backend} takes no graph above 2 GB; quantize.backend: onnxruntime does"
    if scheme not in ABOVE_2_GB:
        return f"{scheme} is not made of a graph above 2 GB, {', '.join(ABOVE_2_GB)} are"
    return ""


def search_precisions(bench: Workbench, scheme: Scheme, plan: Plan) -> Candidate:
    """The variant with the fewest nodes in floating point that is inside the budget; where none is, the best one.

    `tried` in the measurements is the curve of accuracy against the share of the arithmetic in the scheme's precision:
    on the validation split, which training has seen only to pick an epoch; the nodes are ranked on the calibration
    split, and the test split is not touched.
    """
    name, kind = f"onnx-{scheme}", KINDS[scheme]
    if not plan.nodes:
        reason = f"there is nothing to quantize: the graph has no {plan.what}"
        return Candidate(name, f"{name}.onnx", kind.precision, 0, accepted=False, reason=reason)
    variant = guarded(scheme, plan.variant)
    harm: dict[str, float] = {}
    tried: dict[int, dict[str, Any]] = {}

    def inside(count: int) -> bool:
        if count and not harm:
            harm.update(rank_nodes(bench, plan.nodes, variant))
        tried[count] = measured = judge(bench, variant(list(harm)[:count]), scheme)
        words = ", ".join(f"{key} {measured[key]:.4g}" for key in ("metric", "agreement", "narrow_share"))
        bench.context.log.info("           %s: %d nodes in floating point, %s", name, count, words)
        return not outside_budget(bench.config, measured, scheme)

    rungs = rungs_for(len(plan.nodes)) if kind.searched and bench.config.keep_float == "auto" else [0]
    count = fewest(rungs, inside)
    if count is None:
        count = max(tried, key=lambda one: closeness(tried[one]))
    target = bench.scratch / f"{name}.onnx"
    model = variant(list(harm)[:count])  # made again: all of them at once may not fit into memory
    load_weights(model, bench.scratch)
    save_graph(model, target)
    del model
    never = {node.name for node in compute_nodes(bench.model)} - set(plan.nodes)
    floats = [node.name for node in bench.model.graph.node if node.name in never]
    measured = tried[count] | {
        "float_modules": modules_of(bench, list(harm)[:count] + floats),
        "tried": [point_of(one, tried[one]) for one in sorted(tried)],
        "sensitivity": sensitivity_of(bench, harm),
        "repairs": list(plan.repairs),
    }
    return keep_or_leave_out(bench, target, measured, scheme)


def point_of(float_nodes: int, measured: Mapping[str, Any]) -> dict[str, Any]:
    """One point of the curve."""
    return {"float_nodes": float_nodes} | {key: measured[key] for key in ("metric", "agreement", "narrow_share")}


def closeness(measured: Mapping[str, Any]) -> tuple[float, float]:
    """How near to the reference a variant is, larger is nearer: where none is inside, the report shows the best."""
    return measured["metric"], measured["agreement"]


def judge(bench: Workbench, model: onnx.ModelProto, scheme: Scheme) -> dict[str, Any]:
    """Metric, agreement and cosine with the reference over the validation split; what its products really are in.
    `narrow_share` is the share of the multiply-accumulates in the scheme's precision, which `narrow` names."""
    from models.runtimes.onnxruntime_session import OnnxRuntimeSession
    from stages.inputs import predict

    path = bench.write(model, "judge.onnx")
    context = bench.context
    with OnnxRuntimeSession(path, threads=context.threads) as session:
        examples = context.data["validation"]
        outputs = predict(
            session, bench.checkpoint.processing, examples, BATCH_SIZE, context.progress, f"onnx-{scheme}"
        )
    shares = shares_of(products_of(path, one_example(bench.checkpoint, context), context.threads))
    found, before = (bench.task.scores(values, bench.targets) for values in (outputs, bench.reference))
    measured = {
        "metric_name": bench.task.metric,
        "metric": float(found.mean()),
        "reference_metric": float(before.mean()),
        "metric_drop": float((before - found).mean()),  # of counts: 0.868 − 0.858 is above 0.01 in floating point
        "agreement": float(bench.task.same(outputs, bench.reference).mean()),
        "mac_shares": shares,
        "narrow": KINDS[scheme].words,
        "narrow_share": shares.get(KINDS[scheme].share, 0.0),
    }
    if bench.task.embeds:
        measured["cosine"] = smallest_cosine(outputs, bench.reference, bench.task.embeds)
    return measured


def outside_budget(config: QuantizeConfig, measured: Mapping[str, Any], scheme: Scheme) -> str:
    """Why a measured file may not be shipped, or nothing."""
    kind = KINDS[scheme]
    smallest = config.min_share(kind.precision)
    if not measured["narrow_share"] >= smallest:
        share = f"only {measured['narrow_share']:.1%} of the arithmetic is in {kind.words}"
        return f"{share}; {smallest:.0%} is asked for"
    if not measured["metric_drop"] <= config.max_metric_drop:  # also NaN, here and below
        lost = f"the {measured['metric_name']} drops by {measured['metric_drop']:.4f}"
        return f"{lost}; the budget is {config.max_metric_drop:.4f}"
    if not measured["agreement"] >= config.min_agreement:
        return f"it agrees with the reference on {measured['agreement']:.2%}; the budget is {config.min_agreement:.2%}"
    if "cosine" in measured:
        cosine = measured["cosine"]
        if cosine is None:
            return "an embedding has no length, and thus no direction"
        if not cosine >= config.min_cosine:
            return (
                f"an embedding has the cosine {cosine:.4f} with the reference's; the budget is {config.min_cosine:.4f}"
            )
    return ""


def keep_or_leave_out(bench: Workbench, path: Path, measured: dict[str, Any], scheme: Scheme) -> Candidate:
    """The candidate of a measured file, which moves into the artifact where it is inside the budget.

    Raises:
        StageError: nothing in it is in the scheme's precision, whatever was asked for.
    """
    precision = KINDS[scheme].precision
    check_label(path.stem, precision, measured["mac_shares"])
    reason = outside_budget(bench.config, measured, scheme)
    size = size_of_file(path)
    if not reason:
        for file in files_of(path):
            shutil.move(file, bench.context.output / file.name)
    return Candidate(path.stem, path.name, precision, size, accepted=not reason, reason=reason, measurements=measured)
