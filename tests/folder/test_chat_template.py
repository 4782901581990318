"""Chat templates with tools, in the Jinja of onnxruntime-genai: the text that jinja2 renders of the published one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import command_line
import pytest
from exhaustive import in_full
from places import ROOT, TINY
from signing import sign

from surgery import Chat, RepackOptions, repack, tool_calls, tool_grammar, validate
from surgery.errors import RequestError
from surgery.folder.chat_template import genai_template
from surgery.folder.genai_config import mark_ids
from surgery.runtime.conversation import ChatSettings, Turn, open_conversation
from surgery.runtime.tokenizer import Tokenizer
from surgery.runtime.tool_calls import ToolCall
from surgery.source.export import open_export
from surgery.verify.genai_proof import TOOLS
from validation.chat_templates import Conversation, conversations, published_text, renderer

PUBLISHED = (ROOT / "tests" / "tools_template.jinja").read_text(encoding="utf-8")
_MARKS = {
    "<mask>": "<|tool_call>", "<|video|>": "<tool_call|>", "<unused0>": '<|"|>', "<|audio>": "<|channel>",
    "<audio|>": "<channel|>", "(": "{", ")": "}", ";": "[", "!": "]",
}  # fmt: skip
"""Tokens of the committed tokenizer -> what stands in their place: what calls of tools are written with."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose chat template takes tools, and whose tokenizer has their marks."""
    folder = tmp_path_factory.mktemp("tools") / "export"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*fp16*", "*q4f16*", "*quantized*", "*encoder*"))
    (folder / "chat_template.jinja").write_text(PUBLISHED, encoding="utf-8")
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    for old, new in _MARKS.items():
        text = text.replace(json.dumps(old), json.dumps(new))
    tokenizer = json.loads(text)
    added, quote = tokenizer["added_tokens"], '<|"|>'
    if quote not in [entry["content"] for entry in added]:
        added.append({**added[0], "id": tokenizer["model"]["vocab"][quote], "content": quote})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(source: Path) -> Path:
    target = source.parent / "out"
    repack(source, target, RepackOptions(preset="fast"))  # with its proof
    return target


Render = Callable[[Conversation], str]


@pytest.fixture(scope="module")
def render(folder: Path) -> Render:
    return renderer(Path(shutil.copytree(folder, folder.parent / "rendered")), str(genai_template(PUBLISHED)))


@pytest.mark.parametrize("count", [70, in_full(210)])
def test_generated_conversations_are_rendered_as_by_jinja2(count: int, render: Render) -> None:
    for said in conversations(count, seed=7):
        said = replace(said, messages=[{"content": "", **message} for message in said.messages])
        assert render(said) == published_text(PUBLISHED, said), said


@pytest.mark.parametrize("messages", [
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<|channel>b<channel|> c"}],
    [{"role": "user", "content": "\u3000\u00a0\u2003 a \x1c\x85"}],
    [{"role": "user", "content": "\u00a0" * 3000 + "a"}],
    [{"role": "user", "content": " \t"}, {"role": "tool", "name": "t", "content": {"b": None, "A": [{}, [], 1e-7]}}],
])  # fmt: skip
def test_what_the_two_render_otherwise(messages: list[dict[str, object]], render: Render) -> None:
    said = Conversation(messages, TOOLS, thinking=True)
    assert render(said) == published_text(PUBLISHED, said)


def test_the_published_template_is_not_rendered_so(folder: Path, tmp_path: Path) -> None:
    render = renderer(Path(shutil.copytree(folder, tmp_path / "copy")), PUBLISHED)
    with pytest.raises(RuntimeError, match="null"):
        render(Conversation([{"role": "user", "content": "a"}], TOOLS, thinking=False))


def test_what_is_none_and_what_is_missing_are_told_apart(folder: Path, tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}\n  {% if tools and 'b' not in message %}\n- \n\t{% endif %}\n"
        "[{{ message['name'] }}]\n{% endfor %}\n"
    )
    render = renderer(Path(shutil.copytree(folder, tmp_path / "copy")), str(genai_template(template)))
    messages: list[dict[str, object]] = [{"content": "a", "name": None}, {"content": "a"}, {"content": "a", "b": "c"}]
    said = Conversation(messages, TOOLS, thinking=False)
    assert render(said) == published_text(template, said) == "- \n[None]\n- \n[]\n[]\n"


def test_a_template_without_tools_stays_as_it_is() -> None:
    assert genai_template((TINY / "chat_template.jinja").read_text()) is None


