"""New names: for values and nodes, wherever in a graph they are mentioned, and for symbolic sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableSequence
from typing import TYPE_CHECKING

from surgery.graph.scopes import graphs, subgraphs

if TYPE_CHECKING:
    from onnx import GraphProto


def fresh(name: str, taken: set[str]) -> str:
    """`name`, or `name` with the first number that makes it free; the result is added to `taken`."""
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    taken.add(candidate)
    return candidate


def rename(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Rename the values of a graph: interface, initializers, nodes, value_info, and where subgraphs read them.

    A value that a subgraph defines under the same name is another value, and keeps its name.
    """
    if not names:
        return
    _rename_declarations(graph, names)
    for node in graph.node:
        _rename_list(node.input, names)
        _rename_list(node.output, names)
        for body in subgraphs(node):
            _rename_captured(body, names)


def rename_in_every_scope(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Rename values in a graph and in every graph nested in it, whichever of them defines the name; nodes too.

    The meaning stays as it was if no new name is in use: what hid an outer value hides it under the new name.
    """
    if not names:
        return
    for scope in graphs(graph):
        _rename_declarations(scope, names)
        for node in scope.node:
            _rename_list(node.input, names)
            _rename_list(node.output, names)
            if node.name in names:
                node.name = names[node.name]


def rename_dims(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Rename symbolic dimensions in the interface and the value_info of a graph and of its subgraphs."""
    if not names:
        return
    for scope in graphs(graph):
        for value in (*scope.input, *scope.output, *scope.value_info):
            if not value.type.HasField("tensor_type"):
                continue
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param in names:
                    dim.dim_param = names[dim.dim_param]


def _rename_declarations(graph: GraphProto, names: Mapping[str, str]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.name in names:
            value.name = names[value.name]
    for tensor in (*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)):
        if tensor.name in names:
            tensor.name = names[tensor.name]
    for annotation in graph.quantization_annotation:
        if annotation.tensor_name in names:
            annotation.tensor_name = names[annotation.tensor_name]
        for entry in annotation.quant_parameter_tensor_names:
            if entry.value in names:
                entry.value = names[entry.value]


def _rename_list(values: MutableSequence[str], names: Mapping[str, str]) -> None:
    for index, name in enumerate(values):
        if name in names:
            values[index] = names[name]


def _rename_captured(body: GraphProto, names: Mapping[str, str]) -> None:
    """Rename what a body reads from outside, node by node: a name belongs to the body from where it defines it."""
    declared = [value.name for value in body.input]
    declared += [tensor.name for tensor in body.initializer]
    declared += [sparse.values.name for sparse in body.sparse_initializer]
    names = _without(names, declared)
    for node in body.node:
        _rename_list(node.input, names)
        for inner in subgraphs(node):
            _rename_captured(inner, names)
        names = _without(names, node.output)
    _rename_declarations(body, names)


def _without(names: Mapping[str, str], hidden: Iterable[str]) -> Mapping[str, str]:
    """`names` less those that are hidden; the same object where none is, so that bodies cost nothing extra."""
    found = {name for name in hidden if name in names}
    return {old: new for old, new in names.items() if old not in found} if found else names
