"""`predict` and `verify` as a device runs them: six libraries and the standard one, and the pipeline's own answers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import soundfile
from PIL import Image

from models.spec import TaskName
from tests.stages.chain import packed, test_split

ROOT = Path(__file__).parents[2]
TASKS: tuple[TaskName, ...] = ("image-classification", "text-classification", "audio-classification")

DEVICE = """
import importlib.abc, sys

BUNDLE = {"numpy", "PIL", "tokenizers", "soundfile", "soxr", "onnxruntime"}
TYPER = {"typer", "click", "rich", "shellingham", "markdown_it", "mdurl", "pygments",
         "annotated_doc", "pydantic", "pydantic_core", "annotated_types", "typing_inspection"}
# What those import themselves, some of it only where it is there; `models` is this project.
ALONG = {"huggingface_hub", "flatbuffers", "google", "packaging", "defusedxml", "org", "models", "cffi", "pycparser",
         "typing_extensions"}
HEAVY = {"torch", "torchvision", "transformers", "timm", "peft", "onnx", "sklearn", "scipy", "safetensors", "yaml"}

class Device(importlib.abc.MetaPathFinder):
    installed, asked = BUNDLE | ALONG, set()
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root in sys.stdlib_module_names or root in self.installed or root.startswith("_"):
            return None
        self.asked.add(root)
        raise ModuleNotFoundError(f"No module named {name!r} on this device", name=name)

sys.meta_path.insert(0, Device())
"""

ON_A_DEVICE = (
    DEVICE
    + """
Device.installed = BUNDLE | ALONG | TYPER | {"pipeline", "stages"}
from pipeline.cli import run
code = run(sys.argv[1:])
assert not HEAVY & set(sys.modules), sorted(HEAVY & set(sys.modules))
if code != 3:
    assert not HEAVY & Device.asked, Device.asked
sys.exit(code)
"""
)

BY_THE_LIBRARY = (
    DEVICE
    + """
import json
from pathlib import Path
from models.bundle import open_bundle
with open_bundle(Path(sys.argv[1])) as bundle:
    report = bundle.verify()
    predictions = bundle.predict(bundle.golden_contents())
