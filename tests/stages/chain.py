"""Real artifacts of tiny random networks, made once: what validate and package consume."""

from __future__ import annotations

import atexit
import functools
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models.spec import Task
from pipeline.progress import QuietProgress
from stages.artifact import Artifact, digest_files, write_json
from stages.base import StageContext
from stages.candidates import Candidate, write_candidates
from stages.data.splits import DataSplits, Example, digest_of_content, fingerprint_of
from tests.models.tiny import WORDS, image_backbone, saved_checkpoint, text_backbone

LABELS = ("a", "b", "c")
SAMPLES = 48


def artifact_of(stage: str, folder: Path) -> Artifact:
    """A folder as its stage would have committed it."""
    return Artifact(stage, folder, {"schema_version": 1, "stage": stage, "files": digest_files(folder)})


def test_split(task: Task, samples: int = SAMPLES) -> tuple[Example, ...]:
    """Made-up examples, the labels in turn."""
    random = np.random.default_rng(7)
    contents: list[Any] = [
        random.integers(0, 256, (32, 40, 3), dtype=np.uint8)
        if task == "image-classification"
        else " ".join(random.choice(WORDS[4:], 2 + index % 9))
        for index in range(samples)
    ]
    return tuple(
        Example(one, index % len(LABELS), digest_of_content(one), f"made/{index}") for index, one in enumerate(contents)
    )


test_split.__test__ = False  # type: ignore[attr-defined]


def data_of(examples: tuple[Example, ...]) -> DataSplits:
    """The same examples in validation and test."""
    splits = {"train": (), "validation": examples, "calibration": (), "test": examples}
    fingerprints = {name: fingerprint_of(LABELS, part) for name, part in splits.items()}
    return DataSplits(LABELS, splits, fingerprints)  # type: ignore[arg-type]


def context_of(
    output: Path,
    inputs: Mapping[str, Artifact],
    task: Task = "image-classification",
    examples: tuple[Example, ...] | None = None,
) -> StageContext:
    """What the runner would hand to a stage."""
    output.mkdir(parents=True, exist_ok=True)
    data = data_of(test_split(task) if examples is None else examples)
    log, backbone = logging.getLogger("test"), "timm:test_efficientnet"
    return StageContext(output, output, inputs, task, backbone, data, 0, "cpu", 2, log, QuietProgress())


@functools.cache
def made() -> dict[str, Artifact]:
    """merge-lora, export (fp32, fp16) and quantize (the head in INT8) of a tiny random image network."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from stages.export import Export, ExportConfig

    root = temporary_folder()
    saved_checkpoint(root / "merge-lora/checkpoint", image_backbone())
    artifacts = {"merge-lora": artifact_of("merge-lora", root / "merge-lora")}
    result = Export().run(context_of(root / "export", artifacts), ExportConfig())
    assert all(gate.passed for gate in result.gates), [gate.message for gate in result.gates]
    artifacts["export"] = artifact_of("export", root / "export")
    path = root / "quantize/onnx-int8-dynamic.onnx"
    path.parent.mkdir()
    quantize_dynamic(root / "export/onnx-fp32.onnx", path, op_types_to_quantize=["MatMul", "Gemm"],
                     weight_type=QuantType.QInt8)  # fmt: skip
    left_out = Candidate("onnx-int8-static", "onnx-int8-static.onnx", "int8", 0, accepted=False, reason="over budget")
    write_candidates(path.parent, [Candidate(path.stem, path.name, "int8", path.stat().st_size), left_out])
    artifacts["quantize"] = artifact_of("quantize", path.parent)
    return artifacts


@functools.cache
def validated() -> dict[str, Artifact]:
    """The same with validate's artifact."""
    from stages.validate import Validate, ValidateConfig

    folder = temporary_folder()
    # The labels are made up, so the accuracy may move by the flips that INT8 makes.
    config = ValidateConfig.model_validate(
        {"latency_calls": 20, "gates": {"max_metric_drop": 0.2, "min_agreement_int8": 0.8}}
    )
    result = Validate().run(context_of(folder, made()), config)
    assert all(gate.passed for gate in result.gates), [gate.message for gate in result.gates]
    return made() | {"validate": artifact_of("validate", folder)}


@functools.cache
def validated_text() -> dict[str, Artifact]:
    """The checkpoint of a tiny BERT and a hand-made graph of the same contract, with evidence written by hand."""
    root = temporary_folder()
    saved_checkpoint(root / "merge-lora/checkpoint", text_backbone())
    for stage in ("export", "quantize", "validate"):
        (root / stage).mkdir()
    onnx.save(text_graph(), root / "export/onnx-fp32.onnx")
    export = artifact_of("export", root / "export")
    entry = {
        "name": "onnx-fp32", "stage": "export", "precision": "fp32", "file": "onnx-fp32.onnx", "passed": True,
        "files": export.manifest["files"], "sha256": export.manifest["files"]["onnx-fp32.onnx"], "size_bytes": 1,
        "accuracy": 0.5, "accuracy_difference": 0.0, "accuracy_difference_interval": [-0.1, 0.1], "agreement": 1.0,
        "smallest_visible_drop": 0.1, "latency_ms_p50": 1.0,
    }  # fmt: skip
    reference = {"accuracy": 0.5, "latency_ms_p50": 2.0, "size_bytes": 2}
    evidence = {"candidates": [entry], "chosen": "onnx-fp32", "reference": reference, "samples": 48, "threads": 2,
                "objective": "latency", "gates": []}  # fmt: skip
    write_json(root / "validate/evidence.json", evidence)
    return {stage: artifact_of(stage, root / stage) for stage in ("merge-lora", "export", "quantize", "validate")}


def text_graph() -> onnx.ModelProto:
    """`logits` = masked sum of an embedding of `input_ids`, one row a word."""
    table = np.random.default_rng(3).normal(size=(len(WORDS), len(LABELS))).astype(np.float32)
    dims = ["batch", "sequence"]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["words"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["weights"]),
        helper.make_node("Mul", ["words", "weights"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "middle"], ["logits"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "text",
        [helper.make_tensor_value_info(name, TensorProto.INT64, dims) for name in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(LABELS)])],
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(np.array([-1]), "last"),
            numpy_helper.from_array(np.array([1]), "middle"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def temporary_folder() -> Path:
    """A folder that lives as long as the tests."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-chain-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def with_candidate(folder: Path, change: Callable[[onnx.ModelProto], None], precision: str = "int8") -> Artifact:
    """A quantize artifact whose one candidate is the fp32 graph after `change`."""
    model = onnx.load(made()["export"].file("onnx-fp32.onnx"))
    change(model)
    folder.mkdir(parents=True)
    onnx.save(model, folder / "onnx-changed.onnx")
    size = (folder / "onnx-changed.onnx").stat().st_size
    write_candidates(folder, [Candidate("onnx-changed", "onnx-changed.onnx", precision, size)])  # type: ignore[arg-type]
    return artifact_of("quantize", folder)


def edit_weight(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace the one initializer whose name ends in `name`."""
    found = [tensor for tensor in model.graph.initializer if tensor.name.endswith(name)]
    assert len(found) == 1, [tensor.name for tensor in model.graph.initializer]
    found[0].CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(found[0]).copy()), found[0].name))
