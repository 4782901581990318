"""Text to token ids and back, for a folder that onnxruntime-genai does not read.

tokenizer.json is read by `tokenizers`, the chat template by `jinja2` in its sandbox, both as transformers does.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from surgery.architecture import read_config
from surgery.errors import ExportError, RuntimeMissing
from surgery.runtime.installing import needs
from surgery.source.export import Export


class Tokenizer:
    """The tokenizer and the chat template of an export.

    Raises ExportError where a file of it is missing or damaged, RuntimeMissing without tokenizers or jinja2.
    """

    def __init__(self, export: Export) -> None:
        path = export.file("tokenizer.json")
        if path is None:
            raise ExportError(f"{export.root} has no tokenizer.json")
        self._tokenizer = open_tokenizers(path)
        settings = export.file("tokenizer_config.json")
        self._config = read_config(settings) if settings else {}
        self._template = template_text(export.file("chat_template.jinja"), self._config)
        self._root = export.root

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it is: none is put before or behind it."""
        text.encode()  # a surrogate is refused here, and not by Rust, which does not say what it is
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def stream(self) -> Callable[[int], str]:
        """A function that takes tokens one by one, and gives the text that each one completes."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._tokenizer, token) or ""

    @property
    def thinks(self) -> bool:
        """Whether the chat template asks for thoughts where it is told to."""
        return "enable_thinking" in (self._template or "")

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """A conversation, as the chat template writes it, up to where the model is to answer; `variables` are what it
        may read beside the messages."""
        if self._template is None:
            raise ExportError(f"{self._root} has no chat template", hint="give the prompt raw, without the template")
        with _blamed(f"{self._root}: the chat template"):
            return render_template(self._template, self._config, messages, **variables)


def open_tokenizers(path: Path) -> Any:
    """A tokenizers.Tokenizer of a tokenizer.json. Raises ExportError for one that is damaged, RuntimeMissing."""
    with needs("tokenizers"), _blamed(path):
        import tokenizers

        return tokenizers.Tokenizer.from_file(str(path))


def template_text(path: Path | None, config: Mapping[str, Any]) -> str | None:
    """A chat template: chat_template.jinja, at `path`, or what tokenizer_config.json has in its place."""
    if path is not None:
        with _blamed(path):
            return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    return template if isinstance(template, str) else None


def render_template(
    template: str, config: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], **variables: Any
) -> str:
    """What jinja2 renders up to the model's answer; `config` is tokenizer_config.json, and `variables` take the place
    of what a template reads beside the messages. Raises RuntimeMissing without jinja2, and whatever jinja2 and the
    template raise."""
    usual = {"add_generation_prompt": True, "tools": None, **_special_tokens(config)}
    with needs("jinja2"):
        rendered: str = _compiled(template).render(messages=messages, **{**usual, **variables})
        return rendered


def _compiled(template: str) -> Any:
    """As transformers sets jinja2 up."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and its like: a text, or an object with the text as `content`."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


@contextlib.contextmanager
def _blamed(what: object) -> Iterator[None]:
    """Neither library has a base class for what it raises of a damaged file."""
    try:
        yield
    except (ImportError, MemoryError, RuntimeMissing):
        raise
    except Exception as error:
        raise ExportError(f"{what} cannot be used: {error}") from None
