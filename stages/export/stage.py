"""export: the merged network as ONNX, with dynamic batch and length, proven at shapes other than the exported one.

Reads: merge-lora's `checkpoint/`.
Writes: `onnx-fp32.onnx`, `onnx-fp16.onnx` and `onnx-bf16.onnx` where asked for, `candidates.json`; `engines.json` and
`engines/` where engines are asked for.
Gates: parity with the unpatched PyTorch network at every tried shape, per precision. A file that ONNX Runtime does not
run (BF16 on a CPU, where all is compared) is compared by its stand-in, built into engines, and left out of what can
ship: no evidence is never a pass.
Fails when: the network cannot be exported, the graph is not valid, an axis was frozen, or a target takes no engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from models.engines.targets import target_of
from models.errors import RuntimeInferenceError
from models.graph import Product, products_of, shares_of
from models.onnx_files import save_graph, size_of_file
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
from stages.engines import (
    ENGINE_PACKAGES,
    EngineBuildConfig,
    build_engines,
    request_engines,
    require_an_engine,
)
from stages.export.exporter import export_onnx
from stages.export.parity import (
    check_graph,
    contents_of,
    example_inputs,
    parity_gates,
    reference_logits,
    shape_errors,
    tried_inputs,
)
from stages.export.precisions import CONVERTERS, FloatPrecision, rounded_in_fp32, types_of
from stages.gate import GateResult

if TYPE_CHECKING:
    import onnx

NOISE_FACTOR = 20.0
FP32_CEILING = 1e-3
FP16_CEILING = 2e-2
BF16_CEILING = 1e-1
"""Tolerances relative to the logit range. fp32: `NOISE_FACTOR` × the measured noise floor (fp32 against fp64
in PyTorch), never above `FP32_CEILING`, which holds alone where the network does not run in fp64. fp16: its unit
roundoff is 2⁻¹¹ ≈ 4.9e-4; over some fifty layers errors add up to a percent, measured .2–.9 % on the two recipes.
bf16: its unit roundoff is eight times as large; measured .5 and 3.3 % by rounding on the CPU."""

BFLOAT16 = 16
"""`onnx.TensorProto.BFLOAT16`."""

NO_KERNEL = "NOT_IMPLEMENTED"
"""What ONNX Runtime says of an operator that it knows and has no code for, in this type."""

MINIMUM_FLOOR = 1e-6
"""The noise floor is not taken below this: fp32's own roundoff is 6e-8 and a kernel sums thousands of terms."""


