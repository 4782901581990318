"""A list of tokens to keep, proposed from a corpus: what stays, what it covers, what it saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import ExportError, FolderError, RequestError
from surgery.jobs.listener import SILENT, Listener

if TYPE_CHECKING:
    from surgery.source.bpe_tokenizer import BpeTokenizer
    from surgery.source.kept_tokens import KeptTokens
    from surgery.source.opening import OpenedSource

_SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
_MOST_HELD_OUT = 4_000_000
"""Characters of held-out text that a proposal is tried on."""


@dataclass(frozen=True, slots=True)
class VocabularyOptions:
    """What a proposal can be asked for; every field is the command's option of that name.

    corpus        text files: what the application reads and writes
    keep_scripts  scripts whose letters all stay, and whose tokens fill what room is left: latin, cyrillic, cjk, ...
    size          how many tokens stay at most, a multiple of 16 or the next one; None: all that the corpus uses
    """

    corpus: Sequence[Path]
    keep_scripts: Sequence[str] = ()
    size: int | None = None
    precision: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if not self.corpus:
            raise RequestError("a vocabulary is counted over a corpus, and none is given", hint="--corpus FILE")
        if self.size is not None and self.size < 1:
            raise RequestError(f"--size is {self.size}; a number of tokens is expected")


@dataclass(frozen=True, slots=True)
class Coverage:
    """What a list does to text that it was not counted over. `kept` of the source's `tokens` for it stay; the pruned tokenizer
    makes `new_tokens` of it. 0 of everything where a corpus is too small for a tenth of it to be held out."""

    characters: int
    tokens: int
    kept: int
    new_tokens: int

    @property
    def share(self) -> float:
        """Kept of all, 0 to 1."""
        return self.kept / self.tokens if self.tokens else 1.0


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A proposal. `path` is where the list was written; `bytes` has, for each table, its bytes before and after."""

    path: Path
    source_tokens: int
    tokens: int
    needed: int
    counted: int
    filled: int
    coverage: Coverage
    bytes: Mapping[str, tuple[int, int]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        return {
            **asdict(self),
            "path": str(self.path),
            "bytes": {name: list(both) for name, both in self.bytes.items()},
        }


def vocabulary(
    source: str | Path, target: str | Path, options: VocabularyOptions, *, listener: Listener = SILENT
) -> Vocabulary:
    """Write `target`, a list of tokens to keep for `repack` and `strip`; of a Hub repository no weight is fetched.

    Raises SurgeryError for everything that a user can mend.
    """
    from surgery.runtime.sessions import provider_of
    from surgery.source.bpe_tokenizer import BpeTokenizer
    from surgery.source.opening import SourceRequest, look_up
    from surgery.source.proposed_tokens import propose
    from surgery.source.pruned_export import ids_of_settings, tokens_of_templates

    target = Path(target)
    if target.exists():
        raise FolderError(f"{target} exists", hint="choose another name")
    choice = SourceRequest(str(source), provider_of("cpu"), options.precision, options.revision)
    found = look_up(choice, listener.said)
    _fetch_side_files(found)
    export = found.export
    path = export.file("tokenizer.json")
    if path is None:
        raise ExportError(f"{export.root} has no tokenizer.json")
    tokenizer = BpeTokenizer.read(path)
    size = export.architecture.vocab_size
    listener.said(f"corpus     counting {', '.join(map(str, options.corpus))}")
    counts = _counts(path, options.corpus)
    must = {*ids_of_settings(export), *tokens_of_templates(export, tokenizer)}
    proposed = propose(tokenizer, counts, options.keep_scripts, options.size, must)
    proposed.kept.check_size(size, str(export.root))
    coverage = _coverage(path, tokenizer, proposed.kept, options.corpus)
    said = (
        f"{len(proposed.kept):,} of {size:,} tokens, proposed by gemma4-surgery vocabulary",
        "the id of a token in the source, and its text for people; a line that is taken out is a token that goes",
    )
    saved = _bytes(found, proposed.kept)
    with target.open("x", encoding="utf-8") as writer:
        writer.write(proposed.kept.text(tokenizer.texts, said))
    kept, needed = len(proposed.kept), proposed.needed
    return Vocabulary(target, size, kept, needed, proposed.counted, proposed.filled, coverage, saved)


def _fetch_side_files(found: OpenedSource) -> None:
    from surgery.source.hub import get

    if found.download is not None:
        listing = found.download.listing
        for name in _SIDE_FILES:
            if name in listing.files:
                get(listing, listing.files[name])


def _counts(tokenizer: Path, corpus: Sequence[Path]) -> dict[int, int]:
    """How often each token occurs in the counted part of a corpus."""
    from surgery.runtime.token_counts import TokenCounts, count_tokens

    found: TokenCounts = count_tokens(tokenizer, corpus)
    return dict(found.counts)


def _coverage(path: Path, tokenizer: BpeTokenizer, kept: KeptTokens, corpus: Sequence[Path]) -> Coverage:
    from surgery.runtime.token_counts import covered

    return Coverage(*covered(path, tokenizer.pruned(kept), kept, corpus, _MOST_HELD_OUT))


def _bytes(found: OpenedSource, kept: KeptTokens) -> dict[str, tuple[int, int]]:
    """Bytes of each table of tokens, of all of them and of those that stay."""
    from passes import PruneVocabulary
    from passes.base import apply
    from passes.prune_vocabulary import bytes_by_token
    from surgery.graph.model import Model

    sizes: dict[str, tuple[int, int]] = {}
    for path in (found.pair.embed, found.pair.decoder):
        graph = Model.open(path)
        small = bytes_by_token(apply(graph, [PruneVocabulary(kept)])[0])
        sizes |= {name: (count, small[name]) for name, count in bytes_by_token(graph).items()}
    return sizes
