"""Ask one folder questions inside one environment. Imports nothing but onnxruntime_genai and numpy.

    PYTHON probe.py < {"folder": DIR, "questions": [QUESTION, ...]}

writes one JSON line per question as soon as it is answered, {"name": ..., "answer": ...} or {"name": ..., "error":
the runtime's words}, so that a crash costs the answer to one question. What native code prints to stdout goes to
stderr. A question is

    {"name": ..., "kind": "load"}
    {"name": ..., "kind": "encode", "texts": [TEXT, ...]}           ids and decoded text of each
    {"name": ..., "kind": "render", "message": TEXT}
    {"name": ..., "kind": "media", "prompt": TEXT, "images": [FILE, ...], "sounds": [FILE, ...], "steps": COUNT}
                                                                    ids of the prompt, its last logits, greedy tokens
    {"name": ..., "kind": "generate", "overlay": JSON, "search": {...}, "actions": [ACTION, ...]}

where ACTION is ["append", [ROW, ...]], ["generate", COUNT] (fewer where generation ends) or ["rewind", LENGTH], all on
one Generator. The answer is the sequence of each row after the last action.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO

import numpy as np
import onnxruntime_genai as og


class Folder:
    """The folder, whose model is loaded once."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._model: Any = None

    def model(self, overlay: str = "") -> Any:
        """The model on the CPU; an `overlay` of genai_config.json makes it another one."""
        if overlay:
            return self._open(overlay)
        if self._model is None:
            self._model = self._open("")
        return self._model

    def _open(self, overlay: str) -> Any:
        config = og.Config(self._path)
        config.clear_providers()
        if overlay:
            config.overlay(overlay)
        return og.Model(config)


def load(folder: Folder, question: Mapping[str, Any]) -> bool:
    return folder.model() is not None


def encode(folder: Folder, question: Mapping[str, Any]) -> list[Any]:
    tokenizer = og.Tokenizer(folder.model())
    encoded = [[int(token) for token in tokenizer.encode(text)] for text in question["texts"]]
    return [[ids, tokenizer.decode(np.array(ids, np.int32))] for ids in encoded]


def render(folder: Folder, question: Mapping[str, Any]) -> str:
    messages = json.dumps([{"role": "user", "content": question["message"]}])
    return str(og.Tokenizer(folder.model()).apply_chat_template(messages))


def generate(folder: Folder, question: Mapping[str, Any]) -> list[list[int]]:
    model = folder.model(question["overlay"])
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(**question["search"])
    generator = og.Generator(model, parameters)
    for action, argument in question["actions"]:
        if action == "append":
            generator.append_tokens(np.array(argument, np.int32))
        elif action == "rewind":
            generator.rewind_to(argument)
        else:
            _generate(generator, argument)
    rows = range(question["search"]["batch_size"])
    return [[int(token) for token in generator.get_sequence(row)] for row in rows]


def _generate(generator: Any, count: int) -> None:
    for _ in range(count):
        if generator.is_done():
            return
        generator.generate_next_token()


def media(folder: Folder, question: Mapping[str, Any]) -> dict[str, Any]:
    model = folder.model()
    opened = {}
    if question["images"]:
        opened["images"] = og.Images.open(*question["images"])
    if question["sounds"]:
        opened["audios"] = og.Audios.open(*question["sounds"])
    inputs = model.create_multimodal_processor()(question["prompt"], **opened)
    ids = [int(token) for token in inputs["input_ids"].as_numpy()[0]]
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(ids) + question["steps"])
    generator = og.Generator(model, parameters)
    generator.set_inputs(inputs)
    logits = [float(value) for value in np.array(generator.get_logits(), np.float32)[0, -1]]
    _generate(generator, question["steps"])
    tokens = [int(token) for token in generator.get_sequence(0)[len(ids) :]]
    return {"ids": ids, "logits": logits, "tokens": tokens}


_KINDS = {"load": load, "encode": encode, "render": render, "generate": generate, "media": media}


def _answer(folder: Folder, question: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {"name": question["name"], "answer": _KINDS[question["kind"]](folder, question)}
    except Exception as error:  # the runtime raises plain RuntimeError and pybind11's kinds
        return {"name": question["name"], "error": " ".join(str(error).split())}


def _own_stdout() -> TextIO:
    """The real stdout for answers alone; file descriptor 1 becomes stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def main() -> None:
    answers = _own_stdout()
    plan = json.load(sys.stdin)
    folder = Folder(plan["folder"])
    for question in plan["questions"]:
        print(json.dumps(_answer(folder, question)), file=answers, flush=True)


if __name__ == "__main__":
    main()
