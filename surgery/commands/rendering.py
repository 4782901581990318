"""What the commands print for people: rich tables and sentences. Names from models are escaped, never interpreted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from passes.base import Outcome
from surgery.architecture import Layer
from surgery.folder.inspection import ExportInspection, FolderInspection, Inspection, LayerRow
from surgery.printing import plain, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from surgery.cuda.prediction import Prediction
    from surgery.folder.building import Repacked
    from surgery.folder.genai_config import CacheCost
    from surgery.folder.publishing import Destination
    from surgery.folder.text_only import Stripped
    from surgery.graph.weight_writing import Placed
    from surgery.jobs.proposing import Vocabulary
    from surgery.runtime.benchmark import Benchmark
    from surgery.runtime.profiling import Profile
    from surgery.source.hub import Download
    from surgery.verify.parity import KindError
    from surgery.verify.report import Gate, Report, Section

MARKS = {"added": ("+", "green"), "removed": ("-", "red"), "changed": ("~", "yellow"), "skipped": ("=", "dim")}
MANY = 6
"""From this many findings of one verb on, a pass's report gives the first ones and the number of the others."""


def show_rows(
    console: Console, title: str, heads: Sequence[str], rows: Iterable[Sequence[object]], right: str = ""
) -> None:
    """A borderless table; heads named in `right` (separated by commas) are aligned to the right."""
    from rich.table import Table

    table = Table(title=plain(title), title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    numbers = set(right.split(","))
    for head in heads:
        table.add_column(
            plain(head), justify="right" if head in numbers else "left", header_style="dim", overflow="fold"
        )
    for row in rows:
        table.add_row(*(plain("" if cell is None else cell) for cell in row))
    console.print(table)
    console.print()


def show_vocabulary(console: Console, found: Vocabulary) -> None:
    """A proposed list of tokens: what stays, what that does to held-out text, and the bytes of each table."""
    rest = found.tokens - found.needed - found.counted - found.filled
    console.print(plain(f"{found.tokens:,} of {found.source_tokens:,} tokens stay", "bold"))
    console.print(f"  {found.needed:,} that every text may need: bytes, special tokens, digits, punctuation, letters")
    console.print(f"  {found.counted:,} that the corpus uses, and what they are merged from")
    console.print(f"  {found.filled + rest:,} others, of the scripts to keep and for whole groups\n")
    text = found.coverage
    if text.tokens:
        before, after = (text.characters / tokens for tokens in (text.tokens, text.new_tokens))
        console.print(plain(f"Held-out text, {text.characters:,} characters", "bold"))
        console.print(f"  {text.share:.2%} of its {text.tokens:,} tokens stay")
        console.print(f"  {before:.3f} characters per token, {after:.3f} with those that stay\n")
    rows = [(name, size(old), size(new), size(old - new)) for name, (old, new) in found.bytes.items()]
    whole, left = (sum(both[n] for both in found.bytes.values()) for n in (0, 1))
    rows.append(("all", size(whole), size(left), size(whole - left)))
    show_rows(console, "Bytes", ("table", "before", "after", "saved"), rows, right="before,after,saved")
    console.print(plain(f"{'try it':<11}gemma4-surgery repack SRC out/ --vocabulary {found.path}"))


def show_outcome(console: Console, outcome: Outcome) -> None:
    """One pass: `merge-embeddings  +13 nodes ...` and its findings."""
    trace = ", ".join(f"{count:+d} {op}" for op, count in outcome.operators.items())
    line = plain(outcome.name, "bold")
    line.append(f"  {trace}" if trace else "  no operator added or removed", style="dim")
    console.print(line)
    for verb, (mark, style) in MARKS.items():
        found = [finding for finding in outcome.findings if finding.verb == verb]
        shown = found if len(found) <= MANY else found[: MANY - 1]
        for finding in shown:
            entry = plain(f"  {mark} ", style)
            entry.append_text(plain(finding.subject))
            entry.append_text(plain(f": {finding.reason}", "dim"))
            console.print(entry)
        if len(found) > len(shown):
            console.print(plain(f"  {mark} and {len(found) - len(shown)} others {verb}", style))


def show_inspection(console: Console, found: Inspection | ExportInspection | FolderInspection) -> None:
    """What `inspect` found: tables of the interface, layers, operators and data files of each graph."""
    if isinstance(found, ExportInspection):
        _show_export(console, found)
    elif isinstance(found, FolderInspection):
        _show_folder(console, found)
    else:
        _show_graph(console, found)


def _show_export(console: Console, found: ExportInspection) -> None:
    arch = found.export.architecture
    kv_sources = f"{len(arch.kv_sources)} KV caches for {len(arch.layers)} layers"
    console.print(plain(f"{found.export.name}: an export of {arch.family}, {kv_sources}\n", "bold"))
    rows = [(name, size(count), _precision_notes(found, name)) for name, count in found.sizes.items()]
    show_rows(console, "Precisions", ("precision", "graphs and weights", ""), rows, right="graphs and weights")
    for graph in found.graphs:
        _show_graph(console, graph)


def _precision_notes(found: ExportInspection, precision: str) -> str:
    others = [f"{role} in {other}" for role, other in found.export.pairs[precision].others.items()]
    return ", ".join([*others, *(["shown below"] if precision == found.shown else [])])


def _show_folder(console: Console, found: FolderInspection) -> None:
    model = found.config.get("model", {})
    search = found.config.get("search", {})
    kind = model.get("type", "unknown") if isinstance(model, dict) else "unknown"
    console.print(plain(f"{found.folder}: a GenAI folder of type {kind}\n", "bold"))
    if isinstance(model, dict) and isinstance(search, dict):
        keys = ("type", "vocab_size", "context_length", "bos_token_id", "eos_token_id", "pad_token_id")
        rows = [(key, model.get(key)) for key in keys]
        rows += [(key, search.get(key)) for key in ("max_length", "past_present_share_buffer", "do_sample")]
        show_rows(console, "genai_config.json", ("key", "value"), rows)
    for graph in found.graphs:
        _show_graph(console, graph)


def _show_graph(console: Console, found: Inspection) -> None:
    opsets = ", ".join(f"{domain} {version}" for domain, version in found.opsets.items())
    nodes = sum(found.operators.values())
    head = f"{found.path.name}: IR {found.ir_version}, opset {opsets}, by {found.producer or 'an unnamed producer'}"
    console.print(plain(head, "bold"))
    console.print(plain(f"{nodes} nodes, {found.initializers} initializers, {size(found.inline_bytes)} inline\n"))
    interface = [("input", *_grouped(name)) for name in _cache_groups(found.inputs)]
    interface += [("output", *_grouped(name)) for name in _cache_groups(found.outputs)]
    show_rows(console, "Interface", ("", "name", "type"), interface)
    if found.layers:
        show_rows(console, "Layers", LAYER_HEADS, [layer_cells(row) for row in found.layers], right=LAYER_NUMBERS)
    operators = ", ".join(f"{count} {op}" for op, count in found.operators.items())
    console.print(plain("Operators", "bold"))
    console.print(plain(operators + "\n"))
    if found.weight_files:
        rows = [
            (
                f.location,
                size(f.referenced),
                "missing" if f.size is None else size(f.size) + ("" if f.here else ", on the Hub"),
            )
            for f in found.weight_files
        ]
        show_rows(console, "External data", ("file", "referenced", "size"), rows, right="referenced,size")
    if found.problem:
        console.print(plain(f"problem: {found.problem}\n", "red"))


LAYER_HEADS = ("layer", "attention", "head size", "KV heads", "window", "KV cache", "operator", "reads")
LAYER_NUMBERS = "layer,head size,KV heads,window"


def layer_cells(row: LayerRow) -> tuple[object, ...]:
    """A layer as a row under LAYER_HEADS."""
    layer: Layer = row.layer
    cache = "its own" if layer.is_kv_source else f"reads {layer.kv_source}'s"
    reads = row.present or row.past or "no cache"
    return (
        layer.index, layer.attention, layer.head_size, layer.kv_heads, layer.window, cache, row.operator, reads,
    )  # fmt: skip


def _cache_groups(values: Sequence[tuple[str, str]]) -> list[tuple[list[str], str]]:
    """Neighbouring values of one type and one family of names, together: 35 pairs of caches are a few lines."""
    groups: list[tuple[list[str], str]] = []
    for name, kind in values:
        if groups and groups[-1][1] == kind and _family(groups[-1][0][-1]) == _family(name) and _number(name):
            groups[-1][0].append(name)
        else:
            groups.append(([name], kind))
    return groups


def _grouped(group: tuple[list[str], str]) -> tuple[str, str]:
    names, kind = group
    return (names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)})"), kind


