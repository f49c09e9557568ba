"""The share of each precision and the module of a node, as the graph has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.graph import EXPORTER_SCOPES, MODULE, carry_modules, module_of, name_modules, products_of, shares_of


def graph_of(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], dims: list[Any]) -> onnx.ModelProto:
    """x: float32 → the nodes → y."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10)


def shares(tmp_path: Path, model: onnx.ModelProto, x: np.ndarray) -> tuple[list[int], dict[str, float]]:
    """MACs of each product, and the shares."""
    onnx.save(model, tmp_path / "model.onnx")
    products = products_of(tmp_path / "model.onnx", {"x": x})
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]  # nothing is left beside it
    return [product.macs for product in products], shares_of(products)


def ones(*dims: int) -> np.ndarray:
    """float32."""
    return np.ones(dims, np.float32)


def test_macs_are_those_of_the_definitions(tmp_path: Path) -> None:
    """Strided grouped convolution, its transpose, products of activations, Gemm with either operand transposed."""
    nodes = [
        helper.make_node("Conv", ["x", "grouped"], ["a"], strides=[2, 2], group=2),  # (1, 8, 4, 4) of (1, 4, 8, 8)
        helper.make_node("ConvTranspose", ["a", "up"], ["b"], strides=[2, 2]),  # (1, 3, 8, 8)
        helper.make_node("MatMul", ["b", "b"], ["c"]),  # (1, 3, 8, 8) · (8 → 8)
        helper.make_node("Flatten", ["c"], ["d"]),  # (1, 192)
        helper.make_node("Gemm", ["d", "w"], ["e"], transB=1),  # (1, 5)
        helper.make_node("Gemm", ["e", "v"], ["y"], transA=1),  # (5, 1)ᵀ… · (1, 7)
    ]
    weights = {"grouped": ones(8, 2, 1, 1), "up": ones(8, 3, 2, 2), "w": ones(5, 192), "v": ones(1, 7)}
    macs, found = shares(tmp_path, graph_of(nodes, weights, ["batch", 4, 8, 8]), ones(1, 4, 8, 8))
    assert macs == [8 * 16 * 2, 8 * 16 * 3 * 4, 3 * 64 * 8, 5 * 192, 5 * 7 * 1]
    assert found == {"fp32": 1.0}


def pair(name: str, point: str) -> list[onnx.NodeProto]:
    """A quantize-dequantize pair on an activation."""
    return [
        helper.make_node("QuantizeLinear", [name, "s", point], [f"{name}_q"]),
        helper.make_node("DequantizeLinear", [f"{name}_q", "s", point], [f"{name}_d"]),
    ]


@pytest.mark.parametrize(
    ("left", "right", "word"),
    [("x_d", "w_d", "int8"), ("x", "w_d", "int8-weights"), ("x_d", "v", "fp32"), ("x", "v", "fp32")],
)
def test_a_product_is_int8_where_both_factors_are(tmp_path: Path, left: str, right: str, word: str) -> None:
    nodes = [
        *pair("x", "z"),
        helper.make_node("DequantizeLinear", ["w", "s"], ["w_d"]),
        helper.make_node("MatMul", [left, right], ["y"]),
    ]
    weights = {"w": np.ones((4, 2), np.int8), "v": ones(4, 2), "s": np.float32([1])[0:1].reshape(())}
    weights |= {"z": np.array(0, np.uint8)}
    assert shares(tmp_path, graph_of(nodes, weights, [1, 4]), ones(1, 4))[1] == {word: 1.0}


def test_integer_operators_weights_of_four_bits_and_half_precision(tmp_path: Path) -> None:
    blocks = np.full((16, 1, 16), 0x99, np.uint8)  # 16 columns, one block of 32 values
    nodes = [
        helper.make_node("MatMulNBits", ["x", "blocks", "scales"], ["a"], domain="com.microsoft", K=32, N=16, bits=4,
                         block_size=32),
        helper.make_node("DynamicQuantizeLinear", ["a"], ["b", "b_s", "b_z"]),
        helper.make_node("MatMulInteger", ["b", "w", "b_z"], ["c"]),
        helper.make_node("Cast", ["c"], ["d"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["d", "half"], ["e"]),
        helper.make_node("Cast", ["e"], ["y"], to=TensorProto.FLOAT),
    ]  # fmt: skip
    weights = {"blocks": blocks, "scales": ones(16), "w": np.ones((16, 8), np.int8)}
    weights |= {"half": np.ones((8, 4), np.float16)}
    macs, found = shares(tmp_path, graph_of(nodes, weights, [1, 32]), ones(1, 32))
    assert macs == [512, 128, 32]
    assert found == pytest.approx({"int4-weights": 512 / 672, "int8": 128 / 672, "fp16": 32 / 672})
    assert list(found) == ["int4-weights", "int8", "fp16"]


def test_a_graph_that_multiplies_nowhere_has_no_shares(tmp_path: Path) -> None:
    model = graph_of([helper.make_node("Relu", ["x"], ["y"])], {}, [1, 4])
    assert shares(tmp_path, model, ones(1, 4)) == ([], {})


def test_a_node_is_named_by_its_weight_and_else_by_the_innermost_module() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "stem.weight"], ["a"]),
        helper.make_node("MatMul", ["a", "val_1"], ["b"]),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    noted = (["", "bn", "norm"], ["", "block", "block.query", "linear"], ["_empty_nn_module_stack", "relu"])
    for node, scopes in zip(nodes, noted, strict=True):
        node.metadata_props.add(key=EXPORTER_SCOPES, value=repr(scopes))
        node.metadata_props.add(key="stack_trace", value="a path of this machine")
    model = graph_of(nodes, {"stem.weight": ones(1, 1, 1, 1), "val_1": ones(4, 4)}, [1, 1, 4, 4])
    name_modules(model)
    assert [module_of(node) for node in model.graph.node] == ["stem", "block.query", ""]
    assert [len(node.metadata_props) for node in model.graph.node] == [1, 1, 0]


def test_modules_are_carried_over_by_the_names_of_tensors() -> None:
    """ONNX Runtime's preprocessing drops the metadata of some graphs (EfficientNet-Lite0) and keeps that of others."""
    source = graph_of([helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Relu", ["a"], ["y"])], {}, [1, 4])
    for node, module in zip(source.graph.node, ("first", "second"), strict=True):
        node.metadata_props.add(key=MODULE, value=module)
    fused = graph_of([helper.make_node("Clip", ["x"], ["y"]), helper.make_node("Relu", ["y"], ["new"])], {}, [1, 4])
    carry_modules(source, fused)
    assert [module_of(node) for node in fused.graph.node] == ["second", ""]
