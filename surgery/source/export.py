"""The source: which graphs, precisions and side files a folder in the community's layout holds.

    FOLDER/config.json, generation_config.json, tokenizer.json, tokenizer_config.json, chat_template.jinja, ...
    FOLDER/onnx/embed_tokens{_PRECISION}.onnx            input_ids -> inputs_embeds [, per_layer_inputs]
    FOLDER/onnx/decoder_model_merged{_PRECISION}.onnx    inputs_embeds, ... -> logits, present.*

    FOLDER/onnx/vision_encoder{_PRECISION}.onnx          pixel_values, pixel_position_ids -> image_features
    FOLDER/onnx/audio_encoder{_PRECISION}.onnx           input_features, input_features_mask -> audio_features
    FOLDER/onnx/*.onnx_data, *.onnx_data_1, ...          their weights

config.json's `transformers.js_config.dtype` may give each graph a precision of its own: that of the decoder is then the
name of them all. A flat folder, with the graphs beside config.json, is read as well; and so is the split form of
mobius:

    FOLDER/embedding/model.onnx, FOLDER/decoder/model.onnx, or FOLDER/embedding.onnx, FOLDER/decoder.onnx
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.architecture import Architecture, architecture, read_config
from surgery.choices import Modality
from surgery.errors import ExportError, nearest
from surgery.files.json_values import JsonValues
from surgery.files.safe_reading import oversized, stays_inside
from surgery.source.kept_tokens import KeptTokens

PRECISIONS = {
    "fp32": "",
    "fp16": "_fp16",
    "q4": "_q4",
    "q4f16": "_q4f16",
    "quantized": "_quantized",
    "q2f16": "_q2f16",
}
"""Precision -> suffix of the community's file names."""
DTYPES = {"quantized": "q8"}
"""Precision -> what transformers.js calls it, where it has another name for it."""

BEST = {
    "cpu": ("q4", "q4f16", "quantized", "q2f16", "fp32", "fp16"),
    "cuda": ("q4f16", "fp16"),
}
"""Provider -> precisions, best first. On CUDA, float32 attention has no GroupQueryAttention kernel (onnxruntime-gpu
1.31.1's kernel list), so only float16 activations are taken."""

LICENSES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.md", "NOTICE.txt")
"""Names under which a repository has the words that go along with its weights."""
MEDIA_FILES = ("processor_config.json", "preprocessor_config.json")
"""Hugging Face's own processor files. GenAI does not read them; what it reads is made of the first."""

ENCODERS: dict[Modality, str] = {"image": "vision_encoder", "audio": "audio_encoder"}
"""Modality -> name of the graph that turns it into features, without precision."""

EMBED, DECODER = "embed_tokens", "decoder_model_merged"
GENAI_CONFIG = "genai_config.json"
"""What makes a folder one that is repacked already."""
_SAYS = "as config.json (transformers.js_config.dtype) says"
_ROLES = (EMBED, DECODER, *ENCODERS.values())
_GRAPH = re.compile(rf"(?P<role>{'|'.join(_ROLES)})(?P<suffix>_[A-Za-z0-9]+)?\.onnx")


@dataclass(frozen=True, slots=True)
class GraphPair:
    """The two graphs of one precision, and its encoders. `others` has the precision of the graphs, by role, that
    config.json gives another one than the decoder. `kept` are the tokens that stay of it in a folder of fewer tokens:
    the graphs are then meant with the folder's ids.
    """

    precision: str
    embed: Path
    decoder: Path
    encoders: Mapping[Modality, Path] = field(default_factory=dict, hash=False)
    others: Mapping[str, str] = field(default_factory=dict, hash=False)
    kept: KeptTokens | None = None

    def encoder(self, modality: Modality) -> Path:
        """Raises ExportError where the precision has none."""
        if modality in self.encoders:
            return self.encoders[modality]
        wanted = described_graph(ENCODERS[modality], self.precision, self.others)
        raise ExportError(
            f"there is no {wanted} beside {self.decoder}",
            hint=f"leave {modality} out of --modalities, or take a precision that has one",
        )


