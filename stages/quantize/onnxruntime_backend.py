"""The backend by default: every scheme from ONNX Runtime's quantizers."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from models.errors import QuantizeError
from models.onnx_files import is_light
from stages.quantize.bench import Workbench, guarded, quantizer_errors
from stages.quantize.calibration import BATCH_SIZES, calibrate_ranges
from stages.quantize.fp8 import fp8_from_int8
from stages.quantize.int4 import BlockForm, blockwise_nodes, quantize_blocks
from stages.quantize.qdq import Form, Layout, compute_nodes, quantizable_nodes, quantize_graph, quantize_weights
from stages.quantize.repairs import outcome_in_words, repaired
from stages.quantize.schemes import Backend, Plan, Scheme, Variant

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from onnxruntime.quantization.calibrate import TensorsData

CONSTANT_PRODUCTS = "convolution or product with constant weights"
CONSTANT_MATRICES = "MatMul with constant weights"
LAYOUTS: dict[Scheme, Layout] = {"int8-static": "onnxruntime", "int8-symmetric": "tensorrt", "fp8": "tensorrt"}
"""Schemes of quantize-dequantize pairs, and where ONNX Runtime's quantizer puts these."""


def plan_dynamic(bench: Workbench) -> Plan:
    """INT8 weights a channel, activations scaled at run time; matrix products and embeddings only.

    Convolutions stay in floating point: with them EfficientNet-Lite0 fell from .7485 to .103 accuracy, and
    its latency rose from 1.3 to 20.7 ms.
    """
    products = [node.name for node in compute_nodes(bench.model) if node.op_type == "MatMul"]
    return Plan(products, partial(quantize_dynamically, bench), CONSTANT_MATRICES)


def quantize_dynamically(bench: Workbench, floats: Collection[str]) -> onnx.ModelProto:
    """A copy with the other products and embeddings in INT8."""
    products = {node.name for node in compute_nodes(bench.model)} - set(floats)
    left = [node.name for node in bench.model.graph.node if node.op_type == "MatMul" and node.name not in products]
    return quantize_weights(bench.model, left, bench.config.reduce_range, bench.scratch)


def plan_static(bench: Workbench, scheme: Scheme, repairs: bool = True) -> Plan:
    """INT8 by quantize-dequantize pairs, with ranges from the calibration split, and the repairs asked for."""
    layout = LAYOUTS[scheme]
    nodes = [node.name for node in quantizable_nodes(bench.model, layout)]
    if not nodes:
        return Plan(nodes, lambda floats: bench.model, CONSTANT_PRODUCTS)
    form = Form(layout, bench.config.reduce_range)

    def quantized(model: onnx.ModelProto) -> Variant:
        ranges = calibrate(replace(bench, model=model), layout)
        return guarded(scheme, partial(quantize_graph, model, ranges, form, folder=bench.scratch))

    asked = bench.config.repairs if repairs and not is_light(bench.model) else ()  # they hold several graphs at once
    variant, outcomes = repaired(bench.model, asked, quantized, partial(run_calibration, bench))
    for one in outcomes:
        bench.context.log.info("           %s: %s", scheme, outcome_in_words(one))
    return Plan(nodes, variant, CONSTANT_PRODUCTS, outcomes)


def plan_fp8(bench: Workbench) -> Plan:
    """FP8 where the symmetric scheme has INT8: a scale a tensor for activations and a channel for weights."""
    symmetric = plan_static(bench, "fp8", repairs=False)  # the weights in FP8 are those of the graph as it was

    def variant(floats: Collection[str]) -> onnx.ModelProto:
        return fp8_from_int8(symmetric.variant(floats), bench.model)

    return Plan(symmetric.nodes, variant, symmetric.what)


def plan_int4(bench: Workbench, form: BlockForm) -> Plan:
    """INT4 weights in blocks; nothing is calibrated."""
    nodes = [node.name for node in blockwise_nodes(bench.model, form)]
    return Plan(nodes, partial(quantize_blocks, bench.model, form, bench.config.block_size), CONSTANT_MATRICES)


PLANS: Backend = {
    "int8-dynamic": plan_dynamic,
    "int8-static": partial(plan_static, scheme="int8-static"),
    "int8-symmetric": partial(plan_static, scheme="int8-symmetric"),
    "int4-weights": partial(plan_int4, form="operators"),
    "int4-blocks": partial(plan_int4, form="pairs"),
    "fp8": plan_fp8,
}


def calibrate(bench: Workbench, layout: Layout) -> TensorsData:
    """The range of every activation over the calibration split, through the real preprocessing."""
    from stages.inputs import batches

    config, context = bench.config, bench.context
    examples = context.data["calibration"][: config.calibration_samples]
    path = bench.write(bench.model, "source.onnx")
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


def run_calibration(bench: Workbench, model: onnx.ModelProto) -> Iterator[dict[str, np.ndarray]]:
    """The outputs of a graph over the calibration examples, one at a time."""
    from stages.inputs import batches

    examples = bench.context.data["calibration"][: bench.config.calibration_samples]
    return bench.run(model, (arrays for arrays, _ in batches(bench.checkpoint.processing, examples, 1)))
