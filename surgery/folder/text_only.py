"""The text-only repack that people publish: two graphs of one precision, and nothing of images and sound.

    config.json                               the text model's settings one level up, and as `text_config` too
    generation_config.json, tokenizer.json, tokenizer_config.json, chat_template.jinja, LICENSE ...
    onnx/embed_tokens{_PRECISION}.onnx        as the source has them, with their data files
    onnx/decoder_model_merged{_PRECISION}.onnx
    README.md, manifest.json

What reads it: a loop of two sessions (surgery.runtime.two_graphs), and transformers.js. The latter finds `gemma4` alone
among its models, takes the layers from `text_config`, and opens two graphs, not one named `model`, where the
architecture ends in `ForConditionalGeneration`; `gemma4_text` with `Gemma4ForCausalLM` is `Unsupported model type`
there (4.3.1, each form tried; python -m validation.transformers_js tries this one). transformers reads it as a
Gemma4Config without towers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from passes.base import apply
from passes.prune_vocabulary import PruneVocabulary
from surgery.architecture import text_config
from surgery.files.atomic import ToDict, refuse_existing, refuse_holding, require_space, staged_folder
from surgery.folder.genai_config import (
    COPIED,
    check_side_files,
    copy_side_files,
    write_json,
    write_text,
    write_text_files,
)
from surgery.folder.manifest import NAME as MANIFEST_FILE
from surgery.folder.manifest import manifest, refuse_foreign
from surgery.folder.model_card import CARD_FILE, model_card
from surgery.folder.publishing import Published
from surgery.graph.external_data import check_data_name
from surgery.graph.model import Model
from surgery.graph.quantised_weights import check_quantised
from surgery.graph.weight_writing import Placed, Progress, unlinkable, write_data_file
from surgery.source.export import DECODER, DTYPES, EMBED, Export, GraphPair
from surgery.source.kept_tokens import VOCABULARY_FILE

GRAPHS = "onnx"
"""The folder of the graphs, where transformers.js looks for them."""

Proof = TypeVar("Proof")
Proof_co = TypeVar("Proof_co", covariant=True)

_LEFT_OUT = ("vision_config", "audio_config", "text_config", "transformers.js_config")
_CLASSES = {
    "gemma4": "Gemma4ForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma3n": "Gemma3nForConditionalGeneration",
}


@dataclass(frozen=True)
class Stripped(Generic[Proof_co]):
    """What a strip came to. `left_out` are files of a local source and their bytes; `proof` is what the check
    returned."""

    folder: Path
    precision: str
    placed: tuple[Placed, ...]
    left_out: Mapping[str, int]
    proof: Proof_co | None
    published: Published | None = None

    def to_dict(self: Stripped[ToDict]) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        return {
            "folder": str(self.folder),
            "precision": self.precision,
            "weights": [file.to_dict() for file in self.placed],
            "left_out": dict(self.left_out),
            "proof": self.proof.to_dict() if self.proof is not None else None,
            **({"published": self.published.to_dict()} if self.published else {}),
        }


def build_text_only(
    export: Export,
    pair: GraphPair,
    target: Path,
    *,
    weights: Literal["copy", "link"] = "copy",
    force: bool = False,
    started: Callable[[int], None] | None = None,
    progress: Progress | None = None,
    check: Callable[[Path], Proof] | None = None,
) -> Stripped[Proof]:
    """Write `target`: it appears complete and checked, or not at all.

    `started` is told the number of weight bytes, `progress` each portion placed. `check` is called with the staged
    folder; what it raises keeps the target from appearing. Raises SurgeryError for everything that a user can mend.
    """
    may_replace = refuse_foreign if force else None
    refuse_existing(target, may_replace)
    graphs = _graphs(pair)
    files = _data_files(graphs)
    ends = {use.file: use.end for use in files.values()}
    sources = list(dict.fromkeys(file for graph in graphs for file in graph.source_files()))
    refuse_holding(target, (export.root, pair.embed, pair.decoder, *sources))
    check_side_files(export)
    new = sum(size for graph in graphs for size in graph.converted_files().values())
    parent, total = target.absolute().parent, sum(ends.values()) + new
    require_space(parent, unlinkable(ends, parent) + new if weights == "link" else total)
    if started is not None:
        started(total)
    with staged_folder(target, may_replace=may_replace) as stage:
        (stage / GRAPHS).mkdir()
        below = []
        if pair.kept is None:
            for location, use in files.items():
                at = stage / GRAPHS / location
                below.append(write_data_file(use.file, use.graphs[0].open_data, at, weights, use.end, progress))
            for graph in graphs:
                with (stage / GRAPHS / graph.path.name).open("xb") as writer:
                    writer.write(graph.to_bytes())
        else:
            for graph in graphs:
                below += graph.write(stage / GRAPHS, graph.path.name, weights=weights, progress=progress)
            copy_side_files(export, stage, [VOCABULARY_FILE])
        below = [replace(placed, location=f"{GRAPHS}/{placed.location}") for placed in below]
        counts = {graph.path.name: len(graph.used_weight_files() | graph.converted_files()) for graph in graphs}
        write_json(stage / "config.json", two_graph_config(export, pair, counts))
        write_text_files(export, stage)
        recipe = f"{PruneVocabulary.name}{{keep={VOCABULARY_FILE}}}" if pair.kept is not None else ""
        write_text(
            stage / CARD_FILE, model_card(export, pair, "two-graph", below, recipe=recipe, rewritten=bool(recipe))
        )
        write_json(stage / MANIFEST_FILE, manifest(stage, export, pair, recipe, weights, below, sources))
        left_out = _left_out(export, stage)
        proof = check(stage) if check is not None else None
    return Stripped(target, pair.precision, tuple(below), left_out, proof)


def _graphs(pair: GraphPair, *, planned: bool = False) -> list[Model]:
    """The two graphs as they are to be: the source's, less the rows of tokens that do not stay. Those of a plan may
    have no weights yet."""
    graphs = [Model.open(path) for path in (pair.embed, pair.decoder)]
    for graph in graphs if not planned else ():
        graph.check_weights()
        check_quantised(graph)
    if pair.kept is None:
        return graphs
    return [apply(graph, [PruneVocabulary(pair.kept)])[0].with_data_names(graph.path.name) for graph in graphs]


@dataclass(frozen=True)
class _DataFile:
    """A data file, how much of it is used, and by which graphs."""

    file: Path
    end: int
    graphs: tuple[Model, ...]


def _data_files(graphs: Sequence[Model]) -> dict[str, _DataFile]:
    """The data files of the graphs by name. Raises WeightError where one is missing, or its name is none for data."""
    found: dict[str, _DataFile] = {}
    for graph in graphs:
        ends = graph.data_ends()
        for location, file in graph.used_weight_files().items():
            check_data_name(location, graph.path)
            known = found.get(location, _DataFile(file, 0, ()))
            found[location] = _DataFile(file, max(known.end, ends[file]), (*known.graphs, graph))
    return found


def planned_text_only(export: Export, pair: GraphPair) -> dict[str, int | None]:
    """The files of the folder and their bytes; None for what is written anew, or is not there yet to be measured."""
    found: dict[str, int | None] = dict.fromkeys(("config.json", "tokenizer_config.json", CARD_FILE, MANIFEST_FILE))
    found |= {name: _size(export.root / name) for name in COPIED if export.file(name)}
    for graph in _graphs(pair, planned=True):
        found[f"{GRAPHS}/{graph.path.name}"] = _size(graph.path) if pair.kept is None else None
        ends = graph.data_ends()
        used = graph.used_weight_files().items()
        found |= {f"{GRAPHS}/{location}": ends[file] if file.is_file() else None for location, file in used}
        found |= {f"{GRAPHS}/{location}": size for location, size in graph.converted_files().items()}
    if pair.kept is not None:
        found[VOCABULARY_FILE] = None
    return dict(sorted(found.items()))


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def two_graph_config(export: Export, pair: GraphPair, data_files: Mapping[str, int]) -> dict[str, Any]:
    """config.json of the text model in two graphs. `data_files` is the number of them by the name of the graph."""
    text = {key: value for key, value in text_config(export.config).items() if key not in _LEFT_OUT}
    config = {**text, **{key: value for key, value in export.config.items() if key not in _LEFT_OUT}}
    family = export.architecture.family
    if family != "gemma3n":  # the number is 0 where it is absent, and readers cut `layer_types[:-0]`, which is nothing
        for part in (text, config):
            if part.get("num_kv_shared_layers") == 0:
                del part["num_kv_shared_layers"]
    if not isinstance(export.config.get("text_config"), Mapping):  # a text model's own: the names are another class's
        config |= {"architectures": [_CLASSES[family]], "model_type": family}
        text["model_type"] = f"{family}_text"
    return {
        **config,
        "text_config": text,
        "transformers.js_config": _transformers_js(export.config.get("transformers.js_config"), pair, data_files),
    }


def _transformers_js(found: object, pair: GraphPair, data_files: Mapping[str, int]) -> dict[str, Any]:
    """The source's settings, cut down to the precision that is there, which becomes the default."""
    settings = dict(found) if isinstance(found, Mapping) else {}
    embed, decoder = (DTYPES.get(name, name) for name in (pair.others.get(EMBED, pair.precision), pair.precision))
    caches = settings.get("kv_cache_dtype")
    if isinstance(caches, Mapping):
        settings["kv_cache_dtype"] = {key: value for key, value in caches.items() if key == decoder}
    dtype = decoder if embed == decoder else {EMBED: embed, DECODER: decoder}
    return {**settings, "dtype": dtype, "use_external_data_format": dict(sorted(data_files.items()))}


def _left_out(export: Export, stage: Path) -> dict[str, int]:
    """Files of a local source that have no namesake in the folder. Of a repository nothing else was fetched."""
    if export.repo is not None:
        return {}
    files = sorted(path for path in export.root.rglob("*") if path.is_file())
    names = {path.relative_to(export.root): path.stat().st_size for path in files}
    here = {path.name for path in stage.rglob("*")}
    return {name.as_posix(): size for name, size in names.items() if name.name not in here}
