"""New nodes for an editing view: one way to name them, their results and their constants.

node       SCOPE/LABEL                 constant   SCOPE/constants/VALUES, one for each name
result     SCOPE/LABEL/output_0
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from surgery.graph.renaming import fresh

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

FLOAT, INT32, INT64, FLOAT16 = 1, 6, 7, 10
"""Of TensorProto.DataType: the `to` of a Cast."""


class NodeBuilder:
    """Appends nodes to `nodes`, named below one scope. Who builds puts them where they belong in `view.nodes`.

    With `taken`, the names that the graph has, a name in use gets a number; without, the scope is the caller's alone.
    """

    def __init__(self, scope: str = "", taken: set[str] | None = None, nodes: list[gs.Node] | None = None) -> None:
        self.nodes = [] if nodes is None else nodes
        self._scope, self._taken = scope, taken
        self._constants: dict[str, gs.Constant] = {}
        self._count = 0

    def below(self, scope: str) -> NodeBuilder:
        """A builder of another scope, for the same nodes."""
        return NodeBuilder(scope, self._taken, self.nodes)

    def named(self, label: str) -> str:
        """A name below the scope that is not in use; the scope itself for no label."""
        name = f"{self._scope}/{label}" if self._scope and label else label or self._scope
        return name if self._taken is None or not label else fresh(name, self._taken)

    def __call__(
        self, op: str, inputs: list[Any], dtype: Any, shape: Any, label: str = "", **attributes: Any
    ) -> gs.Variable:
        """A node of the standard domain; without a label it is numbered. Returns its result.

        `dtype` is numpy's; a result without a shape gets no value_info.
        """
        self._count += 1
        label = label or f"{op}_{self._count}"
        return self.into(self.variable(f"{label}/output_0", dtype, shape), op, inputs, label, **attributes)

    def into(self, result: gs.Variable, op: str, inputs: list[Any], label: str = "", **attributes: Any) -> gs.Variable:
        """The same for a result that is there, and that no other node gives any more. Returns it."""
        import onnx_graphsurgeon as gs

        result.inputs.clear()
        self.nodes.append(gs.Node(op, self.named(label), attributes, inputs, [result]))
        return result

    def variable(self, label: str, dtype: Any, shape: Any) -> gs.Variable:
        """A value below the scope, which no node gives yet."""
        import numpy as np
        import onnx_graphsurgeon as gs

        known = dtype is None or isinstance(dtype, int)  # the view has a number for dtypes that numpy lacks
        return gs.Variable(self.named(label), dtype=dtype if known else np.dtype(dtype), shape=shape)

    def constant(self, values: Any, dtype: Any = "int64", label: str = "") -> gs.Constant:
        """A constant named by its values, or by a label; the one that is there where the name was given before."""
        import numpy as np
        import onnx_graphsurgeon as gs

        label = label or f"constants/{values}"
        if label not in self._constants:
            self._constants[label] = gs.Constant(self.named(label), np.array(values, dtype))
        return self._constants[label]
