"""What ONNX Runtime GenAI needs beside the graph: genai_config.json, the tokenizer's files, the text model's config.

Every key written here loads in onnxruntime-genai 0.12.2 to 0.18.0; each rule below was measured on these versions.
An unknown key anywhere but at the root is a load error ("Unknown value ..."), so none is written for information.

    type                        gemma4_text: the class `gemma4` is multimodal and never loads a text-only folder.
                                0.12 and 0.13 know neither: gemma3_text is the same class there, for caches of one size
    bot, eot, bor, eor          where a call of a tool and a thought begin and end, for targets from 0.15 on: 0.14 takes
                                them for unknown keys. Without them `Tokenizer.bot_token_id` is an error
    sliding_window              never: from 0.16 it sizes the caches to the window, and the first run past it fails
    layer_types                 never: from 0.16 it selects another cache class, which asks for conv states
    speculative                 where it is asked for; 0.18 knows it
    num_logits_to_keep          never: `Unknown value "num_logits_to_keep"`
    intra_op_num_threads        0, ONNX Runtime's own choice: GenAI's default is half the processors, which on 2 cores
                                without hyper-threading is 28 tokens a second in place of 53 (full-size E2B q4f16)
    mlas.use_lut_gemm           "1" where products of 2 bits can be computed with look-up tables (surgery.graph.look_up_tables)
    enable_cuda_graph           "1" where CUDA can capture the graph, so that a token is one launch in place of hundreds. GenAI
                                then feeds one row, not several, and no beams; 0.13 and older refuse to load it. Never in a
                                multimodal folder: the encoders' sessions would take it over from the decoder's
    past_present_share_buffer   true only if GroupQueryAttention alone touches the caches: any other operator would
                                see the whole buffer, max_length long, instead of the tokens so far
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.architecture import MAX_JSON_BYTES, Architecture, read_config, text_config
from surgery.attention.cache_padding import declared_sizes
from surgery.attention.kv_rows import SCOPE as ROWS
from surgery.attention.sequence_lengths import NEW_COLUMNS
from surgery.choices import Target
from surgery.cuda.layering import OPTION, SETTING, has_layers
from surgery.cuda.prediction import predict
from surgery.errors import ArchitectureError, ExportError, FolderError, ModelError, RequestError
from surgery.files.json_values import JsonValues
from surgery.files.safe_reading import read_inside
from surgery.folder.chat_template import genai_template
from surgery.graph.look_up_tables import OPTION as LUT_OPTION
from surgery.graph.look_up_tables import SETTING as LUT_SETTING
from surgery.graph.look_up_tables import has_lut_products
from surgery.graph.model import Model
from surgery.graph.tensor_types import interface_types
from surgery.source.export import GENAI_CONFIG, LICENSES, Export

MODEL_FILE = "model.onnx"
CONFIG_FILE = GENAI_CONFIG
CAPTURE = "enable_cuda_graph"
"""The CUDA provider's option for graph capture, "0" or "1"."""
MAX_LENGTH = 8192
"""Default of search.max_length: with a shared buffer every cache is allocated at this many tokens when generation
starts."""

_TYPES = {"gemma4": "gemma4_text", "gemma3": "gemma3_text", "gemma3n": "gemma3_text"}
"""Family -> GenAI's class. Gemma 3n has none of its own ("Unsupported model_type in config.json: gemma3n_text"); every
text class drives a merged graph alike."""
_TEXT_TYPES = {**_TYPES, "gemma3n": "gemma3n_text"}
"""Family -> model_type of the text model's config.json."""
_OLD_TYPE = "gemma3_text"
_CLASSES = {"gemma4": "Gemma4ForCausalLM", "gemma3": "Gemma3ForCausalLM", "gemma3n": "Gemma3nForCausalLM"}
TEMPLATE_FILE = "chat_template.jinja"
COPIED = ("tokenizer.json", TEMPLATE_FILE, "generation_config.json", *LICENSES)
"""Files that go into every folder as they are, where the source has them."""
MARKS = ({"bot": "<|tool_call>", "eot": "<tool_call|>"}, {"bor": "<|channel>", "eor": "<channel|>"})
"""GenAI's names of the tokens between which the model calls a tool, and reasons."""
SPECULATION = {
    "ngram_size": 4,
    "max_draft_tokens": 8,
    "ngram_chained_lookup": True,
    "min_adaptive_k": 2,
    "cooldown": True,
}
"""How GenAI 0.18 guesses: what followed the last three tokens where they stood before, and what followed that. Without
chained lookup the small export made 1.0 tokens a run of a text that repeats itself, with it 3.0 to 3.6. The number of
guesses follows how many were right, and pauses where none are."""
CHUNK = 256
"""Tokens of a prompt in one run, where every token has logits: 0.27 GB of them at Gemma 4's vocabulary."""
_LEAST, _MOST = 1e-6, 1e6
"""Of a sampling value: beyond, float32 divides by 0 or makes all tokens alike."""
_TOKENIZER_CLASS = "GemmaTokenizer"
"""The one class that every GenAI version tokenizes exactly as Hugging Face does; `Gemma4Tokenizer` is refused by
all."""