def _family(name: str) -> str:
    return name.split(".")[0]


def _number(name: str) -> bool:
    return any(part.isdecimal() for part in name.split("."))


def show_report(console: Console, report: Report, *, brief: bool = False) -> None:
    """A validation: its gates by section, and one line that says how many passed.

    `brief` gives a section whose gates all passed one line; a gate that failed is always shown.
    """
    sections: tuple[Section, ...] = (
        "manifest",
        "structure",
        "numbers",
        "parity",
        "accuracy",
        "activations",
        "vocabulary",
        "runtime",
        "media",
    )
    for section in sections:
        gates = report.section(section)
        passed = all(gate.passed for gate in gates)
        if brief and passed and gates:
            line = plain("ok  ", "green")
            line.append_text(plain(f"{section}: {_in_brief(section, report)}"))
            console.print(line)
        elif gates:
            console.print(plain(section.capitalize(), "bold"))
            for gate in gates:
                console.print(_gate_line(gate))
            console.print()
    if report.peaks:
        heads = ("layer", "max |x|", "headroom to 65504", "not finite", "value")
        rows = [(p.layer_name, f"{p.max_abs:.4g}", f"{p.headroom:.4g}", p.not_finite, p.value) for p in report.peaks]
        show_rows(console, "Residual stream", heads, rows, right="max |x|,headroom to 65504,not finite")
    if report.kinds:
        _show_kinds(console, report.kinds)
    reasons = dict.fromkeys(case.reason for case in report.skipped)
    for reason in reasons:
        names = ", ".join(case.name for case in report.skipped if case.reason == reason)
        console.print(plain(f"left out {names}: {reason}", "dim"))
    good = len(report.gates) - len(report.failed)
    seconds = sum(report.seconds.values())
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    console.print(plain(f"{good} of {len(report.gates)} gates passed in {seconds:.1f} s, with {versions}"))


