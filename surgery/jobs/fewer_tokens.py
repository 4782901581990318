"""What jobs have in common where only some tokens of a source stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from surgery.errors import RequestError
from surgery.jobs.listener import Listener

if TYPE_CHECKING:
    from surgery.source.opening import OpenedSource

_MOST_PROVEN = 2_000_000
"""Characters of a corpus that a proof goes over."""


def refuse_corpus(vocabulary: Path | None, corpus: Sequence[Path]) -> None:
    """Raise RequestError for a corpus without the vocabulary that it is for."""
    if corpus and vocabulary is None:
        raise RequestError("--corpus is text that a --vocabulary is proven with, and none is given")


def held_out(corpus: Sequence[Path]) -> tuple[str, ...]:
    """The lines of a corpus that a proof goes over."""
    from surgery.source.corpus import held_out_lines

    return held_out_lines(corpus, _MOST_PROVEN)


@contextmanager
def of_fewer_tokens(found: OpenedSource, vocabulary: Path | None, listener: Listener) -> Iterator[OpenedSource]:
    """The source with the tokens of a list alone, or as it is where none is given. Raises RequestError for a list that
    does not suit it, ExportError for a tokenizer that cannot be made smaller."""
    if vocabulary is None:
        yield found
        return
    from surgery.source.kept_tokens import KeptTokens
    from surgery.source.pruned_export import pruned_export

    kept = KeptTokens.read(vocabulary)
    with TemporaryDirectory(prefix="gemma4-surgery-") as place:
        export, pair = pruned_export(found.export, found.pair, kept, Path(place))
        more = f", {len(pair.kept) - len(kept)} of them for whole groups" if pair.kept and pair.kept != kept else ""
        listener.said(f"tokens     {len(pair.kept or ()):,} of {found.export.architecture.vocab_size:,} stay{more}")
        yield replace(found, export=export, pair=pair)
