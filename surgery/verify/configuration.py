"""The configuration against the source: every key of the files that the runtime reads, and why it may be as it is.

What the source's files and graph say is read here anew; nothing that writes the folder has a part in it. What they do
not say is a value with its reason beside it. A key that is not known here is a fault.
"""

from __future__ import annotations

import filecmp
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.architecture import read_config
from surgery.choices import Provider
from surgery.cuda.prediction import predict
from surgery.errors import ArchitectureError
from surgery.folder.opened import OpenedFolder
from surgery.graph.model import Model
from surgery.source.export import GraphPair
from surgery.source.kept_tokens import KeptTokens

if TYPE_CHECKING:
    from onnx import GraphProto

_FILES = (
    "tokenizer.json", "chat_template.jinja", "generation_config.json",
    "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.md", "NOTICE.txt",
)  # fmt: skip
_MEDIA_FILES = ("processor_config.json", "preprocessor_config.json")
_LONGEST = 8192
"""search.max_length: with one buffer for past and present, every cache is this long from the start."""
_MARKS = {
    "bot_token_id": "<|tool_call>", "eot_token_id": "<tool_call|>",
    "bor_token_id": "<|channel>", "eor_token_id": "<channel|>",
}  # fmt: skip
"""Where a call of a tool and a thought begin and end, as the chat template writes them."""
_GUESSES = {
    "ngram_size": 4, "max_draft_tokens": 8, "ngram_chained_lookup": True, "min_adaptive_k": 2, "cooldown": True,
}  # fmt: skip
"""How the runtime speculates: as it was measured, and never other than the target's own tokens."""
_TOWERS = ("vision_config", "audio_config", "text_config", "transformers.js_config")
_NAMES = {
    "gemma4": ("gemma4_text", "gemma4_text", "Gemma4ForCausalLM"),
    "gemma3n": ("gemma3_text", "gemma3n_text", "Gemma3nForCausalLM"),  # the runtime has no class of its own for it
    "gemma3": ("gemma3_text", "gemma3_text", "Gemma3ForCausalLM"),
}
"""What model_type begins with -> the runtime's class, and model_type and class in the text model's config.json."""
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
_SOUND = {
    "min_frequency": 0.0, "max_frequency": 8000.0, "preemphasis": 0.0, "preemphasis_htk_flavor": True,
    "fft_overdrive": False, "mel_floor": 0.001,
}  # fmt: skip
"""What transformers takes where processor_config.json does not say."""


