"""What of a GenAI folder may reach the runtime: known settings with plain values, and files of the folder alone.

onnxruntime-genai does what genai_config.json says. A session option loads a library (`custom_ops_library`), or writes a
profile or a graph to any path; an unknown one goes on to ONNX Runtime as a session entry; a cache's name is a format
that C's printf reads; a file name leads anywhere. So a folder is looked at before a Config, a Model or a Tokenizer of
the runtime exists. Known are the settings that `repack` writes, and those of GenAI's own builder that name no file,
load nothing and write nothing.

A key that is there twice is refused by `read_config`: Python takes the last one, GenAI does what each of them says.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from surgery.architecture import read_config
from surgery.cuda.layering import OPTION, SETTING
from surgery.errors import ArchitectureError, FolderError
from surgery.files.safe_reading import oversized, stays_inside
from surgery.folder.genai_config import CAPTURE, CONFIG_FILE
from surgery.graph.look_up_tables import OPTION as LUT_OPTION
from surgery.graph.look_up_tables import SETTING as LUT_SETTING

Rule = Callable[[Any], bool]

MODULE = "tokenizer_module.json"
"""A file that GenAI's tokenizer follows to other files, wherever it is told; no folder of ours has one."""
_MOST_THREADS = 1024
_LARGEST = 2**53
_NAME = re.compile(r"[\w./:-]{1,200}", re.ASCII)
_PLACES = re.compile(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)*", re.ASCII)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= _LARGEST


def _ids(value: Any) -> bool:
    return all(map(_number, value)) if isinstance(value, list) else _number(value)


