"""Operator sets of ONNX itself: whether a graph means the same in a newer one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from surgery.graph.model import Model
from surgery.graph.scopes import graphs

if TYPE_CHECKING:
    from onnx import NodeProto

_OF_RUNTIMES = {"SimplifiedLayerNormalization"}
"""What exporters write into ONNX's domain although ONNX does not have it: it has no versions."""


def changed_operators(model: Model, version: int) -> list[str]:
    """The operators of a graph whose inputs, outputs or attributes are others in the operator set `version` of ONNX
    than in the graph's own, or which one of the two does not have. An operator that takes more types means the same.
    """
    old = model.opset()
    used = {node.op_type for node in _nodes(model) if node.domain in ("", "ai.onnx")} - _OF_RUNTIMES
    return sorted(
        name for name in used if _signature(name, old) is None or _signature(name, old) != _signature(name, version)
    )


def raise_opset(model: Model, version: int) -> None:
    """Declare the operator set `version` of ONNX."""
    for entry in model.proto.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = version


def _nodes(model: Model) -> Iterator[NodeProto]:
    for graph in graphs(model.graph):
        yield from graph.node
    for function in model.proto.functions:
        yield from function.node


def _signature(name: str, version: int) -> Any:
    """Inputs, outputs, and attributes with their defaults; None where the operator is not there."""
    from onnx import defs

    try:
        schema = defs.get_schema(name, version)
    except defs.SchemaError:
        return None
    if version > defs.onnx_opset_version() or schema.deprecated:
        return None
    values = [[(value.name, value.option) for value in listed] for listed in (schema.inputs, schema.outputs)]
    attributes = {
        key: (each.type, each.required, each.default_value.SerializeToString())
        for key, each in schema.attributes.items()
    }
    return values, attributes
