"""The model card: README.md of a folder, as the Hugging Face Hub reads it.

Its metadata is written by huggingface_hub, and what it says of the source is read from the source's own card and from
the manifest's facts. No time, no path and no name of a machine is in it: the same folder has the same card.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from surgery.attention.sequence_lengths import padding_of
from surgery.choices import Modality
from surgery.files.safe_reading import read_regular
from surgery.folder.genai_config import CAPTURE, CONFIG_FILE
from surgery.folder.manifest import made_by
from surgery.graph.weight_writing import Placed
from surgery.printing import markdown_code, markdown_text
from surgery.source.export import EMBED, ENCODERS, LICENSES, Export, GraphPair
from surgery.source.kept_tokens import VOCABULARY_FILE
from surgery.source.pruned_export import vocabulary_size

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData
    from onnx import GraphProto

CARD_FILE = "README.md"
FolderKind = Literal["genai", "two-graph"]

_MAX_RECIPE = 10_000
_MAX_CARD = 1024 * 1024
_MAX_HEAD = 64 * 1024
_MOST_TEXTS = 200
_FAMILIES = {"gemma3": "Gemma 3", "gemma3n": "Gemma 3n", "gemma4": "Gemma 4"}
_LIBRARIES: dict[FolderKind, str] = {"genai": "onnxruntime-genai", "two-graph": "transformers.js"}
_TASKS: dict[frozenset[Modality], str] = {
    frozenset(): "text-generation",
    frozenset({"image"}): "image-text-to-text",
    frozenset({"audio"}): "audio-text-to-text",
    frozenset({"image", "audio"}): "any-to-any",
}
"""What a folder takes beside text -> the Hub's name of the task; it has none for text, images and sound to text."""
_APACHE = ("Apache License", "Version 2.0")
_TOLD = {
    "license": r"[\w.+-]{1,64}",
    "license_name": r"[\w.+ -]{1,64}",
    "license_link": r"(https://)?[\w./:#?=&%+-]{1,200}",
    "language": r"[A-Za-z][\w-]{1,31}",
    "base_model": r"[\w.-]{1,96}/[\w.-]{1,96}",
}
"""What is taken from the source's card -> how its text, or each text of a list, is written; any other is left out."""
_MAX_LENGTH = 2048
"""Tokens of the examples, prompt and answer."""


@dataclass(frozen=True)
class CardFacts:
    """What a source says of itself: the metadata of its card, and its licence files."""

    metadata: Mapping[str, Any]
    licences: tuple[str, ...]

    @property
    def licence(self) -> str | None:
        """What the source's card names, None where it names none."""
        value = self.metadata.get("license")
        return value if isinstance(value, str) else None


