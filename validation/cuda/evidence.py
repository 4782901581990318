"""The page that is written from the steps' results: docs/validation/cuda.md, once they are a GPU's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from validation.cuda.steps import steps
from validation.cuda.stubs import ROOT

EVIDENCE = ROOT / "docs" / "validation" / "cuda.md"
Results = Mapping[str, Mapping[str, Any]]
"""Name of a step -> what was written of it."""
REHEARSED = """**A rehearsal on the CPU provider with small sizes. Nothing here was measured on a GPU, and no number here says
anything about speed or results on CUDA.**
"""
PEER = "mobius says 139 to 177 tokens/s for E2B in onnxruntime-genai on an H200."


def results(out: Path) -> dict[str, dict[str, Any]]:
    """What the steps have left in a folder, in their order."""
    found: dict[str, dict[str, Any]] = {}
    for step in steps():
        path = out / f"{step.name}.json"
        if path.is_file():
            found[step.name] = json.loads(path.read_text())
    return found


def page(found: Results) -> str:
    """Markdown; says first what is a rehearsal, and last what was not done."""
    done = {name: result["found"] for name, result in found.items() if result["outcome"] == "done"}
    rehearsed = any(result["provider"] != "cuda" for result in found.values())
    parts = ["# On a GPU\n", "Made by `python -m validation.cuda OUT`.\n", *([REHEARSED] if rehearsed else [])]
    parts += [section for section in (_machine(done), _tests(done), _numbers(done), _placement(done)) if section]
    parts += [section for section in (_speed(done), _tokens(done), _media(done), _rest(found)) if section]
    return "\n".join(parts)


def _machine(done: Results) -> str:
    if not (found := done.get("machine")):
        return ""
    packages = [f"{name} {version}" for name, version in found["packages"].items() if version]
    lines = [
        *(f"    {line}" for line in found["gpu"] or ["no nvidia-smi"]),
        f"    Python {found['python']}, {found['platform']}",
    ]
    lines += [f"    {', '.join(packages)}", *(f"    {problem}" for problem in found["problems"])]
    return "\n".join(["## Machine\n", *lines, ""])


def _tests(done: Results) -> str:
    if not (found := done.get("gpu-tests")):
        return ""
    counts = f"`pytest -m gpu`: {found['tests']} tests, {found['failures']} failures, {found['errors']} errors, "
    failed = [f"- {name}: {message}" for name, message in found["failed"].items()]
    return "\n".join(["## Tests\n", f"{counts}{found['skipped']} skipped.\n", *failed, ""])


def _numbers(done: Results) -> str:
    heads = (
        "precision",
        "graph",
        "beside",
        "logits off by",
        "caches off by",
        "least cosine",
        "token faults",
        "not finite",
    )
    rows: list[Sequence[object]] = []
    others: list[str] = []
    refusals: dict[tuple[str, str], list[str]] = {}
    for name, found in done.items():
        if not name.startswith("numbers-"):
            continue
        precision = name.removeprefix("numbers-")
        for form, each in found.items():
            for key in [key for key in each if key.startswith("against ")]:
                rows.append((precision, form, key.removeprefix("against "), *map(_short, each[key].values())))
            wrong = {gate: said for gate, said in each.get("genai", {}).items() if said != "passed"}
            if each.get("foretold", "runs") != "runs":
                refusals.setdefault((precision, each["foretold"]), []).append(form)
            if "error" in each:
                others.append(f"- {precision} {form}: {each['error']}")
            others += [f"- {precision} {form}, GenAI: {gate}: {said}" for gate, said in wrong.items()]
    for (precision, why), forms in refusals.items():
        others.append(f"- {precision} {', '.join(forms)}: `repack --ep cuda` refuses it: {why}")
    if not rows and not others:
        return ""
    lead = "The tiny export on the device, beside the same on the CPU, and beside its source pair on the device.\n"
    return "\n".join(["## Numbers\n", lead, *_table(heads, rows), "", *others, ""])


def _placement(done: Results) -> str:
    if not (found := done.get("placement")):
        return ""
    heads = (
        "graph",
        "nodes",
        "CUDA, foretold",
        "copies, foretold",
        "ran on CUDA",
        "copies",
        "provider agrees",
        "capture",
    )
    rows = []
    for name, each in found.items():
        real = each.get("provider", {})
        capture = real.get("capture", {})
        rows.append((
            name, each["nodes"], each["foretold"]["cuda"], each["foretold"]["copies"], each["ran"]["cuda"],
            each["ran"]["copies"], f"{real['agree']} of {each['nodes']}" if real else each.get("error", ""),
            f"{capture['provider']}, foretold {capture['foretold']}" if capture else "",
        ))  # fmt: skip
    return "\n".join(["## Placement\n", *_table(heads, rows), ""])


def _speed(done: Results) -> str:
    titles = {step.name: step.title.removeprefix("Speed, ") for step in steps()}
    heads = (
        "",
        "context",
        "first token",
        "prefill, tokens/s",
        "a token",
        "of 10, 9 within",
        "decode, tokens/s",
        "load",
        "GPU",
        "host",
    )
    rows = []
    for name, found in done.items():
        for timing in found["timings"] if name.startswith("speed-") else ():
            rows.append((
                titles[name], timing["context"], f"{timing['first_token_seconds']:.3f} s", f"{timing['prefill_rate']:.0f}",
                f"{1000 * timing['token_seconds']:.2f} ms", f"{1000 * timing['token_seconds_p90']:.2f} ms",
                f"{timing['decode_rate']:.0f}", f"{found['load_seconds']:.1f} s",
                f"{found['gpu_peak_mib']} MiB" if found["gpu_peak_mib"] else "", f"{found['host_peak_mib']} MiB",
            ))  # fmt: skip
    if not rows:
        return ""
    made = done.get("export", {})
    lead = f"{made.get('fixture')} {made.get('precision')} with random weights, {made.get('bytes', 0) / 1e9:.2f} GB. {PEER}\n"
    return "\n".join(["## Speed\n", lead, *_table(heads, rows), ""])


def _tokens(done: Results) -> str:
    if not (found := done.get("tokens")):
        return ""
    rows = [(way, context, *each.values()) for way, of in found.items() for context, each in of.items()]
    heads = ("run by", "context", "tokens", "equal to the source pair's", "repeat the one before")
    return "\n".join(["## Tokens\n", *_table(heads, rows), ""])


def _media(done: Results) -> str:
    if not (found := done.get("media")):
        return ""
    lines = []
    for precision, each in found.items():
        faults = [f"{name}: {said}" for name, said in each.get("failed", {}).items()]
        said = each.get("error") or "; ".join(faults) or f"{each['gates']} gates passed"
        lines.append(f"- {precision}: {said}")
    return "\n".join(["## Images and sound\n", *lines, ""])


def _rest(found: Results) -> str:
    missing = [
        f"- {step.title}: {found[step.name].get('error', '') if step.name in found else 'not run'}"
        for step in steps()
        if found.get(step.name, {}).get("outcome") != "done"
    ]
    return "\n".join(["## Not done\n", *missing, ""]) if missing else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