@dataclass(frozen=True, slots=True)
class CacheCost:
    """Memory of the KV caches of one layout. `bytes_per_token` counts keys and values of every pair."""

    pairs: int
    bytes_per_token: int

    def bytes_at(self, tokens: int) -> int:
        """Bytes of all caches, keys and values, of one row of so many tokens."""
        return self.bytes_per_token * tokens


def cache_costs(model: Model) -> dict[str, CacheCost]:
    """What the KV caches take in each layout: `aliased`, a pair for every layer, and `unique`, the source layers'
    pairs.

    The sizes are those of the interface, padding included; config.json's where it has no numbers.
    """
    arch = model.require_architecture()
    dtypes = {
        declared.dtype for name, declared in interface_types(model.graph).items() if name.startswith("past_key_values.")
    }
    element = 2 if "FLOAT16" in dtypes else 4
    layouts = {"aliased": arch.layers, "unique": arch.kv_sources}
    elements = {kv_source: math.prod(size) for kv_source, size in _cache_sizes(model).items()}
    return {
        layout: CacheCost(len(layers), sum(2 * elements[layer.kv_source] * element for layer in layers))
        for layout, layers in layouts.items()
    }


def _cache_sizes(model: Model) -> dict[int, tuple[int, int]]:
    """KV source layer -> KV heads and head size of its cache in the interface."""
    declared, sizes = declared_sizes(model.graph), {}
    for kv_source in model.require_architecture().kv_sources:
        heads, size = declared.get(f"past_key_values.{kv_source.index}.key", (None, None))
        sizes[kv_source.index] = (
            heads if isinstance(heads, int) else kv_source.kv_heads,
            size if isinstance(size, int) else kv_source.head_size,
        )
    return sizes


def cache_pairs(model: Model) -> int:
    """Pairs of past and present in the interface."""
    names = {value.name for value in model.graph.input}
    return sum(name.startswith("past_key_values.") and name.endswith(".key") for name in names)


def shares_buffer(model: Model) -> bool:
    """Whether past and present may be one buffer, longer than the tokens so far.

    GroupQueryAttention knows where they end; ScatterND writes rows of a past in place; a Slice that ends with the mask
    reads no further. Any other operator on a cache sees the whole buffer.
    """
    caches = {value.name for value in model.graph.output if value.name.startswith("present.")}
    caches |= {value.name for value in model.graph.input if value.name.startswith("past_key_values.")}
    for node in model.graph.node:
        ends_with_mask = node.op_type == "Slice" and len(node.input) > 2 and node.input[2].startswith(ROWS)
        length = node.name.startswith(NEW_COLUMNS)  # of the whole buffer, which is what is asked for
        known = node.op_type in ("GroupQueryAttention", "ScatterND") or ends_with_mask or length
        if not known and (caches & set(node.input) or caches & set(node.output)):
            return False
    return bool(caches)


