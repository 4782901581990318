"""The real runtime: onnxruntime-genai loads the folder, tokenizes, and generates what the source would.

Its exceptions become failed gates in its own words.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from surgery.architecture import read_config
from surgery.errors import ModelError, RuntimeMissing
from surgery.folder.chat_template import genai_template
from surgery.runtime.genai import GenAI, encode, has_chat_template, render_listed
from surgery.runtime.sessions import Array, one_line
from surgery.runtime.tokenizer import render_template, template_text
from surgery.verify.agreement import margin
from surgery.verify.prompt_file import shipped_texts
from surgery.verify.prompts import Case
from surgery.verify.recording import Answer
from surgery.verify.report import Gate

QUESTION = "What is the height of the tide today, and when will it turn?"
"""A message that a chat template has to carry through."""
CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": QUESTION}],
    [
        {"role": "user", "content": "Good day."},
        {"role": "assistant", "content": "Bonjour ! “Ça va ?”"},
        {"role": "user", "content": f" {QUESTION}\n"},
    ],
    [{"role": "system", "content": "Be brief & say <no> more."}, {"role": "user", "content": QUESTION}],
)
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "tide_at",
            "description": "The tide, now or at a time.",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "description": "A harbour: “Saint-Malo”, 厦门."},
                    "Unit": {"type": "string", "enum": ["m", "ft"]},
                    "times": {"type": "array", "items": {"type": "string"}},
                    "near": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]},
                    "any": {"type": "object", "properties": {}, "nullable": True},
                },
                "required": ["place"],
            },
        },
    }
]
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": f"\u3000{QUESTION}"},
    {
        "role": "assistant",
        "content": "<|channel>thought\nLet me look.<channel|>",
        "tool_calls": [
            {
                "id": "1",
                "type": "function",
                "function": {
                    "name": "tide_at",
                    "arguments": {
                        "place": "厦门",
                        "Unit": "m",
                        "near": {"lat": 24.5, "by": None},
                        "times": [],
                        "all": True,
                    },
                },
            }
        ],
    },
    {"role": "tool", "tool_call_id": "1", "name": "tide_at", "content": "2.5 m, rising"},
]
"""The template of Gemma 4 with all that GenAI renders otherwise, if it is left as it is published."""


def check_tokenizer(tokenizer: Any, folder: Path, vocab_size: int) -> list[Gate]:
    """Text survives encode and decode, ids are in the vocabulary, and the chat template renders."""
    gates = [_round_trip(tokenizer, vocab_size, _falls_back_to_bytes(folder))]
    if has_chat_template(folder):
        gates.append(_template(tokenizer, folder))
    return gates


def _round_trip(tokenizer: Any, vocab_size: int, knows_every_letter: bool) -> Gate:
    """Without a fallback to bytes a tokenizer may lack letters; such a text is named, and is no fault."""
    name = "tokenizer gives text back"
    faults, unknown, known = [], [], []
    for label, text in shipped_texts().items():
        try:
            ids = encode(tokenizer, text)
            if all(0 <= token < vocab_size for token in ids):
                decoded = tokenizer.decode(np.array(ids, np.int32))
                known.append(label)
                faults += [] if decoded == text else [f"{label}: {decoded[:40]!r} comes back"]
            else:
                unknown.append(label)
        except Exception as error:  # as in _own_words
            faults.append(f"{label}: {one_line(error)}")
    if knows_every_letter or not known:
        faults += [f"{label}: an id is outside of the vocabulary" for label in unknown]
    detail = "; ".join(faults[:3]) or ", ".join(known) + (
        f"; letters of {', '.join(unknown)} unknown" if unknown else ""
    )
    return Gate("runtime", name, not faults, 0, len(faults), detail)


def _falls_back_to_bytes(folder: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("model", {})
        return bool(model.get("byte_fallback")) and "<0xFF>" in model.get("vocab", {})
    return False


def _template(tokenizer: Any, folder: Path) -> Gate:
    """The runtime has a renderer of its own: the same text as jinja2's, of every conversation that jinja2 renders."""
    name = "chat template renders as in jinja2"
    try:
        config, path = read_config(folder / "tokenizer_config.json"), folder / "chat_template.jinja"
        template = template_text(path if path.is_file() else None, config)
        for conversation, tools in _conversations(template):
            wanted = _by_jinja2(template, config, conversation, tools)
            if wanted is None and conversation != CONVERSATIONS[0]:
                continue
            rendered = render_listed(tokenizer, conversation, tools)
            if QUESTION not in rendered:
                return Gate("runtime", name, False, detail="the message is lost")
            if wanted not in (None, rendered):
                return Gate("runtime", name, False, detail=f"{rendered!r} in place of {wanted!r}")
    except RuntimeMissing:
        raise
    except Exception as error:  # as in _own_words
        return Gate("runtime", name, False, detail=one_line(error))
    return Gate("runtime", name, True)


def _conversations(
    template: str | None,
) -> Iterator[tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None]]:
    """With tools too, where the template takes them."""
    yield from ((conversation, None) for conversation in CONVERSATIONS)
    if template is not None and genai_template(template) is not None:
        yield from ((conversation, TOOLS) for conversation in (*CONVERSATIONS, CALLED))


