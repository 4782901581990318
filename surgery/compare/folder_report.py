"""The report of a repack: what is added to the folder, and what would be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from passes.base import Outcome, Pass, apply
from surgery.choices import Target
from surgery.compare.comparing import compare
from surgery.compare.comparison import Comparison
from surgery.compare.formats import FORMATS
from surgery.compare.provenance import JSON_FILE, MARKDOWN_FILE, of_validation, witnessed
from surgery.compare.subjects import open_subject, subject_of_pair, subject_of_plan
from surgery.folder.genai_config import genai_config
from surgery.folder.multimodal import GraphPlan, media_config
from surgery.graph.model import Model
from surgery.source.export import ENCODERS, Export, GraphPair
from surgery.verify.report import Report


def folder_reports(
    folder: Path, export: Export, pair: GraphPair, outcomes: Sequence[Outcome], proof: Report | None
) -> dict[str, str]:
    """Name -> text of the reports of a complete folder: the same that `diff` of its source and it gives later."""
    numbers = replace(of_validation(proof, "repack's closing proof"), recorded=True) if proof is not None else None
    after = open_subject(folder)
    before = subject_of_pair(export, pair, encoders=after.roles)
    found = compare(before, after, provenance=witnessed(outcomes, numbers), manifests="own")
    return {MARKDOWN_FILE: FORMATS["md"](found), JSON_FILE: FORMATS["json"](found)}


def planned_report(
    export: Export,
    pair: GraphPair,
    recipe: Sequence[Pass],
    provider: str = "cpu",
    runtime: Target = "genai-0.15",
    media: Sequence[GraphPlan] = (),
    speculative: bool = False,
) -> Comparison:
    """What a repack would change. Nothing is written, and no data file need be there.

    `media` are the graphs of a folder that takes images or sound too; `recipe` is then the decoder's alone.
    """
    model, outcomes = apply(Model.open(pair.decoder, export.architecture), recipe, weights_absent=True)
    if not media:
        after = subject_of_plan(model, genai_config(model, export, provider, runtime, speculative), export.root)
        return compare(subject_of_pair(export, pair), after, provenance=witnessed(outcomes))
    modalities = [modality for modality, role in ENCODERS.items() if any(part.role == role for part in media)]
    others = {}
    for part in media:
        others[part.role], found = apply(Model.open(part.source), part.recipe, weights_absent=True)
        outcomes += found
    config = media_config(model, export, modalities, provider, runtime)
    return compare(
        subject_of_pair(export, pair, encoders=list(others)),
        subject_of_plan(model, config, export.root, others),
        provenance=witnessed(outcomes),
    )
