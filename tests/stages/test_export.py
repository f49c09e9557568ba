"""export: parity at other shapes, gates that fail when the graph is wrong, and errors that name the frozen axis."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from models.checkpoint import Checkpoint, load_checkpoint
from models.classifier import Classifier
from models.errors import DataError, ExportError
from models.onnx_files import save_graph
from models.spec import IOSpec, TaskName
from stages.export import Export, ExportConfig
from stages.export.exporter import (
    attention_by_products,
    export_onnx,
    root_of,
    use_plain_attention,
    written_out_attention,
)
from stages.export.parity import check_graph, parity_gates, reference_logits, shape_errors, tried_inputs
from stages.export.precisions import fp16_from_fp32
from tests.models.tiny import VIT, image_backbone, saved_checkpoint
from tests.stages.chain import context_of, made, test_split

TASKS: tuple[TaskName, ...] = ("image-classification", "text-classification", "audio-classification")


def dims_of(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("task", TASKS)
def test_files_have_the_names_and_axes_of_the_specification(task: TaskName) -> None:
    artifact = made(task)["export"]
    io = load_checkpoint(made(task)["merge-lora"].folder / "checkpoint").spec.io
    for precision in ("fp32", "fp16"):
        graph = onnx.load(artifact.file(f"onnx-{precision}.onnx")).graph
        for values, specs in ((graph.input, io.inputs), (graph.output, io.outputs)):
            assert [(value.name, dims_of(value)) for value in values] == [(one.name, list(one.dims)) for one in specs]
            kinds = [onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in values]
            assert kinds == [np.dtype(one.dtype) for one in specs]  # also in fp16: callers see one contract
        assert not graph.value_info


@pytest.mark.parametrize("task", TASKS)
def test_candidates_list_what_was_tried(task: TaskName) -> None:
    fp32, fp16 = json.loads(made(task)["export"].file("candidates.json").read_text())
    assert (fp32["name"], fp16["name"]) == ("onnx-fp32", "onnx-fp16")
    assert fp16["size_bytes"] < fp32["size_bytes"]
    batches = {shape.split("×")[0] for shape in fp32["measurements"]["shapes_tried"]}
    assert {"1", "3", "8"} <= batches
    assert fp32["measurements"]["max_abs_error"] <= fp32["measurements"]["tolerance"]


def test_texts_are_tried_short_and_at_full_length(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(made("text-classification")["merge-lora"].folder / "checkpoint")
    context = context_of(tmp_path / "out", {}, "text-classification")
    lengths = [arrays["input_ids"].shape[1] for arrays in tried_inputs(checkpoint, context)]
    assert min(lengths) == 3 and max(lengths) == checkpoint.processing.max_length  # type: ignore[attr-defined]


def test_a_small_validation_split_is_repeated_up_to_every_batch_size(tmp_path: Path) -> None:
    examples = test_split("image-classification", 1)
    context = context_of(tmp_path / "out", made("image-classification"), examples=examples)
    result = Export().run(context, ExportConfig(precisions=("fp32",)))
    assert [gate.verdict for gate in result.gates] == ["pass"] * 3
    assert result.measurements["candidates"][0]["shapes_tried"] == [f"{size}×32×32×3" for size in (1, 3, 8)]


def test_an_empty_validation_split_is_no_evidence(tmp_path: Path) -> None:
    context = context_of(tmp_path / "out", made("image-classification"), examples=())
    with pytest.raises(DataError, match="validation split is empty"):
        Export().run(context, ExportConfig())


def test_only_fp32_where_only_fp32_is_asked_for(tmp_path: Path) -> None:
    Export().run(context_of(tmp_path / "out", made("image-classification")), ExportConfig(precisions=("fp32",)))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["candidates.json", "onnx-fp32.onnx"]


def errors_after(tmp_path: Path, name: str, change: str) -> list[tuple[str, float]]:
    """The parity errors of the exported image network after one weight was changed."""
    artifacts = made("image-classification")
    checkpoint = load_checkpoint(artifacts["merge-lora"].folder / "checkpoint")
    shapes = tried_inputs(checkpoint, context_of(tmp_path / "out", artifacts))
    reference, _ = reference_logits(checkpoint, shapes)
    model = onnx.load(artifacts["export"].file("onnx-fp32.onnx"))
    found = next(tensor for tensor in model.graph.initializer if tensor.name.endswith(name))
    values = numpy_helper.to_array(found).copy()
    values = values[::-1].copy() if change == "permuted" else np.where(np.arange(len(values)) == 0, np.nan, values)
    found.CopyFrom(numpy_helper.from_array(values.astype(np.float32), found.name))
    onnx.save(model, tmp_path / "broken.onnx")
    return shape_errors(tmp_path / "broken.onnx", shapes, reference, 2)


@pytest.mark.parametrize("change", ["permuted", "NaN"])
def test_the_gate_fails_for_a_broken_graph(tmp_path: Path, change: str) -> None:
    name = "task_head.weight" if change == "permuted" else "task_head.bias"
    gates = parity_gates("onnx-fp32", errors_after(tmp_path, name, change), 1e-3, 1.0)
    assert len(gates) == 3 and not any(gate.passed for gate in gates)


def test_the_gate_fails_for_another_output_shape(tmp_path: Path) -> None:
    artifacts = made("image-classification")
    checkpoint = load_checkpoint(artifacts["merge-lora"].folder / "checkpoint")
    shapes = tried_inputs(checkpoint, context_of(tmp_path / "out", artifacts))
    wrong = [logits[:, :2] for logits in reference_logits(checkpoint, shapes)[0]]
    errors = shape_errors(artifacts["export"].file("onnx-fp32.onnx"), shapes, wrong, 2)
    assert not any(gate.passed for gate in parity_gates("onnx-fp32", errors, 1e9, 1.0))


def test_a_network_that_amplifies_rounding_is_told_from_a_broken_export() -> None:
    (own,) = parity_gates("onnx-fp32", [("1×8", 0.02)], 1e-3, 2.0, floor=0.01)
    assert not own.passed and "fp32 itself is 0.005 of the range away from fp64" in own.message
    (broken,) = parity_gates("onnx-fp32", [("1×8", 0.02)], 1e-3, 2.0, floor=1e-6)
    assert not broken.passed and "fp64" not in broken.message


def exported_io() -> tuple[onnx.ModelProto, IOSpec]:
    artifacts = made("image-classification")
    io = load_checkpoint(artifacts["merge-lora"].folder / "checkpoint").spec.io
    return onnx.load(artifacts["export"].file("onnx-fp32.onnx")), io


def test_a_frozen_axis_is_named(tmp_path: Path) -> None:
    model, io = exported_io()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    save_graph(model, tmp_path / "frozen.onnx")
    with pytest.raises(ExportError, match=r"axis 'batch' of image was frozen at 2"):
        check_graph(tmp_path / "frozen.onnx", io)


def test_another_fixed_size_is_named(tmp_path: Path) -> None:
    model, io = exported_io()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 64
    save_graph(model, tmp_path / "other.onnx")
    with pytest.raises(ExportError, match=r"other\.onnx"):
        check_graph(tmp_path / "other.onnx", io)


def test_another_output_name_is_named(tmp_path: Path) -> None:
    model, io = exported_io()
    for node in model.graph.node:
        node.output[:] = ["scores" if name == "logits" else name for name in node.output]
    model.graph.output[0].name = "scores"
    save_graph(model, tmp_path / "renamed.onnx")
    with pytest.raises(ExportError, match=r"has \['scores'\]; expected \['logits'\]"):
        check_graph(tmp_path / "renamed.onnx", io)


def test_a_graph_that_the_checker_refuses(tmp_path: Path) -> None:
    model, io = exported_io()
    model.graph.node[0].input[0] = "nowhere"
    onnx.save(model, tmp_path / "invalid.onnx")
    with pytest.raises(ExportError, match=r"invalid\.onnx is no valid ONNX graph"):
        check_graph(tmp_path / "invalid.onnx", io)


def test_half_precision_halves_the_weights_and_keeps_the_interface() -> None:
    model, _ = exported_io()
    half = fp16_from_fp32(model)
    weight = next(tensor for tensor in half.graph.initializer if tensor.name.endswith("task_head.weight"))
    assert weight.data_type == onnx.TensorProto.FLOAT16
    assert half.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert half.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_no_path_of_this_machine_is_in_the_file() -> None:
    content = made("image-classification")["export"].file("onnx-fp32.onnx").read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in content
    assert b"site-packages" not in content


def test_a_failing_export_is_retried_with_plain_attention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The retry patches a copy: the reference keeps its attention."""
    import stages.export.exporter as module

    architecture = {"library": "hf", "modality": "image", "config": VIT, "mean": [0.5] * 3, "std": [0.5] * 3}
    saved_checkpoint(tmp_path / "checkpoint", image_backbone(architecture))
    checkpoint = load_checkpoint(tmp_path / "checkpoint")
    assert checkpoint.model.backbone.network.config._attn_implementation == "sdpa"
    exporter, seen = module.run_exporter, []

    def refuses_fused_attention(model: torch.nn.Module, *arguments: object) -> onnx.ModelProto:
        seen.append(model.backbone.network.config._attn_implementation)
        if seen[-1] == "sdpa":
            raise RuntimeError("Cannot view a tensor with shape …")
        return exporter(model, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "run_exporter", refuses_fused_attention)
    example = checkpoint.processing.arrays([one.content for one in test_split("image-classification", 2)])
    _, attention = export_onnx(checkpoint, example, 20, tmp_path / "exported.onnx")
    assert (seen, attention) == (["sdpa", "eager"], "plain")
    assert checkpoint.model.backbone.network.config._attn_implementation == "sdpa"