def genai_config(
    model: Model, export: Export, provider: str = "cpu", target: Target = "genai-0.15", speculative: bool = False
) -> dict[str, Any]:
    """genai_config.json for a repacked model, its token ids and sampling values from the export.

    Raises ArchitectureError where the logits do not have config.json's vocabulary, or a token id is outside of it,
    and ModelError where the caches are not as `target` allocates them, or the mask has another dtype than the positions.
    """
    arch = model.require_architecture()
    generation = generation_settings(export)
    ids = {key: _one_or_all(key, found) for key, found in token_ids(export).items()}
    inputs = {value.name for value in model.graph.input}
    _check_vocabulary(model, arch)
    _check_steering(model)
    tokens = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    if target == "genai-0.12":
        _check_uniform(model)
    kv_heads, head_size = _cache_sizes(model)[0]
    return {
        "model": {
            "type": _OLD_TYPE if target == "genai-0.12" else _TYPES[arch.family],
            "vocab_size": arch.vocab_size,
            "context_length": arch.context_length,
            **ids,
            **(mark_ids(export) if target == "genai-0.15" else {}),
            "decoder": {
                "filename": MODEL_FILE,
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "intra_op_num_threads": 0,
                    "provider_options": [] if provider == "cpu" else [{provider: _capture(model, target)}],
                    **({OPTION: SETTING} if provider != "cpu" and has_layers(model.graph) else {}),
                    **({LUT_OPTION: LUT_SETTING} if provider == "cpu" and has_lut_products(model.graph) else {}),
                },
                "head_size": head_size,
                "hidden_size": arch.hidden_size,
                "num_attention_heads": arch.attention_heads,
                "num_key_value_heads": kv_heads,
                "num_hidden_layers": cache_pairs(model),
                "inputs": {
                    **tokens,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            **sampling_values(generation),
            "max_length": min(MAX_LENGTH, arch.context_length),
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": shares_buffer(model),
            **({"chunk_size": CHUNK} if speculative else {}),
        },
        **({"speculative": dict(SPECULATION)} if speculative else {}),
    }


def _capture(model: Model, target: Target) -> dict[str, str]:
    """CUDA's own options: graph capture, where the graph, its caches and the oldest runtime allow it."""
    alone = all(value.name != "inputs_embeds" for value in model.graph.input)
    on = target != "genai-0.12" and alone and shares_buffer(model) and predict(model).ready_for_capture
    return {CAPTURE: "1"} if on else {}


def _check_uniform(model: Model) -> None:
    """0.12 and 0.13 allocate every cache with one size, and 0.12 counts the layers from 0 without a gap."""
    pasts = {name: size for name, size in declared_sizes(model.graph).items() if name.startswith("past_key_values.")}
    if len(set(pasts.values())) > 1:
        small, large = (choose(pasts, key=lambda name: str(pasts[name])) for choose in (min, max))
        raise ModelError(
            f"GenAI 0.12 and 0.13 have one size for all caches, but {small} is {pasts[small]} and {large} {pasts[large]}",
            hint="run uniform-heads",
        )
    for index in range(cache_pairs(model)):
        if f"past_key_values.{index}.key" not in pasts:
            raise ModelError(f"GenAI 0.12 counts the caches from 0, but there is no past_key_values.{index}.key")


def _check_vocabulary(model: Model, arch: Architecture) -> None:
    """`Got invalid dimensions for output: logits ... index: 2` is what a wrong vocab_size comes to at the first run."""
    logits = interface_types(model.graph).get("logits")
    size = logits.shape[-1] if logits and logits.shape else None
    if isinstance(size, int) and size != arch.vocab_size:
        raise ArchitectureError(
            f"config.json has vocab_size {arch.vocab_size}, but the logits are {logits}",
            hint=f"if the tables are padded, set vocab_size to {size} in config.json; else use the export's own",
        )


def _check_steering(model: Model) -> None:
    """`position_ids & attention_mask must have the same data type` is what the runtime says when generation starts."""
    types = interface_types(model.graph)
    mask, positions = types.get("attention_mask"), types.get("position_ids")
    if mask and positions and mask.dtype != positions.dtype:
        raise ModelError(
            f"attention_mask is {mask.dtype} and position_ids {positions.dtype}; onnxruntime-genai feeds both in one dtype",
            hint="declare both inputs of the decoder INT64, with a Cast behind the one that is read as INT32",
        )


def generation_settings(export: Export) -> dict[str, Any]:
    """generation_config.json, or nothing where there is none."""
    path = export.file("generation_config.json")
    return read_config(path) if path else {}


def token_ids(export: Export) -> dict[str, tuple[int, ...]]:
    """bos, eos (all of them) and pad; generation_config.json first: config.json's eos lacks ids that end a turn.

    Raises ArchitectureError where one is outside of the vocabulary.
    """
    sources = (generation_settings(export), export.config, text_config(export.config))
    found: dict[str, tuple[int, ...]] = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for source in sources:
            if (value := source.get(key)) is not None:
                found[key] = _checked_ids(key, value, export.architecture.vocab_size)
                break
    return found


def mark_ids(export: Export) -> dict[str, int]:
    """The ids between which the model calls a tool, and thinks, by GenAI's names; of a pair, both or neither."""
    path = export.file("tokenizer.json")
    listed = read_config(path).get("added_tokens") if path else None
    ids = {
        entry["content"]: entry["id"]
        for entry in (listed if isinstance(listed, list) else ())
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and type(entry.get("id")) is int
    }
    return {
        f"{name}_token_id": _checked_ids(name, ids[mark], export.architecture.vocab_size)[0]
        for pair in MARKS
        for name, mark in pair.items()
        if set(pair.values()) <= ids.keys()
    }


def _checked_ids(key: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ArchitectureError(f"{key} is {token!r}; a token id from 0 to {vocab_size - 1} is expected")
    if not ids:
        raise ArchitectureError(f"{key} is an empty list")
    return tuple(ids)


def _one_or_all(key: str, ids: tuple[int, ...]) -> int | list[int]:
    return list(ids) if key == "eos_token_id" and len(ids) > 1 else ids[0]


def sampling_values(generation: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json says of sampling; what is absent or null is left out. Raises RequestError."""
    values = JsonValues(generation, "generation_config.json", RequestError)
    readers: dict[str, Callable[[str], Any]] = {
        "do_sample": values.flag,
        "temperature": lambda key: values.number(key, least=_LEAST, most=_MOST),
        "top_k": lambda key: values.whole(key, least=0),
        "top_p": lambda key: values.number(key, least=_LEAST, most=1),
        "repetition_penalty": lambda key: values.number(key, least=_LEAST, most=_MOST),
    }
    return {key: read(key) for key, read in readers.items() if generation.get(key) is not None}


def check_side_files(export: Export) -> None:
    """Raise SurgeryError where a file that og.Tokenizer needs is missing or damaged: before any weight is copied."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = export.file(name)
        if path is None:
            raise ExportError(f"{export.root} has no {name}, which GenAI's tokenizer needs")
        read_config(path)


def write_side_files(export: Export, folder: Path, *, multimodal: bool = False) -> list[str]:
    """`write_text_files`, and config.json: the text model's, unless the folder is of the whole, multimodal one."""
    write_json(folder / "config.json", export.config if multimodal else promoted_config(export))
    return [*write_text_files(export, folder, genai=True), "config.json"]


def write_text_files(export: Export, folder: Path, *, genai: bool = False) -> list[str]:
    """Tokenizer, chat template, generation settings and licence, as `check_side_files` found them.

    For GenAI a template with tools is there twice: in GenAI's dialect in tokenizer_config.json, where it looks first, and
    as published in chat_template.jinja.
    """
    written, config = copy_side_files(export, folder, COPIED), _tokenizer_config(export)
    published = published_template(export)
    if genai and published is not None and (dialect := genai_template(published)) is not None:
        config["chat_template"] = dialect
        if TEMPLATE_FILE not in written:
            write_text(folder / TEMPLATE_FILE, published)
            written.append(TEMPLATE_FILE)
    write_json(folder / "tokenizer_config.json", config)
    return [*written, "tokenizer_config.json"]


def takes_tools(folder: Path) -> bool:
    """Whether a folder's chat template, which `write_text_files` wrote, can tell of tools."""
    return "chat_template" in read_config(folder / "tokenizer_config.json") and (
        "bot_token_id" in read_config(folder / CONFIG_FILE)["model"]
    )


def published_template(export: Export) -> str | None:
    """The export's chat template, as Hugging Face's libraries find it. Raises ExportError for one that is no text."""
    if path := export.file(TEMPLATE_FILE):
        try:
            return read_inside(path, path.parent, MAX_JSON_BYTES).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ExportError(f"{path} cannot be used: {error}") from None
    settings = export.file("tokenizer_config.json")
    inline = read_config(settings).get("chat_template") if settings else None
    return inline if isinstance(inline, str) else None


def copy_side_files(export: Export, folder: Path, names: Iterable[str]) -> list[str]:
    """Copy those of the files that the export has; their names. Raises ExportError for one that cannot be read."""
    written = []
    for name in names:
        if source := export.file(name):
            try:
                data = read_inside(source, source.parent, MAX_JSON_BYTES)
            except OSError as error:
                raise ExportError(f"{source} cannot be read: {error.strerror}") from None
            (folder / name).write_bytes(data)
            written.append(name)
    return written


def _tokenizer_config(export: Export) -> dict[str, Any]:
    path = export.file("tokenizer_config.json")
    config = read_config(path or export.root / "tokenizer_config.json")
    config.pop("processor_class", None)  # it names the multimodal processor, whose files are left out
    return {**config, "tokenizer_class": _TOKENIZER_CLASS}


def promoted_config(export: Export) -> dict[str, Any]:
    """config.json of the text model: `text_config` one level up, the multimodal parts left out."""
    arch = export.architecture
    config = text_config(export.config)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
        if key in export.config:
            config[key] = export.config[key]
    for key in ("vision_config", "audio_config", "text_config", "transformers.js_config"):
        config.pop(key, None)
    return {**config, "architectures": [_CLASSES[arch.family]], "model_type": _TEXT_TYPES[arch.family]}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a new file. Raises ExportError for text that is not Unicode: JSON can spell half a surrogate pair."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a new file as UTF-8. Raises ExportError for text that is not Unicode."""
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ExportError(
            f"{path.name} would hold {error.object[error.start : error.end]!r}, which is not Unicode"
        ) from None
    with path.open("xb") as writer:
        writer.write(data)


def require_folder(folder: Path) -> None:
    """Raise FolderError for what is no GenAI folder."""
    if not (folder / CONFIG_FILE).is_file():
        raise FolderError(f"{folder} has no {CONFIG_FILE}; a GenAI folder, as repack writes it, is expected")
