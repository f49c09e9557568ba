"""Execution providers: which were asked for, whether this machine has them, and a run for each candidate on each.

The first provider of `validate.providers` decides: its numbers are the candidates' own, and with them the choice is
made. On every other one a candidate is measured the same way and held to the same gates; only limits on latency and
size, which leave candidates out of the choice, are the first one's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from models.errors import MissingCapabilityError, RuntimeInferenceError
from models.runtimes.onnxruntime_session import CPU, CUDA, INSTALL, TENSORRT_RTX
from stages.gate import GateResult

ProviderName = Literal["cpu", "cuda", "tensorrt-rtx"]
PROVIDERS: dict[ProviderName, str] = {"cpu": CPU, "cuda": CUDA, "tensorrt-rtx": TENSORRT_RTX}
"""Name in a configuration → ONNX Runtime's."""

DEVICES: dict[ProviderName, str] = {"cpu": "cpu", "cuda": "cuda", "tensorrt-rtx": "cuda"}
"""Where PyTorch runs whose times a provider's are compared with."""


def require_providers(names: Sequence[ProviderName]) -> None:
    """Run a network of one node on each, so that a missing one is known before anything long runs.

    ONNX Runtime lists CUDA among its providers also where there is no GPU, and then runs on the CPU: only a session
    tells.

    Raises:
        MissingCapabilityError: one does not run here.
    """
    for name in names:
        if name == "cpu":
            continue
        try:
            with TemporaryDirectory() as folder:
                try_provider(Path(folder) / "probe.onnx", PROVIDERS[name])
        except (MissingCapabilityError, RuntimeInferenceError) as error:
            raise MissingCapabilityError(
                f"validate.providers asks for {name}, which does not run on this machine: {error}. "
                f"`pipeline doctor` says what does; {name} comes with: {INSTALL[PROVIDERS[name]]}"
            ) from error


def try_provider(file: Path, provider: str) -> None:
    """y = x · w on a provider, by way of `file`.

    Raises:
        MissingCapabilityError: the provider is not installed, or not for a device of this machine.
        RuntimeInferenceError: it does not start, or answers wrongly.
    """
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from models.runtimes.onnxruntime_session import OnnxRuntimeSession

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8]) for name in "xy")
    weight = numpy_helper.from_array(np.eye(8, dtype=np.float32) * 2, "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"], "double")], "probe", [x], [y], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)
    with OnnxRuntimeSession(file, provider) as session:
        found = session.infer({"x": np.ones((1, 8), np.float32)})["y"]
    if not np.array_equal(found, np.full((1, 8), 2, np.float32)):
        raise RuntimeInferenceError(f"{provider} answers {found.ravel().tolist()} where 2 is right")


def name_on(name: str, provider: str, deciding: str) -> str:
    """What a run is called: the candidate's own name on the provider that decides."""
    return name if provider == deciding else f"{name} on {provider}"


def split_runs(entries: Sequence[dict[str, Any]], deciding: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(the candidates with their numbers on the provider that decides, the runs on every other one)."""
    return (
        [entry for entry in entries if entry["provider"] == deciding],
        [entry for entry in entries if entry["provider"] != deciding],
    )


def gates_elsewhere(
    candidate: str, runs: Sequence[dict[str, Any]], check: Callable[[dict[str, Any]], list[GateResult]]
) -> list[GateResult]:
    """The gates of a candidate on the other providers; fills in whether each run passed."""
    gates: list[GateResult] = []
    for run in runs:
        if run["candidate"] == candidate:
            results = check(run)
            run["passed"] = not any(result.stops for result in results)
            gates += results
    return gates
