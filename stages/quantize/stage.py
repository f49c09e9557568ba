"""quantize: candidates in INT8 and INT4 that stay inside their budget.

Reads: export's `onnx-fp32.onnx`, merge-lora's `checkpoint/` (the reference), the calibration split, and the
validation split to judge by.
Writes: `onnx-int8-static.onnx` and so on, one a scheme (only those inside the budget), `candidates.json`; their
engines, where export was asked for engines.
Gates: at least one candidate is inside the budget.
Fails when: the quantizer refuses the graph or leaves it as it was, or calibration meets NaN or infinity.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from models.errors import QuantizeError
from models.graph import Product, carry_modules, module_of, products_of, shares_of
from models.tasks import task_of
from stages.base import (
    NETWORK_PACKAGES,
    PROCESSING_PACKAGES,
    RUNTIME_PACKAGES,
    MachinePart,
    StageConfig,
    StageContext,
    StageResult,
)
from stages.candidates import Candidate, check_label, write_candidates
from stages.data.splits import SplitName
from stages.engines import ENGINE_PACKAGES, EngineReport, asked_engines, build_engines
from stages.gate import Gate, GateResult
from stages.quantize.calibration import BATCH_SIZES, Method, calibrate_ranges
from stages.quantize.qdq import Form, Layout, compute_nodes, quantizable_nodes, quantize_graph
from stages.quantize.search import fewest, harm_of_nodes, rungs_for
from stages.statistics import smallest_cosine

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from onnxruntime.quantization.calibrate import TensorsData

    from models.checkpoint import Checkpoint
    from models.tasks import Task

Scheme = Literal["int8-dynamic", "int8-static", "int8-symmetric"]

BATCH_SIZE = 32
LARGEST_GRAPH_BYTES = 1_900_000_000
"""Protobuf ends at 2 GiB; the weights of larger graphs lie in a second file, which is not handled here."""


class QuantizeConfig(StageConfig):
    """What is tried, and how much it may cost."""

    schemes: tuple[Scheme, ...] = Field(
        default=("int8-dynamic", "int8-static"),
        description="int8-dynamic: matrix products with activations scaled at run time (never convolutions, where it "
        "is wrong and slow); int8-static: QDQ with ranges from the calibration split, activations UINT8, the form that "
        "is fast on CPUs; int8-symmetric: QDQ with symmetric INT8 throughout, the form that TensorRT takes (ONNX "
        "Runtime runs it too, slowly on x86). [] goes without.",
    )
    reduce_range: bool = Field(
        default=False, description="7-bit weights, for x86 CPUs without VNNI, whose 8-bit products saturate."
    )
    calibration: Method = Field(
        default="minmax",
        description="How activations get their range: minmax, entropy (least KL divergence), percentile, or mse (least "
        "squared error).",
    )
    calibration_percentile: float = Field(
        default=99.999, gt=50, le=100, description="calibration: percentile keeps this share of the values (percent)."
    )
    calibration_samples: int = Field(default=256, ge=8, description="Calibration examples used (number).")
    sensitivity_samples: int = Field(
        default=64, ge=8, description="Calibration examples that rank the nodes by sensitivity (number)."
    )
    keep_float: Literal["auto", "none"] = Field(
        default="auto",
        description="Static schemes: auto keeps the most sensitive nodes in floating point, as few as the budget "
        "needs; none tries plain INT8 only.",
    )
    max_metric_drop: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Budget: what the metric may lose against the reference on the validation split (0.01 = 1 point).",
    )
    min_int8_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Smallest share of the multiply-accumulates in INT8 worth shipping (ratio).",
    )
    min_agreement: float = Field(
        default=0.975,
        ge=0,
        le=1,
        description="Budget: share of validation examples with the reference's answer (ratio).",
    )
    min_cosine: float = Field(
        default=0.96,
        ge=-1,
        le=1,
        description="Budget of tasks that give embeddings: smallest cosine similarity of any validation example to the "
        "reference's. A little above validate's (validate.gates.min_cosine), which is asked of other examples.",
    )


@dataclass(frozen=True)
class Workbench:
    """What every attempt needs: the prepared graph, its products, where its work goes, the reference's answers."""

    context: StageContext
    config: QuantizeConfig
    checkpoint: Checkpoint
    model: onnx.ModelProto
    products: Sequence[Product]
    scratch: Path
    reference: np.ndarray
    targets: np.ndarray

    @property
    def task(self) -> Task:
        """What is asked of the network."""
        return task_of(self.checkpoint.spec.task)

    def run(self, model: onnx.ModelProto, batches: Any) -> Iterator[dict[str, np.ndarray]]:
        """The outputs of a graph, batch by batch."""
        import onnx

        from models.runtimes.onnxruntime_session import OnnxRuntimeSession

        path = self.scratch / "run.onnx"
        onnx.save(model, path)
        with OnnxRuntimeSession(path, threads=self.context.threads) as session:
            for inputs in batches:
                yield session.infer(inputs)