@dataclass(frozen=True)
class Export:
    """A source folder. `pairs` is keyed by precision, in the order of PRECISIONS.

    `repo` and `revision` (a commit) say where on the Hub it came from; None for a local folder. `instead` is a folder
    whose files take the place of those of the same name.
    """

    root: Path
    config: Mapping[str, Any]
    architecture: Architecture
    pairs: Mapping[str, GraphPair]
    repo: str | None = None
    revision: str | None = None
    instead: Path | None = None

    @property
    def name(self) -> str:
        """Where it is: the repository and its commit, or the folder."""
        return str(self.root) if self.repo is None else f"{self.repo}@{self.revision}"

    def file(self, name: str) -> Path | None:
        """A side file of the export, or None where it has none. Raises ExportError for a link that leads out of it, and
        for one that is far larger than any."""
        root = self.root if self.instead is None or not (self.instead / name).is_file() else self.instead
        path = root / name
        if not path.is_file():
            return None
        _refuse_outside(path, root)
        if words := oversized(path):
            raise ExportError(f"{path} is no file of a model: {words}")
        return path

    def below(self, path: Path) -> Path:
        """A path as manifests record it: relative to the export, so that it does not depend on the machine."""
        return path.relative_to(self.root) if path.is_relative_to(self.root) else Path(path.name)

    def pair(self, precision: str) -> GraphPair:
        """Raises ExportError naming the precisions that exist."""
        if precision in self.pairs:
            return self.pairs[precision]
        known = list(self.pairs)
        raise ExportError(
            f"{self.root} has no precision {precision!r}{nearest(precision, known)}; it holds {', '.join(known)}"
        )

    def placeholder(self, modality: Modality) -> int:
        """The id of the token that features of a modality replace. Raises ExportError where config.json has none."""
        values = JsonValues(self.config, str(self.root / "config.json"), ExportError)
        return values.whole(f"{modality}_token_id", least=0, most=self.architecture.vocab_size - 1)

    def best(self, provider: str) -> tuple[GraphPair, str]:
        """The best precision for a provider, and the reason in words. Raises ExportError where none can run."""
        precision, reason = best_precision(list(self.pairs), provider, str(self.root))
        return self.pairs[precision], reason


def open_export(folder: Path, given: GraphPair | None = None) -> Export:
    """Read a source folder. `given` names the two graphs where they do not lie in the community's layout.

    Raises ExportError, with what was expected and what was found, if it is not an export.
    """
    if not folder.exists():
        raise _absent(folder)
    if not folder.is_dir():
        raise ExportError(f"{folder} is a file; the folder of an export is expected")
    _refuse_outside(folder / "config.json", folder)
    if given is None and (folder / GENAI_CONFIG).exists() and not holds_pair(folder):
        raise ExportError(
            f"{folder} is a folder for ONNX Runtime GenAI already, not an export",
            hint=f"gemma4-surgery generate {folder} Hello runs it, gemma4-surgery validate {folder} proves it; "
            "its manifest.json names the export that it was made from",
        )
    if given is None and not (folder / "config.json").exists():
        find_pairs(folder)  # what is no export at all should not hear of config.json first
    config = read_config(folder / "config.json")
    pairs = find_pairs(folder, declared_precisions(config)) if given is None else {given.precision: given}
    return Export(folder, config, architecture(config), pairs)


def _absent(folder: Path) -> ExportError:
    """A name without a folder may have been meant for the Hub, whose names have an owner."""
    bare = len(folder.parts) == 1 and folder.suffix != ".onnx"
    hint = f"a repository of the Hub is named owner/name, for example onnx-community/{folder}" if bare else None
    return ExportError(f"{folder} does not exist", hint=hint)


def _refuse_outside(path: Path, root: Path) -> None:
    if not stays_inside(path, root):
        raise ExportError(
            f"{path} is a link to {os.path.realpath(path)}, outside of the export",
            hint="put a copy in its place if you trust it",
        )


def best_precision(held: Sequence[str], provider: str, where: str) -> tuple[str, str]:
    """The best of the precisions that `where` holds, and the reason in words. Raises ExportError where none can run."""
    order = BEST[provider]
    found = next((precision for precision in order if precision in held), None)
    if found is None and provider == "cuda":
        raise ExportError(
            f"{where} holds {', '.join(held)}; CUDA needs {' or '.join(order)}: its GroupQueryAttention takes float16 "
            "only, and nobody ran 2 bits there",
            hint="add --ep cpu" + (", or --to-fp16" if {"fp32", "q4", "quantized"} & set(held) else ""),
        )
    if len(held) == 1:
        return held[0], f"{held[0]}: the only one that the export holds"
    if found is not None:
        better = order[: order.index(found)]
        absent = f" ({', '.join(better)} would be better, but the export does not hold it)" if better else ""
        return found, f"{found}: the best of {', '.join(held)} for {provider}{absent}"
    return held[0], f"{held[0]}: the first of {', '.join(held)}, none of which is known"


def holds_pair(folder: Path) -> bool:
    """Whether there are the two graphs of an export, whatever their precision."""
    graphs = _graph_folder(folder)
    if not graphs.is_dir():
        return False
    roles = _roles(path.name for path in graphs.iterdir())
    return bool(roles[EMBED] and roles[DECODER])


def _graph_folder(folder: Path) -> Path:
    return folder / "onnx" if (folder / "onnx").is_dir() else folder


