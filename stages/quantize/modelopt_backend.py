"""The backend `modelopt`: the schemes that TensorRT takes, from NVIDIA ModelOpt (the `quant` extra).

It quantizes once, in a process of its own; the variants of the search take its pairs away again, node by node.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.engines.mends import add_constant, drop_unread_constants, read_only
from models.errors import MissingCapabilityError, QuantizeError
from models.graph import carry_modules
from stages.environment import INSTALL_MODELOPT
from stages.quantize.bench import BATCH_SIZE, Workbench
from stages.quantize.fp8 import keep_relus
from stages.quantize.modelopt_worker import REQUEST, RESULT, SOURCE
from stages.quantize.schemes import Backend, Plan, Scheme

if TYPE_CHECKING:
    import onnx

MODULES = ("modelopt", "onnx_graphsurgeon", "onnxslim", "onnxconverter_common", "lief", "cppimport")
"""What `INSTALL_MODELOPT` installs."""

METHODS = {"minmax": "max", "entropy": "entropy"}
"""How activations get their range: `quantize.calibration` → ModelOpt's word."""

LONGEST_SECONDS = 3600
"""Limit on ModelOpt's time. MiniLM took 5 to 17 s on two cores."""


AWQ_SAMPLES = BATCH_SIZE
"""Calibration examples for AWQ: one batch. It holds the activations of all batches at once and joins them, which
batches of texts of different lengths do not allow; its authors use as few."""


def require_modelopt() -> None:
    """Raises `MissingCapabilityError` where a package is not installed."""
    missing = [name for name in MODULES if find_spec(name) is None]
    if missing:
        raise MissingCapabilityError(
            f"quantize.backend: modelopt needs {', '.join(missing)}, not here: {INSTALL_MODELOPT}"
        )


def plan_with_modelopt(bench: Workbench, scheme: Scheme) -> Plan:
    """The nodes that ModelOpt quantized, and variants with some of them as they were.

    Raises:
        MissingCapabilityError: ModelOpt is not installed.
        QuantizeError: it fails.
    """
    settings = SETTINGS[scheme](bench)
    require_modelopt()
    quantized = run_modelopt(bench, settings, scheme)
    names = {node.name for node in bench.model.graph.node}
    makers = {name: node for node in quantized.graph.node for name in node.output}

    def is_quantized(node: onnx.NodeProto) -> bool:
        sources = [makers[name].op_type for name in node.input if name in makers]
        return node.op_type not in ("QuantizeLinear", "DequantizeLinear") and "DequantizeLinear" in sources

    nodes = [node.name for node in quantized.graph.node if node.name in names and is_quantized(node)]
    return Plan(nodes, partial(restored, bench.model, quantized), "operator that ModelOpt quantizes")


def pairs_of(bench: Workbench, mode: str) -> dict[str, Any]:
    """quantize-dequantize pairs before convolutions and products; weights are stored narrow."""
    return {"quantize_mode": mode, "calibration_method": METHODS[bench.config.calibration], "dq_only": True}


def blocks_of(bench: Workbench) -> dict[str, Any]:
    """INT4 weights in blocks, clipped where that lessens the error of the product (AWQ: Lin et al. 2023,
    arXiv:2306.00978). Gemm stays: ModelOpt 0.47 writes scales of another shape than its transposed matrix."""
    gemms = [node.name for node in bench.model.graph.node if node.op_type == "Gemm"]
    return {
        "quantize_mode": "int4",
        "calibration_method": "awq_clip",
        "block_size": bench.config.block_size,
        "nodes_to_exclude": gemms,
    }


SETTINGS: Mapping[Scheme, Any] = {
    "int8-symmetric": partial(pairs_of, mode="int8"),
    "int4-blocks": blocks_of,
    "fp8": partial(pairs_of, mode="fp8"),
}
"""Scheme → what `modelopt.onnx.quantization.quantize` is called with."""

PLANS: Backend = {scheme: partial(plan_with_modelopt, scheme=scheme) for scheme in SETTINGS}


def run_modelopt(bench: Workbench, settings: Mapping[str, Any], scheme: Scheme) -> onnx.ModelProto:
    """The graph that ModelOpt makes of the prepared one, from the calibration split, which it reads batch by batch.

    Raises:
        QuantizeError: it fails, or writes nothing.
    """
    import numpy as np
    import onnx

    from stages.inputs import batches

    folder = bench.scratch / f"modelopt-{scheme}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    onnx.save(bench.model, folder / SOURCE)
    (folder / REQUEST).write_text(json.dumps(settings), encoding="utf-8")
    most = AWQ_SAMPLES if settings["quantize_mode"] == "int4" else bench.config.calibration_samples
    examples = bench.context.data["calibration"][:most]
    if not examples:
        raise QuantizeError("the calibration split is empty; raise data.calibration_fraction")
    for index, (arrays, _) in enumerate(batches(bench.checkpoint.processing, examples, BATCH_SIZE)):
        named: dict[str, Any] = dict(arrays)
        np.savez(folder / f"batch-{index:06}.npz", **named)
    command = [sys.executable, "-P", "-m", "stages.quantize.modelopt_worker", str(folder.resolve())]
    with bench.context.progress.task(f"ModelOpt {scheme}", 1) as advance, (folder / "output.txt").open("w") as output:
        try:
            ended = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=LONGEST_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise QuantizeError(f"ModelOpt did not end in {LONGEST_SECONDS} s; take {scheme} out") from error
        advance()
    if ended.returncode or not (folder / RESULT).is_file():
        raise QuantizeError(f"ModelOpt: {last_line(folder / 'output.txt')}; take {scheme} out of quantize.schemes")
    quantized = onnx.load(folder / RESULT)
    del quantized.graph.value_info[:]
    carry_modules(bench.model, quantized)
    keep_relus(quantized)
    return quantized


def last_line(path: Path) -> str:
    """Of a program's output: where it raised, that is what it raised."""
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"


def restored(model: onnx.ModelProto, quantized: onnx.ModelProto, floats: Collection[str]) -> onnx.ModelProto:
    """A copy of `quantized` in which the nodes named in `floats` read what they read in `model`."""
    from onnx import numpy_helper

    result = copy.deepcopy(quantized)
    originals = {node.name: node for node in model.graph.node if node.name in floats}
    makers = {name: node for node in result.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in result.graph.node:
        original = originals.get(node.name)
        for index, name in enumerate(node.input if original else ()):
            maker = makers.get(name)
            if original is None or maker is None or maker.op_type != "DequantizeLinear":
                continue
            source = makers.get(maker.input[0])
            wide = original.input[index]
            if source is not None and wide not in constants:
                wide = source.input[0]  # what QuantizeLinear reads, under the name that it has here
            if wide in constants:  # its own name may be that of the narrow one
                wide = add_constant(result, f"{wide}_float", numpy_helper.to_array(constants[wide]))
            node.input[index] = wide
    kept = read_only(list(result.graph.node), {one.name for one in result.graph.output})
    made = [copy.deepcopy(node) for node in kept]
    del result.graph.node[:]
    result.graph.node.extend(made)
    drop_unread_constants(result)
    return result
