"""onnxruntime-genai: a folder's model, its tokenizer, its processor; imported when a folder is loaded, not before."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery.architecture import MAX_JSON_BYTES
from surgery.choices import Provider
from surgery.errors import ModelError, RuntimeMissing, SurgeryError
from surgery.files.safe_reading import read_regular
from surgery.folder.admission import admit
from surgery.folder.genai_config import CAPTURE
from surgery.runtime.installing import how_to_install, needs
from surgery.runtime.sessions import Array, one_line

Message = tuple[str, str]
"""Role and content."""

_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}

PROMPT_CHUNK = 512
"""Tokens of a prompt that a generator of one row takes in one run on the CPU: what lies between the nodes stays as small
as for 512. Of several rows GenAI counts the tokens together, and refuses them in chunks."""

_QUIET = '{"model": {"decoder": {"session_options": {"log_severity_level": 4}}}}'
"""What fails becomes an exception with the same words; ONNX Runtime need not write them to stderr as well."""


def load_genai(provider: Provider) -> Any:
    """The onnxruntime_genai module. Raises RuntimeMissing where it is absent, or not built for `provider`."""
    with needs("onnxruntime-genai", provider):
        import onnxruntime_genai
    if provider == "cuda" and not onnxruntime_genai.is_cuda_available():
        raise RuntimeMissing(f"this onnxruntime-genai has no CUDA provider: {how_to_install(provider)}")
    return onnxruntime_genai


@contextlib.contextmanager
def _own_words(what: str) -> Iterator[None]:
    try:
        yield
    except SurgeryError:
        raise
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
        self._folder, self._provider = folder, provider
        config = admit(folder)
        decoder = config.get("model", {}).get("decoder", {})
        options = [entry.get("cuda", {}) for entry in decoder.get("session_options", {}).get("provider_options", [])]
        self._speculates = "speculative" in config
        self._captures = provider == "cuda" and any(each.get(CAPTURE) == "1" for each in options)
        self._model = self._opened()
        self._processor: Any = None

    def _opened(self) -> Any:
        with _own_words("og.Model"):
            config = self._og.Config(str(self._folder))
            config.overlay(_QUIET)
            config.clear_providers()
            if self._provider != "cpu":
                config.append_provider(self._provider)
            if self._provider == "cuda" and not self._captures:
                config.set_provider_option("cuda", CAPTURE, "0")
            return self._og.Model(config)

    @property
    def version(self) -> str:
        """The version of onnxruntime-genai."""
        return str(self._og.__version__)

    def tokenizer(self) -> Any:
        """The folder's own. Raises ModelError with the runtime's words."""
        with _own_words("og.Tokenizer"):
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

    def generator(self, **search: Any) -> Any:
        """A generator, of one row unless `batch_size` says more, with the folder's search options but for those given."""
        parameters = self._og.GeneratorParams(self._model)
        parameters.set_search_options(**search)
        if self._speculates and search.get("batch_size", 1) > 1:  # the runtime speculates on one row alone
            parameters.set_speculative_options(ngram_size=0, ngram_chained_lookup=False)
        return self._og.Generator(self._model, parameters)

    def continued(self, prepared: Prepared, steps: int, **options: Any) -> tuple[Array, list[int]]:
        """Logits of the prompt's last token, float32 [V], and at most `steps` greedy tokens after it."""
        length = prepared.arrays["input_ids"].shape[1]
        with _own_words("og.Generator"):
            generator = self.generator(**{**_GREEDY, "batch_size": 1, "max_length": length + steps, **options})
            generator.set_inputs(prepared.inputs)
            logits = np.array(generator.get_logits(), np.float32)[0, -1]
            while not generator.is_done():
                generator.generate_next_token()
            return logits, [int(token) for token in generator.get_sequence(0)[length:]]

    def ends_with(self, first: int, token: int) -> bool:
        """Whether a generation that begins with `first` is over once the model says `token`, which it is made to
        say."""
        with _own_words("og.Generator"):
            generator = self.generator(**{**_GREEDY, "batch_size": 1, "max_length": 4})
            generator.append_tokens(np.array([[first]], np.int32))
            forced = np.zeros_like(generator.get_logits())
            forced[..., token] = 1
            generator.set_logits(forced)
            generator.generate_next_token()
            return bool(generator.is_done())

    def generate(self, rows: Sequence[Sequence[int]], pad: int, steps: int, **options: Any) -> list[list[int]]:
        """Greedy continuations of at most `steps` tokens; shorter rows are padded on the right.

        Several rows are run without CUDA graph capture, which takes one alone; from then on so is everything. Raises
        ModelError with the runtime's own words.
        """
        if self._captures and len(rows) > 1:
            self._captures, self._model = False, None  # one model at a time in the GPU's memory
            self._model = self._opened()
        length = max(len(row) for row in rows)
        padded = [[*row, *[pad] * (length - len(row))] for row in rows]
        with _own_words("og.Generator"):
            search = {**_GREEDY, "batch_size": len(rows), "max_length": length + steps, **options}
            generator = self.generator(**search)
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


def encode(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text; -1 for a letter that the tokenizer does not know."""
    return [int(token) for token in tokenizer.encode(text)]


def converse(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The ids of a conversation, up to where the model is to answer."""
    return encode(tokenizer, render_messages(tokenizer, messages))


def render(tokenizer: Any, message: str) -> str:
    """A conversation that begins with a user's message, as the chat template writes it."""
    return render_messages(tokenizer, [("user", message)])


def render_messages(tokenizer: Any, messages: Sequence[Message], template: str | None = None) -> str:
    """A conversation as the folder's chat template writes it, or another one, up to where the model is to answer."""
    return render_listed(tokenizer, [{"role": role, "content": content} for role, content in messages], None, template)


def render_listed(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    template: str | None = None,
) -> str:
    """As `render_messages`, of messages that may call the tools, and tell what these answered."""
    told = {} if template is None else {"template_str": template}
    given = {} if tools is None else {"tools": json.dumps(tools)}
    return str(tokenizer.apply_chat_template(json.dumps(messages), **told, **given))


def has_chat_template(folder: Path) -> bool:
    """Whether the folder brings a template in one of the places where GenAI looks for it."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    return template_of(folder) is not None


def template_of(folder: Path) -> str | None:
    """The chat template that GenAI takes first: tokenizer_config.json's, or else chat_template.jinja.

    Raises ModelError for one that is not UTF-8.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        if isinstance(inline := config.get("chat_template"), str) and inline:
            return inline
    path = folder / "chat_template.jinja"
    try:
        return read_regular(path, MAX_JSON_BYTES).decode("utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
