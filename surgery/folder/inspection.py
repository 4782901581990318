"""What is in an ONNX file, an export or a GenAI folder: facts for a reader, without reading a weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery.architecture import Architecture, Layer, architecture, read_config
from surgery.attention.kv_wiring import attentions
from surgery.errors import ExportError, SurgeryError
from surgery.folder.genai_config import CONFIG_FILE, MODEL_FILE
from surgery.graph.external_data import is_external, tensors
from surgery.graph.metadata_props import properties
from surgery.graph.model import Model
from surgery.graph.tensor_types import tensor_type
from surgery.source.export import DECODER, EMBED, ENCODERS, Export, GraphPair, open_export
from surgery.source.layer_table import layer_entry, read_layer_table


@dataclass(frozen=True)
class WeightFile:
    """One data file: bytes that tensors refer to, and bytes that the file has (None where it is missing).

    `here` is false for one that is on the Hub alone.
    """

    location: str
    referenced: int
    size: int | None
    here: bool = True


@dataclass(frozen=True)
class LayerRow:
    """A decoder layer as the graph has it: its attention's operator, and the cache that the wiring ends at."""

    layer: Layer
    operator: str
    past: str | None
    present: str | None


@dataclass(frozen=True)
class Inspection:
    """One graph. `inputs` and `outputs` are (name, type); sizes in bytes; `problem` is the first fault of the
    weights."""

    path: Path
    ir_version: int
    opsets: Mapping[str, int]
    producer: str
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    operators: Mapping[str, int]
    initializers: int
    inline_bytes: int
    weight_files: tuple[WeightFile, ...]
    layers: tuple[LayerRow, ...]
    metadata: Mapping[str, str]
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        return {
            "path": str(self.path),
            "ir_version": self.ir_version,
            "opsets": dict(self.opsets),
            "producer": self.producer,
            "inputs": dict(self.inputs),
            "outputs": dict(self.outputs),
            "operators": dict(self.operators),
            "initializers": self.initializers,
            "inline_bytes": self.inline_bytes,
            "weight_files": [
                {"location": f.location, "referenced": f.referenced, "size": f.size} for f in self.weight_files
            ],
            "layers": [_layer_dict(row) for row in self.layers],
            "metadata": dict(self.metadata),
            "problem": self.problem,
        }


def _layer_dict(row: LayerRow) -> dict[str, Any]:
    return {**layer_entry(row.layer), "operator": row.operator, "past": row.past, "present": row.present}


def inspect_model(path: Path, arch: Architecture | None = None) -> Inspection:
    """Facts of one ONNX file. Without an architecture the layers come from the model's own table, if it has one."""
    model = Model.open(path, arch or nearby_architecture(path))
    graph = model.graph
    external, inline = [], 0
    for tensor in tensors(model.proto):
        if is_external(tensor):
            external.append(tensor)
        else:
            inline += len(tensor.raw_data)
    return Inspection(
        path=path,
        ir_version=model.proto.ir_version,
        opsets={entry.domain or "ai.onnx": entry.version for entry in model.proto.opset_import},
        producer=f"{model.proto.producer_name} {model.proto.producer_version}".strip(),
        inputs=tuple((value.name, str(tensor_type(value) or "not a tensor")) for value in graph.input),
        outputs=tuple((value.name, str(tensor_type(value) or "not a tensor")) for value in graph.output),
        operators=dict(Counter(node.op_type for node in graph.node).most_common()),
        initializers=len(graph.initializer),
        inline_bytes=inline,
        weight_files=_weight_files(model),
        layers=_layers(model),
        metadata=properties(model.proto),
        problem=_problem(model),
    )


def nearby_architecture(path: Path) -> Architecture | None:
    """The architecture in a config.json beside an ONNX file or one folder up; None where none is known."""
    for folder in (path.parent, path.parent.parent):
        if (folder / "config.json").is_file():
            try:
                return architecture(read_config(folder / "config.json"))
            except SurgeryError:
                return None  # some other model's config: inspect shows what it can without it
    return None


def _weight_files(model: Model) -> tuple[WeightFile, ...]:
    referenced: Counter[str] = Counter()
    for location in model.weight_files:
        referenced[location] = 0
    try:
        for ref in model.weight_references():
            referenced[ref.location] += ref.length
    except SurgeryError:
        pass  # shown as `problem`
    return tuple(WeightFile(name, count, _size(model.weight_files[name])) for name, count in referenced.items())


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None  # a name that no file can have


def _problem(model: Model) -> str | None:
    try:
        model.check_weights()
    except SurgeryError as error:
        return str(error)
    return None


def _layers(model: Model) -> tuple[LayerRow, ...]:
    layers = read_layer_table(model) or (model.architecture.layers if model.architecture else ())
    cores = attentions(model.graph)
    if not cores:
        return ()
    rows = []
    for layer, core in zip(layers, cores, strict=False):
        cache = core.key
        rows.append(LayerRow(layer, core.operator, cache.past if cache else None, cache.present if cache else None))
    return tuple(rows)