@dataclass(frozen=True)
class SourceFiles:
    """A source as it lies there: its folder, config.json, generation_config.json (or nothing), its decoder's graph.

    Where only `kept` tokens of it stay, ids and sizes in these are the new ones.
    """

    root: Path
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    decoder: GraphProto
    kept: KeptTokens | None = None

    @classmethod
    def read(cls, root: Path, pair: GraphPair) -> SourceFiles:
        """Raises ArchitectureError or ModelError for a file that cannot be read."""
        generation = root / "generation_config.json"
        return cls(
            root,
            _with_new_ids(read_config(root / "config.json"), pair.kept),
            _with_new_ids(read_config(generation), pair.kept) if generation.is_file() else {},
            Model.open(pair.decoder).graph,
            pair.kept,
        )

    @property
    def logits(self) -> int | None:
        """How many logits a token has, where the graph says so."""
        return len(self.kept) if self.kept is not None else _last(self.decoder.output, "logits")

    @property
    def text(self) -> Mapping[str, Any]:
        """config.json of the text model, which may be a part of it."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, Mapping) else self.config

    @property
    def family(self) -> str:
        """Which of the known families its model_type begins with."""
        kind = str(self.text.get("model_type") or self.config.get("model_type"))
        return next((family for family in _NAMES if kind.startswith(family)), "gemma4")


def _with_new_ids(said: Mapping[str, Any], kept: KeptTokens | None) -> dict[str, Any]:
    """Settings of a source, its ids and its number of tokens as they are where some tokens alone stay."""
    if kept is None:
        return dict(said)
    numbers = {token: new for new, token in enumerate(kept.ids)}

    def new(key: str, value: Any) -> Any:
        if key.endswith(("_token_id", "_token_ids", "_token_index")):
            return [numbers.get(one, one) for one in value] if isinstance(value, list) else numbers.get(value, value)
        if key.startswith("vocab_size"):
            return sum(token < value for token in kept.ids)
        return _with_new_ids(value, kept) if isinstance(value, Mapping) and key not in _TOWERS[:2] else value

    return {key: new(key, value) for key, value in said.items()}


def setting_faults(folder: OpenedFolder, source: SourceFiles, provider: Provider | None) -> Iterator[str]:
    """genai_config.json; token ids are held by a gate of their own. `provider` is what it is made for, where known."""
    text, graph = source.text, source.decoder
    pasts, theirs = _caches(folder.model.graph), _caches(graph)
    uniform = len(set(pasts.values())) == 1
    widest = tuple(max(axis, default=0) for axis in zip(*theirs.values(), strict=True)) or (0, 0)
    heads, size = widest if uniform else theirs.get(0, (0, 0))
    own_heads, own_size = pasts.get(0, (0, 0))  # where the source's graph has no numbers
    pairs = {text.get("num_hidden_layers"), len(theirs)}  # a pair for every layer, or one for each that is the source's
    context = text.get("max_position_embeddings", 32768 if source.family == "gemma3n" else 131072)
    # gemma3_text is all that 0.12 knows, for caches of one size, and means the same there
    old = read_config(folder.root / "manifest.json").get("target") == "genai-0.12"
    kind = "gemma3_text" if uniform and old else _NAMES[source.family][0]
    ids = [f"{name}_token_id" for name in ("bos", "eos", "pad", *folder.media)]  # held as sets, by another gate
    rows = _rows_of_logits(folder.model.graph)
    guesses = "speculative" in folder.config and rows != 1 and not folder.others  # it compares logits of many tokens
    wanted = {
        "model": {
            "type": "gemma4" if folder.others else kind,
            "vocab_size": source.logits or text.get("vocab_size", ...),
            "context_length": context,
            **{key: ... for key in ids if key in folder.config["model"]},
            **{key: _token_id(folder, mark) for key, mark in _MARKS.items() if key in folder.config["model"]},
            "decoder": {
                "filename": "model.onnx",
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "intra_op_num_threads": 0,  # ONNX Runtime's own choice: the runtime's is half the processors
                    **_providers(folder, provider),
                },
                "head_size": size or own_size,
                "hidden_size": _last(graph.input, "inputs_embeds") or text.get("hidden_size"),
                "num_attention_heads": text.get("num_attention_heads", 8),
                "num_key_value_heads": heads or own_heads,
                "num_hidden_layers": len(pasts) if len(pasts) in pairs else tuple(pairs),
                "inputs": {**_same(_token_inputs(folder.model.graph)), **_patterns("past", "past_key_values")},
                "outputs": {"logits": "logits", **_patterns("present", "present")},
            },
            **(_media(folder) if folder.others else {}),
        },
        "search": {
            **{key: source.generation[key] for key in _SAMPLING if _plain(key, source.generation.get(key))},
            "max_length": min(_LONGEST, context),
            "min_length": 0,  # these three: one answer, of any length, as the source's loop gives it
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": ...,  # held by a gate that reads the graph
            **({"chunk_size": 256} if guesses else {}),  # every token has logits, a quarter of a gigabyte of them
        },
        **({"speculative": _GUESSES} if guesses else {}),
    }
    yield from differences(folder.config, wanted)


def _rows_of_logits(graph: GraphProto) -> int | None:
    """How many tokens of a run have logits; None for all."""
    found = [value.type.tensor_type.shape.dim[1] for value in graph.output if value.name == "logits"]
    return found[0].dim_value or None if found else None


def _token_id(folder: OpenedFolder, text: str) -> int | None:
    """The id of an added token, by the folder's tokenizer.json, which is held by gates of its own."""
    added = read_config(folder.root / "tokenizer.json").get("added_tokens")
    found = [entry["id"] for entry in added or () if entry.get("content") == text]
    return found[0] if found else None


