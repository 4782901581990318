"""The real runtime: onnxruntime-genai loads the folder, tokenizes, and generates what the source would.

onnxruntime_genai is imported when a folder is loaded, not before. Its exceptions become failed gates in its
own words.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery.choices import Provider
from surgery.errors import ModelError, RuntimeMissing
from surgery.folder.admission import admit
from surgery.runtime.sessions import Array, one_line
from surgery.verify.agreement import margin
from surgery.verify.prompt_file import Message, shipped_texts
from surgery.verify.prompts import Case
from surgery.verify.recording import Answer
from surgery.verify.report import Gate

QUESTION = "What is the height of the tide today, and when will it turn?"
"""A message that a chat template has to carry through."""
_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}

_QUIET = '{"model": {"decoder": {"session_options": {"log_severity_level": 4}}}}'
"""What fails becomes an exception with the same words; ONNX Runtime need not write them to stderr as well."""


def load_genai(provider: Provider) -> Any:
    """The onnxruntime_genai module. Raises RuntimeMissing where it is absent, or not built for `provider`."""
    try:
        import onnxruntime_genai
    except ImportError:
        message = f"onnxruntime-genai is not installed: pip install 'gemma4-surgery[{provider}]'"
        raise RuntimeMissing(message) from None
    if provider == "cuda" and not onnxruntime_genai.is_cuda_available():
        raise RuntimeMissing("this onnxruntime-genai has no CUDA provider: pip install 'gemma4-surgery[cuda]'")
    return onnxruntime_genai


@contextlib.contextmanager
def _own_words(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the runtime raises plain RuntimeError and pybind11's kinds
        raise ModelError(f"{what}: {one_line(error)}") from None


@dataclass(frozen=True)
class Prepared:
    """A text with images or sound as the runtime's processor made it: its own object, and numpy copies by name."""

    inputs: Any
    arrays: Mapping[str, Array]


class GenAI:
    """A folder in onnxruntime-genai. Raises ModelError with the runtime's words where it cannot be loaded."""

    def __init__(self, folder: Path, provider: Provider) -> None:
        self._og = load_genai(provider)
        admit(folder)
        with _own_words("og.Model"):
            config = self._og.Config(str(folder))
            config.overlay(_QUIET)
            config.clear_providers()
            if provider != "cpu":
                config.append_provider(provider)
            self._model = self._og.Model(config)
        self._processor: Any = None

    @property
    def version(self) -> str:
        return str(self._og.__version__)

    def tokenizer(self) -> Any:
        return self._og.Tokenizer(self._model)

    def prepare(self, text: str, images: Sequence[Path], sounds: Sequence[Path]) -> Prepared:
        """What the folder's own processor makes of a text with files. Raises ModelError with the runtime's words."""
        with _own_words("og.MultiModalProcessor"):
            if self._processor is None:
                self._processor = self._model.create_multimodal_processor()
            opened = {}
            if images:
                opened["images"] = self._og.Images.open(*map(str, images))
            if sounds:
                opened["audios"] = self._og.Audios.open(*map(str, sounds))
            inputs = self._processor(text, **opened)
            held = {name for name in inputs.keys()}  # noqa: SIM118  # not a dict
            return Prepared(inputs, {name: inputs[name].as_numpy() for name in held})

    def continued(self, prepared: Prepared, steps: int, **options: Any) -> tuple[Array, list[int]]:
        """Logits of the prompt's last token, float32 [V], and at most `steps` greedy tokens after it."""
        length = prepared.arrays["input_ids"].shape[1]
        with _own_words("og.Generator"):
            parameters = self._og.GeneratorParams(self._model)
            parameters.set_search_options(**{**_GREEDY, "batch_size": 1, "max_length": length + steps, **options})
            generator = self._og.Generator(self._model, parameters)
            generator.set_inputs(prepared.inputs)
            logits = np.array(generator.get_logits(), np.float32)[0, -1]
            while not generator.is_done():
                generator.generate_next_token()
            return logits, [int(token) for token in generator.get_sequence(0)[length:]]

    def generate(self, rows: Sequence[Sequence[int]], pad: int, steps: int, **options: Any) -> list[list[int]]:
        """Greedy continuations of at most `steps` tokens; shorter rows are padded on the right.

        Raises ModelError with the runtime's own words.
        """
        length = max(len(row) for row in rows)
        padded = [[*row, *[pad] * (length - len(row))] for row in rows]
        with _own_words("og.Generator"):
            parameters = self._og.GeneratorParams(self._model)
            search = {**_GREEDY, "batch_size": len(rows), "max_length": length + steps, **options}
            parameters.set_search_options(**search)
            generator = self._og.Generator(self._model, parameters)
            generator.append_tokens(np.array(padded, np.int32))
            while not generator.is_done():
                generator.generate_next_token()
            continued = []
            for row in range(len(rows)):
                sequence = [int(token) for token in generator.get_sequence(row)]
                if sequence[:length] != padded[row]:
                    raise ModelError("the sequence does not begin with the prompt")
                continued.append(sequence[length:])
            return continued