def _show_kinds(console: Console, found: Sequence[KindError]) -> None:
    heads = ("int8 by", "products", "number", "relative error", "mean KL", "worst KL", "max |difference|")
    rows = [
        (one.by, one.kind, one.products, f"{one.parity.error:.3f}", f"{one.parity.mean_kl:.2g}", f"{one.parity.kl:.2g}",
         f"{max(one.parity.max_abs, one.parity.regrouped_max_abs):.2f}")
        for one in found
    ]  # fmt: skip
    show_rows(console, "Int8 by kind of product", heads, rows, right=",".join(heads[2:]))


def _in_brief(section: Section, report: Report) -> str:
    """What a section that passed has shown, in one line."""
    gates = report.section(section)
    if section == "parity" and report.parity is not None:
        return str(report.parity)
    if section == "accuracy" and report.level is not None:
        return f"{gates[0].name}, {gates[0].detail}: {report.level}, top-1 {report.level.same:.3f}"
    if section == "numbers":
        steps = sum(case.steps for case in report.cases)
        return f"{report.differences}: {len(report.cases)} cases, {steps} steps"
    if section == "runtime":
        return "; ".join(gate.name + (f" ({gate.detail})" if "tokens" in gate.name else "") for gate in gates)
    if section == "media":
        return "; ".join(
            gate.name
            + (f" (max |difference| {gate.found:.3g}, {gate.detail})" if "tokens after" in gate.detail else "")
            for gate in gates
        )
    return gates[0].name if len(gates) == 1 else f"{len(gates)} gates, from {gates[0].name!r} to {gates[-1].name!r}"


def _gate_line(gate: Gate) -> Text:
    line = plain("  ok    " if gate.passed else "  FAIL  ", "green" if gate.passed else "bold red")
    line.append_text(plain(gate.name))
    if gate.reading:
        line.append_text(plain(f"  {gate.reading}", "bold"))
    if gate.detail:
        line.append_text(plain(f": {gate.detail}", "dim" if gate.passed else ""))
    return line


