"""quantize: INT8 candidates that stay inside their budget.

Reads: export's `onnx-fp32.onnx`, merge-lora's `checkpoint/` (the reference), the calibration split, and the
validation split to judge by.
Writes: `onnx-int8-static.onnx`, `onnx-int8-dynamic.onnx` (only those inside the budget), `candidates.json`.
Gates: at least one candidate is inside the budget.
Fails when: the quantizer refuses the graph, or calibration meets NaN or infinity.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from models.errors import QuantizeError
from models.spec import side_by_side
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
from stages.candidates import Candidate, write_candidates
from stages.data.splits import SplitName
from stages.gate import Gate, GateResult
from stages.quantize.qdq import (
    Form,
    Layout,
    calibrate_ranges,
    compute_nodes,
    macs_by_node,
    quantizable_nodes,
    quantize_graph,
)

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from onnxruntime.quantization.calibrate import TensorsData

    from models.checkpoint import Checkpoint
    from models.tasks import Task

Scheme = Literal["int8-dynamic", "int8-static"]

BATCH_SIZE = 32
LARGEST_GRAPH_BYTES = 1_900_000_000
"""Protobuf ends at 2 GiB; the weights of larger graphs lie in a second file, which is not handled here."""

FLOAT_NODES = (0, 1, 2, 4, 6, 8, 12, 16, 24, 32)
"""How many of the most sensitive nodes stay in floating point, tried in this order until the budget holds, up to
half of the nodes."""


class QuantizeConfig(StageConfig):
    """What is tried, and how much it may cost."""

    schemes: tuple[Scheme, ...] = Field(
        default=("int8-dynamic", "int8-static"),
        description="int8-dynamic: matrix products with activations scaled at run time (never convolutions, where it "
        "is wrong and slow); int8-static: QDQ with ranges from the calibration split. [] goes without INT8.",
    )
    layout: Layout = Field(
        default="onnxruntime",
        description="Form of int8-static: onnxruntime (UINT8 activations, fast on CPUs) or tensorrt (symmetric INT8, "
        "the form that TensorRT parses; slow on x86 CPUs).",
    )
    reduce_range: bool = Field(
        default=False, description="7-bit weights, for x86 CPUs without VNNI, whose 8-bit products saturate."
    )
    calibration_samples: int = Field(default=256, ge=8, description="Calibration examples used (number).")
    sensitivity_samples: int = Field(
        default=64, ge=8, description="Calibration examples that rank the nodes by sensitivity (number)."
    )
    keep_float: Literal["auto", "none"] = Field(
        default="auto",
        description="int8-static: auto keeps the most sensitive nodes in floating point, as few as the budget needs; "
        "none tries plain INT8 only.",
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


@dataclass(frozen=True)
class Workbench:
    """What every attempt needs: the prepared graph, where its work goes, and the reference's answers."""

    context: StageContext
    config: QuantizeConfig
    checkpoint: Checkpoint
    model: onnx.ModelProto
    macs: Mapping[str, int]
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
    packages = (*NETWORK_PACKAGES, *PROCESSING_PACKAGES, *RUNTIME_PACKAGES)
    machine: tuple[MachinePart, ...] = ("threads",)

    def run(self, context: StageContext, config: QuantizeConfig) -> StageResult:
        """Make, judge, and keep or leave out each scheme's candidate."""
        candidates: list[Candidate] = []
        samples = len(context.data["validation"])
        if config.schemes:
            scratch = context.resume / "graphs"
            scratch.mkdir(exist_ok=True)
            bench = open_workbench(context, config, scratch)
            makers = {"int8-dynamic": quantize_dynamically, "int8-static": quantize_statically}
            candidates = [makers[scheme](bench) for scheme in config.schemes]
        write_candidates(context.output, candidates)
        measurements = {"candidates": [candidate.summary() for candidate in candidates], "samples": samples}
        gates = (gate_of(candidates, samples),) if candidates else ()
        return StageResult(gates, measurements, tuple(map(note_of, candidates)))


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
    return (
        f"{candidate.name}: {candidate.size_bytes / 1e6:.1f} MB, {measured['metric_name']} {measured['metric']:.4f} "
        f"(reference {measured['reference_metric']:.4f}), {measured['share_int8_macs']:.0%} of the arithmetic in INT8"
    )


