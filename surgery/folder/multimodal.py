"""The folder that takes images and sound beside text: four graphs, and the files of GenAI's own processor.

    input_ids -----------------> embed_tokens -> inputs_embeds, per_layer_inputs -> model -> logits, caches
    pixel_values,                     ^   ^
    pixel_position_ids -> vision_encoder  |
    input_features,                       |
    input_features_mask ----------> audio_encoder

GenAI's class `gemma4` (0.15 and later) runs it. What was measured on 0.15.2 to 0.18.0, and why a key is written:

    vision                  always there: without it the load ends in `The model path is a directory ...`
    speech.config_filename  "" where there is no sound: its default is a file name, and the load ends in
                            `speech.config_filename is set but speech.filename is missing`
    per_layer_inputs        named on both sides: the default is no name, and the first run lacks the input
    hidden_size             the width of inputs_embeds and of features for a prompt of text
    config_filename         never processor_config.json: a Hugging Face file of another form has that name
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from passes.base import Pass
from surgery.architecture import read_config, text_config
from surgery.choices import Modality, Target
from surgery.errors import ExportError, SurgeryError
from surgery.files.json_values import JsonValues
from surgery.folder.genai_config import CONFIG_FILE, copy_side_files, genai_config, write_json
from surgery.graph.model import Model
from surgery.source.export import EMBED, ENCODERS, MEDIA_FILES, Export

TYPE = "gemma4"
_MOST = 2**20
"""Of anything that a processor counts or measures: pixels, tokens, samples, hertz."""
PROCESSORS: dict[Modality, str] = {"image": "image_processor.json", "audio": "audio_processor.json"}
"""Modality -> the file that tells GenAI how to prepare it."""

SECTIONS: dict[Modality, tuple[str, dict[str, str], dict[str, str]]] = {
    "image": (
        "vision",
        {"pixel_values": "pixel_values", "pixel_position_ids": "pixel_position_ids"},
        {"image_features": "image_features"},
    ),
    "audio": (
        "speech",
        {"audio_embeds": "input_features", "attention_mask": "input_features_mask"},
        {"audio_features": "audio_features"},
    ),
}
"""Modality -> section of genai_config.json, and the names in the graph for the runtime's roles of inputs and
outputs."""


@dataclass(frozen=True)
class GraphPlan:
    """A graph of the folder beside its decoder: its role, which is its name there, its source, and what is done to
    it."""

    role: str
    source: Path
    recipe: Sequence[Pass]

    @property
    def file(self) -> str:
        """The name of its file in the folder."""
        return f"{self.role}.onnx"


def media_of(folder: Path) -> tuple[Modality, ...]:
    """What a GenAI folder takes beside text, as its configuration says; nothing where it cannot be read."""
    try:
        model = read_config(folder / CONFIG_FILE).get("model")
    except SurgeryError:
        return ()
    held = model if isinstance(model, dict) and model.get("type") == TYPE else {}
    return tuple(modality for modality, (section, _, _) in SECTIONS.items() if section in held)


def read_modalities(text: str) -> tuple[Modality, ...]:
    """What a model takes beside text, from `text,image,audio`. Raises ExportError for what no folder can be."""
    given = [word.strip() for word in text.split(",")]
    known = ("text", *ENCODERS)
    if unknown := [word for word in given if word not in known]:
        raise ExportError(f"--modalities has {unknown[0]!r}; {', '.join(known)} are known")
    if "text" not in given:
        raise ExportError("--modalities has no text, which every model takes")
    if "audio" in given and "image" not in given:
        raise ExportError(
            "GenAI's multimodal class loads no folder without a vision encoder", hint="--modalities text,image,audio"
        )
    return tuple(modality for modality in ENCODERS if modality in given)


def check_export(export: Export, modalities: Sequence[Modality]) -> None:
    """Raise ExportError where the export's model, or its processor, is none that GenAI runs in this form."""
    seen = text_config(export.config).get("use_bidirectional_attention")
    if seen is not None:
        raise ExportError(
            f"{export.root / 'config.json'}: use_bidirectional_attention is {seen!r}: tokens of an image see each other, "
            "which this decoder's graph does not know of",
            hint="--modalities text repacks it for text",
        )
    for modality in modalities:
        _PROCESSOR[modality](export)


def most_patches(export: Export) -> int:
    """Patches of the largest image that the processor makes."""
    attributes = _image_attributes(export)
    return attributes["max_soft_tokens"] * attributes["pooling_kernel_size"] ** 2


