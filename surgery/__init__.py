"""Repack ONNX exports of Gemma 4 for ONNX Runtime GenAI, by surgery on the published graphs.

    import surgery

    surgery.repack("onnx-community/gemma-4-E2B-it-ONNX", "out")

    repack, RepackOptions, plan_repack      an export in, a proven GenAI folder out; what it would do
    strip, StripOptions, plan_strip         the two graphs for text, and nothing else
    vocabulary, VocabularyOptions           tokens to keep, proposed from a corpus; for both of these
    validate, Request, Report               the proof of a folder
    diff, Comparison                        what differs between two models
    inspect                                 what is in a file, an export or a folder
    generate, Chat, bench                   ask a folder; talk with it; measure it
    tool_calls, tool_grammar                the calls in an answer; a grammar that answers follow
    Model                                   one ONNX graph without its weights in memory
    Pass, Finding, apply, parse             what a pass is; apply passes to a model; a recipe from its text
    Listener                                hears what a job tells while it goes on
    SurgeryError, GateFailed                what a user can mend; a proof that failed

Each name is loaded when it is first used. docs/library.md shows each of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from passes.base import Finding, Pass, apply
    from passes.recipe import parse
    from surgery.compare.comparison import Comparison
    from surgery.errors import GateFailed, SurgeryError
    from surgery.graph.model import Model
    from surgery.jobs.benchmarking import bench
    from surgery.jobs.diffing import diff
    from surgery.jobs.generating import Chat, generate
    from surgery.jobs.inspecting import inspect
    from surgery.jobs.listener import Listener
    from surgery.jobs.proposing import VocabularyOptions, vocabulary
    from surgery.jobs.repacking import RepackOptions, plan_repack, repack
    from surgery.jobs.stripping import StripOptions, plan_strip, strip
    from surgery.jobs.validating import validate
    from surgery.runtime.tool_calls import tool_calls, tool_grammar
    from surgery.verify.report import Report
    from surgery.verify.request import Request

_HOMES = {
    "Chat": "surgery.jobs.generating",
    "Comparison": "surgery.compare.comparison",
    "Finding": "passes.base",
    "GateFailed": "surgery.errors",
    "Listener": "surgery.jobs.listener",
    "Model": "surgery.graph.model",
    "Pass": "passes.base",
    "RepackOptions": "surgery.jobs.repacking",
    "Report": "surgery.verify.report",
    "Request": "surgery.verify.request",
    "StripOptions": "surgery.jobs.stripping",
    "SurgeryError": "surgery.errors",
    "VocabularyOptions": "surgery.jobs.proposing",
    "apply": "passes.base",
    "bench": "surgery.jobs.benchmarking",
    "diff": "surgery.jobs.diffing",
    "generate": "surgery.jobs.generating",
    "inspect": "surgery.jobs.inspecting",
    "parse": "passes.recipe",
    "plan_repack": "surgery.jobs.repacking",
    "plan_strip": "surgery.jobs.stripping",
    "repack": "surgery.jobs.repacking",
    "strip": "surgery.jobs.stripping",
    "tool_calls": "surgery.runtime.tool_calls",
    "tool_grammar": "surgery.runtime.tool_calls",
    "validate": "surgery.jobs.validating",
    "vocabulary": "surgery.jobs.proposing",
}

__all__ = [
    "Chat",
    "Comparison",
    "Finding",
    "GateFailed",
    "Listener",
    "Model",
    "Pass",
    "RepackOptions",
    "Report",
    "Request",
    "StripOptions",
    "SurgeryError",
    "VocabularyOptions",
    "apply",
    "bench",
    "diff",
    "generate",
    "inspect",
    "parse",
    "plan_repack",
    "plan_strip",
    "repack",
    "strip",
    "tool_calls",
    "tool_grammar",
    "validate",
    "vocabulary",
]


def __getattr__(name: str) -> object:
    """Load a name of the front door when it is first used: `import surgery` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