def _providers(folder: OpenedFolder, provider: Provider | None) -> dict[str, Any]:
    """Where the graph runs; an annotation of nodes that stay on the CPU means nothing without its option.

    CUDA may capture a graph of the text model that is foretold to be ready for it, and need not.
    """
    options = folder.decoder.get("session_options", {})
    found = options.get("provider_options")
    annotated = any(
        (prop.key, prop.value) == ("layer_ann", "cpu_embedding")
        for node in folder.model.graph.node
        for prop in node.metadata_props
    )
    layers = {"session.layer_assignment_settings": "cpu(=cpu_embedding)"} if annotated and found else {}
    captures = [{}, {"enable_cuda_graph": "0"}]
    if provider != "cpu" and not folder.others and predict(folder.model).ready_for_capture:
        captures.append({"enable_cuda_graph": "1"})
    cuda = [[{"cuda": options}] for options in captures]
    choices: dict[Provider | None, list[list[dict[str, Any]]]] = {"cpu": [[]], "cuda": cuda, None: [[], *cuda]}
    return {"provider_options": tuple(choices[provider]), **layers, **_tables(folder, found)}


def _tables(folder: OpenedFolder, providers: Any) -> dict[str, Any]:
    """Products of 2 bits in float32 with level 4, which is what the option for look-up tables is for on the CPU."""
    single = {value.name for value in folder.model.graph.value_info if value.type.tensor_type.elem_type == 1}
    products = [node for node in folder.model.graph.node if node.op_type == "MatMulNBits" and node.input[0] in single]
    chosen = [{each.name: each.i for each in node.attribute} for node in products]
    looked_up = any((each.get("bits"), each.get("accuracy_level")) == (2, 4) for each in chosen)
    return {"mlas.use_lut_gemm": "1"} if looked_up and not providers else {}


def _media(folder: OpenedFolder) -> dict[str, Any]:
    """The graphs around the decoder, by the names that the runtime's processor knows."""
    between = _same(
        [name for name in _token_inputs(folder.model.graph) if name in ("inputs_embeds", "per_layer_inputs")]
    )
    features = _same([f"{modality}_features" for modality in folder.media])
    vision = {
        "filename": "vision_encoder.onnx",
        "config_filename": "image_processor.json",
        "inputs": _same(["pixel_values", "pixel_position_ids"]),
        "outputs": _same(["image_features"]),
    }
    speech = {
        "filename": "audio_encoder.onnx",
        "config_filename": "audio_processor.json",
        "inputs": {"audio_embeds": "input_features", "attention_mask": "input_features_mask"},
        "outputs": _same(["audio_features"]),
    }
    ids = {"input_ids": "input_ids"}
    return {
        "embedding": {"filename": "embed_tokens.onnx", "inputs": {**ids, **features}, "outputs": between},
        "vision": vision,  # the runtime's class loads no folder without it; without sound it looks for a default file
        "speech": speech if "audio" in folder.media else {"config_filename": ""},
    }


def _same(names: list[str]) -> dict[str, str]:
    return {name: name for name in names}


def _patterns(role: str, name: str) -> dict[str, str]:
    return {f"{role}_{kind}_names": f"{name}.%d.{kind}" for kind in ("key", "value")}


def _plain(key: str, value: object) -> bool:
    """Whether a sampling value is one that the runtime's configuration takes; others are left to its defaults."""
    return isinstance(value, bool) if key == "do_sample" else type(value) in (int, float)


def _token_inputs(graph: GraphProto) -> list[str]:
    return [value.name for value in graph.input if not value.name.startswith("past_key_values.")]


