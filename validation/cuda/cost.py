"""What a token costs on CUDA, on paper: the bytes that decoding it moves through the GPU's memory, and its kernels.

    python -m validation.cuda.cost [NAME ...]     Markdown for docs/cuda.md; e2b and e4b, q4f16, unless others are named

Counted in the graphs that a repack makes of exports of the published sizes, whose weights are holes in files. Weights:
every initializer that is not a table of rows to look up, once a token. Caches: what attention reads and copies of them
behind a number of tokens, one row alone. Activations are left out: they are less than a hundredth. Kernels: nodes that
are foretold to run on CUDA and compute, before ONNX Runtime's optimizers, which join some of them.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from onnx import NodeProto, TensorProto

from fixtures.build import find_fixture, find_precisions, graphs
from fixtures.precision import Reading
from fixtures.sidecars import write_sidecars
from surgery.architecture import Architecture
from surgery.attention.kv_wiring import AttentionNodes, attention_nodes
from surgery.cuda.layering import stays_on_cpu
from surgery.cuda.prediction import predict
from surgery.folder.building import plan
from surgery.graph.model import Model
from surgery.source.export import Export, open_export
from validation.cuda.correctness import FORMS

CARDS = {"H200": 4800e9, "L4": 300e9, "RTX 4060": 272e9}
"""Bytes a second of the GPU's memory, by NVIDIA's data sheets."""
SHOWN = ("aliased", "unique", "fast")
"""Forms whose bytes differ: `host` is `unique` with the rows of its tables on the way."""
CONTEXTS = (128, 1024, 4096)
LAUNCHES = (2e-6, 5e-6, 10e-6)
"""Seconds from one kernel to the next, supposed: what decoding comes to if the GPU waits for launches."""
_VIEWS = ("Reshape", "Unsqueeze", "Squeeze", "Flatten", "Identity")
_LOOKUPS = ("Gather", "GatherBlockQuantized")
_BITS: dict[int, int] = {
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.FLOAT16: 16,
    TensorProto.INT64: 64,
    TensorProto.UINT8: 8,
}
_HALF = 2
"""Bytes of a float16."""


@dataclass(frozen=True, slots=True)
class TokenCost:
    """One graph. `weights` and `rows` in bytes a token; `rows` are looked up, `host_rows` of them in host memory and
    copied. `held` are bytes of caches that are read behind a token in view, `window` of how many it is at most."""

    weights: int
    rows: int
    host_rows: int
    layers: tuple[LayerCost, ...]
    kernels: int

    def bytes_behind(self, tokens: int) -> int:
        """Bytes that decoding one token behind `tokens` moves through the GPU's memory."""
        return self.weights + self.rows - self.host_rows + sum(layer.bytes_behind(tokens) for layer in self.layers)


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One layer's caches. `read`: bytes for each token that attention looks at, `window` tokens at most (0: all).
    `copied`: bytes for each token so far, whether it is looked at or not."""

    read: int
    window: int
    copied: int

    def bytes_behind(self, tokens: int) -> int:
        return self.read * (min(tokens, self.window) if self.window else tokens) + self.copied * tokens


def cost_of(model: Model, arch: Architecture, *, in_place: bool) -> TokenCost:
    """What a merged graph costs. `in_place`: past and present are one buffer, so that no cache is copied."""
    weights = {tensor.name: _nbytes(tensor) for tensor in model.graph.initializer}
    heights = {tensor.name: tensor.dims[0] if tensor.dims else 1 for tensor in model.graph.initializer}
    looked_up = [node for node in model.graph.node if node.op_type in _LOOKUPS and heights.get(node.input[0], 0) > 1]
    tables = {name for node in looked_up for name in node.input if heights.get(name, 0) == heights[node.input[0]]}
    whole = {
        name for node in model.graph.node if not _is_one(node, looked_up) for name in node.input if name in weights
    }
    rows = {name: weights[name] // heights[name] for name in tables}
    host = {name for node in looked_up if stays_on_cpu(node) for name in node.input if name in tables}
    run = {each.node for each in predict(model).on("cuda")}
    computing = [node for node in model.graph.node if node.name in run and node.op_type not in _VIEWS]
    written = {value.name for value in model.graph.output}
    layers = tuple(
        _layer(arch, index, core, not in_place and f"present.{index}.key" in written)
        for index, core in enumerate(attention_nodes(model.graph))
    )
    return TokenCost(
        sum(weights[name] for name in whole),
        sum(rows.values()),
        sum(rows[name] for name in host),
        layers,
        len(computing),
    )


def _is_one(node: NodeProto, nodes: list[NodeProto]) -> bool:
    return any(node is other for other in nodes)


def _layer(arch: Architecture, index: int, core: AttentionNodes, copies: bool) -> LayerCost:
    """A fused layer reads what is in view; an unfused one reads all, writes it once for each query head, reads that.
    `copies`: a new cache is written each time, of the old one or of another layer's."""
    layer = arch.layers[index]
    row = 2 * layer.head_size * _HALF  # a head's key and value
    copied = 2 * row * layer.kv_heads if copies else 0
    if core.mixed is None:
        return LayerCost(row * layer.kv_heads, layer.window or 0, copied)
    return LayerCost(row * (layer.kv_heads + 2 * arch.attention_heads), 0, copied)


