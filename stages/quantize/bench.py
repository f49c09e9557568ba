"""What every attempt works on: the prepared graph, the reference's answers, and where its work goes."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import QuantizeError
from models.graph import Product, module_of
from models.onnx_files import is_light, save_graph
from models.tasks import task_of
from stages.base import StageContext
from stages.quantize.search import harm_of_nodes

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from models.checkpoint import Checkpoint
    from models.tasks import Task
    from stages.quantize.schemes import Scheme, Variant
    from stages.quantize.stage import QuantizeConfig

BATCH_SIZE = 32


@dataclass(frozen=True)
class Workbench:
    """What every attempt needs: the prepared graph, its products, where its work goes, the reference's answers.

    The network of `checkpoint` has no weights any more. A light `model` (`models.onnx_files`) and the graphs made of it
    have theirs in `scratch`, where they can be saved.
    """

    context: StageContext
    config: QuantizeConfig
    checkpoint: Checkpoint
    model: onnx.ModelProto
    products: Sequence[Product]
    scratch: Path
    reference: np.ndarray
    targets: np.ndarray

    @property
    def task(self) -> Task:
        """What is asked of the network."""
        return task_of(self.checkpoint.spec.task)

    def write(self, model: onnx.ModelProto, name: str) -> Path:
        """Save a graph in `scratch`, where light ones have their weights."""
        if is_light(self.model):
            gc.collect()  # quantizers refer to themselves, and hold a large graph until they are found
        save_graph(model, self.scratch / name)
        return self.scratch / name

    def run(self, model: onnx.ModelProto, batches: Any) -> Iterator[dict[str, np.ndarray]]:
        """The outputs of a graph, batch by batch."""
        from models.runtimes.onnxruntime_session import OnnxRuntimeSession

        path = self.write(model, "run.onnx")
        with OnnxRuntimeSession(path, threads=self.context.threads) as session:
            for inputs in batches:
                yield session.infer(inputs)


def one_example(checkpoint: Checkpoint, context: StageContext) -> dict[str, np.ndarray]:
    """The first validation example as the graph takes it."""
    return checkpoint.processing.arrays([context.data["validation"][0].content])


def rank_nodes(bench: Workbench, nodes: Sequence[str], variant: Variant) -> dict[str, float]:
    """Node → harm on calibration examples, most sensitive first."""
    from stages.inputs import batches

    examples = bench.context.data["calibration"][: bench.config.sensitivity_samples]
    inputs = [arrays for arrays, _ in batches(bench.checkpoint.processing, examples, BATCH_SIZE)]
    with bench.context.progress.task("sensitivity", len(nodes)) as advance:
        return harm_of_nodes(nodes, bench.model, variant, lambda model: bench.run(model, inputs), advance)


def modules_of(bench: Workbench, names: Sequence[str]) -> list[str]:
    """The module of the network that each node comes from, or its own name where the graph does not say; each once."""
    modules = {node.name: module_of(node) or node.name for node in bench.model.graph.node}
    return list(dict.fromkeys(modules[name] for name in names))


def sensitivity_of(bench: Workbench, harm: Mapping[str, float]) -> list[dict[str, Any]]:
    """Every ranked node: its module, the harm it does alone, and its share of the multiply-accumulates."""
    total = sum(product.macs for product in bench.products) or 1
    macs = {product.node: product.macs for product in bench.products}
    return [
        {"node": name, "module": modules_of(bench, [name])[0], "harm": value, "mac_share": macs.get(name, 0) / total}
        for name, value in harm.items()
    ]


def quantizer_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime's quantizer raises."""
    import onnx

    from models.runtimes.onnxruntime_session import onnxruntime_errors

    return (*onnxruntime_errors(), TypeError, KeyError, AttributeError, onnx.shape_inference.InferenceError,
            onnx.version_converter.ConvertError)  # fmt: skip


def guarded(scheme: Scheme, variant: Variant) -> Variant:
    """The variants of a scheme, where what its quantizer raises says which scheme it was as a `QuantizeError`."""

    def made(floats: Collection[str]) -> onnx.ModelProto:
        try:
            return variant(floats)
        except quantizer_errors() as error:
            raise QuantizeError(f"{scheme}: {error}; take {scheme} out of quantize.schemes") from error

    return made