@dataclass(frozen=True)
class ExportInspection:
    """An export: its precisions with the bytes of their files, and the graphs of one of them by role."""

    export: Export
    sizes: Mapping[str, int]
    shown: str
    roles: Mapping[str, Inspection]

    @property
    def graphs(self) -> tuple[Inspection, ...]:
        """The graphs, in the order of their roles."""
        return tuple(self.roles.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        encoders = {role: graph.to_dict() for role, graph in self.roles.items() if role in ENCODERS.values()}
        return {
            "folder": str(self.export.root),
            "family": self.export.architecture.family,
            "layers": len(self.export.architecture.layers),
            "owners": len(self.export.architecture.kv_sources),
            "precisions": dict(self.sizes),
            "shown": self.shown,
            "other_precisions": dict(self.export.pairs[self.shown].others),
            "embed": self.roles[EMBED].to_dict(),
            "decoder": self.roles[DECODER].to_dict(),
            **encoders,
        }


@dataclass(frozen=True)
class FolderInspection:
    """A GenAI folder: its configuration and its graph; `others` by section of the configuration, where it has more."""

    folder: Path
    config: Mapping[str, Any]
    graph: Inspection
    others: Mapping[str, Inspection] = field(default_factory=dict)

    @property
    def graphs(self) -> tuple[Inspection, ...]:
        """The decoder, then the others in the order of genai_config.json."""
        return (self.graph, *self.others.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        return {
            "folder": str(self.folder),
            "genai_config": dict(self.config),
            "model": self.graph.to_dict(),
            **{section: graph.to_dict() for section, graph in self.others.items()},
        }


def inspect_path(
    path: Path, precision: str | None = None, sizes: Mapping[str, int | None] | None = None
) -> Inspection | ExportInspection | FolderInspection:
    """Look into an ONNX file, an export or a GenAI folder, of which `sizes` are those of files that are not here. Raises
    ExportError for anything else."""
    if path.is_file():
        return inspect_model(path)
    if (path / CONFIG_FILE).is_file():
        config = read_config(path / CONFIG_FILE)
        names = _graph_files(config)
        graphs = {
            section: _sized(inspect_model(path / name), path / name, path, sizes or {})
            for section, name in {"decoder": MODEL_FILE, **names}.items()
        }
        return FolderInspection(path, config, graphs.pop("decoder"), graphs)
    if not path.is_dir():
        raise ExportError(f"{path} does not exist", hint="an .onnx file, an export or a GenAI folder can be inspected")
    export = open_export(path)
    pair = export.pair(precision) if precision else export.best("cpu")[0]
    roles = {
        name: {role: _below(graph, path) for role, graph in _graphs(one).items()} for name, one in export.pairs.items()
    }
    here = {_below(file, path): file.stat().st_size for file in pair.embed.parent.iterdir() if file.is_file()}
    here |= {_below(file, path): file.stat().st_size for file in pair.decoder.parent.iterdir() if file.is_file()}
    return inspect_export(export, pair, roles, here)


def inspect_export(
    export: Export, pair: GraphPair, roles: Mapping[str, Mapping[str, str]], sizes: Mapping[str, int | None]
) -> ExportInspection:
    """The graphs of one pair, and what every precision takes: `roles` names the graphs of each by role, `sizes` are
    those of all files, below the export; of weights that are not here they are the only thing that is known.
    """
    graphs = {
        role: _sized(inspect_model(graph, export.architecture), graph, export.root, sizes)
        for role, graph in _graphs(pair).items()
    }
    totals = {
        name: sum(size or 0 for file, size in sizes.items() if any(file.startswith(graph) for graph in held.values()))
        for name, held in roles.items()
    }
    return ExportInspection(export, totals, pair.precision, graphs)


def _sized(found: Inspection, graph: Path, root: Path, sizes: Mapping[str, int | None]) -> Inspection:
    """Where a data file is not here, what is said of its size."""

    def told(file: WeightFile) -> WeightFile:
        said = sizes.get(_below(graph.parent / file.location, root))
        return replace(file, size=said, here=False) if file.size is None and said is not None else file

    files = tuple(told(file) for file in found.weight_files)
    return replace(found, weight_files=files, problem=found.problem if all(file.here for file in files) else None)


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _graphs(pair: GraphPair) -> dict[str, Path]:
    encoders = {ENCODERS[modality]: path for modality, path in pair.encoders.items()}
    return {EMBED: pair.embed, DECODER: pair.decoder, **encoders}


def _graph_files(config: Mapping[str, Any]) -> dict[str, str]:
    """Section of a configuration -> its graph, for each section that names one."""
    model = config.get("model")
    sections = model.items() if isinstance(model, dict) else ()
    return {name: str(part["filename"]) for name, part in sections if isinstance(part, dict) and part.get("filename")}
