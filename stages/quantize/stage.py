"""quantize: candidates in INT8, INT4 and FP8 that stay inside their budget.

Reads: export's `onnx-fp32.onnx`, merge-lora's `checkpoint/` (the reference), the calibration split, and the
validation split to judge by.
Writes: `onnx-int8-static.onnx` and so on, one a scheme (only those inside the budget), `candidates.json`; their
engines, where export was asked for engines.
Gates: at least one candidate is inside the budget.
Fails when: the quantizer refuses the graph or leaves it as it was, or calibration meets NaN or infinity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from models.errors import QuantizeError
from models.graph import carry_modules, products_of
from models.onnx_files import SMALLEST_OUTSIDE_BYTES, is_light, save_graph, weights_beside
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
from stages.candidates import Candidate, Precision, write_candidates
from stages.data.splits import SplitName
from stages.engines import ENGINE_PACKAGES, EngineReport, asked_engines, build_engines
from stages.gate import Gate, GateResult
from stages.quantize import modelopt_backend, onnxruntime_backend
from stages.quantize.advice import advice_of
from stages.quantize.bench import BATCH_SIZE, Workbench, one_example, quantizer_errors
from stages.quantize.budget import make_candidate
from stages.quantize.calibration import Method
from stages.quantize.repairs import REPAIRED, Repair
from stages.quantize.schemes import Backend, Scheme

if TYPE_CHECKING:
    import onnx

    from models.checkpoint import Checkpoint

BackendName = Literal["onnxruntime", "modelopt"]

ORT_ONLY = ("repairs", "reduce_range", "calibration_percentile")
"""Fields that nothing but ONNX Runtime's backend reads."""

NO_REPAIRS = "quantize.repairs are not made of a graph above 2 GB"


class QuantizeConfig(StageConfig):
    """What is tried, and how much it may cost."""

    schemes: tuple[Scheme, ...] = Field(
        default=("int8-dynamic", "int8-static"),
        description="int8-dynamic: matrix products with activations scaled at run time (never convolutions, where it "
        "is wrong and slow); int8-static: QDQ with ranges from the calibration split, activations UINT8, the form that "
        "is fast on CPUs; int8-symmetric: QDQ with symmetric INT8 throughout, the form that TensorRT takes (ONNX "
        "Runtime runs it too, slowly on x86); int4-weights: matrices and embeddings in INT4 blocks, in ONNX Runtime's "
        "own operators, activations stay as they are; int4-blocks: matrices by INT4 DequantizeLinear in blocks (opset "
        "21), the form that TensorRT takes; fp8: QDQ in E4M3 for GPUs from SM89 (correct on CPUs, but slower than "
        "FP32). [] goes without.",
    )
    backend: BackendName = Field(
        default="onnxruntime",
        description="What quantizes: ONNX Runtime's quantizers, or NVIDIA ModelOpt (the extra `quant`), which has "
        "int8-symmetric, int4-blocks (with AWQ) and fp8, calibrated by minmax or entropy.",
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
    block_size: Literal[16, 32, 64, 128, 256] = Field(
        default=32,
        description="INT4 schemes: weights of a column that share a scale (number). Smaller is truer and larger.",
    )
    sensitivity_samples: int = Field(
        default=64, ge=8, description="Calibration examples that rank the nodes by sensitivity (number)."
    )
    keep_float: Literal["auto", "none"] = Field(
        default="auto",
        description="All schemes but int8-dynamic: auto keeps the most sensitive nodes in floating point, as few as "
        "the budget needs; none tries the plain scheme only.",
    )
    repairs: tuple[Repair, ...] = Field(
        default=("bias-correction",),
        description="Static INT8 schemes of the backend onnxruntime, below 2 GB: smooth moves outlying channels from "
        "what layer norms give into weights (SmoothQuant); bias-correction adds the mean error of every quantized node "
        "to its bias. Each is kept where it lowers the error on calibration examples.",
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
    min_int4_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Schemes int4-…: smallest share of the multiply-accumulates with INT4 weights worth shipping "
        "(ratio).",
    )
    min_fp8_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Scheme fp8: smallest share of the multiply-accumulates in FP8 worth shipping (ratio).",
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

    @model_validator(mode="after")
    def backend_has_the_schemes(self) -> QuantizeConfig:
        """The backend has every scheme, the way of calibrating, and whatever else is set."""
        has = BACKENDS[self.backend]
        missing = [scheme for scheme in self.schemes if scheme not in has]
        if missing:
            raise ValueError(f"the backend {self.backend} has no {', '.join(missing)}; it has {', '.join(has)}")
        if self.backend == "modelopt" and self.calibration not in modelopt_backend.METHODS:
            known = ", ".join(modelopt_backend.METHODS)
            raise ValueError(f"the backend modelopt has no calibration {self.calibration}; it has {known}")
        asked = [name for name in ORT_ONLY if name in self.model_fields_set and getattr(self, name)]
        if self.backend == "modelopt" and asked:
            raise ValueError(f"the backend modelopt has no {', '.join(asked)}; take it out, or use onnxruntime")
        return self

    def min_share(self, precision: Precision) -> float:
        """The smallest share of the multiply-accumulates in this precision that is worth shipping."""
        return {"int8": self.min_int8_share, "int4": self.min_int4_share, "fp8": self.min_fp8_share}[precision]


BACKENDS: Mapping[BackendName, Backend] = {"onnxruntime": onnxruntime_backend.PLANS, "modelopt": modelopt_backend.PLANS}


class Quantize:
    """See the module's docstring."""

    name = "quantize"
    config_type = QuantizeConfig
    consumes = ("merge-lora", "export")
    splits: tuple[SplitName, ...] = ("calibration", "validation")
    packages = (
        *NETWORK_PACKAGES,
        *PROCESSING_PACKAGES,
        *RUNTIME_PACKAGES,
        *ENGINE_PACKAGES,
        "nvidia-modelopt",
    )
    machine: tuple[MachinePart, ...] = ("threads",)

    def run(self, context: StageContext, config: QuantizeConfig) -> StageResult:
        """Make, judge, and keep or leave out each scheme's candidate."""
        candidates: list[Candidate] = []
        samples = len(context.data["validation"])
        if config.schemes:
            scratch = context.resume / "graphs"
            scratch.mkdir(exist_ok=True)
            bench = open_workbench(context, config, scratch)
            plans = BACKENDS[config.backend]
            candidates = [make_candidate(bench, scheme, plans) for scheme in config.schemes]
        write_candidates(context.output, candidates)
        measurements = {"candidates": [candidate.summary() for candidate in candidates], "samples": samples}
        above_2_gb = bool(candidates) and is_light(bench.model)
        advice = advice_of(candidates, repairs=config.backend == "onnxruntime" and not above_2_gb)
        gates = (gate_of(candidates, samples, advice),) if candidates else ()
        engines = engines_of(context, bench.checkpoint, candidates) if candidates else EngineReport()
        if engines.engines or engines.left_out:
            measurements |= engines.summary()
        skipped = above_2_gb and config.repairs and any(one in REPAIRED for one in config.schemes)
        notes = (*map(note_of, candidates), *([NO_REPAIRS] if skipped else []), *advice, *engines.notes())
        return StageResult(gates, measurements, notes)


def engines_of(context: StageContext, checkpoint: Checkpoint, candidates: Sequence[Candidate]) -> EngineReport:
    """The engines of what was made, where export was asked for engines."""
    request = asked_engines(context.inputs["export"])
    if request is None:
        return EngineReport()
    contents = [one.content for one in context.data["validation"][:BATCH_SIZE]]
    return build_engines(context, request, candidates, [checkpoint.processing.arrays(contents)])


def gate_of(candidates: Sequence[Candidate], samples: int, advice: Sequence[str]) -> GateResult:
    """At least one candidate is inside its budget."""
    accepted = sum(candidate.accepted for candidate in candidates)
    reasons = [f"{one.name}: {one.reason}" for one in candidates if not one.accepted]
    left_out = "; ".join((*reasons, *(() if accepted else advice)))
    gate = Gate("lower precision inside its budget", "at least", 1.0, "candidates")
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
        f"(reference {measured['reference_metric']:.4f}), {measured['narrow_share']:.0%} of the arithmetic "
        f"in {measured['narrow']}" + (kept if floats else "")
    )


