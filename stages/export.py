"""export: the merged network as ONNX, with dynamic batch and length, proven at shapes other than the exported one.

Reads: merge-lora's `checkpoint/`.
Writes: `onnx-fp32.onnx`, `onnx-fp16.onnx` where asked for, `candidates.json`; `engines.json` and `engines/` where
engines are asked for.
Gates: parity with the unpatched PyTorch network at every tried shape, per precision.
Fails when: the network cannot be exported, the graph is not valid, an axis was frozen, or a target takes no engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from models.engines.targets import target_of
from models.errors import DataError, ExportError
from models.graph import name_modules, products_of, shares_of
from stages.base import (
    NETWORK_PACKAGES,
    PROCESSING_PACKAGES,
    RUNTIME_PACKAGES,
    MachinePart,
    StageConfig,
    StageContext,
    StageResult,
)
from stages.candidates import Candidate, Precision, check_label, write_candidates
from stages.data.splits import SplitName
from stages.engines import (
    ENGINE_PACKAGES,
    EngineBuildConfig,
    build_engines,
    request_engines,
    require_an_engine,
)
from stages.gate import Gate, GateResult

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch

    from models.checkpoint import Checkpoint
    from models.modalities import Content
    from models.spec import IOSpec, TensorSpec

BATCHES = (1, 3, 8)
"""Batch sizes tried; the exported example has 2 (torch.export specialises 0 and 1)."""

NOISE_FACTOR = 20.0
FP32_CEILING = 1e-3
FP16_CEILING = 2e-2
"""Tolerances relative to the logit range. fp32: `NOISE_FACTOR` × the measured noise floor (fp32 against fp64
in PyTorch), never above `FP32_CEILING`, which holds alone where the network does not run in fp64. fp16: its unit
roundoff is 2⁻¹¹ ≈ 4.9e-4; over some fifty layers errors add up to a percent, measured .2–.9 % on the two recipes."""

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
    precisions: tuple[Literal["fp32", "fp16"], ...] = Field(
        default=("fp32", "fp16"), min_length=1, description="Precisions of the ONNX files; fp32 is always made."
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

        from models.checkpoint import load_checkpoint

        torch.set_num_threads(context.threads)
        checkpoint = load_checkpoint(context.inputs["merge-lora"].folder / "checkpoint")
        shapes = tried_inputs(checkpoint, context)
        reference, floor = reference_logits(checkpoint, shapes)
        scale = max(float(max(part.max() for part in reference) - min(part.min() for part in reference)), 1e-30)
        targets = config.targets
        request = request_engines(targets, config.profile, config.engine_build, checkpoint.spec.io, shapes)
        opset = opset_for(config.opset, targets)
        model, attention = export_onnx(checkpoint, example_inputs(checkpoint, context), opset)
        single = checkpoint.processing.arrays(contents_of(context, 1))
        gates: list[GateResult] = []
        candidates = []
        for precision in sorted({"fp32", *config.precisions}, reverse=True):
            path = context.output / f"onnx-{precision}.onnx"
            save_onnx(model if precision == "fp32" else fp16_from_fp32(model), path)
            check_graph(path, checkpoint.spec.io)
            shares = shares_of(products_of(path, single, context.threads))
            check_label(path.stem, precision, shares)
            errors = shape_errors(path, shapes, reference, context.threads)
            tolerance = config.max_relative_error_fp16
            if precision == "fp32":
                tolerance = config.max_relative_error_fp32
                if floor is not None:
                    tolerance = min(tolerance, NOISE_FACTOR * max(floor / scale, MINIMUM_FLOOR))
            gates += parity_gates(f"onnx-{precision}", errors, tolerance, scale)
            candidates.append(describe(path, precision, errors, tolerance, scale, shares))
        write_candidates(context.output, candidates)
        measurements = {
            "candidates": [candidate.summary() for candidate in candidates],
            "opset": opset,
            "noise_floor": floor,
            "logit_range": scale,
            "attention": attention,
        }
        notes = [f"{one.name}: {one.size_bytes / 1e6:.1f} MB, parity at {len(shapes)} shapes" for one in candidates]
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


def tried_inputs(checkpoint: Checkpoint, context: StageContext) -> list[dict[str, np.ndarray]]:
    """Real validation inputs at every batch size, and the limits of the modality (a text of one token, silence)."""
    examples = contents_of(context, max(BATCHES))
    shapes = [checkpoint.processing.arrays(examples[:batch]) for batch in BATCHES]
    return shapes + [checkpoint.processing.arrays(batch) for batch in checkpoint.processing.extremes(examples)]


def example_inputs(checkpoint: Checkpoint, context: StageContext) -> dict[str, np.ndarray]:
    """Two real examples."""
    return checkpoint.processing.arrays(contents_of(context, 2))


def opset_for(asked: int, targets: Sequence[str]) -> int:
    """The opset asked for, or the latest that every target reads."""
    return min([asked, *(limit for name in targets if (limit := target_of(name).max_opset))])


def contents_of(context: StageContext, count: int) -> list[Content]:
    """`count` validation examples; a smaller split is repeated, so that every batch size is tried.

    Raises:
        DataError: the split is empty.
    """
    examples = context.data["validation"]
    if not examples:
        raise DataError("the validation split is empty, so nothing proves the export; raise data.validation_fraction")
    return [examples[index % len(examples)].content for index in range(count)]


def reference_logits(
    checkpoint: Checkpoint, shapes: Sequence[dict[str, np.ndarray]]
) -> tuple[list[np.ndarray], float | None]:
    """fp32 logits of the unpatched network, and how much of them is rounding (see `rounding_error`)."""
    import copy

    import torch

    from models.rounding import rounding_error

    model, inputs = checkpoint.model, checkpoint.spec.io.inputs
    batches = [[torch.from_numpy(arrays[tensor.name]) for tensor in inputs] for arrays in shapes]
    with torch.inference_mode():
        singles = [model(*batch) for batch in batches]
    return [single.numpy().copy() for single in singles], rounding_error(copy.deepcopy(model), batches, singles)


def export_onnx(checkpoint: Checkpoint, example: dict[str, np.ndarray], opset: int) -> tuple[onnx.ModelProto, str]:
    """Export a copy of the network; retry with plain attention where the fused one does not decompose.

    The copy keeps the reference unpatched. In torch 2.13 some scaled-dot-product attentions with an additive bias do
    not decompose ("Cannot view a tensor …"), and those over 3 or 5 axes have no ONNX form ("only 4D query, key, and
    value are supported"). docs/coverage.md has the families.

    Raises:
        ExportError: both ways failed.
    """
    import copy

    failures = []
    for attention in ("as built", "plain"):
        model = copy.deepcopy(checkpoint.model)
        patched: AbstractContextManager[None] = nullcontext()
        if attention == "plain":
            use_plain_attention(model)
            patched = written_out_attention()
        try:
            with patched:
                return run_exporter(model, checkpoint.spec.io, example, opset), attention
        except exporter_errors() as error:
            failures.append(f"{attention} attention: {root_of(error)}")
    raise ExportError(
        f"{checkpoint.spec.backbone.id} could not be exported to ONNX; {'; '.join(failures)}. "
        "Try another opset (export.opset) or another backbone"
    )


def root_of(error: BaseException) -> str:
    """The first cause of an error, in a line or two: torch wraps what happened in advice on how to report it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join([f"{type(error).__name__}:", *lines[: 2 if lines and lines[0].endswith(":") else 1]])


def exporter_errors() -> tuple[type[Exception], ...]:
    """What torch.onnx raises."""
    import torch

    return (
        torch.onnx.errors.OnnxExporterError,
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        IndexError,
    )


def use_plain_attention(model: Any) -> None:
    """Switch fused attention off: timm's `fused_attn` flags, transformers' attention implementation."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation("eager")


@contextmanager
def written_out_attention() -> Iterator[None]:
    """Inside, PyTorch's fused attention is two products and a softmax: also where no flag of a library turns it off."""
    import torch

    functional: Any = torch.nn.functional
    fused = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = attention_by_products
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = fused


def attention_by_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """softmax(Q·Kᵀ·scale + mask)·V (Vaswani et al. 2017), as PyTorch documents its `scaled_dot_product_attention`.

    `query` is float (…, targets, width), `key` and `value` (…, sources, width), `attn_mask` additive, or True where to
    look. There is no dropout: what is exported is in eval mode.
    """
    import torch

    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


def run_exporter(model: Any, io: IOSpec, example: dict[str, np.ndarray], opset: int) -> onnx.ModelProto:
    """torch.onnx's dynamo exporter, with names and dynamic axes from the I/O spec."""
    import contextlib
    import io as text_io
    import warnings

    import torch

    output_names = [tensor.name for tensor in io.outputs]
    axes: dict[str, Any] = {}
    for tensor in io.inputs:
        for axis in tensor.dynamic_axes.values():
            axes.setdefault(axis, torch.export.Dim.DYNAMIC)
    dynamic = tuple({index: axes[axis] for index, axis in tensor.dynamic_axes.items()} for tensor in io.inputs)
    with warnings.catch_warnings(), contextlib.redirect_stdout(text_io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            named_outputs(model, io),
            tuple(torch.from_numpy(example[tensor.name]) for tensor in io.inputs),
            input_names=[tensor.name for tensor in io.inputs],
            output_names=output_names,
            dynamic_shapes=(dynamic,),
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    register_lost_constants(program.model.graph)
    free_names(program.model.graph, output_names)
    return clean_graph(program.model_proto, io)


def register_lost_constants(graph: Any) -> None:
    """Give an onnx-ir graph the constants that its nodes read and it has lost.

    onnxscript 0.7 makes one Clip of a minimum and a maximum, and names its limits after what is clipped: where a value
    is clipped twice (gemma4_vit) the second pair of limits has a name and no place.
    """
    given = set(graph.inputs)
    for node in graph:
        for value in node.inputs:
            nowhere = value is not None and value.producer() is None and not value.is_initializer()
            if nowhere and value not in given and value.const_value is not None:
                graph.register_initializer(value)


def free_names(graph: Any, names: Sequence[str]) -> None:
    """Rename what has the name of an output of an onnx-ir graph and is none.

    The exporter names values by their operator, also aten's embedding, and does not look whether the name is taken.
    """
    for node in graph:
        for value in node.outputs:
            if value.name in names and not value.is_graph_output():
                value.name = f"inner_{value.name}"


def named_outputs(model: Any, io: IOSpec) -> Any:
    """The network with its outputs, which it gives side by side, one by one."""
    import torch

    class Apart(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.model(*inputs).split([int(one.dims[1]) for one in io.outputs], dim=1)  # type: ignore[no-any-return]

    return Apart().eval() if len(io.outputs) > 1 else model


def clean_graph(model: onnx.ModelProto, io: IOSpec) -> onnx.ModelProto:
    """Remove stale shapes, name the dynamic axes and the module of each node.

    The exporter's `value_info` disagrees with the graph, and ONNX Runtime's quantizer then refuses it
    ("Inferred shape and existing shape differ"): 38 of 47 networks, mended in 37 by deleting it.
    """
    part_pads_from_pools(model)
    del model.graph.value_info[:]
    for values, specs in ((model.graph.input, io.inputs), (model.graph.output, io.outputs)):
        for value, spec in zip(values, specs, strict=True):
            for dim, wanted in zip(value.type.tensor_type.shape.dim, spec.dims, strict=True):
                if isinstance(wanted, str) and dim.HasField("dim_param"):
                    dim.dim_param = wanted
    del model.metadata_props[:]
    name_modules(model)
    return model


def part_pads_from_pools(model: onnx.ModelProto) -> None:
    """Put a reshape that changes nothing between a Pad and a MaxPool.

    ONNX Runtime 1.31 moves the padding into the pool, where it counts as −∞: with zeros beside negative values the
    result is another one (bit: .0006 of the logit range). TensorRT and ONNX Runtime run the reshape without a copy.
    """
    import numpy as np
    import onnx

    pads = {node.output[0] for node in model.graph.node if node.op_type == "Pad"}
    for index, node in reversed(list(enumerate(model.graph.node))):
        if node.op_type == "MaxPool" and node.input[0] in pads:
            padded, same = node.input[0], f"{node.name}_unpadded"
            shape = onnx.numpy_helper.from_array(np.zeros(4, np.int64), f"{same}_shape")  # 0: as it was
            model.graph.initializer.append(shape)
            node.input[0] = same
            model.graph.node.insert(index, onnx.helper.make_node("Reshape", [padded, shape.name], [same], same))


def save_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Write the file; weights above 2 GB go beside it."""
    import onnx

    large = model.ByteSize() > 1_900_000_000
    onnx.save(model, path, save_as_external_data=large, location=f"{path.name}.data" if large else None)


def fp16_from_fp32(model: onnx.ModelProto) -> onnx.ModelProto:
    """Half-precision weights and arithmetic; inputs and outputs keep their dtypes."""
    import copy
    import warnings

    from onnxruntime.transformers import float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of every value that half precision rounds to zero
        converted: onnx.ModelProto = float16.convert_float_to_float16(
            copy.deepcopy(model), keep_io_types=True, disable_shape_infer=False,
            op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, "LayerNormalization", "Cast"],
        )  # fmt: skip
    drop_repeated_casts(converted)
    OnnxModel(converted).topological_sort()  # the converter appends its casts at the end
    del converted.graph.value_info[:]
    return converted


def drop_repeated_casts(model: onnx.ModelProto) -> None:
    """One cast a tensor: the converter adds one for each kept node that reads it, all under one name.

    Layer norms share a weight where the exporter found theirs to be equal (zero biases).
    """
    seen: set[str] = set()
    nodes = []
    for node in model.graph.node:
        if node.op_type != "Cast" or node.output[0] not in seen:
            nodes.append(node)
        seen.update(node.output)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def check_graph(path: Path, io: IOSpec) -> None:
    """The graph is valid, and its inputs and outputs are those of the I/O spec, dynamic where it says so.

    Raises:
        ExportError: it is not; a frozen axis is named.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} is no valid ONNX graph: {error}") from error
    graph = onnx.load(str(path), load_external_data=False).graph
    for values, specs in ((graph.input, io.inputs), (graph.output, io.outputs)):
        names = [value.name for value in values]
        if names != [spec.name for spec in specs]:
            raise ExportError(f"{path.name} has {names}; expected {[spec.name for spec in specs]}")
        for value, spec in zip(values, specs, strict=True):
            check_dims(path, value, spec)


def check_dims(path: Path, value: onnx.ValueInfoProto, spec: TensorSpec) -> None:
    """Dynamic axes are dynamic, fixed ones have their size. Raises `ExportError`."""
    dims = value.type.tensor_type.shape.dim
    if len(dims) != len(spec.dims):
        raise ExportError(f"{path.name}: {spec.name} has {len(dims)} axes; expected {len(spec.dims)}, {spec.dims}")
    for index, (dim, wanted) in enumerate(zip(dims, spec.dims, strict=True)):
        if isinstance(wanted, str) and dim.HasField("dim_value"):
            raise ExportError(
                f"{path.name}: the axis {wanted!r} of {spec.name} was frozen at {dim.dim_value}; "
                "the network's code fixes it, so take another backbone"
            )
        if isinstance(wanted, int) and dim.dim_value != wanted:
            found = dim.dim_value or dim.dim_param or "unknown"
            raise ExportError(f"{path.name}: axis {index} of {spec.name} is {found}; expected {wanted}")


def shape_errors(
    path: Path, shapes: Sequence[dict[str, np.ndarray]], reference: Sequence[np.ndarray], threads: int
) -> list[tuple[str, float]]:
    """(shape in words, largest absolute error) per tried shape; NaN where shapes differ."""
    import numpy as np

    from models.runtimes.onnxruntime_session import OnnxRuntimeSession
    from models.spec import side_by_side

    errors = []
    with OnnxRuntimeSession(path, threads=threads) as session:
        for arrays, wanted in zip(shapes, reference, strict=True):
            found = session.infer(arrays)
            logits = side_by_side(found)
            name = ", ".join("×".join(map(str, array.shape)) for array in list(arrays.values())[:1])
            same = logits.shape == wanted.shape
            errors.append((name, float(np.abs(logits - wanted).max()) if same else float("nan")))
    return errors


def parity_gates(subject: str, errors: Sequence[tuple[str, float]], tolerance: float, scale: float) -> list[GateResult]:
    """One gate a tried shape."""
    gate = Gate("export parity", "at most", tolerance, "of the logit range")
    hint = "" if subject == "onnx-fp32" else "to go without it, take its precision out of export.precisions"

    def check(shape: str, error: float) -> GateResult:
        good = error / scale <= tolerance
        return gate.check(f"{subject} at {shape}", error / scale, 1, "" if good else hint)

    return [check(shape, error) for shape, error in errors]


def describe(
    path: Path,
    precision: Precision,
    errors: Sequence[tuple[str, float]],
    tolerance: float,
    scale: float,
    shares: dict[str, float],
) -> Candidate:
    """The candidate with what was measured."""
    external = path.with_name(f"{path.name}.data")
    size = path.stat().st_size + (external.stat().st_size if external.exists() else 0)
    measurements = {
        "max_abs_error": max((error for _, error in errors if math.isfinite(error)), default=None),
        "tolerance": tolerance * scale,
        "shapes_tried": [shape for shape, _ in errors],
        "mac_shares": shares,
    }
    return Candidate(f"onnx-{precision}", path.name, precision, size, measurements=measurements)
