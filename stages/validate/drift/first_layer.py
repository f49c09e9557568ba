"""The first layer that broke: two graphs of one network compared node by node, in topological order.

A node far down differs because everything before it does. So each node of the good graph is given what the other graph
gave to its counterpart: what it then makes of it is what it should have made, and the difference is its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx

MAX_LISTED = 10
"""Nodes in the evidence, those with the largest errors of their own."""


@dataclass(frozen=True)
class Piece:
    """The nodes of the good graph between tensors that both graphs have, and one such tensor that they make."""

    output: str
    inputs: tuple[str, ...]
    nodes: tuple[onnx.NodeProto, ...]


def find_first_layer(
    good: Path, bad: Path, inputs: Mapping[str, np.ndarray], outputs: Sequence[str], limit: float, threads: int = 1
) -> dict[str, Any]:
    """Which node of `bad` is the first to add an error of its own above `limit`, a share of what it gives.

    Errors are ‖found − wanted‖ / ‖wanted‖ over all samples. Tensors are matched by name, which optimizers and
    quantizers keep of what they do not fuse. `accumulated` is the error against the good graph, `own` that against the
    good node on the bad graph's inputs. Where no node is above the limit `first` is None; the largest are listed all
    the same.

    Raises:
        RuntimeInferenceError: one of the graphs, or a piece of the good one, does not run.
    """
    import onnx

    from models.graph import module_of
    from models.probe import tensor_values

    wanted_graph, found_graph = onnx.load(str(good)), onnx.load(str(bad))
    shared = shared_tensors(wanted_graph, found_graph)
    missing = [name for name in outputs if name not in shared]
    wanted = tensor_values(wanted_graph, shared, inputs, threads)
    found = tensor_values(found_graph, shared, inputs, threads)
    matched = {name for name in shared if comparable(wanted[name], found[name])}
    nodes = []
    first = None
    for piece in pieces_of(wanted_graph, matched, set(inputs)):
        given = {name: found.get(name, inputs.get(name)) for name in piece.inputs}
        should = run_piece(wanted_graph, piece, given, wanted, threads)
        entry: dict[str, Any] = {
            "tensor": piece.output,
            "node": piece.nodes[-1].name,
            "operator": piece.nodes[-1].op_type,
            "module": next((module_of(one) for one in piece.nodes[::-1] if module_of(one)), ""),
            "own": share_of(found[piece.output], should),
            "accumulated": share_of(found[piece.output], wanted[piece.output]),
        }
        nodes.append(entry)
        if first is None and not entry["own"] <= limit:  # NaN is above every limit
            first = entry
            break
    largest = sorted(nodes, key=lambda one: -rank(one["own"]))[:MAX_LISTED]
    return {
        "first": finite(first),
        "limit": limit,
        "compared": len(nodes),
        "matched": len(matched),
        "samples": len(next(iter(inputs.values()))),
        "missing_outputs": missing,
        "largest": [finite(one) for one in largest],
    }


def shared_tensors(good: onnx.ModelProto, bad: onnx.ModelProto) -> set[str]:
    """What nodes of both graphs make, by name."""
    one, other = ({name for node in model.graph.node for name in node.output if name} for model in (good, bad))
    return one & other


def comparable(wanted: np.ndarray, found: np.ndarray) -> bool:
    """Whether both are numbers that a rounding could move: floats of one shape."""
    return wanted.shape == found.shape and wanted.dtype.kind == "f" and found.dtype.kind == "f" and bool(wanted.size)


def pieces_of(model: onnx.ModelProto, matched: Collection[str], inputs: Collection[str]) -> list[Piece]:
    """The graph cut at the matched tensors, in topological order."""
    makers = {name: (place, node) for place, node in enumerate(model.graph.node) for name in node.output}
    pieces = []
    for node in model.graph.node:
        for output in node.output:
            if output not in matched:
                continue
            reached: dict[int, onnx.NodeProto] = {}
            borders: list[str] = []
            left = [output]
            while left:
                name = left.pop()
                if name not in makers:
                    if name in inputs and name not in borders:
                        borders.append(name)
                    continue
                if name in matched and name != output:
                    if name not in borders:
                        borders.append(name)
                    continue
                place, maker = makers[name]
                if place not in reached:
                    reached[place] = maker
                    left += [one for one in maker.input if one]
            pieces.append(Piece(output, tuple(borders), tuple(reached[place] for place in sorted(reached))))
    return pieces


def run_piece(
    model: onnx.ModelProto,
    piece: Piece,
    given: Mapping[str, np.ndarray | None],
    wanted: Mapping[str, np.ndarray],
    threads: int,
) -> np.ndarray:
    """What the good nodes make of the bad graph's tensors, which take the good ones' types."""
    import onnx

    from models.onnx_files import save_graph
    from models.runtimes.onnxruntime_session import OnnxRuntimeSession

    arrays = {
        name: value.astype(wanted[name].dtype) if name in wanted else value
        for name, value in given.items()
        if value is not None
    }
    helper = onnx.helper
    types = {
        name: helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), list(value.shape))
        for name, value in arrays.items()
    }
    read = {name for node in piece.nodes for name in node.input}
    constants = [tensor for tensor in model.graph.initializer if tensor.name in read]
    asked = [helper.make_empty_tensor_value_info(piece.output)]
    graph = helper.make_graph(list(piece.nodes), "piece", list(types.values()), asked, constants)
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    with tempfile.TemporaryDirectory(prefix="piece-") as folder:
        path = Path(folder) / "piece.onnx"
        save_graph(alone, path)
        with OnnxRuntimeSession(path, threads=threads, optimization="none") as session:
            return session.infer(arrays)[piece.output]


def share_of(found: np.ndarray, wanted: np.ndarray) -> float:
    """‖found − wanted‖ / ‖wanted‖ in float64: 0 where both are zero, infinite where only `wanted` is; NaN where either
    is not finite."""
    import numpy as np

    one, other = found.astype(np.float64), wanted.astype(np.float64)
    noise, signal = float(np.linalg.norm(one - other)), float(np.linalg.norm(other))
    if noise == 0:
        return 0.0
    return noise / signal if signal else float("inf")


def rank(value: float) -> float:
    """For an order in which NaN is the largest."""
    return value if value == value else float("inf")


def finite(entry: dict[str, Any] | None) -> dict[str, Any] | None:
    """An entry as JSON takes it: what is not finite becomes None."""
    import math

    if entry is None:
        return None
    return {key: None if isinstance(one, float) and not math.isfinite(one) else one for key, one in entry.items()}