class Quantize:
    """See the module's docstring."""

    name = "quantize"
    config_type = QuantizeConfig
    consumes = ("merge-lora", "export")
    splits: tuple[SplitName, ...] = ("calibration", "validation")
    packages = (*NETWORK_PACKAGES, *PROCESSING_PACKAGES, *RUNTIME_PACKAGES, *ENGINE_PACKAGES)
    machine: tuple[MachinePart, ...] = ("threads",)

    def run(self, context: StageContext, config: QuantizeConfig) -> StageResult:
        """Make, judge, and keep or leave out each scheme's candidate."""
        candidates: list[Candidate] = []
        samples = len(context.data["validation"])
        if config.schemes:
            scratch = context.resume / "graphs"
            scratch.mkdir(exist_ok=True)
            bench = open_workbench(context, config, scratch)
            candidates = [MAKERS[scheme](bench) for scheme in config.schemes]
        write_candidates(context.output, candidates)
        measurements = {"candidates": [candidate.summary() for candidate in candidates], "samples": samples}
        gates = (gate_of(candidates, samples),) if candidates else ()
        engines = engines_of(context, bench.checkpoint, candidates) if candidates else EngineReport()
        if engines.engines or engines.left_out:
            measurements |= engines.summary()
        return StageResult(gates, measurements, (*map(note_of, candidates), *engines.notes()))


def engines_of(context: StageContext, checkpoint: Checkpoint, candidates: Sequence[Candidate]) -> EngineReport:
    """The engines of what was made, where export was asked for engines."""
    request = asked_engines(context.inputs["export"])
    if request is None:
        return EngineReport()
    contents = [one.content for one in context.data["validation"][:BATCH_SIZE]]
    return build_engines(context, request, candidates, [checkpoint.processing.arrays(contents)])


def gate_of(candidates: Sequence[Candidate], samples: int) -> GateResult:
    """At least one candidate is inside its budget."""
    accepted = sum(candidate.accepted for candidate in candidates)
    left_out = "; ".join(f"{one.name}: {one.reason}" for one in candidates if not one.accepted)
    gate = Gate("INT8 inside its budget", "at least", 1.0, "candidates")
    return gate.check("quantize", float(accepted), samples, left_out)


def note_of(candidate: Candidate) -> str:
    """One line for a person."""
    if not candidate.accepted:
        return f"{candidate.name} is left out: {candidate.reason}"
    measured = candidate.measurements
    floats = measured["float_modules"]
    kept = f"; in floating point: {', '.join(floats[:4])}" + (f" and {len(floats) - 4} more" * (len(floats) > 4))
    return (
        f"{candidate.name}: {candidate.size_bytes / 1e6:.1f} MB, {measured['metric_name']} {measured['metric']:.4f} "
        f"(reference {measured['reference_metric']:.4f}), {measured['share_int8_macs']:.0%} of the arithmetic in INT8"
        + (kept if floats else "")
    )


