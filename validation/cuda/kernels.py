"""Make surgery/cuda/kernels.json: the CUDA provider's kernels, as the released wheel lists them.

    python -m validation.cuda.kernels FOLDER [VERSION]

FOLDER receives the wheel of onnxruntime-gpu (256 MB) and stub CUDA libraries; see validation.cuda.stubs. Takes half a
minute after the download. Rows that differ in one constraint are joined, and the result is taken apart again and
compared with what the provider listed before it is written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from surgery.cuda.kernels import DATA, short_type
from validation.cuda.stubs import ROOT, StubbedRuntime, prepare

DOMAINS = ("", "com.microsoft")
"""ai.onnx and ONNX Runtime's own. What is left out: ai.onnx.ml, and kernels that only its layout optimizer uses."""
GRAPHS = ("decoder_model_merged", "decoder_model_merged_fp16", "decoder_model_merged_q4f16", "embed_tokens_q4")
"""Of the committed export; they hold the operators that the onnx package has no tests of."""

Types = dict[str, frozenset[str]]
Version = tuple[str, str, int, int | None]


def joined(rows: Iterable[list[Any]]) -> list[list[Any]]:
    """Kernels with as few rows as joining on one constraint at a time gives."""
    versions: dict[Version, list[Types]] = {}
    for domain, operator, first, last, types in rows:
        kernels = versions.setdefault((domain, operator, first, last), [])
        kernels.append({name: frozenset(map(short_type, allowed)) for name, allowed in types.items()})
    result = []
    for version in sorted(versions, key=lambda key: key[:3]):
        for types in _joined_types(versions[version]):
            result.append([*version, {name: " ".join(sorted(types[name])) for name in sorted(types)}])
    return sorted(result, key=lambda row: (*row[:3], json.dumps(row[4])))


def _joined_types(kernels: list[Types]) -> list[Types]:
    pending, done = list(kernels), list[Types]()
    while pending:
        one = pending.pop()
        other = next((each for each in pending if _differ_in(one, each) is not None), None)
        if other is None:
            done.append(one)
        else:
            pending.remove(other)
            name = _differ_in(one, other)
            pending.append({key: types | other[key] if key == name else types for key, types in one.items()})
    return done


def _differ_in(one: Types, other: Types) -> str | None:
    """The one constraint in which two kernels differ; any where they are equal; None where they differ in several."""
    if one.keys() != other.keys():
        return None
    names = [name for name in one if one[name] != other[name]] or list(one)[:1]
    return names[0] if len(names) == 1 else None


def combinations(rows: Iterable[list[Any]]) -> set[tuple[object, ...]]:
    """Every single combination of types that the rows allow."""
    return set(_combinations(rows))


def _combinations(rows: Iterable[list[Any]]) -> Iterator[tuple[object, ...]]:
    for domain, operator, first, last, types in rows:
        names = sorted(types)
        given = (types[name].split() if isinstance(types[name], str) else types[name] for name in names)
        for chosen in product(*given):
            yield domain, operator, first, last, tuple(zip(names, map(short_type, chosen), strict=True))


def table(listed: dict[str, Any], runtime: StubbedRuntime) -> dict[str, Any]:
    """What is committed. Raises ValueError where joining rows has changed their meaning."""
    kernels = [row for row in listed["kernels"] if row[0] in DOMAINS]
    rows = joined(kernels)
    if combinations(rows) != combinations(kernels):
        raise ValueError("the joined rows do not say what the provider listed")
    return {
        "onnxruntime": listed["onnxruntime"],
        "wheel": runtime.wheel,
        "sha256": runtime.sha256,
        "listed": len(kernels),
        "kernels": rows,
        "host": [row for row in listed["host"] if row[3] or row[4]],
        "schemas": sorted(
            [domain, operator, since, " ".join(inputs), " ".join(outputs)]
            for domain, operator, since, inputs, outputs in listed["schemas"]
            if domain in DOMAINS
        ),
    }


def text(value: dict[str, Any]) -> str:
    """JSON with one row a line."""
    parts = []
    for key, entry in value.items():
        if isinstance(entry, list):
            rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in entry)
            parts.append(f'"{key}": [\n{rows}\n]')
        else:
            parts.append(f'"{key}": {json.dumps(entry)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m validation.cuda.kernels FOLDER [VERSION]")
    runtime = prepare(sys.argv[2] if len(sys.argv) == 3 else "1.31.1", Path(sys.argv[1]))
    graphs = [str(ROOT / "fixtures" / "tiny-e2b" / "onnx" / f"{name}.onnx") for name in GRAPHS]
    made = table(json.loads(runtime.run("validation.cuda.real_provider", "kernels", *graphs)), runtime)
    DATA.write_text(text(made), encoding="utf-8")
    print(f"{DATA}: {made['listed']} kernels in {len(made['kernels'])} rows, {DATA.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