def open_workbench(context: StageContext, config: QuantizeConfig, scratch: Path) -> Workbench:
    """Prepare the graph, and run the reference, the unpatched merged network, once over the validation split."""
    from models.checkpoint import load_checkpoint
    from models.runtimes.torch_eager import TorchEager
    from stages.inputs import predict

    checkpoint = load_checkpoint(context.inputs["merge-lora"].folder / "checkpoint")
    model = prepare_graph(context.inputs["export"].file("onnx-fp32.onnx"), scratch)
    macs = count_macs(model, checkpoint, context, scratch)
    examples = context.data["validation"]
    with TorchEager(checkpoint.model, checkpoint.spec.io, "cpu", context.threads) as runtime:
        outputs = predict(runtime, checkpoint.processing, examples, BATCH_SIZE, context.progress, "reference")
    spec = checkpoint.spec
    targets = task_of(spec.task).targets([one.label for one in examples], spec.io.width)
    return Workbench(context, config, checkpoint, model, macs, scratch, outputs, targets)


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


def count_macs(model: onnx.ModelProto, checkpoint: Checkpoint, context: StageContext, scratch: Path) -> dict[str, int]:
    """Compute node → multiply-accumulates of one validation example, with shapes from a real run."""
    import copy

    import onnx

    from models.runtimes.onnxruntime_session import OnnxRuntimeSession

    probe = copy.deepcopy(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.helper.make_empty_tensor_value_info(node.output[0]) for node in compute_nodes(model))
    if not probe.graph.output:
        return {}
    path = scratch / "shapes.onnx"
    onnx.save(probe, path)
    with OnnxRuntimeSession(path, threads=context.threads, optimization="none") as session:
        outputs = session.infer(checkpoint.processing.arrays([context.data["validation"][0].content]))
    return macs_by_node(model, {name: value.size for name, value in outputs.items()})


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
    return keep_or_leave_out(bench, target, judge(bench, onnx.load(str(target)), name) | arithmetic(bench, floats))


def quantize_statically(bench: Workbench) -> Candidate:
    """QDQ INT8. Where plain INT8 is outside the budget, the most sensitive nodes go back to floating point."""
    import onnx

    name = "onnx-int8-static"
    form = Form(bench.config.layout, bench.config.reduce_range)
    nodes = [node.name for node in quantizable_nodes(bench.model, form.layout)]
    if not nodes:
        reason = "there is nothing to quantize: the graph has no convolution or product with constant weights"
        return Candidate(name, f"{name}.onnx", "int8", 0, accepted=False, reason=reason)
    ranges = calibrate(bench)
    ranking: list[str] = []
    ladder: list[dict[str, Any]] = []
    best: tuple[onnx.ModelProto, dict[str, Any]] | None = None
    for count in float_counts(bench.config, len(nodes)):
        if count and not ranking:
            ranking = rank_nodes(bench, nodes, ranges, form)
        model = quantize_graph(bench.model, ranges, form, ranking[:count])
        measured = judge(bench, model, name) | arithmetic(bench, ranking[:count])
        step = {"float_nodes": count} | {key: measured[key] for key in ("metric", "agreement", "share_int8_macs")}
        ladder.append(step)
        words = ", ".join(f"{key} {value:.4g}" for key, value in step.items())
        bench.context.log.info("           %s: %s", name, words)
        inside = not outside_budget(bench.config, measured)
        if inside or best is None or closeness(measured) > closeness(best[1]):
            best = (model, measured)
        if inside:
            break
    assert best is not None
    model, measured = best
    target = bench.scratch / f"{name}.onnx"
    onnx.save(model, target)
    return keep_or_leave_out(bench, target, measured | {"layout": form.layout, "ladder": ladder})