def test_plain_attention_computes_the_same(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(made("text-classification")["merge-lora"].folder / "checkpoint")
    shapes = tried_inputs(checkpoint, context_of(tmp_path / "out", {}, "text-classification"))
    plain = copy.deepcopy(checkpoint.model)
    use_plain_attention(plain)
    assert plain.backbone.network.config._attn_implementation == "eager"
    inputs = [torch.from_numpy(shapes[1][tensor.name]) for tensor in checkpoint.spec.io.inputs]
    with torch.inference_mode():
        torch.testing.assert_close(plain(*inputs), checkpoint.model(*inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["plain", "additive", "boolean", "causal", "scaled", "grouped", "3 axes", "5 axes"])
def test_attention_by_products_equals_the_fused_one(form: str) -> None:
    torch.manual_seed(0)
    lead = {"3 axes": (2,), "5 axes": (2, 3, 4)}.get(form, (2, 4))
    query, key, value = (torch.randn(*lead, length, 8) for length in (5, 7, 7))
    options: dict[str, object] = {}
    if form == "additive":
        options["attn_mask"] = torch.randn(2, 1, 5, 7)
    elif form == "boolean":
        options["attn_mask"] = torch.rand(5, 7).gt(0.3) | torch.eye(5, 7).bool()
    elif form == "causal":
        options["is_causal"] = True
    elif form == "scaled":
        options["scale"] = 0.1
    elif form == "grouped":
        key, value, options = key[:, :2], value[:, :2], {"enable_gqa": True}
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(attention_by_products(query, key, value, **options), wanted, atol=1e-5, rtol=0)


def test_the_fused_attention_is_back_also_after_an_error() -> None:
    fused = torch.nn.functional.scaled_dot_product_attention
    with pytest.raises(ValueError), written_out_attention():
        assert torch.nn.functional.scaled_dot_product_attention is attention_by_products
        raise ValueError
    assert torch.nn.functional.scaled_dot_product_attention is fused


class AttentionOverFiveAxes(torch.nn.Module):
    """As in hiera, nest and twins, but with no flag that turns the fused form off."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Linear(96, 96)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        pixels = image.to(self.network.weight.dtype) / 255
        tokens = self.network(pixels.unflatten(1, (4, 8)).unsqueeze(1).flatten(4))  # (batch, 1, 4, 8, 96)
        return torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).flatten(1, 3).mean(1)


def with_network(network: torch.nn.Module, features: int) -> Checkpoint:
    """A checkpoint with this network in place of its own."""
    checkpoint = load_checkpoint(made("image-classification")["merge-lora"].folder / "checkpoint")
    return replace(checkpoint, model=Classifier(network, torch.nn.Linear(features, 3)).eval())


def exported_error(checkpoint: Checkpoint, folder: Path) -> tuple[float, str]:
    """The largest error of its graph at every tried shape, and how its attention was exported."""
    shapes = tried_inputs(checkpoint, context_of(folder / "out", {}))
    exported, attention = export_onnx(checkpoint, shapes[1], 20, folder / "exported.onnx")
    save_graph(exported, folder / "exported.onnx")
    check_graph(folder / "exported.onnx", checkpoint.spec.io)
    reference, _ = reference_logits(checkpoint, shapes)
    return max(error for _, error in shape_errors(folder / "exported.onnx", shapes, reference, 2)), attention


def test_attention_that_has_no_onnx_form_is_written_out(tmp_path: Path) -> None:
    error, attention = exported_error(with_network(AttentionOverFiveAxes(), 96), tmp_path)
    assert attention == "plain" and error < 1e-5


def test_bytes_are_cast_before_they_are_moved() -> None:
    """TensorRT takes an image of bytes only where a cast reads it."""
    model, io = exported_io()
    assert {node.op_type for node in model.graph.node if io.inputs[0].name in node.input} == {"Cast"}


class ZerosBesideNegatives(torch.nn.Module):
    """As transformers' bit: zeros around the maps, then a maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Conv2d(3, 3, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        maps = self.network(image.to(self.network.weight.dtype).permute(0, 3, 1, 2) / 255).abs().neg() - 1
        padded = torch.nn.functional.pad(maps, (1, 1, 1, 1))
        return torch.nn.functional.max_pool2d(padded, 3, 2).mean((2, 3))


def test_zeros_around_negative_values_stay_zeros_in_a_maximum(tmp_path: Path) -> None:
    """ONNX Runtime takes a padding into the pool, as if it were −∞."""
    assert exported_error(with_network(ZerosBesideNegatives(), 3), tmp_path)[0] < 1e-5


class ClippedTwice(torch.nn.Module):
    """As gemma4_vit, whose limits are buffers: three projections of one value, each with limits of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Linear(3, 3)
        for index in range(3):
            self.register_buffer(f"low_{index}", torch.tensor(-0.1 * index))
            self.register_buffer(f"high_{index}", torch.tensor(0.1 + 0.1 * index))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        pixels = (image.to(self.network.weight.dtype) / 255).mean((1, 2)) * 2 - 1
        clipped = [torch.clamp(pixels, self.get_buffer(f"low_{i}"), self.get_buffer(f"high_{i}")) for i in range(3)]
        return self.network(clipped[0]) + clipped[1] * clipped[2]


def test_the_limits_of_a_value_that_is_clipped_twice_are_kept(tmp_path: Path) -> None:
    assert exported_error(with_network(ClippedTwice(), 3), tmp_path)[0] < 1e-5


class SinglePrecision(torch.nn.Module):
    """Casts inside, so that its weights in fp64 meet values in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Linear(3, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network((image.float() / 255).mean((1, 2)))


def test_a_network_that_does_not_run_in_fp64_has_no_noise_floor(tmp_path: Path) -> None:
    checkpoint = with_network(SinglePrecision(), 3)
    shapes = tried_inputs(checkpoint, context_of(tmp_path / "out", {}))
    reference, floor = reference_logits(checkpoint, shapes)
    assert floor is None and len(reference) == len(shapes)
    assert {parameter.dtype for parameter in checkpoint.model.parameters()} == {torch.float32}


def test_the_reason_of_a_failed_export_is_its_first_cause() -> None:
    try:
        try:
            raise ValueError("Found conflicts:\n  - a static shape of 7 for inputs[0].shape[1]\n\nadvice")
        except ValueError as error:
            raise RuntimeError("This is step 1/3 of exporting the model") from error
    except RuntimeError as error:
        assert root_of(error) == "ValueError: Found conflicts: - a static shape of 7 for inputs[0].shape[1]"


def test_an_export_that_fails_twice_says_both_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    import stages.export.exporter as module

    def refuses(*_: object) -> onnx.ModelProto:
        raise RuntimeError("")

    monkeypatch.setattr(module, "run_exporter", refuses)
    checkpoint = load_checkpoint(made("text-classification")["merge-lora"].folder / "checkpoint")
    with pytest.raises(ExportError, match=r"as built attention: RuntimeError.*plain attention: RuntimeError"):
        export_onnx(checkpoint, {}, 20, Path("exported.onnx"))


def test_the_configuration_refuses_other_formats() -> None:
    with pytest.raises(ValueError, match="onnx"):
        ExportConfig(formats=("coreml",))  # type: ignore[arg-type]
