"""An ONNX graph against a target of the table: each node that the target does not take, before anything is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from models.engines.targets import MendName, Rule, Target, rules_of
from models.graph import module_of

if TYPE_CHECKING:
    import numpy as np
    import onnx

ALWAYS_TAKEN = ("bool", "int32", "int64", "string", "undefined")
"""Dtypes that every library takes somewhere; what an operator takes of them is a rule's business."""


@dataclass(frozen=True)
class Finding:
    """One node that a target does not take. `module` is the part of the network it comes from, where that is known;
    `rule` the row of the table, or `dtype`, `opset` or `parser`."""

    node: str
    operator: str
    module: str
    rule: str
    reason: str
    fix: str
    mend: MendName | None = None

    def __str__(self) -> str:
        where = f" of {self.module}" if self.module else ""
        return f"{self.operator} {self.node}{where}: {self.reason}; {self.fix}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class GraphView:
    """A graph with what the rules ask for: dtypes by tensor name, constants, modules by node name."""

    model: onnx.ModelProto
    dtypes: Mapping[str, str]
    constants: Mapping[str, onnx.TensorProto]

    def value(self, name: str) -> np.ndarray | None:
        """A constant's value, or None."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None


def view_of(model: onnx.ModelProto) -> GraphView:
    """The dtype of every tensor, as far as ONNX's own inference knows the operators."""
    import onnx

    names = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()}
    aliases = {"float": "float32", "double": "float64"}
    inferred = onnx.shape_inference.infer_shapes(model).graph
    dtypes: dict[str, str] = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        dtypes[value.name] = names[value.type.tensor_type.elem_type]
    dtypes |= {tensor.name: names[tensor.data_type] for tensor in inferred.initializer}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    return GraphView(model, {name: aliases.get(one, one) for name, one in dtypes.items()}, constants)


def check_graph_for(model: onnx.ModelProto, target: Target) -> list[Finding]:
    """Every node that `target` does not take, in graph order; of graphs above 2 GB pass one without its weights."""
    view = view_of(model)
    findings = list(opset_findings(model, target))
    for node in model.graph.node:
        for name, rule in rules_of(target).items():
            if matches(rule, node, view):
                findings.append(
                    Finding(node.name, node.op_type, module_of(node), name, rule.reason, rule.fix, rule.mend)
                )
        findings += dtype_findings(node, view, target)
    return findings


def matches(rule: Rule, node: onnx.NodeProto, view: GraphView) -> bool:
    """Whether all conditions of a rule hold of a node."""
    if rule.operators and node.op_type not in rule.operators:
        return False
    if rule.domains and node.domain not in rule.domains:
        return False
    # The zero point tells the dtype that QuantizeLinear gives: it counts as an input here.
    if rule.inputs and not any(view.dtypes.get(name) in rule.inputs for name in node.input):
        return False
    found = {attribute.name: attribute.i for attribute in node.attribute}
    if any(found.get(name, 0) != value for name, value in rule.attributes.items()):
        return False
    if rule.zero_point == "nonzero":
        zero = view.value(node.input[2]) if len(node.input) > 2 else None
        return zero is not None and bool(zero.astype("int64").any())
    return True


def dtype_findings(node: onnx.NodeProto, view: GraphView, target: Target) -> Iterator[Finding]:
    """A dtype that the target does not have, at the first node that makes or reads it."""
    for name in (*node.output, *node.input):
        dtype = view.dtypes.get(name, "undefined")
        if dtype not in (*ALWAYS_TAKEN, *target.dtypes):
            reason = f"{name} is {dtype}, and {target.name} takes {', '.join(target.dtypes)}"
            fix = "take another precision for this target"
            yield Finding(node.name, node.op_type, module_of(node), "dtype", reason, fix)
            return


def opset_findings(model: onnx.ModelProto, target: Target) -> Iterator[Finding]:
    """The graph's opset is above the target's."""
    opset = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 0)
    if target.max_opset and opset > target.max_opset:
        reason = f"the graph has opset {opset}, and {target.name} reads {target.max_opset} at most"
        yield Finding(
            "",
            "graph",
            "",
            "opset",
            reason,
            f"set export.opset to {target.max_opset}, or take a precision that needs no later one",
        )


def summary(findings: Sequence[Finding], most: int = 3) -> str:
    """The findings by rule, for a person: the first node of each and how many more there are."""
    by_rule: dict[tuple[str, str, str], list[Finding]] = {}
    for one in findings:
        by_rule.setdefault((one.rule, one.operator, one.fix), []).append(one)
    parts = []
    for group in list(by_rule.values())[:most]:
        more = f" (and {len(group) - 1} more)" if len(group) > 1 else ""
        parts.append(f"{group[0]}{more}")
    left = len(by_rule) - most
    return ". ".join(parts) + (f". And {left} more kinds" if left > 0 else "")