def _nbytes(tensor: TensorProto) -> int:
    elements: int = math.prod(tensor.dims)
    return elements * _BITS.get(tensor.data_type, 32) // 8


def export_of_holes(name: str, precision: str, root: Path) -> Export:
    """An export whose data files have their sizes, and take no room."""
    fixture = find_fixture(name)
    (wanted,) = find_precisions(fixture, precision)
    (root / "onnx").mkdir(parents=True)
    for graph in graphs(fixture, wanted, Reading(), fixture.weights()):
        (root / "onnx" / f"{graph.stem}.onnx").write_bytes(graph.model().SerializeToString())
        for file, size in graph.sizes().items():
            (root / "onnx" / file).touch()
            os.truncate(root / "onnx" / file, size)
    write_sidecars(root, fixture, {})
    return open_export(root)


def costs(name: str, precision: str = "q4f16") -> dict[str, TokenCost]:
    """Form -> what a token costs."""
    with tempfile.TemporaryDirectory(prefix="gemma4-surgery-") as folder:
        export = export_of_holes(name, precision, Path(folder) / name)
        pair = export.pair(precision)
        found = {}
        for form, recipe in FORMS.items():
            model, _ = plan(pair, export, recipe(pair.embed))
            found[form] = cost_of(model, export.architecture, in_place=form == "fast")
        return found


def main() -> None:
    for name in sys.argv[1:] or ("e2b", "e4b"):
        print(table(name, costs(name)))


def table(name: str, found: dict[str, TokenCost]) -> str:
    """Two Markdown tables: what there is to do for a token; and what bytes alone allow."""
    launched = " | ".join(f"tokens/s at {1e6 * each:.0f} µs a kernel" for each in LAUNCHES)
    lines = [
        f"### {name.upper()}, q4f16\n",
        f"| form | weights | rows looked up | of these in host memory | kernels | {launched} |",
        "|---|---|---|---|---|" + "---|" * len(LAUNCHES),
    ]
    for form, cost in found.items():
        most = [f"{1 / (each * cost.kernels):,.0f}" for each in LAUNCHES]
        first = [form, f"{cost.weights / 1e9:.3f} GB", f"{cost.rows:,} B", f"{cost.host_rows:,} B", f"{cost.kernels:,}"]
        lines.append(f"| {' | '.join([*first, *most])} |")
    cards = " | ".join(f"tokens/s, {card}" for card in CARDS)
    lines += [f"\n| form | behind tokens | bytes a token | {cards} |", "|---|---|---|" + "---|" * len(CARDS)]
    for form in SHOWN:
        for n in CONTEXTS:
            moved = found[form].bytes_behind(n)
            most = [f"{speed / moved:,.0f}" for speed in CARDS.values()]
            lines.append(f"| {form} | {n:,} | {moved / 1e9:.3f} GB | {' | '.join(most)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