def _threads(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value <= _MOST_THREADS


def _name(value: Any) -> bool:
    return isinstance(value, str) and bool(_NAME.fullmatch(value))


def _pattern(value: Any) -> bool:
    """A name with the number of a layer: GenAI gives it to printf."""
    return isinstance(value, str) and value.count("%") == 1 and _name(value.replace("%d", "0"))


def _file(*suffixes: str) -> Rule:
    return lambda value: isinstance(value, str) and bool(_PLACES.fullmatch(value)) and value.endswith(suffixes)


def _one_of(*values: Any) -> Rule:
    return lambda value: value in values


def _providers(value: Any) -> bool:
    """`[]` or `[{"cuda": {}}]`: a provider's own options take paths and addresses of memory; these take "0" and "1"."""
    return isinstance(value, list) and all(
        isinstance(entry, dict)
        and entry.keys() <= {"cpu", "cuda"}
        and all(
            isinstance(options, dict) and options.keys() <= _SWITCHES and all(map(_SWITCH, options.values()))
            for options in entry.values()
        )
        for entry in value
    )


_SWITCHES = {CAPTURE, "enable_skip_layer_norm_strict_mode"}
_SWITCH = _one_of("0", "1")
_SESSION = {
    "log_id": _name,
    "log_severity_level": _number,
    "log_verbosity_level": _number,
    "intra_op_num_threads": _threads,
    "inter_op_num_threads": _threads,
    "enable_cpu_mem_arena": _number,
    "enable_mem_pattern": _number,
    "graph_optimization_level": _one_of("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"),
    "session.intra_op.allow_spinning": _SWITCH,
    "session.inter_op.allow_spinning": _SWITCH,
    "provider_options": _providers,
    OPTION: _one_of(SETTING),
    LUT_OPTION: _one_of(LUT_SETTING),
}
_NAMES = dict.fromkeys(
    (
        "input_ids", "inputs_embeds", "per_layer_inputs", "attention_mask", "position_ids", "logits",
        "image_features", "audio_features", "pixel_values", "pixel_position_ids", "audio_embeds",
    ),
    _name,
)  # fmt: skip
_CACHES = dict.fromkeys(("past_key_names", "past_value_names", "present_key_names", "present_value_names"), _pattern)
_GRAPH = {"filename": _file(".onnx"), "session_options": _SESSION, "inputs": _NAMES, "outputs": _NAMES}
_ENCODER = {**_GRAPH, "config_filename": lambda value: value == "" or _file(".json")(value)}
_SIZES = ("head_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
_MEANINGS = ("bos", "eos", "pad", "sep", "bot", "eot", "bor", "eor", "image", "audio", "video")
_SETTINGS = {
    "model": {
        "type": _name,
        **dict.fromkeys(("vocab_size", "context_length"), _number),
        **dict.fromkeys((f"{what}_token_id" for what in _MEANINGS), _ids),
        "decoder": {
            **_GRAPH,
            **dict.fromkeys(_SIZES, _number),
            "inputs": {**_NAMES, **_CACHES},
            "outputs": {**_NAMES, **_CACHES},
        },
        "embedding": _GRAPH,
        "vision": _ENCODER,
        "speech": _ENCODER,
    },
    "speculative": {
        **dict.fromkeys(("max_draft_tokens", "ngram_size", "min_adaptive_k"), _number),
        **dict.fromkeys(("ngram_chained_lookup", "cooldown"), _one_of(True, False)),
    },
    "search": dict.fromkeys(
        (
            "batch_size", "chunk_size", "diversity_penalty", "do_sample", "early_stopping", "length_penalty",
            "max_length", "min_length", "no_repeat_ngram_size", "num_beams", "num_return_sequences",
            "past_present_share_buffer", "random_seed", "repetition_penalty", "temperature", "top_k", "top_p",
        ),
        _number,
    ),
}  # fmt: skip
_ATTRIBUTES = {
    **dict.fromkeys(("patch_size", "max_soft_tokens", "pooling_kernel_size"), _number),
    **dict.fromkeys(("feature_size", "sampling_rate", "frame_length_ms", "hop_length_ms", "mel_floor"), _number),
    **dict.fromkeys(("min_frequency", "max_frequency", "preemphasis", "preemphasis_htk_flavor"), _number),
    "fft_overdrive": _number,
    "color_space": _one_of("RGB", "BGR"),
}
_OPERATION = {
    "operation": {
        "name": _name,
        "type": _one_of("DecodeImage", "Gemma4ImageTransform", "AudioDecoder", "Gemma4LogMel"),
        "attrs": _ATTRIBUTES,
    }
}
_PROCESSOR = {
    "processor": {"name": _name, "transforms": [_OPERATION]},
    "feature_extraction": {"sequence": [_OPERATION]},
}


def admit(folder: Path) -> dict[str, Any]:
    """The genai_config.json of a folder. Raises FolderError for one that the runtime must not be given."""
    if not folder.is_dir():
        raise FolderError(f"{folder} is not a folder")
    try:
        config = read_config(folder / CONFIG_FILE)
        found = list(islice(admission_faults(folder, config), 3))
    except ArchitectureError as error:
        raise FolderError(str(error)) from None
    if found:
        raise FolderError(
            f"{folder} is not given to the runtime: {'; '.join(found)}",
            hint="if you trust the folder, take that out of it",
        )
    return config


def admission_faults(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """What the runtime must not be given, one sentence each, of a folder and its genai_config.json."""
    named = list(_unknown(config, _SETTINGS, ""))
    yield from (f"{CONFIG_FILE}: {fault}" for fault in named)
    if (folder / MODULE).exists():
        yield f"{MODULE} leads the tokenizer to other files"
    body = config.get("model")
    sections = [part for part in body.values() if isinstance(part, dict)] if isinstance(body, dict) else []
    places = {folder}
    for section in () if named else sections:
        if graph := section.get("filename"):
            places.add((folder / graph).parent)
        if name := section.get("config_filename"):
            processor = read_config(folder / name)
            yield from (f"{name}: {fault}" for fault in _unknown(processor, _PROCESSOR, ""))
    for place in sorted(places):
        yield from _foreign(place, folder)


def _foreign(place: Path, folder: Path) -> Iterator[str]:
    """Links that lead out of the folder, what is neither a file nor a folder, and files that are far too long."""
    if not stays_inside(place, folder):
        yield f"{place.relative_to(folder)} is a link that leads out of the folder"
        return
    try:
        names = sorted(entry.name for entry in os.scandir(place))
    except OSError as error:
        yield f"{place.name} cannot be read: {error.strerror}"
        return
    for name in names:
        path = place / name
        if not stays_inside(path, folder):
            yield f"{name} is a link that leads out of the folder"
        elif not path.is_file() and not path.is_dir():
            yield f"{name} is not a regular file"
        elif path.suffix in (".json", ".jinja") and (words := oversized(path)):
            yield f"{name}: {words}"


def _unknown(value: Any, known: Any, where: str) -> Iterator[str]:
    """Keys that are not known, and values that are not of the known form. `known` has the form of the value: an object
    of rules, a list of the one rule for its entries, or a rule."""
    if isinstance(known, Mapping) and isinstance(value, Mapping):
        for key, each in value.items():
            place = f"{where}.{key}" if where else str(key)
            if key in known:
                yield from _unknown(each, known[key], place)
            else:
                yield f"{place} is not among the known settings"
    elif isinstance(known, Sequence) and isinstance(value, list):
        for number, each in enumerate(value):
            yield from _unknown(each, known[0], f"{where}[{number}]")
    elif not callable(known) or not known(value):
        shown = repr(value)
        yield f"{where or 'the file'} is {shown if len(shown) <= 80 else shown[:77] + '...'}, which it cannot be"