def show_benchmarks(console: Console, found: Sequence[Benchmark]) -> None:
    """One row per side and context."""
    rows = [
        (
            one.side,
            timing.context,
            f"{timing.first_token_seconds:.3f} s",
            f"{timing.prefill_rate:.1f}",
            f"{timing.decode_rate:.1f}",
            f"{one.load_seconds:.1f} s",
            size(one.peak_rss),
        )
        for one in found
        for timing in one.timings
    ]
    heads = ("side", "context", "first token", "prefill tokens/s", "decode tokens/s", "load", "peak memory")
    show_rows(console, "", heads, rows, right=",".join(heads[1:]))


def show_profiles(console: Console, found: Sequence[Profile]) -> None:
    """A table for each phase and context: the operators that take a hundredth of the time or more, and the rest."""
    for one in found:
        prompt = one.phase == "prefill"
        each = f", {one.milliseconds / one.context:.2f} ms a token" if prompt else " a token"
        head = f"{one.phase} {'of' if prompt else 'behind'} {one.context:,} tokens: {one.milliseconds:.1f} ms{each}"
        console.print(plain(f"{head}; the memory gives {one.bandwidth / 1e9:.1f} GB/s", "bold"))
        shown = [share for share in one.shares if share.share >= 0.01]
        rows = [
            (share.operator, "none" if share.layers == "-" else share.layers, share.nodes, f"{share.milliseconds:.2f}",
             f"{share.share:.1%}", size(share.bytes), f"{share.rate / 1e9:.1f}", f"{share.rate / one.bandwidth:.0%}")
            for share in shown
        ]  # fmt: skip
        left = one.milliseconds - sum(share.milliseconds for share in shown)
        nodes = sum(share.nodes for share in one.shares) - sum(share.nodes for share in shown)
        rows.append(
            ("all others, and between nodes", "", nodes, f"{left:.2f}", f"{left / one.milliseconds:.1%}", "", "", "")
        )
        heads = ("operator", "layers", "nodes", "ms", "share", "bytes", "GB/s", "of memory")
        show_rows(console, "", heads, rows, right=",".join(heads[2:]))


def show_prediction(console: Console, name: str, found: Prediction) -> None:
    """Where nodes would go on CUDA: faults by operator, and what may stay on the CPU in one line a reason."""
    counts = [f"{len(nodes)} on {where}" for where, nodes in (("CUDA", found.on("cuda")), ("the CPU", found.on("cpu")))]
    if unknown := found.on("unknown"):
        counts.append(f"{len(unknown)} unknown")
    head = f"{name} on CUDA, predicted for onnxruntime-gpu {found.runtime}: {', '.join(counts)}"
    console.print(plain(f"{head}; {len(found.copies)} copies a run", "bold"))
    faults = [(g.operator, len(g.nodes), g.reason, g.nodes[0]) for g in found.groups if g.is_fault]
    if faults:
        show_rows(console, "", ("operator", "nodes", "why not on CUDA", "first node"), faults, right="nodes")
    for reason in dict.fromkeys(g.reason for g in found.groups if not g.is_fault):
        names = ", ".join(f"{len(g.nodes)} {g.operator}" for g in found.groups if g.reason == reason)
        console.print(plain(f"{names}: {reason}"))
    console.print(plain(found.advice, "red" if found.faults else ""))
    console.print(plain(f"{found.capture}\n"))


def show_passes(console: Console, described: Sequence[Mapping[str, Any]]) -> None:
    """Each pass as passes.recipe.describe_pass tells of it: a line, and a table of its options where it has any."""
    for entry in described:
        console.print(f"{entry['name']}: {entry['summary']}", markup=False, highlight=False)
        if options := [(f"  {o['name']}", o["values"], o["default"]) for o in entry["options"]]:
            show_rows(console, "", ("  option", "values", "default"), options)