def _last(values: Any, name: str) -> int | None:
    """The last axis of an input or output; None where it has no number."""
    dims = [value.type.tensor_type.shape.dim for value in values if value.name == name]
    return dims[0][-1].dim_value or None if dims and len(dims[0]) else None


def _caches(graph: GraphProto) -> dict[int, tuple[int, int]]:
    """Layer -> KV heads and head size of its past, 0 where it has no number."""
    found = {}
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        if (match := re.fullmatch(r"past_key_values\.(\d+)\.key", value.name)) and len(dims) == 4:
            found[int(match[1])] = (dims[1].dim_value, dims[3].dim_value)
    return found


def logits_faults(folder: OpenedFolder, source: SourceFiles) -> Iterator[str]:
    """Every token's logits, where the manifest's recipe says the last one's: a prompt then costs gigabytes."""
    recipe = read_config(folder.root / "manifest.json").get("recipe")
    said = recipe.get("decoder_model_merged") if isinstance(recipe, Mapping) else recipe
    promised = re.search(r"fold-logits-to-keep(?!\{keep=all\})", str(said))
    asked = any(value.name == "num_logits_to_keep" for value in source.decoder.input)
    for value in folder.model.graph.output if promised and asked else ():
        if value.name == "logits" and (rows := value.type.tensor_type.shape.dim[1]).dim_value != 1:
            yield f"the logits have {rows.dim_param or rows.dim_value or 'any number of'} rows; the recipe in manifest.json says 1"


def file_faults(folder: OpenedFolder, source: SourceFiles) -> Iterator[str]:
    """Files that go along as they are, tokenizer_config.json and config.json."""
    yield from _along(folder.root, source, (*_FILES, *(_MEDIA_FILES if folder.others else ())))
    yield from differences(read_config(folder.root / "config.json"), _model_config(folder, source), "config.json: ")


def two_graph_faults(root: Path, source: SourceFiles) -> Iterator[str]:
    """The same of a folder of two graphs: config.json has the text model one level up, and in its own place too."""
    yield from _along(root, source, _FILES)
    text, config = ({key: part[key] for key in part if key not in _TOWERS} for part in (source.text, source.config))
    wanted: dict[str, Any] = {**text, **config}
    for part in (text, wanted):
        if source.family != "gemma3n" and part.get("num_kv_shared_layers") == 0:
            del part["num_kv_shared_layers"]  # readers cut `layer_types[:-0]`
    if source.text is source.config:  # a text model's own, under the names of the class of two graphs
        wanted |= {"architectures": ..., "model_type": source.family}
        text["model_type"] = f"{source.family}_text"
    wanted |= {"text_config": text, "transformers.js_config": ...}  # its graphs are loaded by the names in there
    yield from differences(read_config(root / "config.json"), wanted, "config.json: ")


def _along(root: Path, source: SourceFiles, names: Iterable[str]) -> Iterator[str]:
    """Files that go along as they are, and tokenizer_config.json."""
    for name in names:
        ours, theirs = root / name, source.root / name
        if name == "chat_template.jinja" and ours.is_file() and not theirs.is_file():
            inline = read_config(source.root / "tokenizer_config.json").get("chat_template")
            if ours.read_text(encoding="utf-8") != inline:
                yield f"{name} is neither the source's nor in its tokenizer_config.json"
        elif ours.is_file() != theirs.is_file():
            yield f"{name} is missing" if theirs.is_file() else f"the source has no {name}"
        elif source.kept is not None and name == "generation_config.json" and ours.is_file():
            yield from differences(read_config(ours), source.generation, f"{name}: ")
        elif source.kept is not None and name == "tokenizer.json":
            continue  # held by the gates of the vocabulary
        elif ours.is_file() and not filecmp.cmp(ours, theirs, shallow=False):
            yield f"{name} is not the source's"
    tokenizer = read_config(source.root / "tokenizer_config.json")
    tokenizer.pop("processor_class", None)  # it names a processor of transformers, which the runtime does not have
    tokenizer["tokenizer_class"] = "GemmaTokenizer"  # the one that all versions of the runtime know
    found = read_config(root / "tokenizer_config.json")
    if "tool.function" in str(found.get("chat_template")):
        tokenizer["chat_template"] = ...  # in the runtime's dialect: a gate renders it beside the published one
    yield from differences(found, tokenizer, "tokenizer_config.json: ")


