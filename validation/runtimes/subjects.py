"""The folders under test: fixtures repacked in each KV layout, made by the environment that runs the matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fixtures.build import build
from passes.presets import accuracy, compatible, fast, lut_products
from passes.recipe import Recipe, recipe_text
from surgery.choices import KVLayout, OnnxRuntime, Preset, Target
from surgery.folder.building import build_folder
from surgery.graph.model import Model
from surgery.source.export import GraphPair, open_export


@dataclass(frozen=True, slots=True)
class Layout:
    """How the caches are laid out. For `genai-0.12` all of them have one size; `fast` updates them in place."""

    name: str
    kv_layout: KVLayout
    runtime: Target = "genai-0.14"
    fast: OnnxRuntime | None = None

    def recipe(self, pair: GraphPair) -> Recipe:
        """What `repack` applies on the CPU, but that products of 4 bits get no accuracy level."""
        level = self.level(pair)
        if self.fast is None:
            return *compatible(pair.embed, self.kv_layout, self.runtime), *level
        return (
            *fast(pair.embed, "cpu", self.fast),
            *level,
            *lut_products(Model.open(pair.decoder), level, "auto", "fast"),
        )

    def level(self, pair: GraphPair) -> Recipe:
        """The accuracy level of a QAT export, which `repack` sets; the others have their source's numbers."""
        preset: Preset = "compatible" if self.fast is None else "fast"
        return accuracy(Model.open(pair.decoder), "auto", preset, "cpu") if pair.precision == "q2f16" else ()

    @property
    def folder(self) -> str:
        return f"{self.kv_layout}-{self.runtime}" + (f"-fast-{self.fast}" if self.fast else "")


LAYOUTS = (
    Layout("aliased", "aliased"),
    Layout("unique", "unique"),
    Layout("aliased, of one size", "aliased", "genai-0.12"),
    Layout("fast", "unique", fast="1.31"),
    Layout("fast, for ONNX Runtime 1.27", "unique", fast="1.27"),
)

_PRECISIONS = {
    "tiny-e2b": ("fp32", "fp16", "q4", "q4f16", "quantized"),
    "tiny-e4b": ("fp32", "q4f16"),
    "tiny-31b": ("fp32", "q4f16"),
    "tiny-e2b-qat": ("q2f16",),
    "tiny-e4b-qat": ("q2f16",),
}
"""tiny-e2b in all of them; the others, which differ in layers and KV heads, in the two extremes."""

FIXTURES = tuple(_PRECISIONS)

_LIGHT = {"tiny-e2b": ("q4f16",), "tiny-31b": ("fp32",)}


@dataclass(frozen=True, slots=True)
class Subject:
    """A folder under test, and the pair that it was made of. `made` names the fixture and its precision, `level` sets
    the accuracy level that the folder has."""

    made: str
    layout: str
    folder: Path
    pair: GraphPair
    level: Recipe = ()


def make_subjects(root: Path, light: bool, fixtures: Sequence[str] = FIXTURES) -> list[Subject]:
    """Build the exports and repack them. A light matrix has one E2B and, for its mixed KV heads, one 31B."""
    chosen = _LIGHT if light else {name: _PRECISIONS[name] for name in fixtures}
    return [subject for name, precisions in chosen.items() for subject in _of_fixture(root, name, precisions)]


def _of_fixture(root: Path, name: str, precisions: Iterable[str]) -> Iterable[Subject]:
    source = root / "exports" / name
    for precision in precisions:
        build(name, precision, source, force=True)
    export = open_export(source)
    for precision in precisions:
        pair = export.pair(precision)
        for layout in LAYOUTS:
            made = f"{name} {precision}"
            folder = root / "folders" / f"{name}-{precision}-{layout.folder}"
            recipe = layout.recipe(pair)
            build_folder(
                export, pair, recipe, folder, recipe_text=recipe_text(recipe), runtime=layout.runtime, force=True
            )
            yield Subject(made, layout.name, folder, pair, layout.level(pair))
