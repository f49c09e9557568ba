"""Every kind of task goes the whole way, from labels to a bundle that verifies, on tiny networks with real runtimes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models.bundle import open_bundle
from models.tasks import Target
from stages.artifact import Artifact
from stages.base import StageContext
from stages.data.splits import DataSplits, SplitName
from stages.export import Export, ExportConfig
from stages.finetune import Finetune, FinetuneConfig
from stages.finetune.setup import build
from stages.gate import GateResult
from stages.merge_lora import MergeLora, MergeLoraConfig
from stages.package import Package, PackageConfig
from stages.quantize import Quantize, QuantizeConfig
from stages.validate import Validate, ValidateConfig
from tests.models.tiny import WORDS, hf_text_folder
from tests.pipeline.test_edge import on_a_device
from tests.stages.small_run import artifact_of, image_folder, make_context, split_of

COUNTS: dict[SplitName, int] = {"train": 48, "validation": 24, "calibration": 8, "test": 24}


def several_labels(index: int) -> tuple[int, ...]:
    """None, one or two of three labels."""
    return ((0,), (1,), (2,), (0, 1), (1, 2), ())[index % 6]


def text_of(labels: tuple[int, ...], random: np.random.Generator) -> str:
    """Words at random with one for each label."""
    return " ".join([*(WORDS[7 + label] for label in labels), *random.choice(WORDS[4:7], 3)])


def image_of(labels: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Noise with a colour channel raised for each label: uint8 (32, 32, 3)."""
    pixels = random.integers(0, 60, (32, 32, 3))
    for label in labels:
        pixels[:, :, label] += 150
    return np.asarray(pixels, np.uint8)


def made_up(task: str) -> DataSplits:
    """Contents that tell their labels, a number, or which of two texts has the first label."""
    random = np.random.default_rng(0)
    splits: dict[SplitName, Any] = {}
    for name, count in COUNTS.items():
        contents: list[Any] = []
        targets: list[Target] = []
        for index in range(count):
            many = several_labels(index)
            if task == "pairs":
                targets.append(index % 2)
                both = [text_of((0,), random), text_of((1,), random)]
                contents.append(tuple(both if index % 2 else both[::-1]))
            elif task == "image-text":
                word = str(random.choice(WORDS[7:10])) + f" {WORDS[4 + index % 3]}"
                targets.append(word)
                contents.append((image_of((WORDS.index(word.split()[0]) - 7,), random), word))
            elif task == "text-features":
                targets.append(index % 3)
                contents.append(text_of((index % 3,), random))
            elif task == "text-regression":
                targets.append(float(len(many)) - 0.5)
                contents.append(text_of(many, random))
            else:
                targets.append(many)
                contents.append(text_of(many, random) if task.startswith("text") else image_of(many, random))
        # The same few words make the same text twice: here it is another example all the same.
        splits[name] = tuple(replace(one, digest=f"{name} {one.digest}") for one in split_of(contents, targets))
    labels: tuple[str, ...] = {"image-text": (), "pairs": ("first", "second"), "text-regression": ("value",)}.get(
        task, ("a", "b", "c")
    )
    return DataSplits(labels, splits, {name: f"{task} {name}" for name in splits})


GATES = {"min_samples": 24, "max_metric_drop": 0.5, "min_agreement": 0.5, "min_sqnr_db": 5.0}