def open_workbench(context: StageContext, config: QuantizeConfig, scratch: Path) -> Workbench:
    """Run the reference, the unpatched merged network, once over the validation split, and prepare the graph."""
    from models.checkpoint import load_checkpoint
    from models.runtimes.torch_eager import TorchEager
    from stages.inputs import predict

    checkpoint = load_checkpoint(context.inputs["merge-lora"].folder / "checkpoint")
    examples = context.data["validation"]
    with TorchEager(checkpoint.model, checkpoint.spec.io, "cpu", context.threads) as runtime:
        outputs = predict(runtime, checkpoint.processing, examples, BATCH_SIZE, context.progress, "reference")
    checkpoint.model.to("meta")  # its weights are let go
    model = prepare_graph(context.inputs["export"].file("onnx-fp32.onnx"), scratch)
    save_graph(model, scratch / "prepared.onnx")
    products = products_of(scratch / "prepared.onnx", one_example(checkpoint, context), context.threads)
    spec = checkpoint.spec
    targets = task_of(spec.task).targets([one.label for one in examples], spec.io.width)
    return Workbench(context, config, checkpoint, model, products, scratch, outputs, targets)


def prepare_graph(path: Path, scratch: Path) -> onnx.ModelProto:
    """The fp32 graph with constants folded, batch norm fused into convolutions, shapes inferred, and every node named.

    It is ONNX Runtime's `quant_pre_process`, which holds a large graph in memory twice. Of a light graph the weights
    are in `scratch`.

    Raises:
        QuantizeError: ONNX Runtime refuses the graph.
    """
    import onnx
    from onnxruntime.quantization.quant_utils import add_infer_metadata, add_pre_process_metadata

    target = scratch / "prepared.onnx"
    try:
        optimize_file(path, target)
        onnx.shape_inference.infer_shapes_path(str(target))
        model = onnx.load(str(target), load_external_data=False)
        carry_modules(onnx.load(str(path), load_external_data=False), model)
        add_pre_process_metadata(model)
        add_infer_metadata(model)  # else the quantizer would write it, infer again and read it back, once a variant
    except quantizer_errors() as error:
        message = f"ONNX Runtime's quantizer refuses {path.name}: {error}; set quantize.schemes: [] to go without INT8"
        raise QuantizeError(message) from error
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"  # the exporter's names carry a counter that differs between versions
    return model


def optimize_file(path: Path, target: Path) -> None:
    """Write what ONNX Runtime's basic optimizations, which keep to standard operators, make of a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")  # it is not run
    if weights_beside(path).exists():
        prefix = "session.optimized_model_external_initializers"
        options.add_session_config_entry(f"{prefix}_file_name", weights_beside(target).name)
        options.add_session_config_entry(f"{prefix}_min_size_in_bytes", str(SMALLEST_OUTSIDE_BYTES))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