def model_card(
    export: Export,
    pair: GraphPair,
    kind: FolderKind,
    placed: Sequence[Placed],
    *,
    recipe: str | Mapping[str, str] = "",
    rewritten: bool = False,
    modalities: Sequence[Modality] = (),
    needs: str = "",
    tools: bool = False,
) -> str:
    """The text of README.md, for a folder of which everything else is known; card.md is its form.

    `recipe` is the manifest's, of one graph or by role; `rewritten` is whether it changed weights; `modalities` is what
    the folder takes beside text; `needs` says which runtimes can run it, and how; `tools` is whether it can be told of
    tools. Raises nothing for a source whose own card is missing or damaged: it then says less.
    """
    from jinja2 import Environment, StrictUndefined

    told, context = read_told(export), export.architecture.context_length
    made = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    made.filters |= {
        "code": markdown_code,
        "links": lambda names: " and ".join(f"[{name}]({name})" for name in names),
        "text": markdown_text,
    }
    return made.from_string(files("surgery.folder").joinpath("card.md").read_text(encoding="utf-8")).render(
        export=export,
        pair=pair,
        kind=kind,
        placed=placed,
        rewritten=rewritten,
        modalities=list(modalities),
        needs=needs,
        tools=tools,
        told=told,
        metadata=_metadata(export, kind, told, modalities).to_yaml(),
        title=export.repo.partition("/")[2] if export.repo else _FAMILIES[export.architecture.family],
        length=min(_MAX_LENGTH, context),
        tokens=min(256, context // 2),
        rows=_provenance(export, pair, recipe, modalities),
        kept=len(pair.kept or ()),
        vocabulary=vocabulary_size(export) if pair.kept is not None else 0,
        list=VOCABULARY_FILE,
    )


def on_batches(graph: GraphProto) -> str:
    """What holds for prompts of different length in one batch."""
    if padding_of(graph) == "between":
        return "Run prompts of different length one by one: in one batch a sliding window would count the padding."
    return "Prompts of different length may go in one batch: each is continued as it is alone."


def on_capture(config: Mapping[str, Any]) -> str:
    """What CUDA graph capture leaves out, where genai_config.json switches it on."""
    options = config["model"]["decoder"]["session_options"]["provider_options"]
    if not any(entry.get("cuda", {}).get(CAPTURE) == "1" for entry in options):
        return ""
    return f" With {CAPTURE} on, one prompt runs at a time: for a batch or beams, set it to 0 in {CONFIG_FILE}."


def on_level(recipe: str | Mapping[str, str]) -> str:
    """What the accuracy level of a recipe changes, where it sets int8."""
    from passes.recipe import steps_of
    from passes.set_accuracy_level import SetAccuracyLevel

    texts = [recipe] if isinstance(recipe, str) else recipe.values()
    for step in (step for text in texts for step in steps_of(text, SetAccuracyLevel)):
        if step.level == "4":
            which = "products of 2 or 8 bits" if step.products == "slow" else "quantised products"
            return f" On the CPU its {which} multiply in int8: faster than the export, and numbers differ a little from its."
    return ""


def read_told(export: Export) -> CardFacts:
    """The source's card and licences; empty where it has none that can be read."""
    licences = tuple(name for name in LICENSES if export.file(name))
    metadata: dict[str, Any] = {}
    if path := export.file(CARD_FILE):
        metadata = _card_metadata(path)
    if "license" not in metadata and (apache := _apache(export, licences)):
        metadata["license"] = apache
    return CardFacts(metadata, licences)


def _card_metadata(path: Path) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    try:
        found = ModelCard(
            _head(read_regular(path, _MAX_CARD).decode("utf-8")), ignore_metadata_errors=True
        ).data.to_dict()  # type: ignore[no-untyped-call]
        return {key: found[key] for key, form in _TOLD.items() if key in found and _is_written(found[key], form)}
    except Exception:  # a stranger's YAML: of many kinds, and none of them keeps a folder from being written
        return {}


def _head(text: str) -> str:
    """The metadata of a card alone, without blank lines: who looks for its end goes back and forth over them."""
    first, *lines = text.lstrip("\ufeff").splitlines() or [""]
    end = lines.index("---") if first == "---" and "---" in lines else 0
    head = "\n".join(line for line in lines[:end] if line.strip())
    return f"---\n{head}\n---\n" if 0 < len(head) <= _MAX_HEAD else ""


def _is_written(value: Any, form: str) -> bool:
    texts = value if isinstance(value, list) else [value]
    return 0 < len(texts) <= _MOST_TEXTS and all(
        isinstance(text, str) and re.fullmatch(form, text, re.ASCII) for text in texts
    )


def _apache(export: Export, licences: Iterable[str]) -> str | None:
    for name in licences:
        path = export.file(name)
        if path is not None and path.stat().st_size <= _MAX_CARD:
            head = path.read_text(encoding="utf-8", errors="replace")[:500]
            if all(words in head for words in _APACHE):
                return "apache-2.0"
    return None


def _metadata(export: Export, kind: FolderKind, told: CardFacts, modalities: Sequence[Modality]) -> ModelCardData:
    from huggingface_hub import ModelCardData

    known = {key: told.metadata[key] for key in ("license_name", "license_link", "language") if key in told.metadata}
    base = export.repo or told.metadata.get("base_model")
    return ModelCardData(
        base_model=base,
        # Of the Hub's four relations this is the one of other forms of the same weights; without it, it says "finetune".
        base_model_relation="quantized" if base else None,
        library_name=_LIBRARIES[kind],
        license=told.licence,
        pipeline_tag=_TASKS[frozenset(modalities)],
        tags=["onnx", export.architecture.family, "gemma4-surgery"],
        **known,
    )


def _provenance(
    export: Export, pair: GraphPair, recipe: str | Mapping[str, str], modalities: Sequence[Modality]
) -> list[tuple[str, str]]:
    """What the folder was made from, and how: names and values in Markdown, empty where there is nothing to say."""
    versions = ", ".join(f"{name} {version}" for name, version in made_by().items() if version)
    recipes = {"": recipe} if isinstance(recipe, str) else {f" of {role}": text for role, text in recipe.items()}
    roles = (EMBED, *(ENCODERS[modality] for modality in modalities))
    return [
        ("source", markdown_text(export.repo or "a local folder")),
        ("revision", markdown_text(export.revision or "")),
        ("precision", markdown_text(pair.precision)),
        *((f"precision of {role}", markdown_text(pair.others.get(role, ""))) for role in roles),
        *((f"recipe{role}", markdown_code(text, _MAX_RECIPE)) for role, text in recipes.items()),
        ("made with", versions),
    ]