def open_tokenizer(folder: Path, provider: Provider) -> Any:
    """The folder's tokenizer, without its model where the runtime can. Raises ModelError with the runtime's words."""
    og = load_genai(provider)
    admit(folder)
    with _own_words("og.Tokenizer"):
        try:
            return og.Tokenizer(str(folder))
        except TypeError:  # up to 0.17 it takes a model alone
            return GenAI(folder, provider).tokenizer()


def check_tokenizer(tokenizer: Any, folder: Path, vocab_size: int) -> list[Gate]:
    """Text survives encode and decode, ids are in the vocabulary, and the chat template renders."""
    gates = [_round_trip(tokenizer, vocab_size, _falls_back_to_bytes(folder))]
    if has_chat_template(folder):
        gates.append(_template(tokenizer))
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


def _template(tokenizer: Any) -> Gate:
    name = "chat template renders"
    try:
        rendered = render(tokenizer, QUESTION)
    except Exception as error:  # as in _own_words
        return Gate("runtime", name, False, detail=one_line(error))
    return Gate("runtime", name, QUESTION in rendered, detail="" if QUESTION in rendered else "the message is lost")


def encode(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer.encode(text)]


def converse(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The ids of a conversation, up to where the model is to answer."""
    return encode(tokenizer, render_messages(tokenizer, messages))


def render(tokenizer: Any, message: str) -> str:
    """A conversation that begins with a user's message, as the chat template writes it."""
    return render_messages(tokenizer, [("user", message)])


def render_messages(tokenizer: Any, messages: Sequence[Message]) -> str:
    listed = [{"role": role, "content": content} for role, content in messages]
    return str(tokenizer.apply_chat_template(json.dumps(listed)))


def has_chat_template(folder: Path) -> bool:
    """Whether the folder brings a template in one of the places where GenAI looks for it."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return bool(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    return False


def check_generation(
    genai: GenAI,
    answers: Sequence[Answer],
    eos: tuple[int, ...],
    tolerance: float,
    progress: Callable[[str], None] | None = None,
) -> list[Gate]:
    """GenAI's greedy tokens against the source's: prompts one by one, in chunks, and as a batch.

    Only the tokens before a row's first end-of-sequence id are compared: GenAI stops there. A token is no
    fault where the source prefers its own by no more than twice the tolerance; that row is not followed
    further.
    """
    kinds: dict[str, Callable[[Case], bool]] = {
        "tokens are the source's": lambda case: len(case.rows) == 1 and case.chunk is None,
        "tokens are the source's, prompt in chunks": lambda case: len(case.rows) == 1 and case.chunk is not None,
        "tokens are the source's, in a batch": lambda case: len(case.rows) > 1 and not case.ragged,
        "tokens are the source's, in a padded batch": lambda case: case.ragged,
    }
    gates = []
    for name, belongs in kinds.items():
        chosen = [answer for answer in answers if belongs(answer.case) and comparable(answer.case)]
        if chosen:
            gates.append(_generation_gate(name, genai, chosen, eos, tolerance, progress))
    return gates


def comparable(case: Case) -> bool:
    """Whether GenAI reads the prompt as the source does: it takes the mask from where the pad id is.

    A row alone is read as padded where it ends in that id, a row of a batch where it holds it. It cannot feed a
    batch in chunks: the second one has a tensor of negative size (0.18.0).
    """
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
