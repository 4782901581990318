"""Every pass is linear in the graph: its time at 1, 5 and 20 thousand nodes, and with 4,000 readers of one value.

    python -m benchmarks.passes

The graphs are decoders of the exporter's form with more layers. "4,000 readers" adds that many nodes that read the
value which fold-logits-to-keep rewires. The table is Markdown; the best of three runs is given.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from onnx import helper

from fixtures.build import find_fixture, graphs
from fixtures.precision import PRECISIONS, Reading
from fixtures.sidecars import model_config
from passes import AnnotateHeadSizes, ExpandSharedKV, FoldLogitsToKeep, MergeEmbeddings, RenameIO
from passes.base import Pass, apply
from surgery.architecture import architecture
from surgery.graph.model import Model

SIZES = {"1k": 23, "5k": 128, "20k": 520}
"""Label -> layers that give about so many nodes."""

READERS = 4000
ROUNDS = 3


def pair_of(layers: int, folder: Path) -> tuple[Path, Model]:
    """An embedding graph on disk and a decoder of `layers` layers, with its architecture."""
    fixture = find_fixture("tiny-e2b")
    pattern = fixture.architecture.layer_types[:5]
    types = (pattern * (layers // 5 + 1))[:layers]
    types = (*types[:-1], pattern[-1])
    sizes = dataclasses.replace(fixture.architecture, layer_types=types, num_kv_shared_layers=layers // 2)
    larger = dataclasses.replace(fixture, architecture=sizes)
    embed, decoder = graphs(larger, PRECISIONS["q4"], Reading(), find_fixture("e2b").weights())
    embed.write(folder)
    decoder.write(folder)
    model = Model.open(folder / f"{decoder.stem}.onnx", architecture(model_config(larger, {})))
    return folder / f"{embed.stem}.onnx", model


def add_readers(model: Model) -> None:
    """Let READERS more nodes read the value that reaches lm_head."""
    kept = next(node.output[0] for node in model.graph.node if node.op_type == "Slice" and "lm_head" in node.name)
    for index in range(READERS):
        model.graph.node.append(helper.make_node("Identity", [kept], [f"reader_{index}"], name=f"reader_{index}"))


def seconds(embed: Path, model: Model) -> dict[str, float]:
    """Time of each pass of the main recipe, and of keep=all, which rewires every reader."""
    steps: list[Pass] = [MergeEmbeddings(embed), FoldLogitsToKeep(), RenameIO(), ExpandSharedKV(), AnnotateHeadSizes()]
    best: dict[str, float] = {}
    for _ in range(ROUNDS):
        _, outcomes = apply(model, steps)
        _, rewired = apply(model, [FoldLogitsToKeep(keep="all")])
        found = {outcome.name: outcome.seconds for outcome in outcomes}
        found["fold-logits-to-keep{keep=all}"] = rewired[0].seconds
        best = {name: min(taken, best.get(name, taken)) for name, taken in found.items()}
    return best


def main() -> None:
    columns: dict[str, dict[str, float]] = {}
    heads = []
    with tempfile.TemporaryDirectory() as work:
        for label, layers in SIZES.items():
            folder = Path(work) / label
            folder.mkdir()
            embed, model = pair_of(layers, folder)
            heads.append(f"{len(model.graph.node):,} nodes")
            columns[label] = seconds(embed, model)
            if label == "1k":
                add_readers(model)
                heads.append(f"{len(model.graph.node):,} nodes, {READERS:,} readers of one value")
                columns["readers"] = seconds(embed, model)
    print(f"| pass | {' | '.join(heads)} |")
    print("|---|" + "---|" * len(heads))
    for name in columns["1k"]:
        print(f"| {name} | {' | '.join(f'{column[name] * 1000:.0f} ms' for column in columns.values())} |")


if __name__ == "__main__":
    main()
