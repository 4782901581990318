"""Errors that a user can act on, and text that is safe to print.

Every error names the file or tensor, what was expected and what was found; `hint` is the next step. The command line
prints them as one sentence and exits with 2. GateFailed is a result, not a mistake: its exit code is 1. Anything else
that escapes is a defect of ours.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

LONGEST = 2000
"""Characters of a message. Names in a model may be megabytes long, and messages quote them."""


class SurgeryError(Exception):
    """A mistake in the input, or in how it is used. `str(error)` is one sentence on one line."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(_one_line(message))
        self.hint = _one_line(hint) if hint else None


class ExportError(SurgeryError):
    """The source folder or repository is not an export, or lacks what was asked for."""


class ArchitectureError(SurgeryError):
    """config.json does not describe an architecture that the passes know."""


class ModelError(SurgeryError):
    """An ONNX file cannot be read, or its graph is broken."""


class WeightError(SurgeryError):
    """External data does not hold what the graph says it holds."""


class WeightsAbsent(WeightError):
    """A file of external data is not there."""


class PassError(SurgeryError):
    """A pass cannot be applied to this model; the model is as it was."""


class RecipeError(SurgeryError):
    """The text of a recipe cannot be read."""


class FolderError(SurgeryError):
    """The target folder cannot be written, or is not a GenAI folder."""


class PublishError(SurgeryError):
    """A folder cannot be uploaded to the Hub."""


class RequestError(SurgeryError):
    """What a validation or a comparison was asked for cannot be done: a file or a value that it was given is at
    fault."""


class RepositoryError(SurgeryError):
    """git, or the site that a repository is on, cannot do what was asked for."""


class ProcessEnded(SurgeryError):
    """A process that ran a model or its files died, took too long, or too much memory."""


class RuntimeMissing(SurgeryError):
    """onnxruntime or onnxruntime-genai is not installed, or lacks the provider that was asked for."""


class GateFailed(Exception):
    """A closing proof failed, so the folder was not written. `report`, a surgery.Report, says what was found."""

    def __init__(self, failed: Iterable[str], report: Any) -> None:
        super().__init__(f"a gate failed: {', '.join(failed)}")
        self.report = report


def unforeseen(error: Exception) -> SurgeryError:
    """What to say of an error that nothing foresaw: what the system does not do, in its words (a name that is too long,
    a disk that is full), and text that is none; anything else is a defect of ours. Raises the error itself where a
    traceback is asked for.
    """
    if os.environ.get("GEMMA4_SURGERY_TRACEBACK"):
        raise error
    if isinstance(error, OSError) and error.strerror:
        return SurgeryError(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    if isinstance(error, MemoryError):
        return SurgeryError("more memory is needed than there is", hint="a graph without its weights takes megabytes")
    if isinstance(error, UnicodeEncodeError):
        return SurgeryError(
            f"{error.object[error.start : error.end]!r} is not Unicode; no name and no text can hold it"
        )
    return SurgeryError(
        f"a defect of gemma4-surgery: {type(error).__name__}: {error}",
        hint="set GEMMA4_SURGERY_TRACEBACK=1 to see where, and report it",
    )


def printable(text: str) -> str:
    """`text` on one line, with what is no letter, sign or space escaped: names inside a hostile model must not drive a
    terminal, begin a line of a log, or change the direction in which it is read.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _one_line(text: str) -> str:
    """A message of bounded length, without the password of an address in it."""
    short = text if len(text) <= LONGEST else f"{text[: LONGEST - 200]} [...] {text[-190:]}"
    return printable(re.sub(r"(?<=://)[^/\s?#]+@", "***@", short))


def nearest(word: str, known: list[str]) -> str:
    """The known word closest to a misspelt one, as the tail of a sentence: ` (did you mean X?)` or nothing."""
    import difflib

    match = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