class ExportConfig(StageConfig):
    """What is written."""

    formats: tuple[Literal["onnx", "tensorrt-rtx", "tensorrt"], ...] = Field(
        default=("onnx",),
        min_length=1,
        description="File formats; onnx is always made. Engines need `targets`, and are built of every candidate, "
        "those of quantize included.",
    )
    targets: tuple[str, ...] = Field(
        default=(),
        description="Devices that engines are built for, by their names in models/engines/targets.yaml "
        "(sm86, jetson-orin-jp6, …).",
    )
    profile: dict[str, tuple[int, int, int]] = Field(
        default={},
        description="Dynamic axis → the smallest, usual and largest size that an engine takes (numbers). Default: "
        "batch [1, 8, 32], and of texts 1, that of the examples, and the largest that is kept.",
    )
    engine_build: EngineBuildConfig = Field(
        default_factory=EngineBuildConfig, description="Limits and options of building engines."
    )
    precisions: tuple[FloatPrecision, ...] = Field(
        default=("fp32", "fp16"),
        min_length=1,
        description="Precisions of the ONNX files; fp32 is "
        "always made. bf16 (opset 22, norms and softmax in FP32) is compared by a stand-in; its engines are built for "
        "inspection and never shipped in this version.",
    )
    opset: int = Field(
        default=20, ge=18, le=23, description="ONNX opset (number); lowered to what the targets read, JetPack 6 20."
    )
    max_relative_error_fp32: float = Field(
        default=FP32_CEILING, gt=0, description="Ceiling of the fp32 tolerance, as a share of the logit range (ratio)."
    )
    max_relative_error_fp16: float = Field(
        default=FP16_CEILING, gt=0, description="Tolerance of fp16, as a share of the logit range (ratio)."
    )
    max_relative_error_bf16: float = Field(
        default=BF16_CEILING, gt=0, description="Tolerance of bf16, as a share of the logit range (ratio)."
    )

    def tolerance_of(self, precision: FloatPrecision) -> float:
        """Of a precision, as a share of the logit range."""
        return {
            "fp32": self.max_relative_error_fp32,
            "fp16": self.max_relative_error_fp16,
            "bf16": self.max_relative_error_bf16,
        }[precision]

    @field_validator("targets")
    @classmethod
    def known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Every target is in the table, once."""
        for name in value:
            target_of(name)
        if len(set(value)) != len(value):
            raise ValueError("a target stands twice")
        return value

    @field_validator("profile")
    @classmethod
    def ascending(cls, value: dict[str, tuple[int, int, int]]) -> dict[str, tuple[int, int, int]]:
        """Sizes go from the smallest to the largest."""
        for axis, (low, usual, high) in value.items():
            if not 1 <= low <= usual <= high:
                raise ValueError(f"{axis} has {[low, usual, high]}; expected 1 ≤ smallest ≤ usual ≤ largest")
        return value

    @model_validator(mode="after")
    def formats_fit_targets(self) -> ExportConfig:
        """Each engine format has a target, and each target its format."""
        wanted = {target_of(name).runtime: name for name in self.targets}
        for runtime, name in wanted.items():
            if runtime not in self.formats:
                raise ValueError(f"the target {name} is built with {runtime}: add {runtime} to export.formats")
        for name in self.formats:
            if name != "onnx" and name not in wanted:
                raise ValueError(f"the format {name} needs a device: name one in export.targets (sm86, …)")
        return self


class Export:
    """See the module's docstring."""

    name = "export"
    config_type = ExportConfig
    consumes = ("merge-lora",)
    splits: tuple[SplitName, ...] = ("validation",)
    packages = (*NETWORK_PACKAGES, *PROCESSING_PACKAGES, *RUNTIME_PACKAGES, "onnxscript", "onnx-ir", *ENGINE_PACKAGES)
    machine: tuple[MachinePart, ...] = ("threads",)

    def run(self, context: StageContext, config: ExportConfig) -> StageResult:
        """Export once, convert to the other precisions, compare each with the reference."""
        import torch

        from models.checkpoint import load_checkpoint, weights_given_back

        torch.set_num_threads(context.threads)
        checkpoint = load_checkpoint(context.inputs["merge-lora"].folder / "checkpoint")
        shapes = tried_inputs(checkpoint, context)
        reference, floor = reference_logits(checkpoint, shapes)
        scale = max(float(max(part.max() for part in reference) - min(part.min() for part in reference)), 1e-30)
        targets = config.targets
        request = request_engines(targets, config.profile, config.engine_build, checkpoint.spec.io, shapes)
        opset = opset_for(config.opset, targets)
        path = context.output / "onnx-fp32.onnx"
        with weights_given_back(checkpoint.model):
            model, attention = export_onnx(checkpoint, example_inputs(checkpoint, context), opset, path)
        single = checkpoint.processing.arrays(contents_of(context, 1))
        gates: list[GateResult] = []
        candidates = []
        for precision in (one for one in CONVERTERS if one in ("fp32", *config.precisions)):
            path = context.output / f"onnx-{precision}.onnx"
            converted = CONVERTERS[precision](model, context.output)
            save_graph(converted, path)
            check_graph(path, checkpoint.spec.io)
            ran, problem = file_to_run(path, precision, converted, context)
            products = products_of(ran, single, context.threads)
            shares = shares_of(as_in(converted, products) if problem else products)
            check_label(path.stem, precision, shares)
            errors = shape_errors(ran, shapes, reference, context.threads)
            tolerance = config.tolerance_of(precision)
            if precision == "fp32" and floor is not None:
                tolerance = min(tolerance, NOISE_FACTOR * max(floor / scale, MINIMUM_FLOOR))
            gates += parity_gates(f"onnx-{precision}", errors, tolerance, scale, floor)
            candidates.append(describe(path, precision, errors, tolerance, scale, shares, problem))
        write_candidates(context.output, candidates)
        measurements = {
            "candidates": [candidate.summary() for candidate in candidates],
            "opset": opset,
            "noise_floor": floor,
            "logit_range": scale,
            "attention": attention,
        }
        notes = [
            f"{one.name}: {one.size_bytes / 1e6:.1f} MB, parity at {len(shapes)} shapes"
            + f"; left out: {one.reason}" * (not one.accepted)
            for one in candidates
        ]
        if floor is None:
            notes.append("the network does not run in fp64, so the noise floor is not known: the ceiling holds")
        if attention == "plain":
            notes.append("exported with attention written out: the fused form has no ONNX form here")
        if opset != config.opset:
            notes.append(f"opset {opset} in place of {config.opset}: the targets read no later one")
        if targets:
            engines = build_engines(context, request, candidates, shapes)
            require_an_engine(request, engines)
            measurements |= engines.summary()
            notes += engines.notes()
        return StageResult(tuple(gates), measurements, tuple(notes))


def opset_for(asked: int, targets: Sequence[str]) -> int:
    """The opset asked for, or the latest that every target reads."""
    return min([asked, *(limit for name in targets if (limit := target_of(name).max_opset))])


def file_to_run(
    path: Path, precision: FloatPrecision, model: onnx.ModelProto, context: StageContext
) -> tuple[Path, str]:
    """(the file itself, nothing) where ONNX Runtime runs it; of BF16 else (a stand-in in FP32 that rounds, why)."""
    from models.runtimes.onnxruntime_session import OnnxRuntimeSession

    if precision != "bf16":
        return path, ""
    try:
        with OnnxRuntimeSession(path, threads=context.threads):
            return path, ""
    except RuntimeInferenceError as error:
        if NO_KERNEL not in str(error):
            raise
        stand_in = context.resume / f"{path.stem}-rounded.onnx"
        save_graph(rounded_in_fp32(model), stand_in)
        return stand_in, f"ONNX Runtime does not run BF16 here, so that nothing measures the file itself: {error}"


def as_in(model: onnx.ModelProto, products: Sequence[Product]) -> list[Product]:
    """The products of a stand-in, with their precisions as `model` has them."""
    types = types_of(model)
    halved = {node.name for node in model.graph.node if types[node.output[0]] == BFLOAT16}
    return [replace(one, precision="bf16") if one.node in halved else one for one in products]


def describe(
    path: Path,
    precision: FloatPrecision,
    errors: Sequence[tuple[str, float]],
    tolerance: float,
    scale: float,
    shares: dict[str, float],
    problem: str,
) -> Candidate:
    """The candidate with what was measured; `problem` says why the file itself does not run here."""
    measurements = {
        "max_abs_error": max((error for _, error in errors if math.isfinite(error)), default=None),
        "tolerance": tolerance * scale,
        "shapes_tried": [shape for shape, _ in errors],
        "mac_shares": shares,
    }
    return Candidate(
        path.stem, path.name, precision, size_of_file(path), accepted=not problem, reason=problem,
        runs_here=not problem, measurements=measurements,
    )  # fmt: skip