def show_download(console: Console, planned: Download) -> None:
    """The files that one precision of a repository needs, and how many bytes are still to come."""
    listing = planned.listing
    rows = [
        (entry.file.name, "?" if entry.file.size is None else size(entry.file.size), "yes" if entry.cached else "no")
        for entry in planned.files
    ]
    title = f"{listing.source.repo_id} {planned.precision}, commit {listing.commit[:12]}"
    show_rows(console, title, ("file", "size", "cached"), rows, right="size")
    console.print(plain(f"{size(planned.total_bytes)} in all, {size(planned.missing_bytes)} to download"))


def show_contents(console: Console, files: Mapping[str, int | None], destination: Destination | None) -> None:
    """What would be written, None being the size of what is new, and where it would be uploaded."""
    rows = [(name, "new" if count is None else size(count)) for name, count in files.items()]
    show_rows(console, "would be written", ("file", "size"), rows, right="size")
    if destination is not None:
        kind = "the private repository " if destination.private else ""
        console.print(plain(f"{len(files)} files would be uploaded to {kind}{destination.repo_id}"))


def show_repacked(console: Console, result: Repacked[Report], layout: str, *, verbose: bool = False) -> None:
    """What was made, in a screen; `verbose` adds each pass with its findings, and the proof by its sections."""
    if verbose:
        _show_passes_of(console, result)
        for name, cost in result.costs.items():
            mark = "*" if name == layout else " "
            console.print(plain(f"{mark} KV caches {name}: {_cost(cost)}"))
        console.print()
        _show_proof(console, result.proof)
        _show_placed(console, result.placed)
        console.print()
    names = [outcome.name for found in (result.outcomes, *result.others.values()) for outcome in found]
    total = sum(file.size for file in result.placed)
    how = " and ".join(dict.fromkeys(file.how for file in result.placed))
    shared = ", sharing their bytes with the source" if "linked" in how else ""
    lines = [
        ("passes", ", ".join(dict.fromkeys(names))),
        ("KV caches", f"{layout}: {_cost(result.costs[layout])}"),
        ("weights", f"{size(total)} in {len(result.placed)} files, {how}{shared}"),
        ("proof", result.proof.summary if result.proof else "none was asked for"),
    ]
    for head, text in lines:
        console.print(plain(f"{head:<11}{text}"))
    if result.proof and result.proof.skipped:
        reasons = Counter(case.reason for case in result.proof.skipped).most_common()
        told = ", ".join(f"{count} ({reason})" for reason, count in reasons)
        console.print(plain(f"{'':<11}{len(result.proof.skipped)} prompts not run: {told}; -v names them", "dim"))
    console.print(plain(f"{'ready':<11}{result.folder} (report.md says what changed)", "bold green"))
    console.print(plain(f'{"try it":<11}gemma4-surgery generate {result.folder} "Hello"'))


def _cost(cost: CacheCost) -> str:
    at_8k = size(cost.bytes_at(8192))
    return f"{cost.pairs} pairs, {size(cost.bytes_per_token)} per token, {at_8k} at 8,192 tokens"


def _show_passes_of(console: Console, result: Repacked[Report]) -> None:
    graphs = {"decoder_model_merged": result.outcomes, **result.others}
    for role, outcomes in graphs.items():
        if result.others:
            console.print(plain(role, "bold underline"))
        for outcome in outcomes:
            show_outcome(console, outcome)
    console.print()


def show_stripped(console: Console, result: Stripped[Report], *, verbose: bool = False) -> None:
    """The proof, the weight files, and what was left out; `verbose` gives every gate."""
    _show_proof(console, result.proof, brief=not verbose)
    _show_placed(console, result.placed)
    if result.left_out:
        console.print(plain(f"left out: {len(result.left_out)} files, {size(sum(result.left_out.values()))}"))
    console.print(plain(f"{'ready':<11}{result.folder}", "bold green"))
    console.print(plain(f'{"try it":<11}gemma4-surgery generate {result.folder} "Hello"'))


def _show_proof(console: Console, proof: Report | None, *, brief: bool = True) -> None:
    if proof is not None:
        show_report(console, proof, brief=brief)
        console.print()


def _show_placed(console: Console, placed: Sequence[Placed]) -> None:
    for file in placed:
        shared = " (it shares its bytes with the source)" if file.how == "linked" else ""
        console.print(plain(f"{file.location}: {size(file.size)} {file.how}{shared}"))
