"""The proof holds the configuration against the source: each fault, written into a folder that is sound otherwise."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from folders import repack
from signing import sign
from vocabularies import kept_of, small_export, small_tokenizer, written

import surgery
from passes import FoldLogitsToKeep
from passes.presets import compatible
from passes.recipe import recipe_text
from surgery import RepackOptions
from surgery.folder.manifest import recorded_tokens
from surgery.folder.opened import open_genai_folder
from surgery.runtime.genai import GenAI, open_tokenizer
from surgery.source.export import Export, open_export
from surgery.verify import Request, prove_folder
from surgery.verify.configuration import SourceFiles, differences, setting_faults
from surgery.verify.genai_proof import check_ends, check_tokenizer
from surgery.verify.source_files import source_file_gates

DROPPED = object()
IDS, SETTINGS, FILES, PROCESSORS, READ = (
    *(f"{what} are the source's" for what in ("token ids", "settings", "files", "processors")), "folder can be read",
)  # fmt: skip
Edits = Mapping[str, object]
"""Place in a JSON file -> what stands there, or DROPPED."""

TEXT: dict[str, tuple[str, Edits, str]] = {
    "eos of config.json": ("genai_config", {"model.eos_token_id": [1, 106]}, IDS),
    "the first eos": ("genai_config", {"model.eos_token_id": 1}, IDS),
    "the last eos": ("genai_config", {"model.eos_token_id": 50}, IDS),
    "pad is an eos": ("genai_config", {"model.pad_token_id": 1}, IDS),
    "pad is a word": ("genai_config", {"model.pad_token_id": 77}, IDS),
    "another bos": ("genai_config", {"model.bos_token_id": 3}, IDS),
    "no bos": ("genai_config", {"model.bos_token_id": DROPPED}, IDS),
    "context doubled": ("genai_config", {"model.context_length": 512}, SETTINGS),
    "context of the window": ("genai_config", {"model.context_length": 8}, SETTINGS),
    "longer than the context": ("genai_config", {"search.max_length": 512}, SETTINGS),
    "16 tokens": ("genai_config", {"search.max_length": 16}, SETTINGS),
    "least length": ("genai_config", {"search.min_length": 4}, SETTINGS),
    "head size": ("genai_config", {"model.decoder.head_size": 32}, SETTINGS),
    "KV heads": ("genai_config", {"model.decoder.num_key_value_heads": 2}, SETTINGS),
    "attention heads": ("genai_config", {"model.decoder.num_attention_heads": 8}, SETTINGS),
    "hidden size": ("genai_config", {"model.decoder.hidden_size": 32}, SETTINGS),
    "a layer too many": ("genai_config", {"model.decoder.num_hidden_layers": 11}, SETTINGS),
    "pairs of the other layout": ("genai_config", {"model.decoder.num_hidden_layers": 5}, SETTINGS),
    "the class of one size": ("genai_config", {"model.type": "gemma3_text"}, SETTINGS),
    "repetition penalty": ("genai_config", {"search.repetition_penalty": 1.1}, SETTINGS),
    "top_k and top_p swapped": ("genai_config", {"search.top_k": 0.95, "search.top_p": 64}, SETTINGS),
    "temperature": ("genai_config", {"search.temperature": 0.7}, SETTINGS),
    "do_sample dropped": ("genai_config", {"search.do_sample": DROPPED}, SETTINGS),
    "do_sample is 1": ("genai_config", {"search.do_sample": 1}, SETTINGS),
    "beams": ("genai_config", {"search.num_beams": 2}, SETTINGS),
    "a setting that nothing asked for": ("genai_config", {"search.no_repeat_ngram_size": 3}, SETTINGS),
    "an id that nothing asked for": ("genai_config", {"model.sep_token_id": 5}, SETTINGS),
    "a key that nobody knows": ("genai_config", {"model.decoder.foo": 5}, READ),
    "threads": ("genai_config", {"model.decoder.session_options.intra_op_num_threads": 1}, SETTINGS),
    "another provider": ("genai_config", {"model.decoder.session_options.provider_options": [{"cuda": {}}]}, SETTINGS),
    "tokenizer class": ("tokenizer_config", {"tokenizer_class": "Gemma4Tokenizer"}, FILES),
    "a processor of transformers": ("tokenizer_config", {"processor_class": "Gemma4Processor"}, FILES),
    "begin of text": ("tokenizer_config", {"bos_token": "<eos>"}, FILES),
    "no text model": ("config", {"model_type": "gemma4"}, FILES),
    "window in config.json": ("config", {"sliding_window": 512}, FILES),
    "sampling of generation_config.json": ("generation_config", {"top_k": 65}, FILES),
}  # fmt: skip
MEDIA: dict[str, tuple[str, Edits, str]] = {
    "patch size": ("image_processor", {"processor.transforms.1.operation.attrs.patch_size": 14}, PROCESSORS),
    "soft tokens": ("image_processor", {"processor.transforms.1.operation.attrs.max_soft_tokens": 280}, PROCESSORS),
    "colours": ("image_processor", {"processor.transforms.0.operation.attrs.color_space": "BGR"}, PROCESSORS),
    **{
        key: ("audio_processor", {f"feature_extraction.sequence.1.operation.attrs.{key}": value}, PROCESSORS)
        for key, value in (
            ("mel_floor", 1e-5), ("sampling_rate", 8000), ("preemphasis", 0.97), ("hop_length_ms", 20.0),
            ("frame_length_ms", 320), ("preemphasis_htk_flavor", 0), ("fft_overdrive", DROPPED), ("max_frequency", 4000.0),
        )
    },
    "placeholders swapped": ("genai_config", {"model.image_token_id": 114, "model.audio_token_id": 113}, IDS),
    "class of text": ("genai_config", {"model.type": "gemma4_text"}, SETTINGS),
    "a name": ("genai_config", {"model.vision.config_filename": "audio_processor.json"}, SETTINGS),
    "of processor_config.json": ("processor_config", {"audio_seq_length": 1}, FILES),
}  # fmt: skip


@pytest.fixture(scope="module")
def text(export: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound folder for text, with the recipe in its manifest."""
    pair = export.pair("q4")
    target = tmp_path_factory.mktemp("sound") / "out"
    return repack(export, target, recipe_text=recipe_text(compatible(export.below(pair.embed)))).folder