def open_workbench(context: StageContext, config: QuantizeConfig, scratch: Path) -> Workbench:
    """Prepare the graph, and run the reference, the unpatched merged network, once over the validation split."""
    import onnx

    from models.checkpoint import load_checkpoint
    from models.runtimes.torch_eager import TorchEager
    from stages.inputs import predict

    checkpoint = load_checkpoint(context.inputs["merge-lora"].folder / "checkpoint")
    model = prepare_graph(context.inputs["export"].file("onnx-fp32.onnx"), scratch)
    onnx.save(model, scratch / "prepared.onnx")
    products = products_of(scratch / "prepared.onnx", one_example(checkpoint, context), context.threads)
    examples = context.data["validation"]
    with TorchEager(checkpoint.model, checkpoint.spec.io, "cpu", context.threads) as runtime:
        outputs = predict(runtime, checkpoint.processing, examples, BATCH_SIZE, context.progress, "reference")
    spec = checkpoint.spec
    targets = task_of(spec.task).targets([one.label for one in examples], spec.io.width)
    return Workbench(context, config, checkpoint, model, products, scratch, outputs, targets)


def prepare_graph(path: Path, scratch: Path) -> onnx.ModelProto:
    """The fp32 graph with constants folded, batch norm fused into convolutions, and every node named.

    Raises:
        QuantizeError: the graph is too large, or ONNX Runtime's preprocessing refuses it.
    """
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if path.stat().st_size > LARGEST_GRAPH_BYTES or path.with_name(f"{path.name}.data").exists():
        raise QuantizeError(f"{path.name} is above 2 GB, which INT8 does not handle yet; set quantize.schemes: []")
    target = scratch / "prepared.onnx"
    try:
        quant_pre_process(str(path), str(target), skip_symbolic_shape=True)
        model = onnx.load(str(target))
        carry_modules(onnx.load(str(path)), model)
    except quantizer_errors() as error:
        message = f"ONNX Runtime's quantizer refuses {path.name}: {error}; set quantize.schemes: [] to go without INT8"
        raise QuantizeError(message) from error
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"  # the exporter's names carry a counter that differs between versions
    return model


def quantizer_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime's quantizer raises."""
    import onnx

    from models.runtimes.onnxruntime_session import onnxruntime_errors

    return (*onnxruntime_errors(), TypeError, KeyError, AttributeError, onnx.shape_inference.InferenceError)


def one_example(checkpoint: Checkpoint, context: StageContext) -> dict[str, np.ndarray]:
    """The first validation example as the graph takes it."""
    return checkpoint.processing.arrays([context.data["validation"][0].content])


