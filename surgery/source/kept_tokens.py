"""The tokens that stay where a vocabulary is made smaller, and their new ids.

    # what follows an id is its text, for people
    0	"<pad>"
    1	"<eos>"
    ...

One line a token: its id in the source. The new id is the place among those that stay, in ascending order, so that
whatever compares ids by size goes on to be right.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from surgery.errors import RequestError
from surgery.files.safe_reading import read_regular

VOCABULARY_FILE = "vocabulary.txt"
"""What the list is called in a folder that was made with it."""
GROUP = 16
"""Kernels take logits in groups, and sum up what is left over in another order: as many tokens as make whole groups
stay."""
_MOST_BYTES = 64 * 2**20
_LINE = re.compile(r"[0-9]{1,9}(?=\s|$)")


@dataclass(frozen=True, slots=True)
class KeptTokens:
    """The ids that stay, of the source's vocabulary, ascending; the place of an id is its new id."""

    ids: tuple[int, ...] = field(repr=False)

    @classmethod
    def of(cls, ids: Iterable[int]) -> KeptTokens:
        """The list of these ids, each once, in order."""
        return cls(tuple(sorted(set(ids))))

    @classmethod
    def read(cls, path: Path) -> KeptTokens:
        """Read a list. Raises RequestError for a file that is none, with the line."""
        try:
            text = read_regular(path, _MOST_BYTES).decode("utf-8")
        except FileNotFoundError:
            raise RequestError(
                f"{path} does not exist", hint="gemma4-surgery vocabulary SRC -o FILE writes such a list"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise RequestError(f"{path} cannot be read: {reason}") from None
        found: dict[int, int] = {}
        for number, line in enumerate(text.split("\n"), start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            match = _LINE.match(line)
            if match is None:
                raise RequestError(
                    f"{path}, line {number}: {line[:40]!r} begins with no token id; one id a line is expected"
                )
            if (token := int(match[0])) in found:
                raise RequestError(f"{path}, line {number}: token {token} stands in line {found[token]} already")
            found[token] = number
        if not found:
            raise RequestError(f"{path} names no token; one id a line is expected")
        return cls.of(found)

    def __len__(self) -> int:
        return len(self.ids)

    def below(self, bound: int) -> int:
        """How many of the kept ids are smaller than `bound`."""
        return bisect_left(self.ids, bound)

    def __contains__(self, token: object) -> bool:
        return isinstance(token, int) and self.new(token) is not None

    def new(self, token: int) -> int | None:
        """The new id of a token, None where it does not stay."""
        place = self.below(token)
        return place if place < len(self.ids) and self.ids[place] == token else None

    def check_size(self, size: int, what: str) -> None:
        """Raise RequestError where an id is outside of a vocabulary of `size` tokens, which `what` has."""
        if self.ids[-1] >= size:
            raise RequestError(f"the vocabulary keeps token {self.ids[-1]}, and {what} ends at token {size - 1}")

    def text(self, texts: Mapping[int, str], said: Iterable[str] = ()) -> str:
        """The list as a file holds it. `texts` are tokens by id; `said` are sentences to begin with."""
        lines = [f"# {sentence}\n" for sentence in said]
        for token in self.ids:
            words = f"\t{json.dumps(texts[token], ensure_ascii=False)}" if token in texts else ""
            lines.append(f"{token}{words}\n")
        return "".join(lines)
