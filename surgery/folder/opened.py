"""A GenAI folder as it lies there: its configuration, its graphs without their weights, its layer table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.architecture import Layer
from surgery.choices import Modality
from surgery.errors import FolderError
from surgery.files.json_values import JsonValues
from surgery.folder.admission import admit
from surgery.folder.genai_config import CONFIG_FILE
from surgery.folder.multimodal import SECTIONS
from surgery.folder.multimodal import TYPE as MULTIMODAL
from surgery.graph.model import Model
from surgery.source.layer_table import read_layer_table


@dataclass(frozen=True)
class OpenedFolder:
    """A GenAI folder: its configuration, its graph without the weights, its layer table or None."""

    root: Path
    config: Mapping[str, Any]
    model: Model
    layers: tuple[Layer, ...] | None
    others: Mapping[str, Model] = field(default_factory=dict)
    """Section of the configuration -> its graph, where the folder takes images or sound: embedding, vision, speech."""

    def check_weights(self) -> None:
        """Raise WeightError where a graph refers to bytes that its data files do not have."""
        for model in (self.model, *self.others.values()):
            model.check_weights()

    @property
    def media(self) -> dict[Modality, int]:
        """Modality -> placeholder id, of a folder that takes more than text."""
        model = json_object(self.config, "model")
        held = [modality for modality, (section, _, _) in SECTIONS.items() if section in self.others]
        return {modality: _whole(model, f"{modality}_token_id") for modality in held}

    @property
    def decoder(self) -> Mapping[str, Any]:
        """genai_config.json's `model.decoder`. Raises FolderError where it is no object."""
        return json_object(json_object(self.config, "model"), "decoder")

    @property
    def vocab_size(self) -> int:
        """How many token ids there are."""
        return _whole(json_object(self.config, "model"), "vocab_size")

    @property
    def hidden_size(self) -> int:
        """Width of the embeddings."""
        return _whole(self.decoder, "hidden_size")

    @property
    def context_length(self) -> int:
        """Tokens of the longest prompt and answer together."""
        return _whole(json_object(self.config, "model"), "context_length")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """bos_token_id, eos_token_id or pad_token_id as a tuple; empty where it is absent."""
        value = json_object(self.config, "model").get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise FolderError(f"{CONFIG_FILE}: model.{key} is {value!r}; a token id or a list of them is expected")
        return tuple(ids)

    @property
    def kv_sources(self) -> dict[int, int]:
        """Layer -> the KV source layer whose cache it reads, from the layer table; empty without one."""
        return {layer.index: layer.kv_source for layer in self.layers or ()}

    @property
    def window(self) -> int | None:
        """Tokens that a sliding layer sees."""
        return max((layer.window for layer in self.layers or () if layer.window), default=None)


def open_genai_folder(root: Path) -> OpenedFolder:
    """Read a folder that the runtime may be given. Raises FolderError, or ModelError where its graph is at fault."""
    config = admit(root)
    decoder = json_object(json_object(config, "model"), "decoder")
    model = Model.open(root / _filename(decoder))
    return OpenedFolder(root, config, model, read_layer_table(model), dict(_others(root, config)))


def _others(root: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, Model]]:
    """The graphs beside the decoder, of a configuration of the multimodal class."""
    body = json_object(config, "model")
    if body.get("type") != MULTIMODAL:
        return
    for section in ("embedding", *(section for section, _, _ in SECTIONS.values())):
        if (described := json_object(body, section)).get("filename"):
            yield section, Model.open(root / _filename(described, section))


def _filename(described: Mapping[str, Any], section: str = "decoder") -> Path:
    name = described.get("filename")
    if not isinstance(name, str) or not name:
        raise FolderError(f"{CONFIG_FILE}: model.{section}.filename is {name!r}; a file name is expected")
    return Path(name)


def json_object(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under a key, empty where there is none. Raises FolderError for another value."""
    value = parent.get(key, {})
    if not isinstance(value, Mapping):
        raise FolderError(f"{CONFIG_FILE}: {key} is {value!r}; an object is expected")
    return value


def _whole(parent: Mapping[str, Any], key: str) -> int:
    return JsonValues(parent, f"{CONFIG_FILE}: model", FolderError).whole(key)