def quantize_dynamically(bench: Workbench) -> Candidate:
    """INT8 weights a channel, activations scaled at run time; matrix products and embeddings only.

    Convolutions stay in floating point: with them EfficientNet-Lite0 fell from .7485 to .103 accuracy, and
    its latency rose from 1.3 to 20.7 ms.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    name = "onnx-int8-dynamic"
    nodes = compute_nodes(bench.model)
    products = {node.name for node in nodes if node.op_type == "MatMul"}
    if not products:
        reason = "there is nothing to quantize: the graph has no MatMul with constant weights"
        return Candidate(name, f"{name}.onnx", "int8", 0, accepted=False, reason=reason)
    source, target = bench.scratch / "source.onnx", bench.scratch / f"{name}.onnx"
    onnx.save(bench.model, source)
    left = [node.name for node in bench.model.graph.node if node.op_type == "MatMul" and node.name not in products]
    try:
        quantize_dynamic(
            str(source), str(target), op_types_to_quantize=["MatMul", "Gather"], per_channel=True,
            reduce_range=bench.config.reduce_range, weight_type=QuantType.QInt8, nodes_to_exclude=left,
        )  # fmt: skip
    except quantizer_errors() as error:
        raise QuantizeError(f"{name}: {error}; take int8-dynamic out of quantize.schemes") from error
    floats = [node.name for node in nodes if node.op_type != "MatMul"]
    measured = judge(bench, onnx.load(str(target)), name) | {"float_modules": modules_of(bench, floats)}
    return keep_or_leave_out(bench, target, measured)


def quantize_statically(bench: Workbench, layout: Layout) -> Candidate:
    """QDQ INT8. Where plain INT8 is outside the budget, the most sensitive nodes go back to floating point."""
    name = {"onnxruntime": "onnx-int8-static", "tensorrt": "onnx-int8-symmetric"}[layout]
    form = Form(layout, bench.config.reduce_range)
    nodes = [node.name for node in quantizable_nodes(bench.model, layout)]
    if not nodes:
        reason = "there is nothing to quantize: the graph has no convolution or product with constant weights"
        return Candidate(name, f"{name}.onnx", "int8", 0, accepted=False, reason=reason)
    ranges = calibrate(bench, layout)
    return search_precisions(bench, name, nodes, partial(quantize_graph, bench.model, ranges, form))


MAKERS: dict[Scheme, Callable[[Workbench], Candidate]] = {
    "int8-dynamic": quantize_dynamically,
    "int8-static": partial(quantize_statically, layout="onnxruntime"),
    "int8-symmetric": partial(quantize_statically, layout="tensorrt"),
}


def search_precisions(
    bench: Workbench, name: str, nodes: Sequence[str], variant: Callable[[Collection[str]], onnx.ModelProto]
) -> Candidate:
    """The variant with the fewest nodes in floating point that is inside the budget; where none is, the best one.

    `variant` makes the graph in which the named nodes are not quantized. `tried` in the measurements is the curve of
    accuracy against the share of the arithmetic in INT8: on the validation split, which training has seen only to
    pick an epoch; the nodes are ranked on the calibration split, and the test split is not touched.
    """
    import onnx

    harm: dict[str, float] = {}
    tried: dict[int, dict[str, Any]] = {}

    def inside(count: int) -> bool:
        if count and not harm:
            harm.update(rank_nodes(bench, nodes, variant))
        tried[count] = measured = judge(bench, variant(list(harm)[:count]), name)
        words = ", ".join(f"{key} {measured[key]:.4g}" for key in ("metric", "agreement", "share_int8_macs"))
        bench.context.log.info("           %s: %d nodes in floating point, %s", name, count, words)
        return not outside_budget(bench.config, measured)

    rungs = [0] if bench.config.keep_float == "none" else rungs_for(len(nodes))
    count = fewest(rungs, inside)
    if count is None:
        count = max(tried, key=lambda one: closeness(tried[one]))
    target = bench.scratch / f"{name}.onnx"
    onnx.save(variant(list(harm)[:count]), target)  # made again: all of them at once may not fit into memory
    measured = tried[count] | {
        "float_modules": modules_of(bench, list(harm)[:count]),
        "tried": [point_of(one, tried[one]) for one in sorted(tried)],
        "sensitivity": sensitivity_of(bench, harm),
    }
    return keep_or_leave_out(bench, target, measured)


def point_of(float_nodes: int, measured: Mapping[str, Any]) -> dict[str, Any]:
    """One point of the curve."""
    return {"float_nodes": float_nodes} | {key: measured[key] for key in ("metric", "agreement", "share_int8_macs")}


def closeness(measured: Mapping[str, Any]) -> tuple[float, float]:
    """How near to the reference a variant is, larger is nearer: where none is inside, the report shows the best."""
    return measured["metric"], measured["agreement"]


def modules_of(bench: Workbench, names: Sequence[str]) -> list[str]:
    """The module of the network that each node comes from, or its own name where the graph does not say; each once."""
    modules = {node.name: module_of(node) or node.name for node in bench.model.graph.node}
    return list(dict.fromkeys(modules[name] for name in names))


def sensitivity_of(bench: Workbench, harm: Mapping[str, float]) -> list[dict[str, Any]]:
    """Every ranked node: its module, the harm it does alone, and its share of the multiply-accumulates."""
    total = sum(product.macs for product in bench.products) or 1
    macs = {product.node: product.macs for product in bench.products}
    return [
        {"node": name, "module": modules_of(bench, [name])[0], "harm": value, "mac_share": macs.get(name, 0) / total}
        for name, value in harm.items()
    ]


def calibrate(bench: Workbench, layout: Layout) -> TensorsData:
    """The range of every activation over the calibration split, through the real preprocessing."""
    import onnx

    from stages.inputs import batches

    config, context = bench.config, bench.context
    examples = context.data["calibration"][: config.calibration_samples]
    path = bench.scratch / "source.onnx"
    onnx.save(bench.model, path)
    size = BATCH_SIZES[config.calibration]
    with context.progress.task("calibration", math.ceil(len(examples) / size)) as advance:
        arrays = (inputs for inputs, _ in batches(bench.checkpoint.processing, examples, size))
        try:
            return calibrate_ranges(
                path, bench.scratch, arrays, advance, config.calibration, config.calibration_percentile,
                symmetric=layout == "tensorrt",
            )  # fmt: skip
        except quantizer_errors() as error:
            message = f"calibration: {error}; go without the static schemes (quantize.schemes)"
            raise QuantizeError(message) from error


def rank_nodes(
    bench: Workbench, nodes: Sequence[str], variant: Callable[[Collection[str]], onnx.ModelProto]
) -> dict[str, float]:
    """Node → harm on calibration examples, most sensitive first."""
    from stages.inputs import batches

    examples = bench.context.data["calibration"][: bench.config.sensitivity_samples]
    inputs = [arrays for arrays, _ in batches(bench.checkpoint.processing, examples, BATCH_SIZE)]
    with bench.context.progress.task("sensitivity", len(nodes)) as advance:
        return harm_of_nodes(nodes, bench.model, variant, lambda model: bench.run(model, inputs), advance)


def judge(bench: Workbench, model: onnx.ModelProto, description: str) -> dict[str, Any]:
    """Metric, agreement and cosine with the reference over the validation split; what its products really are in."""
    import onnx

    from models.runtimes.onnxruntime_session import OnnxRuntimeSession
    from stages.inputs import predict

    path = bench.scratch / "judge.onnx"
    onnx.save(model, path)
    context = bench.context
    with OnnxRuntimeSession(path, threads=context.threads) as session:
        outputs = predict(
            session, bench.checkpoint.processing, context.data["validation"], BATCH_SIZE, context.progress, description
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
        "share_int8_macs": shares.get("int8", 0.0),
    }
    if bench.task.embeds:
        measured["cosine"] = smallest_cosine(outputs, bench.reference, bench.task.embeds)
    return measured


def outside_budget(config: QuantizeConfig, measured: Mapping[str, Any]) -> str:
    """Why a measured file may not be shipped, or nothing."""
    if measured["share_int8_macs"] < config.min_int8_share:
        share = f"only {measured['share_int8_macs']:.1%} of the arithmetic is in INT8"
        return f"{share}; {config.min_int8_share:.0%} is asked for"
    if measured["metric_drop"] > config.max_metric_drop:
        lost = f"the {measured['metric_name']} drops by {measured['metric_drop']:.4f}"
        return f"{lost}; the budget is {config.max_metric_drop:.4f}"
    if measured["agreement"] < config.min_agreement:
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


def keep_or_leave_out(bench: Workbench, path: Path, measured: dict[str, Any]) -> Candidate:
    """The candidate of a measured file, which moves into the artifact where it is inside the budget.

    Raises:
        StageError: nothing in it is INT8, whatever was asked for.
    """
    check_label(path.stem, "int8", measured["mac_shares"])
    reason = outside_budget(bench.config, measured)
    size = path.stat().st_size
    if not reason:
        shutil.move(path, bench.context.output / path.name)
    return Candidate(path.stem, path.name, "int8", size, accepted=not reason, reason=reason, measurements=measured)
