"""What each version of ONNX Runtime GenAI does with a folder for images and sound.

    python -m validation.media WORK

WORK gets an environment for each version of onnxruntime-genai with the oldest and the newest ONNX Runtime that it
admits (kept for the next run), the folders and the sample files. Each folder is asked in each environment to load and
to continue prompts with a real PNG and WAV; the answers are held to the source's own encoders and graphs in a loop
(surgery.verify.multimodal_proof), run here. Writes docs/validation/media.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from passes.presets import compatible, multimodal
from passes.recipe import recipe_text
from surgery.choices import Modality
from surgery.folder.building import build_folder
from surgery.folder.multimodal import GraphPlan, most_patches
from surgery.runtime.genai import GenAI, render
from surgery.runtime.sessions import Settings, versions
from surgery.source.export import EMBED, ENCODERS, GraphPair, open_export
from surgery.verify.multimodal_proof import MEDIA_PROMPTS, Files, SourceLoop, prompt_text
from surgery.verify.recording import Answer
from validation.runtimes.environments import Environment, Kind, make_environment
from validation.runtimes.outcomes import probed, shortened

VERSIONS = ("0.14.1", "0.15.2", "0.16.0", "0.17.1", "0.18.0")
PRECISIONS = ("fp32", "fp16", "q4", "q4f16", "quantized")
HALF = ("fp16", "q4f16")
STEPS = 24
SOURCE = Path(__file__).parents[1] / "fixtures" / "tiny-e2b"
DOCUMENT = Path(__file__).parents[1] / "docs" / "validation" / "media.md"
BOTH: tuple[Modality, ...] = ("image", "audio")


@dataclass(frozen=True, slots=True)
class Subject:
    """A folder, and what the source answers to each prompt."""

    precision: str
    folder: Path
    asked: dict[str, dict[str, Any]]
    answers: dict[str, Answer]


def main() -> int:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m validation.media WORK")
    work = Path(sys.argv[1])
    work.mkdir(parents=True, exist_ok=True)
    files = Files(work)
    subjects = [make_subject(work, precision, files) for precision in PRECISIONS]
    environments = make_environments(work / "environments")
    rows = {name: [cell(subjects, environment, name) for environment in environments] for name in subjects[0].asked}
    DOCUMENT.write_text(document(environments, rows), encoding="utf-8")
    return 0


def make_subject(work: Path, precision: str, files: Files) -> Subject:
    export = open_export(SOURCE)
    pair = export.pair(precision)
    tokens = {modality: export.placeholder(modality) for modality in BOTH}
    recipes = multimodal(compatible(pair.embed), tokens, export.architecture.hidden_size, most_patches(export))
    sources = {EMBED: pair.embed, **{ENCODERS[modality]: pair.encoder(modality) for modality in BOTH}}
    parts = [GraphPlan(role, path, recipes[role]) for role, path in sources.items()]
    folder = work / f"media-{precision}"
    recorded = {role: recipe_text(recipe) for role, recipe in recipes.items()}
    build_folder(export, pair, recipes["decoder_model_merged"], folder, media=parts, recipe_text=recorded, force=True)
    asked, answers = expected(folder, pair, tokens, files)
    return Subject(precision, folder, asked, answers)


def expected(
    folder: Path, pair: GraphPair, tokens: dict[Modality, int], files: Files
) -> tuple[dict[str, dict[str, Any]], dict[str, Answer]]:
    """Prompt -> what a probe is asked, and the source's answer to what the processor of this environment makes of it."""
    genai, loop = GenAI(folder, "cpu"), SourceLoop(pair, tokens, Settings())
    asked: dict[str, dict[str, Any]] = {}
    answers: dict[str, Answer] = {}
    for prompt in MEDIA_PROMPTS:
        if prompt.chunk is None:
            images, sounds = files.of(prompt)
            question = render(genai.tokenizer(), prompt_text(prompt))
            prepared = genai.prepare(question, images, sounds)
            answers[prompt.name] = loop.answer(prompt.name, prepared.arrays, STEPS)
            asked[prompt.name] = {"kind": "media", "prompt": question, "steps": STEPS,
                                  "images": [str(i) for i in images], "sounds": [str(s) for s in sounds]}  # fmt: skip
    return asked, answers


def make_environments(root: Path) -> list[Environment]:
    kinds: tuple[Kind, ...] = ("minimum", "newest")
    return [make_environment(root, version, kind) for version in VERSIONS for kind in kinds]


def cell(subjects: Sequence[Subject], environment: Environment, name: str) -> str:
    """All precisions together: the largest differences of the prompt's logits, and how many tokens are the source's."""
    differences: dict[bool, list[float]] = {False: [], True: []}
    equal = 0
    for subject in subjects:
        (reply,) = probed(environment.python, subject.folder, {name: subject.asked[name]})
        if "error" in reply:
            return f"refused: {shortened(str(reply['error']))}"
        answer, found = subject.answers[name], reply["answer"]
        if tuple(found["ids"]) != answer.case.rows[0]:
            return "wrong: other ids"
        wanted = answer.steps[0].logits[0].astype(np.float32)
        differences[subject.precision in HALF].append(
            float(np.abs(np.array(found["logits"], np.float32) - wanted).max())
        )
        equal += sum(a == b for a, b in zip(found["tokens"], before_end(answer), strict=False))
    total = sum(len(before_end(subject.answers[name])) for subject in subjects)
    return f"{max(differences[False]):.3g}; {max(differences[True]):.3g}; {equal}/{total}"


def before_end(answer: Answer) -> list[int]:
    """The source's tokens up to the first that ends the sequence, at which the runtime stops."""
    tokens = [int(token) for token in answer.tokens()[0]]
    return tokens[: next((place for place, token in enumerate(tokens) if token in (1, 50, 106)), len(tokens))]


def document(environments: Sequence[Environment], rows: dict[str, list[str]]) -> str:
    notes: dict[str, int] = {}

    def shown(found: str) -> str:
        verdict, _, words = found.partition(": ")
        return f"{verdict}[^{notes.setdefault(words, len(notes) + 1)}]" if words else found

    heads = [f"{e.column.genai}<br>ORT {e.column.onnxruntime}" for e in environments]
    table = [[name, *(shown(found) for found in cells)] for name, cells in rows.items()]
    lines = [
        "# Images and sound in each version of ONNX Runtime GenAI",
        "",
        "<!-- written by `python -m validation.media WORK`; do not edit -->",
        "",
        f"Folders of tiny-e2b in {', '.join(PRECISIONS)}, each asked each prompt, on the CPU. A cell is the largest",
        f"|difference| of the logits of the prompt's last token in float32 precisions, the same in {' and '.join(HALF)}, and how",
        "many greedy tokens are those of the source: its own encoders and two graphs in a loop, with the features put in",
        f"place by numpy, under ONNX Runtime {versions()['onnxruntime']}. Another ONNX Runtime may round in another way.",
        "",
        *(f"| {' | '.join(row)} |" for row in (["", *heads], ["---"] * (len(heads) + 1), *table)),
        "",
        *(f"[^{number}]: `{words}`" for words, number in notes.items()),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
