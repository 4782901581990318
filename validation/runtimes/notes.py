"""Why some cells are not `ok`: what was found out by experiment, to be read under the tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from validation.runtimes.outcomes import Verdict


@dataclass(frozen=True, slots=True)
class Note:
    """`text` is printed where one of `questions` has `verdict` somewhere."""

    questions: Sequence[str]
    verdict: Verdict
    title: str
    text: str


NOTES: Sequence[Note] = (
    Note(
        ("loads",),
        "refused",
        "0.12 and 0.13 load nothing but the layout of --target genai-0.12.",
        "They do not know the type gemma4_text, and allocate every cache with the one size that the configuration has.",
    ),
    Note(
        ("loads",),
        "refused",
        "Below ONNX Runtime 1.27 a QAT export does not load.",
        "Its tables have 2 bits, which GatherBlockQuantized takes from 1.27.0 on (tried alone: its embed_tokens).",
    ),
    Note(
        ("generates",),
        "refused",
        "0.14 does not run 31B.",
        "It reads each cache's head size from the graph, but the number of KV heads, in which 31B's layers differ too, "
        "from the configuration, once for all. 0.15 reads both. Caches of one size run on every version.",
    ),
    Note(
        ("batch of 2, in chunks", "ragged batch of 2, in chunks"),
        "refused",
        "A batch cannot be fed in chunks.",
        "`search.chunk_size` is held against the tokens of all rows together, and the lengths of the caches are counted "
        "with them. Two rows of 11 run where it is 22 or more, which is in one piece, and fail below; at 21 the words are "
        "`batch_size must be 1 for continuous decoding`. The graph has no part in it: a graph that gives the logits of all "
        "tokens fails alike. 0.14 reads `chunk_size` in the configuration alone, and ignores it among a generator's "
        "search options.",
    ),
    Note(
        ("appends in the middle",),
        "refused",
        "Tokens cannot be appended before generation has ended.",
        "The last generated token is in the sequence and the mask but not yet in the caches, which are one token too "
        "short. After the end they are complete. Where `rewind_to` works, take back two tokens and append them again.",
    ),
    Note(
        ("appends in the middle",),
        "wrong",
        "With one buffer for past and present, tokens appended before generation has ended are answered wrongly.",
        "The runtime counts the last generated token, but has not fed it: its row in the buffer is empty, and nothing in "
        "the graph can tell. Take back two tokens and append them again. Where such a cell says ok, the tokens were the "
        "same without that row.",
    ),
    Note(
        ("generates",),
        "crash",
        "Below ONNX Runtime 1.31 the layout fast needs --onnxruntime 1.27.",
        "A layer that reads another one's cache has no present outputs there, and 1.27 to 1.30 die of it. Before 1.27 "
        "no version reads such a cache.",
    ),
    Note(
        ("rewind_to(5)", "rewind_to(0)"),
        "refused",
        "From 0.14 on, `rewind_to` needs caches of one size.",
        "Where sizes differ between layers, the runtime keeps a shape for each layer and compares the length with another "
        "one, which stays 0. Caches of one size rewind; for the other layouts, make a new Generator and give it all tokens.",
    ),
)