assert not (HEAVY | TYPER) & Device.asked, Device.asked
print(json.dumps([report.ok, [one.label for one in predictions]]))
"""
)


def on_a_device(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """The command line in a process that can import nothing else."""
    command = [sys.executable, "-P", "-c", ON_A_DEVICE, *arguments]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=120)


def inputs_of(task: TaskName, folder: Path) -> list[str]:
    """Examples as a user gives them: files, or texts."""
    contents = [one.content for one in test_split(task)][:6]
    if task == "text-classification":
        return [str(one) for one in contents]
    if task == "audio-classification":
        sounds = [folder / f"{index}.wav" for index in range(len(contents))]
        for path, waveform in zip(sounds, contents, strict=True):
            soundfile.write(path, waveform.samples, waveform.rate, subtype="FLOAT")  # type: ignore[union-attr]
        return [str(path) for path in sounds]
    paths = [folder / f"{index}.png" for index in range(len(contents))]
    for path, pixels in zip(paths, contents, strict=True):
        Image.fromarray(pixels).save(path)  # type: ignore[arg-type]
    return [str(path) for path in paths]


@pytest.mark.parametrize("task", TASKS)
def test_a_program_needs_six_libraries(task: TaskName) -> None:
    command = [sys.executable, "-P", "-c", BY_THE_LIBRARY, str(packed(task) / "tiny.tar")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ok, labels = json.loads(done.stdout)
    assert ok and set(labels) <= {"a", "b", "c"} and len(labels) == 8


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("form", ["bundle", "tiny.tar"])
def test_verify_needs_no_torch(task: TaskName, form: str) -> None:
    done = on_a_device("verify", str(packed(task) / form), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] and len(report["checks"]) >= 4


def pipelines_own(task: TaskName, inputs: Sequence[str]) -> list[dict[str, Any]]:
    """What the merged PyTorch network says of the same inputs."""
    import torch

    from models.checkpoint import load_checkpoint
    from models.tasks.single_label import probabilities_from_logits
    from tests.stages.chain import made

    checkpoint = load_checkpoint(made(task)["merge-lora"].folder / "checkpoint")
    contents: list[Any] = list(inputs) if task == "text-classification" else [Path(one) for one in inputs]
    arrays = checkpoint.processing.arrays(contents)
    with torch.inference_mode():
        logits = checkpoint.model(*(torch.from_numpy(arrays[one.name]) for one in checkpoint.spec.io.inputs)).numpy()
    labels = checkpoint.spec.labels
    return [
        {"label": labels[int(row.argmax())], "probabilities": dict(zip(labels, map(float, row), strict=True))}
        for row in probabilities_from_logits(logits)
    ]


@pytest.mark.parametrize("task", TASKS)
def test_predictions_equal_the_pipelines_own(task: TaskName, tmp_path: Path) -> None:
    inputs = inputs_of(task, tmp_path)
    bundle = with_fp32_chosen(task, tmp_path)
    done = on_a_device("predict", str(bundle), *inputs, "--json")
    assert done.returncode == 0, done.stderr
    rows, wanted = json.loads(done.stdout), pipelines_own(task, inputs)
    assert [row["input"] for row in rows] == inputs
    for row, one in zip(rows, wanted, strict=True):
        assert row["label"] == one["label"]
        assert row["probabilities"] == pytest.approx(one["probabilities"], abs=1e-5)
        assert row["score"] == max(row["probabilities"].values())


def with_fp32_chosen(task: TaskName, folder: Path) -> Path:
    """A bundle of the fp32 candidate: the only one that can equal PyTorch to five digits."""
    from stages.artifact import write_json
    from stages.package import Package, PackageConfig
    from tests.stages.chain import artifact_of, context_of, validated

    validate = folder / "validate"
    validate.mkdir()
    evidence = json.loads(validated(task)["validate"].file("evidence.json").read_text())
    write_json(validate / "evidence.json", evidence | {"chosen": "onnx-fp32"})
    inputs = validated(task) | {"validate": artifact_of("validate", validate)}
    Package().run(context_of(folder / "package", inputs, task), PackageConfig(name="tiny"))
    return folder / "package/bundle"


def test_texts_come_from_standard_input_too() -> None:
    bundle = str(packed("text-classification") / "bundle")
    lines = ["good bird", "bad stone runs"]
    piped = on_a_device("predict", bundle, "-", "--json", stdin="\n".join(lines) + "\n")
    given = on_a_device("predict", bundle, *lines, "--json")
    assert piped.returncode == given.returncode == 0, piped.stderr
    assert json.loads(piped.stdout) == json.loads(given.stdout)


def test_a_line_an_input_for_people(tmp_path: Path) -> None:
    inputs = inputs_of("image-classification", tmp_path)[:2]
    done = on_a_device("predict", str(packed() / "bundle"), *inputs)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[2] for row in rows] == inputs
    assert all(row[0] in ("a", "b", "c") and 0 < float(row[1]) <= 1 for row in rows)


def test_classes_are_no_vectors_to_write(tmp_path: Path) -> None:
    bundle = str(packed("text-classification") / "bundle")
    done = on_a_device("predict", bundle, "good bird", "--output", str(tmp_path / "vectors.npy"))
    assert done.returncode == 2 and "this bundle's task is text-classification" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_bundle_that_does_not_verify_ends_with_1_and_a_damaged_one_with_4(tmp_path: Path) -> None:
    import numpy as np

    from models.bundle import sha256_of

    bundle = Path(shutil.copytree(packed() / "bundle", tmp_path / "bundle"))
    manifest = json.loads((bundle / "bundle.json").read_text())
    name = f"golden/{manifest['models'][manifest['chosen']]['golden_outputs']}.npy"
    np.save(bundle / name, np.load(bundle / name) + 1)
    done = on_a_device("verify", str(bundle))
    assert done.returncode == 4 and "has changed" in done.stderr and "Traceback" not in done.stderr
    manifest["files"][name] = sha256_of(bundle / name)
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    done = on_a_device("verify", str(bundle))
    assert done.returncode == 1 and "FAIL golden outputs" in done.stdout


def test_help_and_a_training_command_without_the_training_libraries(tmp_path: Path) -> None:
    assert on_a_device("--help").returncode == 0
    done = on_a_device("all", "-c", str(ROOT / "pipeline/recipes/vision.yaml"))
    assert done.returncode == 3
    assert "is not installed here. Install it: pip install " in done.stderr
    done = on_a_device("doctor", "--edge")
    assert done.returncode == 0 and "CPUExecutionProvider" in done.stdout
