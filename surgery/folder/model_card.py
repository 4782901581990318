"""The model card: README.md of a folder, as the Hugging Face Hub reads it.

Its metadata is written by huggingface_hub, and what it says of the source is read from the source's own card and from
the manifest's facts. No time, no path and no name of a machine is in it: the same folder has the same card.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from surgery.attention.sequence_lengths import padding_of
from surgery.choices import Modality
from surgery.files.safe_reading import read_regular
from surgery.folder.manifest import made_by
from surgery.graph.weight_writing import Placed
from surgery.printing import markdown_code, markdown_text
from surgery.source.export import EMBED, ENCODERS, LICENSES, Export, GraphPair

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData
    from onnx import GraphProto

CARD_FILE = "README.md"
FolderKind = Literal["genai", "two-graph"]

_MAX_RECIPE = 10_000
_MAX_CARD = 1024 * 1024
_FAMILIES = {"gemma3": "Gemma 3", "gemma3n": "Gemma 3n", "gemma4": "Gemma 4"}
_LIBRARIES: dict[FolderKind, str] = {"genai": "onnxruntime-genai", "two-graph": "transformers.js"}
_TITLES: dict[FolderKind, str] = {"genai": "for ONNX Runtime GenAI", "two-graph": "text only, as two ONNX graphs"}
_TASKS: dict[frozenset[Modality], str] = {
    frozenset(): "text-generation",
    frozenset({"image"}): "image-text-to-text",
    frozenset({"audio"}): "audio-text-to-text",
    frozenset({"image", "audio"}): "any-to-any",
}
"""What a folder takes beside text -> the Hub's name of the task; it has none for text, images and sound to text."""
_APACHE = ("Apache License", "Version 2.0")
_MAX_LENGTH = 2048
"""Tokens of the examples, prompt and answer."""


@dataclass(frozen=True)
class CardFacts:
    """What a source says of itself: the metadata of its card, and its licence files."""

    metadata: Mapping[str, Any]
    licences: tuple[str, ...]

    @property
    def licence(self) -> str | None:
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
    further: str = "",
) -> str:
    """The text of README.md, for a folder of which everything else is known.

    `recipe` is the manifest's, of one graph or by role; `rewritten` is whether it changed weights; `modalities` is what
    the folder takes beside text, and `further` a section on how; `needs` says which runtimes can run it, and how. Raises nothing
    for a source whose own card is missing or damaged: it then says less.
    """
    told = read_told(export)
    title = export.repo.partition("/")[2] if export.repo else _FAMILIES[export.architecture.family]
    parts = [
        f"---\n{_metadata(export, kind, told, modalities).to_yaml()}\n---",
        f"# {markdown_text(title)}, {markdown_text(pair.precision)}, {_TITLES[kind]}",
        _introduction(export, kind, rewritten, modalities),
        _genai_usage(export, needs) if kind == "genai" else _two_graph_usage(export),
        *([further] if further else []),
        _provenance(export, pair, recipe, placed, modalities),
        _licence(told),
    ]
    return "\n\n".join(parts) + "\n"


def on_batches(graph: GraphProto) -> str:
    """What holds for prompts of different length in one batch."""
    if padding_of(graph) == "between":
        return "Run prompts of different length one by one: in one batch a sliding window would count the padding."
    return "Prompts of different length may go in one batch: each is continued as it is alone."


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
        text = read_regular(path, _MAX_CARD).decode("utf-8")
        return dict(ModelCard(text, ignore_metadata_errors=True).data.to_dict())  # type: ignore[no-untyped-call]
    except Exception:  # a stranger's YAML: of many kinds, and none of them keeps a folder from being written
        return {}


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


def _introduction(export: Export, kind: FolderKind, rewritten: bool, modalities: Sequence[Modality]) -> str:
    source = f"[{export.repo}](https://huggingface.co/{export.repo})" if export.repo else "a community export"
    what = {
        "genai": "graphs and a configuration that `onnxruntime-genai` loads",
        "two-graph": "`embed_tokens` and `decoder_model_merged` of one precision, without the encoders of images and sound",
    }[kind]
    weights = "Some weights were rewritten, by the recipe below." if rewritten else "No weight was changed."
    takes = f" It takes {' and '.join(('text', *modalities))}." if modalities else ""
    return f"Made from {source} by operating on its graphs: {what}.{takes} {weights}"