def media_config(
    model: Model, export: Export, modalities: Sequence[Modality], provider: str = "cpu", target: Target = "genai-0.15"
) -> dict[str, Any]:
    """genai_config.json of a folder of four graphs, `model` being its decoder; as `genai_config` otherwise."""
    config = genai_config(model, export, provider, target)
    body = config["model"]
    between = [v.name for v in model.graph.input if v.name in ("inputs_embeds", "per_layer_inputs")]
    decoder = body["decoder"]
    decoder["inputs"] = {**{name: name for name in between}, **decoder["inputs"]}
    features = {f"{modality}_features": f"{modality}_features" for modality in modalities}
    body["type"] = TYPE
    body |= {f"{modality}_token_id": export.placeholder(modality) for modality in modalities}
    body["embedding"] = {
        "filename": f"{EMBED}.onnx",
        "inputs": {"input_ids": "input_ids", **features},
        "outputs": {name: name for name in between},
    }
    body["speech"] = {"config_filename": ""}
    for modality in modalities:
        section, inputs, outputs = SECTIONS[modality]
        body[section] = {
            "filename": f"{ENCODERS[modality]}.onnx",
            "config_filename": PROCESSORS[modality],
            "inputs": dict(inputs),
            "outputs": dict(outputs),
        }
    return config


def write_media_files(export: Export, folder: Path, modalities: Sequence[Modality]) -> None:
    """GenAI's processor files, and Hugging Face's own."""
    for modality in modalities:
        write_json(folder / PROCESSORS[modality], _PROCESSOR[modality](export))
    copy_side_files(export, folder, MEDIA_FILES)


def _image_processor(export: Export) -> dict[str, Any]:
    return {
        "processor": {
            "name": "gemma4_image_processor",
            "transforms": [
                _operation("decode_image", "DecodeImage", {"color_space": "RGB"}),
                _operation("gemma4_image_transform", "Gemma4ImageTransform", _image_attributes(export)),
            ],
        }
    }


def _image_attributes(export: Export) -> dict[str, int]:
    section = _section(export, "image_processor")
    keys = ("patch_size", "max_soft_tokens", "pooling_kernel_size")
    return {key: section.whole(key, most=_MOST) for key in keys}


def _audio_processor(export: Export) -> dict[str, Any]:
    """Raises ExportError for what GenAI's log-mel does not do: noise, scaling, means of bins."""
    section = _section(export, "feature_extractor")
    for key, nothing in (("dither", 0), ("input_scale_factor", 1), ("per_bin_mean", None), ("per_bin_stddev", None)):
        if (found := section.values.get(key, nothing)) != nothing:
            raise ExportError(
                f"{section.where}: {key} is {repr(found)[:40]}, which GenAI's log-mel has no form "
                f"for; {nothing} is expected",
                hint="leave audio out of --modalities",
            )
    rate = section.whole("sampling_rate", most=_MOST)
    attributes = {
        "feature_size": section.whole("feature_size", most=_MOST),
        "sampling_rate": rate,
        "frame_length_ms": section.whole("frame_length", most=_MOST) * 1000 / rate,
        "hop_length_ms": section.whole("hop_length", most=_MOST) * 1000 / rate,
        "min_frequency": section.number("min_frequency", default=0.0, least=0, most=_MOST),
        "max_frequency": section.number("max_frequency", default=8000.0, least=0, most=_MOST),
        "preemphasis": section.number("preemphasis", default=0.0, least=0, most=1),
        "preemphasis_htk_flavor": int(section.flag("preemphasis_htk_flavor", default=True)),
        "fft_overdrive": int(section.flag("fft_overdrive", default=False)),
        "mel_floor": section.number("mel_floor", default=0.001, least=0, most=1),
    }
    return {
        "feature_extraction": {
            "sequence": [
                _operation("audio_decoder", "AudioDecoder"),
                _operation("gemma4_log_mel", "Gemma4LogMel", attributes),
            ]
        }
    }


_PROCESSOR = {"image": _image_processor, "audio": _audio_processor}


def _operation(name: str, kind: str, attributes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    operation: dict[str, Any] = {"name": name, "type": kind}
    return {"operation": {**operation, "attrs": dict(attributes)} if attributes else operation}


def _section(export: Export, name: str) -> JsonValues:
    path = export.file("processor_config.json")
    section = read_config(path).get(name) if path else None
    if not isinstance(section, Mapping):
        raise ExportError(
            f"{export.root} has no processor_config.json with {name!r}, which says how the model's input is prepared",
            hint="fetch the file from the repository that the export came from",
        )
    return JsonValues(section, f"processor_config.json: {name}", ExportError)
