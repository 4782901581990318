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

    def started(self, total: int) -> None:
        """`total` bytes of weights are going to be written."""

    def advanced(self, count: int) -> None:
        """`count` more bytes of weights are written."""

    def stage(self, text: str) -> None:
        """The proof begins a stage, `stage` or `stage: case`."""


SILENT = Listener()