def _genai_usage(export: Export, needs: str) -> str:
    length = min(_MAX_LENGTH, export.architecture.context_length)
    asked = f" {needs}" if needs else ""
    return f'''## Python

`pip install onnxruntime-genai`, then in the folder of this repository.{asked}

```python
import json
import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
messages = [{{"role": "user", "content": "Why is the sky blue?"}}]
prompt = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
params = og.GeneratorParams(model)
params.set_search_options(max_length={length})
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode(prompt))
stream = tokenizer.create_stream()
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
```

## C#

`dotnet add package Microsoft.ML.OnnxRuntimeGenAI`, then

```csharp
using Microsoft.ML.OnnxRuntimeGenAI;

using var model = new Model(".");
using var tokenizer = new Tokenizer(model);
using var stream = tokenizer.CreateStream();
var messages = """[{{"role": "user", "content": "Why is the sky blue?"}}]""";
var prompt = tokenizer.ApplyChatTemplate(File.ReadAllText("chat_template.jinja"), messages, "", true);
using var tokens = tokenizer.Encode(prompt);
using var options = new GeneratorParams(model);
options.SetSearchOption("max_length", {length});
using var generator = new Generator(model, options);
generator.AppendTokenSequences(tokens);
while (!generator.IsDone())
{{
    generator.GenerateNextToken();
    Console.Write(stream.Decode(generator.GetSequence(0)[^1]));
}}
```'''


def _two_graph_usage(export: Export) -> str:
    tokens = min(256, export.architecture.context_length // 2)
    return f"""## Python

With gemma4-surgery, which runs the two graphs as one model, in the folder of this repository:

```python
from pathlib import Path
from surgery.runtime.two_graphs import open_two_graphs

for piece in open_two_graphs(Path(".")).answer("Why is the sky blue?", new_tokens={tokens}):
    print(piece, end="", flush=True)
```

## JavaScript

With [transformers.js](https://huggingface.co/docs/transformers.js), and this repository's name:

```js
import {{ pipeline }} from "@huggingface/transformers";

const generate = await pipeline("text-generation", "OWNER/NAME");
const messages = [{{ role: "user", content: "Why is the sky blue?" }}];
const [answer] = await generate(messages, {{ max_new_tokens: {tokens} }});
console.log(answer.generated_text.at(-1).content);
```"""


def _provenance(
    export: Export,
    pair: GraphPair,
    recipe: str | Mapping[str, str],
    placed: Sequence[Placed],
    modalities: Sequence[Modality],
) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in made_by().items() if version)
    recipes = {"": recipe} if isinstance(recipe, str) else {f" of {role}": text for role, text in recipe.items()}
    rows = [
        ("source", markdown_text(export.repo or "a local folder")),
        ("revision", markdown_text(export.revision or "")),
        ("precision", markdown_text(pair.precision)),
        *(
            (f"precision of {role}", markdown_text(pair.others.get(role, "")))
            for role in (EMBED, *(ENCODERS[m] for m in modalities))
        ),
        *((f"recipe{role}", markdown_code(text, _MAX_RECIPE)) for role, text in recipes.items()),
        ("made with", versions),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows if value)
    digests = "\n".join(
        f"| {markdown_code(file.location)} | {file.size:,} | {f'`{file.sha256}`' if file.sha256 else 'linked'} |"
        for file in placed
    )
    return (
        f"## Provenance\n\n| | |\n|---|---|\n{table}\n\n| weights | bytes | SHA-256 |\n|---|---|---|\n{digests}\n\n"
        "`manifest.json` has the digest of every file, and of the source's."
    )


def _licence(told: CardFacts) -> str:
    texts = " and ".join(f"[{name}]({name})" for name in told.licences)
    licence = markdown_text(told.licence or "")
    if licence and texts:
        return f"## License\n\n{licence}, as the source's: {texts}"
    if licence or texts:
        return f"## License\n\nThe source's: {licence or texts}"
    return "## License\n\nThe source names none. The model's own terms apply."
