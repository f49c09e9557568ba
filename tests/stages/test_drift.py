"""The drift waterfall: whose error it is, which node began it, and that a stranger sees the same."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.probe import tensor_values
from stages.artifact import Artifact
from stages.base import StageResult
from stages.validate import Validate, ValidateConfig
from stages.validate.drift.first_layer import find_first_layer, share_of
from stages.validate.drift.script import errors, same
from stages.validate.proofs import split_failed
from tests.models.tiny import image_backbone, saved_checkpoint
from tests.stages.chain import SAMPLES, artifact_of, context_of, edit_weight, made, temporary_folder, with_candidate
from tests.stages.test_validate import HEAD

QUICK = {
    "latency_calls": 20,
    "drift_samples": 32,
    "gates": {"min_samples": 24, "max_metric_drop": 0.2, "min_agreement_int8": 0.8},
}


def chain_model(seed: int = 0) -> onnx.ModelProto:
    """x → MatMul → Relu → MatMul → Relu → MatMul → y, each weight named after its module."""
    random = np.random.default_rng(seed)
    nodes, weights, before = [], [], "x"
    for index in range(3):
        weights.append(numpy_helper.from_array(random.normal(size=(8, 8)).astype(np.float32), f"layer{index}.weight"))
        after = "y" if index == 2 else f"h{index}"
        nodes.append(helper.make_node("MatMul", [before, f"layer{index}.weight"], [after], f"product{index}"))
        if index < 2:
            nodes.append(helper.make_node("Relu", [after], [f"r{index}"], f"relu{index}"))
            before = f"r{index}"
    float32, dims = TensorProto.FLOAT, ["batch", 8]
    x, y = (helper.make_tensor_value_info(name, float32, dims) for name in "xy")
    graph = helper.make_graph(nodes, "chain", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


X = {"x": np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)}


def first_layer(folder: Path, change: Callable[[onnx.ModelProto], None], limit: float = 1e-3) -> dict[str, Any]:
    good, bad = chain_model(), chain_model()
    change(bad)
    onnx.save(good, folder / "good.onnx")
    onnx.save(bad, folder / "bad.onnx")
    return find_first_layer(folder / "good.onnx", folder / "bad.onnx", X, ["y"], limit)


def edit(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[onnx.ModelProto], None]:
    return lambda model: edit_weight(model, name, change)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_first_broken_node_is_named_not_those_behind_it(tmp_path: Path, index: int) -> None:
    found = first_layer(tmp_path, edit(f"layer{index}.weight", lambda weight: np.roll(weight, 1, 1)))
    assert found["first"]["node"] == f"product{index}"
    assert found["first"]["module"] == f"layer{index}"
    assert found["first"]["own"] > 0.1


def test_what_comes_behind_a_broken_node_has_no_error_of_its_own(tmp_path: Path) -> None:
    found = first_layer(tmp_path, edit("layer0.weight", lambda weight: weight * 1.5), limit=10.0)
    assert found["first"] is None and found["compared"] == 5
    own = {one["node"]: one["own"] for one in found["largest"]}
    accumulated = {one["node"]: one["accumulated"] for one in found["largest"]}
    assert own["product0"] == pytest.approx(0.5, rel=1e-5)
    assert max(own[name] for name in ("relu0", "product1", "relu1", "product2")) < 1e-6
    assert min(accumulated.values()) == pytest.approx(0.5, rel=1e-4)


def test_equal_graphs_have_no_first_layer(tmp_path: Path) -> None:
    found = first_layer(tmp_path, lambda model: None)
    assert found["first"] is None and found["compared"] == found["matched"] == 5
    assert {one["own"] for one in found["largest"]} == {0.0}


def test_nan_is_above_every_limit(tmp_path: Path) -> None:
    def put_nan(weight: np.ndarray) -> np.ndarray:
        weight[0, 0] = np.nan
        return weight

    found = first_layer(tmp_path, edit("layer1.weight", put_nan), limit=1e9)
    assert found["first"]["node"] == "product1" and found["first"]["own"] is None
    json.dumps(found, allow_nan=False)


def test_what_was_fused_is_compared_as_one_piece(tmp_path: Path) -> None:
    """The bad graph has other nodes between two tensors that both have: the difference is that of the piece."""

    def fuse(model: onnx.ModelProto) -> None:
        edit_weight(model, "layer1.weight", lambda weight: 2 * weight)
        for node in model.graph.node:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    names[index] = {"h1": "inner1", "r1": "other1"}.get(name, name)

    found = first_layer(tmp_path, fuse)
    assert found["matched"] == 3  # h0, r0, y
    assert found["first"]["tensor"] == "y" and found["first"]["own"] == pytest.approx(1.0, rel=1e-5)


def test_a_lost_output_is_said(tmp_path: Path) -> None:
    def rename(model: onnx.ModelProto) -> None:
        model.graph.node[-1].output[0] = model.graph.output[0].name = "z"

    found = first_layer(tmp_path, rename)
    assert found["missing_outputs"] == ["y"] and found["first"] is None


def test_errors_of_nothing_and_of_nan() -> None:
    zeros, ones = np.zeros(3, np.float32), np.ones(3, np.float32)
    assert share_of(zeros, zeros) == 0.0
    assert share_of(ones, zeros) == float("inf")
    assert share_of(zeros, ones) == 1.0
    assert np.isnan(share_of(np.full(3, np.nan), np.full(3, np.nan)))


def test_values_of_a_graph_are_those_that_flow() -> None:
    values = tensor_values(chain_model(), {"x", "h0", "layer0.weight", "nowhere"}, X)
    assert set(values) == {"x", "h0", "layer0.weight"}
    assert values["h0"] == pytest.approx(X["x"] @ values["layer0.weight"], rel=1e-5)


# --- in the stage ------------------------------------------------------------------------------------


def finetuned() -> Artifact:
    """finetune's artifact with an adapter that does something, and merge-lora's network as its base."""
    import torch

    from models.adapters import AdapterSettings, inject_adapters, save_adapter
    from models.checkpoint import load_checkpoint

    folder = temporary_folder()
    saved_checkpoint(folder / "base", image_backbone())
    adapted = inject_adapters(load_checkpoint(folder / "base").model, AdapterSettings("lora", 2, 4.0, 0.0))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    save_adapter(adapted, folder / "adapter")
    return artifact_of("finetune", folder)


@functools.cache
def broken_run() -> tuple[StageResult, Path]:
    """A run in which the weights of one convolution of the INT8 candidate are permuted."""
    root = temporary_folder()

    def permute(model: onnx.ModelProto) -> None:
        edit_weight(model, "blocks.4.0.conv_pwl.weight", lambda weight: np.roll(weight, 1, 0) * 40)

    for stage in ("export", "merge-lora"):
        shutil.copytree(made()[stage].folder, root / stage)
    inputs = made() | {"quantize": with_candidate(root / "quantize", permute), "finetune": finetuned()}
    result = Validate().run(context_of(root / "validate", inputs), ValidateConfig.model_validate(QUICK))
    return result, root


def test_each_step_is_held_against_the_one_before() -> None:
    drift = broken_run()[0].measurements["drift"]
    steps = {one["name"]: one for one in drift["steps"]}
    assert list(steps) == ["adapted", "merged", "onnx, as written", "onnx-fp32", "onnx-fp16", "onnx-changed"]
    assert [one["after"] for one in drift["steps"]] == [
        None, "adapted", "merged", "onnx, as written", "onnx-fp32", "onnx-fp32",
    ]  # fmt: skip
    assert drift["samples"] == 32 and drift["start"] == "adapted"
    # The adapter was not folded into what stands in for merge-lora: the waterfall sees whose fault that is.
    assert steps["merged"]["from_before"]["relative_error"] > 0.01
    assert steps["onnx, as written"]["from_before"]["relative_error"] < 1e-4
    assert steps["onnx, as written"]["from_start"]["relative_error"] > 0.01
    assert 0 < steps["onnx-fp16"]["from_before"]["relative_error"] < 0.02
    json.dumps(drift, allow_nan=False)


def test_a_bad_merge_is_the_first_step_that_broke() -> None:
    (broken,) = broken_run()[0].measurements["drift"]["broken"]
    assert broken["candidate"] == "onnx-changed"
    assert broken["step"] == "merged" and "SQNR" in broken["gates"]


def test_with_the_default_gates_a_break_is_blamed_on_its_own_step(tmp_path: Path) -> None:
    """Two dozen samples leave the default margin open of everything, the start against itself included."""

    def swap(model: onnx.ModelProto) -> None:
        edit_weight(model, HEAD, lambda weight: np.roll(weight, 1, 0))

    inputs = made() | {"quantize": with_candidate(tmp_path / "quantize", swap)}
    config = ValidateConfig.model_validate({"latency_calls": 20})
    found = Validate().run(context_of(tmp_path / "out", inputs), config).measurements["drift"]["broken"]
    blamed = {one["candidate"]: one["step"] for one in found}
    assert blamed == {"onnx-fp32": None, "onnx-fp16": None, "onnx-changed": "onnx-changed"}
    gates = next(one["gates"] for one in found if one["step"])
    assert "SQNR" in gates and "accuracy drop" not in gates


@functools.cache
def broken_layer_run() -> tuple[StageResult, Path]:
    """The same without an adapter: merge-lora has passed a checkpoint through."""
    root = temporary_folder()

    def permute(model: onnx.ModelProto) -> None:
        edit_weight(model, "blocks.4.0.conv_pwl.weight", lambda weight: np.roll(weight, 1, 0) * 40)

    shutil.copytree(made()["export"].folder, root / "export")
    inputs = made() | {"quantize": with_candidate(root / "quantize", permute)}
    result = Validate().run(context_of(root / "validate", inputs), ValidateConfig.model_validate(QUICK))
    return result, root


def test_a_failed_gate_leads_to_the_layer() -> None:
    result, _ = broken_layer_run()
    (broken,) = result.measurements["drift"]["broken"]
    assert (broken["candidate"], broken["step"]) == ("onnx-changed", "onnx-changed")
    assert broken["layer"]["first"]["module"] == "backbone.network.blocks.4.0.conv_pwl"
    assert any("conv_pwl" in note for note in result.notes)


def test_a_stranger_sees_the_same_numbers_with_numpy_and_onnxruntime_alone() -> None:
    result, root = broken_layer_run()
    script = root / "validate/reproduce/reproduce.py"
    probe = "import runpy, sys; sys.argv = sys.argv[1:]; blocked = {'torch', 'onnx', 'models', 'stages', 'pipeline'}\n"
    probe += "class Finder:\n    def find_spec(self, name, *rest):\n"
    probe += "        assert name.partition('.')[0] not in blocked, name\n"
    probe += "sys.meta_path.insert(0, Finder()); runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-c", probe, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("relative_error") == 3 and "conv_pwl" in done.stdout
    recorded = result.measurements["drift"]["reproduce"]["steps"]
    worst = next(one for one in recorded if one["name"] == "onnx-changed")
    assert f"{worst['numbers']['relative_error']:.6g}" in done.stdout
    assert worst["numbers"]["relative_error"] > 0.1


def test_another_file_is_told_from_the_recorded_one() -> None:
    _, root = broken_layer_run()
    folder = temporary_folder()
    shutil.copyfile(root / "export/onnx-fp32.onnx", folder / "onnx-changed.onnx")
    script, swapped = root / "validate/reproduce/reproduce.py", folder / "onnx-changed.onnx"
    done = subprocess.run([sys.executable, str(script), str(swapped)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "recorded" in done.stdout


def test_no_pickle_is_written() -> None:
    _, root = broken_layer_run()
    with np.load(root / "validate/reproduce/golden.npz", allow_pickle=False) as golden:
        assert set(golden.files) == {"reference", "input.image"}
        assert len(golden["reference"]) == 8


def test_where_all_gates_pass_there_is_nothing_to_reproduce(tmp_path: Path) -> None:
    result = Validate().run(context_of(tmp_path, made()), ValidateConfig.model_validate(QUICK))
    assert result.measurements["drift"]["broken"] == []
    assert not (tmp_path / "reproduce").exists()


def test_zero_samples_are_no_step(tmp_path: Path) -> None:
    result = Validate().run(context_of(tmp_path, made(), examples=()), ValidateConfig.model_validate(QUICK))
    drift = result.measurements["drift"]
    assert drift["samples"] == 0 and all(one["from_start"]["problem"] for one in drift["steps"])
    assert all(one["step"] == "merged" for one in drift["broken"]) and len(drift["broken"]) == 3


def test_what_failed_on_another_provider_only_is_not_explained_by_these_outputs() -> None:
    candidates = [
        {"name": "both", "failed_on": ["cpu", "cuda"]},
        {"name": "good", "failed_on": []},
        {"name": "there", "failed_on": ["cuda"]},
    ]
    assert split_failed(candidates, "cpu") == (["both"], {"there": ["cuda"]})
    result, _ = broken_layer_run()
    assert {one["name"]: one["failed_on"] for one in result.measurements["candidates"]} == {
        "onnx-fp32": [], "onnx-fp16": [], "onnx-changed": ["cpu"],
    }  # fmt: skip


def test_numbers_of_the_script_are_those_of_its_definition() -> None:
    wanted = np.array([[0, 4], [2, 2]], np.float32)
    found = errors(wanted + np.array([[0, 1], [0, 0]], np.float32), wanted)
    assert found == {"max_abs_error": 1.0, "relative_error": 0.25, "sqnr_db": pytest.approx(10 * np.log10(24))}
    assert set(errors(np.full((2, 2), np.nan), wanted).values()) == {None}
    assert set(errors(wanted, np.full((2, 2), np.nan)).values()) == {None}
    assert set(errors(wanted[:1], wanted).values()) == {None}
    assert same(None, None) and not same(None, 1.0) and same(1.0, 1.01) and not same(1.0, 1.1)
    assert SAMPLES >= 32