def _model_config(folder: OpenedFolder, source: SourceFiles) -> Mapping[str, Any]:
    """The source's own where the folder is of the whole model; otherwise the text model's, one level up."""
    if folder.others:
        return source.config
    above = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
    config = {**source.text, **{key: source.config[key] for key in above if key in source.config}}
    _, kind, name = _NAMES[source.family]
    return {key: config[key] for key in config if key not in _TOWERS} | {"architectures": [name], "model_type": kind}


def processor_faults(folder: OpenedFolder, source: SourceFiles) -> Iterator[str]:
    """The runtime's processor files against Hugging Face's."""
    said = read_config(source.root / "processor_config.json")
    wanted = {
        "image": ("image_processor.json", "image_processor", _image),
        "audio": ("audio_processor.json", "feature_extractor", _audio),
    }
    for modality in folder.media:
        name, section, made = wanted[modality]
        try:
            expected = made(said[section])
        except (KeyError, TypeError) as error:
            raise ArchitectureError(f"{source.root / 'processor_config.json'}: {section} has no {error}") from None
        yield from differences(read_config(folder.root / name), expected, f"{name}: ")


def _image(said: Mapping[str, Any]) -> dict[str, Any]:
    attributes = {key: said[key] for key in ("patch_size", "max_soft_tokens", "pooling_kernel_size")}
    decode = {"name": "decode_image", "type": "DecodeImage", "attrs": {"color_space": "RGB"}}
    transform = {"name": "gemma4_image_transform", "type": "Gemma4ImageTransform", "attrs": attributes}
    steps = [{"operation": decode}, {"operation": transform}]
    return {"processor": {"name": "gemma4_image_processor", "transforms": steps}}


def _audio(said: Mapping[str, Any]) -> dict[str, Any]:
    """Lengths are in samples there, in milliseconds here; switches are numbers here."""
    values = {**_SOUND, **said}
    rate = values["sampling_rate"]
    attributes = {
        **{key: int(value) if isinstance(value := values[key], bool) else value for key in _SOUND},
        "feature_size": values["feature_size"],
        "sampling_rate": rate,
        "frame_length_ms": values["frame_length"] * 1000 / rate,
        "hop_length_ms": values["hop_length"] * 1000 / rate,
    }
    mel = {"name": "gemma4_log_mel", "type": "Gemma4LogMel", "attrs": attributes}
    steps = [{"operation": {"name": "audio_decoder", "type": "AudioDecoder"}}, {"operation": mel}]
    return {"feature_extraction": {"sequence": steps}}


def differences(found: Any, wanted: Any, where: str = "") -> Iterator[str]:
    """What is not as `wanted`, one sentence each. There, `...` is any value, and a tuple has the values that will
    do."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        place = f"{where}." if where and not where.endswith(": ") else where
        for key in [key for key in found if key not in wanted]:
            yield f"{place}{key} is {found[key]!r}, which is nothing that the source has"
        for key, value in wanted.items():
            if key in found:
                yield from differences(found[key], value, place + key)
            else:
                yield f"{place}{key} is missing"
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
            yield from differences(one, other, f"{where}[{number}]")
    elif wanted is not ...:
        values = wanted if isinstance(wanted, tuple) else (wanted,)
        if not any(found == value and isinstance(found, bool) == isinstance(value, bool) for value in values):
            yield f"{where} is {found!r}; {' or '.join(map(repr, values))} is expected"