def declared_precisions(config: Mapping[str, Any]) -> dict[str, str]:
    """Role -> precision, where config.json gives each graph its own; empty where it gives one for all, or none."""
    settings = config.get("transformers.js_config")
    given = settings.get("dtype") if isinstance(settings, Mapping) else None
    by_dtype = {dtype: precision for precision, dtype in DTYPES.items()}
    found = given.items() if isinstance(given, Mapping) else ()
    return {role: by_dtype.get(name, name) for role, name in found if role in _ROLES and isinstance(name, str)}


def find_pairs(folder: Path, declared: Mapping[str, str] | None = None) -> dict[str, GraphPair]:
    """The complete pairs in `folder/onnx`, or in `folder` itself, with their encoders. `declared` is what config.json
    says of the precision of each role.
    """
    graphs, declared = _graph_folder(folder), declared or {}
    names = [path.name for path in sorted(graphs.iterdir())]
    pairs = {}
    for precision, found in named_graphs(names, declared).items():
        encoders = {m: graphs / found[role] for m, role in ENCODERS.items() if role in found}
        others = other_precisions(precision, declared)
        pairs[precision] = GraphPair(precision, graphs / found[EMBED], graphs / found[DECODER], encoders, others)
    if not pairs and (split := _split_form(folder)) is not None:
        return {split.precision: split}
    if not pairs:
        raise ExportError(_no_pair(graphs, declared))
    return pairs


def named_graphs(names: Iterable[str], declared: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Precision -> role -> name, from the names of one folder's files, for each precision that has both graphs of a
    pair. A precision is the decoder's; the other graphs have the same one, but for what `declared` says.
    """
    roles = _roles(names)
    found = {}
    for precision in dict.fromkeys((*PRECISIONS, *sorted(roles[DECODER]))):
        wanted = {**dict.fromkeys(_ROLES, precision), **other_precisions(precision, declared)}
        graphs = {role: roles[role][name] for role, name in wanted.items() if name in roles[role]}
        if EMBED in graphs and DECODER in graphs:
            found[precision] = graphs
    return found


def other_precisions(precision: str, declared: Mapping[str, str]) -> dict[str, str]:
    """Role -> precision of the graphs that go with a decoder of `precision` and are not of the same."""
    if declared.get(DECODER) != precision:
        return {}
    return {role: other for role, other in declared.items() if other != precision}


def described_graph(role: str, precision: str, others: Mapping[str, str]) -> str:
    """The graph that goes with a decoder of `precision`, in words."""
    if role not in others:
        return _described_graph(role, precision)
    return f"{_described_graph(role, others[role])}, {_SAYS},"


def _described_graph(role: str, precision: str) -> str:
    return f"{role} of precision {precision!r}"


def _split_form(folder: Path) -> GraphPair | None:
    """The two graphs of a package by mobius; their one precision is called `split`."""
    for name in ("{}/model.onnx", "{}.onnx"):
        embed, decoder = folder / name.format("embedding"), folder / name.format("decoder")
        if embed.is_file() and decoder.is_file():
            return GraphPair("split", embed, decoder)
    return None


def _roles(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Role -> precision -> name."""
    found: dict[str, dict[str, str]] = {role: {} for role in _ROLES}
    for name in names:
        if match := _GRAPH.fullmatch(name):
            found[match["role"]][_precision(match["suffix"])] = name
    return found


def _precision(suffix: str | None) -> str:
    by_suffix = {suffix: precision for precision, suffix in PRECISIONS.items()}
    return by_suffix.get(suffix or "", (suffix or "").lstrip("_"))


def expected_pair(declared: Mapping[str, str]) -> str:
    """The two graphs that an export has to hold, in words."""
    if (precision := declared.get(DECODER)) is None:
        return f"{EMBED}*.onnx and {DECODER}*.onnx of the same precision"
    return (
        f"{_described_graph(EMBED, declared.get(EMBED, precision))} and {_described_graph(DECODER, precision)}, {_SAYS}"
    )


def _no_pair(graphs: Path, declared: Mapping[str, str]) -> str:
    roles = _roles(path.name for path in graphs.iterdir())
    embeds, decoders = roles[EMBED], roles[DECODER]
    expected = f"an export holds {expected_pair(declared)}"
    if embeds or decoders:
        one = EMBED if embeds else DECODER
        both = f"{EMBED} of {', '.join(embeds)} but {DECODER} of {', '.join(decoders)}"
        return f"{graphs} has {both if embeds and decoders else f'only {one} graphs'}; {expected}"
    others = sorted(path.name for path in graphs.glob("*.onnx"))[:3]
    return f"{graphs} has {', '.join(others) if others else 'no .onnx file'}; {expected}"