def _by_jinja2(
    template: str | None,
    config: Mapping[str, Any],
    conversation: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
) -> str | None:
    """None where there is no template that it could read, and where the template refuses the conversation."""
    try:
        return render_template(template, config, conversation, tools=tools) if template is not None else None
    except RuntimeMissing:
        raise
    except Exception:  # a template raises what it likes
        return None


def check_ends(genai: GenAI, eos: Sequence[int], vocab_size: int) -> Gate:
    """Each end-of-sequence id, made the likeliest token, ends a generation; another id does not."""
    name = "each end-of-sequence id ends a generation"
    other = next(token for token in range(vocab_size) if token not in eos)
    try:
        faults = [f"{token} does not" for token in eos if not genai.ends_with(other, token)]
        faults += [f"{other} does too"] if genai.ends_with(other, other) else []
    except ModelError as error:
        return Gate("runtime", name, False, detail=str(error))
    return Gate("runtime", name, not faults, 0, len(faults), "; ".join(faults) or ", ".join(map(str, eos)))


def check_generation(
    genai: GenAI,
    answers: Sequence[Answer],
    eos: tuple[int, ...],
    tolerance: float,
    padded: float,
    progress: Callable[[str], None] | None = None,
) -> list[Gate]:
    """GenAI's greedy tokens against the source's: prompts one by one, in chunks, as a batch, and padded.

    Only the tokens before a row's first end-of-sequence id are compared: GenAI stops there. A token is no
    fault where the source prefers its own by no more than twice the tolerance, `padded` in a padded batch; that row is
    not followed further.
    """
    kinds: dict[str, Callable[[Case], bool]] = {
        "tokens are the source's": lambda case: len(case.rows) == 1 and case.chunk is None,
        "tokens are the source's, prompt in chunks": lambda case: len(case.rows) == 1 and case.chunk is not None,
        "tokens are the source's, in a batch": lambda case: len(case.rows) > 1 and not case.ragged,
        "tokens are the source's for each row alone, in a padded batch": lambda case: case.ragged,
    }
    gates = []
    for name, belongs in kinds.items():
        chosen = [answer for answer in answers if belongs(answer.case) and comparable(answer.case)]
        if chosen:
            allowed = padded if chosen[0].case.ragged else tolerance
            gates.append(_generation_gate(name, genai, chosen, eos, allowed, progress))
    return gates


def comparable(case: Case) -> bool:
    """Whether GenAI reads the prompt as the source does: it takes the mask from where the pad id is.

    It takes no caches. A row alone is read as padded where it ends in that id, a row of a batch where it holds it. It
    cannot feed a batch in chunks: the second one has a tensor of negative size (0.18.0).
    """
    if case.past:
        return False
    if len(case.rows) == 1:
        return case.rows[0][-1] != case.pad
    return case.chunk is None and all(case.pad not in row for row in case.rows)


def _generation_gate(
    name: str,
    genai: GenAI,
    answers: Sequence[Answer],
    eos: tuple[int, ...],
    tolerance: float,
    progress: Callable[[str], None] | None,
) -> Gate:
    compared, faults = 0, []
    for answer in answers:
        case = answer.case
        if progress is not None:
            progress(case.name)
        options: dict[str, Any] = {} if case.chunk is None else {"chunk_size": case.chunk}
        expected = answer.tokens()
        try:
            continued = genai.generate(case.rows, case.pad, expected.shape[1], **options)
        except ModelError as error:
            return Gate("runtime", name, False, 0, None, f"case {case.name}: {error}")
        for row, tokens in enumerate(continued):
            count, fault = first_fault(answer, row, expected[row], tokens, eos, tolerance)
            compared += count
            if fault:
                faults.append(f"case {case.name}: {fault}")
    detail = "; ".join(faults[:3]) or f"{compared} tokens, prompts: {len(answers)}"
    return Gate("runtime", name, not faults, 0, len(faults), detail)


def first_fault(
    answer: Answer, row: int, expected: Array, found: list[int], eos: tuple[int, ...], tolerance: float
) -> tuple[int, str]:
    """How many tokens were compared, and the first that is wrong, in words."""
    for number, wanted in enumerate(int(token) for token in expected):
        if wanted in eos:
            return number, ""
        token = found[number] if number < len(found) else None
        if token == wanted:
            continue
        logits = answer.steps[answer.prefill - 1 + number].logits[row]
        if token is not None and margin(logits, wanted, token) <= 2 * tolerance:
            return number, ""
        got = "the end" if token is None else f"token {token}"
        return number, f"{got} at step {number} of row {row}, where the source gives {wanted}"
    return len(expected), ""


def check_runs(genai: GenAI, cases: Sequence[Case], steps: int, vocab_size: int) -> Gate:
    """Without a source: every prompt is continued, by ids of the vocabulary."""
    name = "generates tokens"
    chosen = [case for case in cases if comparable(case)]
    for case in chosen:
        options: dict[str, Any] = {} if case.chunk is None else {"chunk_size": case.chunk}
        try:
            continued = genai.generate(case.rows, case.pad, steps, **options)
        except ModelError as error:
            return Gate("runtime", name, False, detail=f"case {case.name}: {error}")
        for tokens in continued:
            if not tokens or not all(0 <= token < vocab_size for token in tokens):
                return Gate("runtime", name, False, detail=f"case {case.name}: {tokens} is no continuation")
    return Gate("runtime", name, True, detail=f"{len(chosen)} cases")