@pytest.fixture(scope="module")
def media(export: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound folder for images and sound."""
    options = RepackOptions(precision="q4", modalities=("image", "audio"), provider="cpu", validate=False)
    return surgery.repack(export.root, tmp_path_factory.mktemp("media") / "out", options).folder


def damaged(sound: Path, target: Path, name: str, edits: Edits) -> Path:
    """A copy with the edits in one of its files, signed as it is."""
    shutil.copytree(sound, target)
    path = target / f"{name}.json"
    content = json.loads(path.read_text())
    for place, value in edits.items():
        *above, last = place.split(".")
        part: Any = reduce(lambda part, key: part[int(key) if key.isdecimal() else key], above, content)
        if value is DROPPED:
            del part[last]
        else:
            part[last] = value
    path.write_text(json.dumps(content))
    return sign(target)


def failed(folder: Path, export: Export) -> set[str]:
    """The gates of the closing proof that fail; generation is not tried where the structure is at fault."""
    report = prove_folder(folder, export.pair("q4"), request=Request(scope="closing"))
    return {gate.name for gate in report.failed} - {"generation"}


# What the source says is written, whatever it says


def rewritten(path: Path, *place: str, **values: object) -> None:
    """Other values in a JSON file, at a place in it; DROPPED takes one away."""
    content = json.loads(path.read_text())
    part = reduce(lambda part, key: part[key], place, content)
    part.update(values)
    for key in [key for key, value in values.items() if value is DROPPED]:
        del part[key]
    path.write_text(json.dumps(content))


def held(folder: Path, export: Export) -> list[str]:
    """What the gates over the source's files say of a folder."""
    gates = source_file_gates(open_genai_folder(folder), export.pair("q4"), export.root, "cpu")
    assert len(gates) >= 5
    return [gate.detail for gate in gates if not gate.passed]


def test_what_the_writer_makes_of_other_values_is_the_source_s(source: Path, tmp_path: Path) -> None:
    said = {"do_sample": False, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}
    ids = {"bos_token_id": 3, "pad_token_id": 9, "eos_token_id": [106, 50, 7]}
    rewritten(source / "generation_config.json", **said, **ids)
    (source / "LICENSE").write_text("mine")
    export = open_export(source)
    folder = repack(export, tmp_path / "out").folder
    assert held(folder, export) == []
    written = json.loads((folder / "genai_config.json").read_text())
    assert written["search"].items() >= said.items() and written["model"].items() >= ids.items()
    rewritten(source / "generation_config.json", **dict.fromkeys((*said, *ids), DROPPED))
    rewritten(source / "config.json", **ids)
    export = open_export(source)
    assert held(repack(export, tmp_path / "plain").folder, export) == []


SOUND = {
    "mel_floor": 0.002, "preemphasis": 0.97, "preemphasis_htk_flavor": False, "fft_overdrive": True, "min_frequency": 20.0,
    "max_frequency": 7600.0, "frame_length": 400, "hop_length": 200, "sampling_rate": 8000,
}  # fmt: skip


@pytest.mark.parametrize("sound", [SOUND, dict.fromkeys(list(SOUND)[:6], DROPPED)], ids=["other values", "no values"])
def test_what_the_writer_makes_of_processors_is_the_source_s(
    sound: dict[str, object], source: Path, tmp_path: Path
) -> None:
    rewritten(source / "processor_config.json", "feature_extractor", **sound)
    rewritten(source / "processor_config.json", "image_processor", max_soft_tokens=35)
    options = RepackOptions(precision="q4", modalities=("image", "audio"), provider="cpu", validate=False)
    folder = surgery.repack(source, tmp_path / "out", options).folder
    assert held(folder, open_export(source)) == []


# Faults


@pytest.mark.parametrize("fault", TEXT)
def test_a_wrong_configuration(fault: str, text: Path, export: Export, tmp_path: Path) -> None:
    name, edits, gate = TEXT[fault]
    assert failed(damaged(text, tmp_path / "out", name, edits), export) == {gate}


@pytest.mark.parametrize("fault", MEDIA)
def test_a_wrong_configuration_of_images_and_sound(fault: str, media: Path, export: Export, tmp_path: Path) -> None:
    name, edits, gate = MEDIA[fault]
    assert gate in failed(damaged(media, tmp_path / "out", name, edits), export)


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json"])
def test_a_file_that_was_not_copied(name: str, text: Path, export: Export, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(text, tmp_path / "out"))
    (folder / name).unlink()
    assert failed(sign(folder), export) == {FILES}


@pytest.mark.parametrize(("place", "name"), [
    ("inputs.input_ids", "ids"), ("inputs.past_key_names", "past.%d.key"), ("outputs.logits", "present.0.key"),
])  # fmt: skip
def test_names_of_the_graph_are_held_by_themselves(
    place: str, name: str, text: Path, export: Export, tmp_path: Path
) -> None:
    folder = damaged(text, tmp_path / "out", "genai_config", {f"model.decoder.{place}": name})
    gates = source_file_gates(open_genai_folder(folder), export.pair("q4"), export.root, "cpu")
    assert [gate.name for gate in gates if not gate.passed] == [SETTINGS]


ELSEWHERE = {f"{name}_token_id" for name in ("bos", "eos", "pad", "image", "audio")} | {"past_present_share_buffer"}
"""Keys that have a gate of their own."""
KINDS: dict[str, dict[str, Any]] = {
    "prompts in int8, guesses": {"precision": "q4", "preset": "fast", "prefill": "int8", "speculative": True},
    "fewer tokens": {"precision": "q4", "vocabulary": "list"},
    "images and sound": {"precision": "q4", "modalities": ("image", "audio")},
    "CUDA, tables on the host": {"precision": "q4f16", "provider": "cuda", "host_embeddings": True},
}


def places(content: Mapping[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where the values stand, all the way in."""
    found = [
        places(value, (*above, key)) if isinstance(value, dict) else [(*above, key)] for key, value in content.items()
    ]
    return [place for part in found for place in part]


def another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else f"{value}_" if isinstance(value, str) else [1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_of_every_kind_of_folder_is_held(kind: str, export: Export, tmp_path: Path) -> None:
    """Each key, dropped and with another value."""
    options = {"provider": "cpu", "validate": False, **KINDS[kind]}
    if "vocabulary" in options:
        export = open_export(small_export(tmp_path / "words"))
        options["vocabulary"] = written(kept_of(small_tokenizer(tmp_path), 801), tmp_path / "list")
    folder = surgery.repack(export.root, tmp_path / "out", RepackOptions(**options)).folder
    pair = replace(export.pair(options["precision"]), kept=recorded_tokens(folder))
    opened, source = open_genai_folder(folder), SourceFiles.read(export.root, pair)
    assert not list(setting_faults(opened, source, options["provider"]))
    for *above, key in [place for place in places(opened.config) if not ELSEWHERE.intersection(place)]:
        part = reduce(lambda part, name: part[name], above, opened.config)
        value = part.pop(key)
        assert list(setting_faults(opened, source, options["provider"])), f"without {'.'.join((*above, key))}"
        part[key] = another(value)
        assert list(setting_faults(opened, source, options["provider"])), f"{'.'.join((*above, key))} is {part[key]}"
        part[key] = value


def test_the_class_is_that_of_the_oldest_runtime(export: Export, tmp_path: Path) -> None:
    """One size of caches is what 0.12 needs, and others may have it by nature: the manifest tells."""
    options = RepackOptions(precision="q4", target="genai-0.12", provider="cpu", validate=False)
    folder = surgery.repack(export.root, tmp_path / "out", options).folder
    assert held(folder, export) == []
    rewritten(folder / "genai_config.json", "model", type="gemma4_text")
    assert held(folder, export) == ["model.type is 'gemma4_text'; 'gemma3_text' is expected"]
    rewritten(folder / "genai_config.json", "model", type="gemma3_text")
    rewritten(folder / "manifest.json", target=DROPPED)
    assert held(folder, export) == ["model.type is 'gemma3_text'; 'gemma4_text' is expected"]


def test_a_file_of_the_same_size_and_time_is_not_the_same(text: Path, export: Export, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(text, tmp_path / "out"))
    path, theirs = (root / "tokenizer.json" for root in (folder, export.root))
    path.write_bytes(path.read_bytes().replace(b"Hello", b"Jello").replace(b"the", b"teh"))
    times = theirs.stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size and path.read_bytes() != theirs.read_bytes()
    gates = source_file_gates(open_genai_folder(folder), export.pair("q4"), export.root, "cpu")
    assert [gate.detail for gate in gates if not gate.passed] == ["tokenizer.json is not the source's"]


def test_the_text_model_s_name_is_written_where_the_source_has_none(source: Path, tmp_path: Path) -> None:
    rewritten(source / "config.json", "text_config", model_type=DROPPED)
    export = open_export(source)
    folder = repack(export, tmp_path / "out").folder
    assert held(folder, export) == []
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gemma4_text"


def test_a_template_of_another_model(text: Path, export: Export, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(text, tmp_path / "out"))
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    assert failed(sign(folder), export) == {FILES}


def test_logits_of_all_tokens_where_the_last_are_promised(export: Export, tmp_path: Path) -> None:
    def every(embed: Path) -> list[Any]:
        return [replace(step, keep="all") if isinstance(step, FoldLogitsToKeep) else step for step in compatible(embed)]

    embed = export.below(export.pair("q4").embed)
    said = repack(export, tmp_path / "said", preset=every, recipe_text=recipe_text(every(embed))).folder
    broken = repack(export, tmp_path / "broken", preset=every, recipe_text=recipe_text(compatible(embed))).folder
    assert not failed(said, export)
    assert failed(broken, export) == {"logits are as many as promised"}


def test_what_a_source_does_not_say_is_not_in_the_folder(
    source: Path, text: Path, export: Export, tmp_path: Path
) -> None:
    """A source without sampling values, and with a licence that was not copied."""
    (source / "generation_config.json").write_text(
        '{"eos_token_id": [1, 106, 50], "top_k": true, "temperature": 1.0, "top_p": 0.95}'
    )
    (source / "LICENSE").write_text("mine")
    request = Request(scope="closing", files=source)
    gates = {gate.name: gate.detail for gate in prove_folder(text, export.pair("q4"), request=request).failed}
    assert "LICENSE is missing" in gates[FILES] and "generation_config.json is not the source's" in gates[FILES]
    assert "search.do_sample is True, which is nothing that the source has" in gates[SETTINGS]
    assert "search.top_k is 64, which is nothing that the source has" in gates[SETTINGS]


def test_a_source_that_cannot_be_read_is_a_failed_gate(source: Path, text: Path) -> None:
    """A file that is no JSON, and a layer table of another length."""
    folder, pair, found = open_genai_folder(text), open_export(source).pair("q4"), list[list[str]]()
    for change in (lambda: rewritten(source / "config.json", "text_config", num_hidden_layers=9, layer_types=DROPPED),
                   lambda: (source / "generation_config.json").write_text("{")):  # fmt: skip
        change()
        found.append([gate.name for gate in source_file_gates(folder, pair, source, "cpu") if not gate.passed])
    assert "layers are the source's" in found[0] and found[1] == ["source's files can be read"]


def test_every_end_of_sequence_id_is_forced(text: Path) -> None:
    genai = GenAI(text, "cpu")
    assert check_ends(genai, (1, 106, 50), 128).passed
    assert check_ends(genai, (1, 106, 50, 7), 128).detail == "7 does not"
    assert check_ends(genai, (0,), 128).detail == "0 does not; 1 does too"


def test_the_runtime_renders_what_jinja2_renders(text: Path, tmp_path: Path) -> None:
    """The runtime does not find a text in a text: templates that cut an answer's thoughts out leave them there."""
    folder = Path(shutil.copytree(text, tmp_path / "out"))
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{% if 'tide' in message['content'] %}!{% endif %}{{ message['content'] }}{% endfor %}"
    )
    gates = {gate.name: gate for gate in check_tokenizer(open_tokenizer(folder, "cpu"), folder, 128)}
    gate = gates["chat template renders as in jinja2"]
    assert not gate.passed and "in place of '!What is" in gate.detail


def test_differences_name_the_place() -> None:
    wanted = {"a": {"b": [1, ("x", "y")], "c": ...}, "d": True}
    assert not list(differences({"a": {"b": [1, "y"], "c": 5}, "d": True}, wanted))
    found = sorted(differences({"a": {"b": [2, "z"], "e": 0}, "d": 1}, wanted))
    assert found == [
        "a.b[0] is 2; 1 is expected",
        "a.b[1] is 'z'; 'x' or 'y' is expected",
        "a.c is missing",
        "a.e is 0, which is nothing that the source has",
        "d is 1; True is expected",
    ]