def closeness(measured: Mapping[str, Any]) -> tuple[float, float]:
    """How near to the reference a variant is, larger is nearer: where none is inside, the report shows the best."""
    return measured["metric"], measured["agreement"]


def float_counts(config: QuantizeConfig, nodes: int) -> list[int]:
    """The rungs of the ladder for a graph with so many quantizable nodes."""
    if config.keep_float == "none":
        return [0]
    return [count for count in FLOAT_NODES if count <= nodes // 2]


def calibrate(bench: Workbench) -> TensorsData:
    """The range of every activation over the calibration split, through the real preprocessing."""
    import onnx

    from stages.inputs import batches

    examples = bench.context.data["calibration"][: bench.config.calibration_samples]
    path = bench.scratch / "source.onnx"
    onnx.save(bench.model, path)
    with bench.context.progress.task("calibration", math.ceil(len(examples) / BATCH_SIZE)) as advance:
        arrays = (inputs for inputs, _ in batches(bench.checkpoint.processing, examples, BATCH_SIZE))
        try:
            return calibrate_ranges(path, bench.scratch, arrays, advance)
        except quantizer_errors() as error:
            message = f"onnx-int8-static: {error}; take int8-static out of quantize.schemes"
            raise QuantizeError(message) from error


def rank_nodes(bench: Workbench, nodes: Sequence[str], ranges: TensorsData, form: Form) -> list[str]:
    """Nodes from the most to the least sensitive.

    Each is quantized alone; its harm is the mean squared change of the outputs over calibration examples. Ranked so,
    one float node did what three did when taken in graph order, and eight reached an agreement of .984 against .974
    (EfficientNet-Lite0, 500 images).
    """
    import numpy as np

    from stages.inputs import batches

    examples = bench.context.data["calibration"][: bench.config.sensitivity_samples]
    inputs = [arrays for arrays, _ in batches(bench.checkpoint.processing, examples, BATCH_SIZE)]

    def outputs_of(model: onnx.ModelProto) -> np.ndarray:
        return np.concatenate([side_by_side(outputs) for outputs in bench.run(model, inputs)])

    wanted = outputs_of(bench.model)
    harm: dict[str, float] = {}
    with bench.context.progress.task("sensitivity", len(nodes)) as advance:
        for name in nodes:
            alone = quantize_graph(bench.model, ranges, form, [other for other in nodes if other != name])
            harm[name] = float(np.square(outputs_of(alone) - wanted).mean())
            advance()
    return sorted(nodes, key=lambda name: -harm[name])


def judge(bench: Workbench, model: onnx.ModelProto, description: str) -> dict[str, Any]:
    """Metric and agreement with the reference over the validation split."""
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
    found, before = (bench.task.scores(values, bench.targets) for values in (outputs, bench.reference))
    return {
        "metric_name": bench.task.metric,
        "metric": float(found.mean()),
        "reference_metric": float(before.mean()),
        "metric_drop": float((before - found).mean()),  # of counts: 0.868 − 0.858 is above 0.01 in floating point
        "agreement": float(bench.task.same(outputs, bench.reference).mean()),
    }


def arithmetic(bench: Workbench, floats: Sequence[str]) -> dict[str, Any]:
    """Which nodes stay in floating point, by name, and the share of multiply-accumulates that is in INT8."""
    total = sum(bench.macs.values())
    left = sum(count for name, count in bench.macs.items() if name not in set(floats))
    return {"float_nodes": list(floats), "share_int8_macs": left / total if total else 0.0}


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
    return ""


def keep_or_leave_out(bench: Workbench, path: Path, measured: dict[str, Any]) -> Candidate:
    """The candidate of a measured file, which moves into the artifact where it is inside the budget."""
    reason = outside_budget(bench.config, measured)
    size = path.stat().st_size
    if not reason:
        shutil.move(path, bench.context.output / path.name)
    return Candidate(path.stem, path.name, "int8", size, accepted=not reason, reason=reason, measurements=measured)
