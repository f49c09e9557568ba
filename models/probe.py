"""What flows through an ONNX graph: the values of its inner tensors on real inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import onnx


def tensor_values(
    model: onnx.ModelProto, names: Collection[str], inputs: Mapping[str, np.ndarray], threads: int = 1
) -> dict[str, np.ndarray]:
    """The tensors of a graph that are named, in its own types and shapes; its inputs and constants too.

    ONNX Runtime runs it without optimization, so that every node is there as it stands in the graph. Names that the
    graph does not have are left out. `model` stays as it is; weights outside of it must have been loaded.

    Raises:
        RuntimeInferenceError: ONNX Runtime cannot run it.
    """
    import onnx

    from models.onnx_files import save_graph
    from models.runtimes.onnxruntime_session import OnnxRuntimeSession

    made = {name for node in model.graph.node for name in node.output if name}
    found = {name: inputs[name] for name in names if name in inputs}
    for tensor in model.graph.initializer:
        if tensor.name in names:
            found[tensor.name] = onnx.numpy_helper.to_array(tensor)
    asked = sorted(made & set(names))
    if not asked:
        return found
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    del probed.graph.output[:]
    probed.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in asked)
    taken = {one.name: inputs[one.name] for one in probed.graph.input if one.name in inputs}
    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        path = Path(folder) / "probe.onnx"
        save_graph(probed, path)
        with OnnxRuntimeSession(path, threads=threads, optimization="none") as session:
            return found | session.infer(taken)
