"""What only a machine with a GPU can show: `make test-gpu`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.machine import resolve_device
from tests.pipeline.tiny_project import make_project, pipeline
from tests.stages.chain import made, test_split

pytestmark = [pytest.mark.gpu]


@pytest.fixture(autouse=True)
def needs_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device here")


def test_auto_is_cuda() -> None:
    assert resolve_device("auto") == resolve_device("cuda") == "cuda"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_on_the_gpu_ends_in_a_bundle_that_runs_on_the_cpu(tmp_path: Path, precision: str) -> None:
    project = make_project(tmp_path)
    done = pipeline("all", "--set", "device=cuda", "--set", f"finetune.precision={precision}", cwd=project)
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = json.loads((project / "runs/pipeline/finetune/manifest.json").read_text(encoding="utf-8"))
    assert manifest["key_parts"]["device"] == "cuda"
    assert pipeline("verify", str(project / "runs/pipeline/package/bundle")).returncode == 0


def test_the_cuda_provider_computes_what_the_cpu_computes() -> None:
    from models.checkpoint import load_checkpoint
    from models.runtimes.onnxruntime_session import OnnxRuntimeSession

    processing = load_checkpoint(made()["merge-lora"].folder / "checkpoint").processing
    arrays = processing.arrays([one.content for one in test_split("image-classification", 8)])
    path = made()["export"].file("onnx-fp32.onnx")
    with OnnxRuntimeSession(path, "CUDAExecutionProvider") as cuda, OnnxRuntimeSession(path) as cpu:
        np.testing.assert_allclose(cuda.infer(arrays)["logits"], cpu.infer(arrays)["logits"], rtol=0, atol=5e-2)