@pytest.mark.parametrize(
    "task", ["text-multilabel", "image-multilabel", "text-regression", "pairs", "image-text", "text-features"]
)
def test_from_labels_to_a_bundle(tmp_path: Path, task: str) -> None:
    data, kind = made_up(task), "image" if task.startswith("image") else "text"
    backbone = None
    if task == "image-text":
        backbone = f"{image_folder(tmp_path / 'image')}+{hf_text_folder(tmp_path / 'text')}"
    name: Any = "text-classification" if task == "pairs" else task
    artifacts: dict[str, Artifact] = {}
    measured: dict[str, dict[str, Any]] = {}
    gates_of: dict[str, tuple[GateResult, ...]] = {}

    def run(stage: Any, config: Any) -> None:
        made: StageContext = replace(
            make_context(tmp_path, stage.name, data, kind, artifacts, backbone=backbone), task=name
        )
        result = stage.run(made, config)
        failed = [f"{gate.name}: {gate.message}" for gate in result.gates if not gate.passed]
        assert not failed, failed
        artifacts[stage.name] = artifact_of(stage.name, made.output)
        measured[stage.name] = result.measurements
        gates_of[stage.name] = result.gates

    run(Finetune(), FinetuneConfig(strategy="lora", epochs=2, batch_size=8, min_gain_over_majority=0.0,
                                   max_drop_from_probe=2.0))  # fmt: skip
    run(MergeLora(), MergeLoraConfig())
    run(Export(), ExportConfig())
    run(Quantize(), QuantizeConfig.model_validate({"schemes": ["int8-static"], "max_metric_drop": 1.0,
                                                   "min_agreement": 0.0, "calibration_samples": 8,
                                                   "min_int8_share": 0.0, "min_cosine": 0.85}))  # fmt: skip
    (int8,) = measured["quantize"]["candidates"]
    # INT8 of a tiny random network turns each of its two embeddings by up to a cosine of .92 (measured).
    assert ("cosine" in int8) == (task in ("image-text", "text-features")) and int8.get("cosine", 0.9) < 1
    # The nearest of 24 points flips with little noise, where many of them have the same word.
    gates = GATES | ({"min_agreement": 0.1, "min_cosine": 0.85} if task in ("image-text", "text-features") else {})
    run(Validate(), ValidateConfig.model_validate({"latency_calls": 20, "objective": "accuracy", "gates": gates}))
    run(Package(), PackageConfig(name="tiny"))
    metric = {
        "text-regression": "R²", "pairs": "accuracy", "image-text": "recall@1", "text-features": "recall@1"
    }.get(task, "samples F1")  # fmt: skip
    assert measured["finetune"]["metric"] == measured["validate"]["metric_name"] == metric
    reference = measured["validate"]["reference"]
    fp32 = next(one for one in measured["validate"]["candidates"] if one["precision"] == "fp32")
    assert fp32["agreement"] == 1.0 and fp32["metric"] == pytest.approx(reference["metric"], abs=1e-5)
    assert set(fp32["more_metrics"]) == set(reference["more_metrics"]) != set()
    with open_bundle(artifacts["package"].folder / "bundle") as bundle:
        contents = [one.content for one in data["test"]]
        found = bundle.predict(contents)
        outputs = bundle.infer(bundle.processing.arrays(contents))
        chosen = next(one for one in measured["validate"]["candidates"] if one["name"] == bundle.chosen)
        targets = bundle.kind.targets([one.label for one in data["test"]], bundle.io.width)
        assert bundle.kind.scores(outputs, targets).mean() == pytest.approx(chosen["metric"], abs=1e-6)
        assert len(found) == 24 and all(isinstance(one.label, str) for one in found)
        golden = json.loads((bundle.folder / "bundle.json").read_text(encoding="utf-8"))["golden"]["samples"]
        assert {one["label"] for one in golden} <= {
            bundle.kind.describe(one.label, data.labels) for one in data["test"]
        }
        if task == "image-text":
            images, texts = [one.content[0] for one in data["test"]], ["bad a", "red good", "bird bad"]  # type: ignore[index]
            near = bundle.similarities(images, texts)
            assert bundle.similarities([], texts).shape == (0, 3)
            assert near.shape == (24, 3) and float(np.abs(near).max()) < 1 + 1e-5
            assert near[5, 2] == pytest.approx(bundle.predict([(images[5], texts[2])])[0].score, abs=1e-3)
            assert bundle.similarities(images[:1], texts)[0] == pytest.approx(near[0], abs=1e-3)
        if task == "text-features":
            check_vectors(bundle.folder, [str(one) for one in contents[:4]], outputs[:4], tmp_path)
            assert not measured["validate"]["confusion"]
            assert {gate.name for gate in gates_of["validate"]} >= {"cosine", "agreement", "recall@1 drop"}
        if task == "pairs":
            assert [one.name for one in bundle.io.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
            swapped = bundle.predict([(second, first) for first, second in contents])  # type: ignore[misc]
            assert [one.probabilities for one in swapped] != [one.probabilities for one in found]
            assert bundle.processing.from_argument("a good\tred bird") == ("a good", "red bird")
    card = (artifacts["package"].folder / "bundle/README.md").read_text(encoding="utf-8")
    assert metric in card and ("Softmax" in card) == (task == "pairs")


def check_vectors(bundle: Path, texts: list[str], wanted: np.ndarray, folder: Path) -> None:
    """`predict` gives the same vectors as numbers, as JSON and as a file, on a device without PyTorch."""
    printed = on_a_device("predict", str(bundle), *texts)
    assert printed.returncode == 0, printed.stderr
    lines = [line.split("\t") for line in printed.stdout.splitlines()]
    assert [line[1] for line in lines] == texts
    vectors = np.array([line[0].split() for line in lines], np.float64)
    # Texts are padded with those of their batch, which moves a little in INT8 and fp16.
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-3)
    assert float((vectors * wanted).sum(axis=1).min()) > 0.99
    done = on_a_device("predict", str(bundle), "-", "-o", str(folder / "vectors"), "--json", stdin="\n".join(texts))
    assert done.returncode == 0, done.stderr
    rows, written = json.loads(done.stdout), np.load(folder / "vectors", allow_pickle=False)
    assert (written.dtype, written.shape) == (np.float32, wanted.shape)
    assert [row["input"] for row in rows] == texts and np.array_equal([row["embedding"] for row in rows], written)
    np.testing.assert_allclose(written, vectors, atol=1e-5)
    for place, said in ((folder, "is a folder"), (folder / "none/a.npy", "its folder is not there")):
        # Before the work: the second input, which no bundle reads, is not looked at.
        refused = on_a_device("predict", str(bundle), texts[0], "\udcff", "-o", str(place))
        assert refused.returncode == 2 and f"cannot be written: {said}" in refused.stderr


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_locked_tower_stays_as_it_was_while_the_other_learns(tmp_path: Path, tower: Any) -> None:
    context = replace(
        make_context(
            tmp_path, "out", made_up("image-text"),
            backbone=f"{image_folder(tmp_path / 'image')}+{hf_text_folder(tmp_path / 'text')}",
        ),
        task="image-text",
    )  # fmt: skip
    # With a random head the batch norm of what learns moves its statistics: that of a locked tower must not.
    config = FinetuneConfig(strategy="full", locked_tower=tower, epochs=1, batch_size=8, augment="crop")
    before = build(context, config).model.state_dict()
    found = Finetune().run(context, config).measurements
    after = load_file(context.output / "checkpoint/model.safetensors")
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    other = "text" if tower == "image" else "image"
    assert not any(name.startswith(f"backbone.network.{tower}.") for name in moved)
    assert len([name for name in moved if name.startswith(f"backbone.network.{other}.")]) > 10
    assert {"task_head.image.weight", "task_head.text.weight", "task_head.log_scale"} <= moved
    assert 0 < found["trainable_parameters"] < found["total_parameters"]
