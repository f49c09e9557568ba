"""ONNX files: the graph, and beside it `<file>.data` with the weights where protobuf cannot hold them.

A graph in memory is *whole*, or *light*: then its weights lie in a file of the folder that it was read from, and a copy
of it costs next to nothing. Light is everything above the limit, so that memory does not grow by a model a copy.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

LARGEST_FILE_BYTES = 1_900_000_000
"""Weights of one file (bytes). Protobuf ends at 2 GiB, and the graph itself needs room."""

SMALLEST_OUTSIDE_BYTES = 1024
"""Smaller tensors stay in the graph, where shape inference reads them: the limit of `onnx.save`."""


def weights_beside(path: Path) -> Path:
    """Where the weights of a large graph lie."""
    return path.with_name(f"{path.name}.data")


def files_of(path: Path) -> list[Path]:
    """An ONNX file, and the weights beside it where there are any."""
    return [one for one in (path, weights_beside(path)) if one.exists()]


def size_of_file(path: Path) -> int:
    """Bytes of an ONNX file and the weights beside it."""
    return sum(one.stat().st_size for one in files_of(path))


def is_light(model: onnx.ModelProto) -> bool:
    """Whether weights lie in a second file."""
    return any(outside(tensor) for tensor in model.graph.initializer)


def outside(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor's numbers lie in a second file."""
    from onnx import TensorProto

    return bool(tensor.data_location == TensorProto.EXTERNAL)


def size_of_tensor(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor's numbers; types of less than a byte count as one."""
    from onnx.helper import tensor_dtype_to_np_dtype

    return math.prod(int(size) for size in tensor.dims) * int(tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def protobuf_of(model: Any, path: Path) -> onnx.ModelProto:
    """The protobuf of an onnx-ir model. Above the limit it is light, its weights written to where those of `path` lie,
    tensor by tensor: onnx-ir holds views of what PyTorch holds."""
    import onnx_ir

    sizes = [value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None]
    if sum(sizes) > LARGEST_FILE_BYTES:
        onnx_ir.external_data.unload_from_model(
            model, path.parent, weights_beside(path).name, size_threshold_bytes=SMALLEST_OUTSIDE_BYTES
        )
    proto: onnx.ModelProto = onnx_ir.to_proto(model)
    return proto


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph. What it holds of weights goes into the file or, above the limit, beside it: then it is light
    afterwards. The weights of a light graph must lie in the folder of `path` and stay where they are."""
    import onnx
    from onnx.external_data_helper import set_external_data

    held = {tensor.name: size_of_tensor(tensor) for tensor in model.graph.initializer if not outside(tensor)}
    if sum(held.values()) > LARGEST_FILE_BYTES:
        weights_beside(path).unlink(missing_ok=True)  # onnx would append to it
        for tensor in model.graph.initializer:
            if held.get(tensor.name, 0) >= SMALLEST_OUTSIDE_BYTES and tensor.HasField("raw_data"):
                set_external_data(tensor, weights_beside(path).name)
    onnx.save(model, path)


def load_weights(model: onnx.ModelProto, folder: Path, names: Collection[str] | None = None) -> None:
    """Read weights that lie in a file of `folder` into the graph, in place: all of them, or those named."""
    from onnx.external_data_helper import load_external_data_for_tensor

    for tensor in model.graph.initializer:
        if outside(tensor) and (names is None or tensor.name in names):
            load_external_data_for_tensor(tensor, str(folder))