def test_the_folder_has_both_templates_the_ids_and_a_section_in_its_card(folder: Path) -> None:
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == PUBLISHED
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["chat_template"] == genai_template(PUBLISHED)
    model = json.loads((folder / "genai_config.json").read_text())["model"]
    assert [model[f"{name}_token_id"] for name in ("bot", "eot", "bor", "eor")] == [4, 116, 98, 125]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "## Tools and thoughts" in card and "{%- set enable_thinking = true -%}" in card
    assert "onnxruntime-genai 0.15" in card


def test_a_target_of_0_14_has_no_ids(source: Path, tmp_path: Path) -> None:
    repack(source, tmp_path / "out", RepackOptions(target="genai-0.14", validate=False))
    model = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]
    assert "bot_token_id" not in model and "eos_token_id" in model


def test_a_template_that_is_in_tokenizer_config_is_put_beside(source: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(source, tmp_path / "inline"))
    (moved / "chat_template.jinja").unlink()
    settings = json.loads((moved / "tokenizer_config.json").read_text(encoding="utf-8"))
    (moved / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": PUBLISHED}))
    repack(moved, tmp_path / "out", RepackOptions())
    assert (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8") == PUBLISHED


def test_of_a_pair_of_marks_there_are_both_or_neither(source: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(source, tmp_path / "copy"))
    text = (copied / "tokenizer.json").read_text(encoding="utf-8")
    assert sorted(mark_ids(open_export(copied))) == ["bor_token_id", "bot_token_id", "eor_token_id", "eot_token_id"]
    (copied / "tokenizer.json").write_text(text.replace("<tool_call|>", "<call|>"), encoding="utf-8")
    assert sorted(mark_ids(open_export(copied))) == ["bor_token_id", "eor_token_id"]


@pytest.mark.parametrize("part", ["trim(text)", "sort_pairs(mapping"])
def test_a_dialect_that_says_something_else_fails_the_proof(
    part: str, source: Path, folder: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    settings = json.loads((copied / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert f"macro {part}" in settings["chat_template"]
    wrong = settings["chat_template"].replace("<=", ">").replace("left.more = true", "left.more = false")
    (copied / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": wrong}))
    sign(copied)
    report = validate(copied, source)
    assert "chat template renders as in jinja2" in [gate.name for gate in report.gates if not gate.passed]


def test_an_id_of_another_token_fails_the_proof(source: Path, folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copied / "genai_config.json").read_text())
    config["model"]["bot_token_id"] = 5
    (copied / "genai_config.json").write_text(json.dumps(config))
    sign(copied)
    report = validate(copied, source)
    assert any("bot_token_id is 5; 4 is expected" in str(gate.detail) for gate in report.gates if not gate.passed)


SCRIPTED = (
    'Let me look.<|tool_call>call:tide_at{place:<|"|>Saint-Malo {<|"|>,near:{lat:48.5,by:None},times:[1,-2.5e-3,true]}'
    "<tool_call|><|tool_call>call:now{}<tool_call|>"
)


def test_calls_are_read_from_a_scripted_answer() -> None:
    assert tool_calls(SCRIPTED) == [
        ToolCall("tide_at", {"place": "Saint-Malo {", "near": {"lat": 48.5, "by": None}, "times": [1, -0.0025, True]}),
        ToolCall("now", {}),
    ]
    assert tool_calls("no call") == []


@pytest.mark.parametrize("end", [*range(30, SCRIPTED.index("<tool_call|>"), 9)])
def test_a_call_that_is_cut_off_is_a_sentence(end: int) -> None:
    with pytest.raises(RequestError, match=r"a tool call is (cut off|not in the model's form)"):
        tool_calls(SCRIPTED[:end])
    with pytest.raises(RequestError, match="64 at most"):
        tool_calls("<|tool_call>call:a{b:" + "[" * 99)


@pytest.mark.parametrize("number", ["007", "1e999", "9" * 5000, "٣", "-01"])
def test_a_number_that_is_none_in_a_call_is_a_sentence(number: str) -> None:
    with pytest.raises(RequestError, match="which is no number of JSON's"):
        tool_calls(f"<|tool_call>call:a{{b:{number}}}<tool_call|>")


def test_tools_that_are_nested_too_deeply_are_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text("[" * 200_000)
    done = command_line.run("generate", TINY, "hi", "--tools", tmp_path / "tools.json")
    assert done.returncode == 2 and "tools.json is not JSON: maximum recursion depth" in done.stderr


def test_what_a_template_writes_of_a_call_is_read_back() -> None:
    arguments = {"place": "厦门\n", "near": {"lat": 24.5, "x": None}, "times": ["a", 1, False], "none": {}}
    call = {"id": "1", "type": "function", "function": {"name": "tide_at", "arguments": arguments}}
    said = Conversation([{"role": "assistant", "content": "", "tool_calls": [call]}], None, thinking=False)
    assert tool_calls(published_text(PUBLISHED, said)) == [ToolCall("tide_at", arguments)]


TIDE = [{"type": "function", "function": {"name": "tide", "description": "", "parameters": {"type": "object", "properties": {
    "place": {"type": "string", "enum": ["here", "there"]}, "n": {"type": "integer"}, "on": {"type": "boolean"},
    "many": {"type": "array", "items": {"type": "integer"}}, "in": {"type": "object", "properties": {"a": {"type": "boolean"}}},
}}}}]  # fmt: skip


def test_guidance_takes_the_grammar_and_what_follows_it_is_read(folder: Path) -> None:
    """A model that says anything at all says calls of the tools, with arguments of their types."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=True, temperature=3.0, random_seed=3, max_length=120)
    params.set_guidance("lark_grammar", tool_grammar(TIDE, must_call=True))
    generator = og.Generator(model, params)
    generator.append_tokens(tokenizer.encode("hello"))
    while not generator.is_done():
        generator.generate_next_token()
    words = {4: "<|tool_call>", 116: "<tool_call|>", int(tokenizer.encode('<|"|>')[0]): '<|"|>'}
    ids = [int(token) for token in generator.get_sequence(0)]
    said = "".join(words.get(token) or tokenizer.decode([token]) for token in ids)
    found = tool_calls(said[: said.rindex("<tool_call|>") + len("<tool_call|>")])
    assert found and {call.name for call in found} == {"tide"}
    kinds = {"place": str, "n": int, "on": bool, "many": list, "in": dict}
    assert all(isinstance(value, kinds[key]) for call in found for key, value in call.arguments.items())


def test_a_chat_tells_of_tools(folder: Path) -> None:
    prompts = []
    for tools in (None, [{"type": "function", "function": {"name": "tide", "description": ""}}]):
        with Chat(folder, tools=tools, new_tokens=1, lasting=False) as chat:
            list(chat.say("hello"))
            prompts.append(chat.answered.prompt if chat.answered else 0)
    assert prompts[0] < prompts[1]


def test_what_tools_returned_is_rendered_as_a_template_has_it(folder: Path, source: Path) -> None:
    """The conversation after a call, which this model of random weights does not make by itself."""
    tools = [{"type": "function", "function": {"name": "tide", "description": ""}}]
    call = '<|tool_call>call:tide{n:2,place:<|"|>Brest<|"|>}<tool_call|>'
    asked = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": f"er {call}{call}"}]
    settings, results = ChatSettings(new_tokens=3, tools=json.dumps(tools)), [{"metres": 4.5}, "low"]
    made = [{"type": "function", "function": {"name": "tide", "arguments": {"n": 2, "place": "Brest"}}}] * 2
    messages = [asked[0], {"role": "assistant", "content": "er ", "tool_calls": made}]
    messages += [{"role": "tool", "name": "tide", "content": result} for result in results]
    for place in (folder, source):
        going: Any = open_conversation(place, settings, precision=None if place == folder else "fp32")
        going._said.messages = [dict(message) for message in asked]
        assert list(going.answer(Turn("", results=json.dumps(results))))
        assert going._said.messages[:-1] == messages
        with pytest.raises(RequestError, match="the last answer calls 0 tools, and there are results of 1"):
            list(going.answer(Turn("", results="[1]")))
    going = open_conversation(folder, settings)
    going._said.messages = messages
    assert going._rendered() == Tokenizer(open_export(source)).render(messages, tools=tools)


@pytest.mark.parametrize("tools", [{"name": "a"}, [], [{"function": {}}], ["a"]])
def test_tools_in_another_form_are_a_sentence(tools: list[dict[str, object]], folder: Path) -> None:
    with pytest.raises(RequestError, match="the tools are not in the form that chat templates take"):
        Chat(folder, tools=tools)
    with pytest.raises(RequestError, match="has the name"):
        tool_grammar([{"function": {"name": "a b"}}])
