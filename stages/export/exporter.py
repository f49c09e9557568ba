"""A network → an ONNX graph: torch.onnx, with the mends that its graphs need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import ExportError
from models.graph import name_modules
from models.onnx_files import protobuf_of

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch

    from models.checkpoint import Checkpoint
    from models.spec import IOSpec


def export_onnx(
    checkpoint: Checkpoint, example: dict[str, np.ndarray], opset: int, path: Path
) -> tuple[onnx.ModelProto, str]:
    """Export a copy of the network; retry with plain attention where the fused one does not decompose.

    The copy keeps the reference unpatched; it shares the weights, which nothing changes. Weights above what protobuf
    holds are written beside `path`, where the graph is to be saved (`models.onnx_files`).

    In torch 2.13 some scaled-dot-product attentions with an additive bias do not decompose ("Cannot view a tensor …"),
    and those over 3 or 5 axes have no ONNX form ("only 4D query, key, and value are supported"). docs/coverage.md has
    the families.

    Raises:
        ExportError: both ways failed.
    """
    failures = []
    for attention in ("as built", "plain"):
        model = copy_sharing_weights(checkpoint.model)
        patched: AbstractContextManager[None] = nullcontext()
        if attention == "plain":
            use_plain_attention(model)
            patched = written_out_attention()
        try:
            with patched:
                return run_exporter(model, checkpoint.spec.io, example, opset, path), attention
        except exporter_errors() as error:
            failures.append(f"{attention} attention: {root_of(error)}")
    raise ExportError(
        f"{checkpoint.spec.backbone.id} could not be exported to ONNX; {'; '.join(failures)}. "
        "Try another opset (export.opset) or another backbone"
    )


def copy_sharing_weights(model: Any) -> Any:
    """A copy of a network whose parameters and buffers are those of the original."""
    import copy

    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


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


def run_exporter(model: Any, io: IOSpec, example: dict[str, np.ndarray], opset: int, path: Path) -> onnx.ModelProto:
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
    return clean_graph(protobuf_of(program.model, path), io)


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
