"""What a job tells while it goes on."""

from __future__ import annotations


class Listener:
    """Hears nothing. Override what is to be heard: a progress bar, a log, a user interface.

    >>> class Log(Listener):
    ...     def said(self, text: str) -> None:
    ...         print(text)
    """

    def said(self, text: str) -> None:
        """A fact as a sentence: what is read, what was chosen and why."""

    def started(self, total: int, doing: str = "writing") -> None:
        """`total` bytes of weights, of all files together, are going to be written, or fetched."""

    def advanced(self, count: int) -> None:
        """`count` more bytes are written or fetched. Files that are fetched at a time tell it from threads of their own."""

    def stage(self, text: str) -> None:
        """The proof begins a stage, `stage`, or a case in it, `stage: 3 of 33, case`."""


SILENT = Listener()
