"""Steps that say whether it is right: versions, tests, numbers beside the CPU and the source pair, placement."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fixtures.build import build
from passes import HostEmbeddings
from passes.presets import compatible, fast
from passes.recipe import Recipe
from surgery.cuda.kernels import cuda_kernels
from surgery.cuda.prediction import predict
from surgery.errors import GateFailed, SurgeryError
from surgery.folder.building import build_folder
from surgery.graph.model import Model
from surgery.runtime.environment import environment
from surgery.runtime.genai import GenAI
from surgery.runtime.sessions import MergedModel, Settings, load_onnxruntime
from surgery.runtime.two_graphs import TwoGraphModel
from surgery.source.export import Export, GraphPair, open_export
from surgery.verify.agreement import Agreement, agreement_of
from surgery.verify.execution_profile import profile_run
from surgery.verify.genai_proof import check_generation
from surgery.verify.prompts import Case
from surgery.verify.recording import record
from validation.cuda.steps import Found, Setting
from validation.cuda.stubs import ROOT

FORMS: dict[str, Callable[[Path], Recipe]] = {
    "aliased": lambda embed: compatible(embed, "aliased"),
    "unique": lambda embed: compatible(embed, "unique"),
    "fast": lambda embed: fast(embed, "cuda"),
    "host": lambda embed: (*compatible(embed, "unique"), HostEmbeddings()),
}
"""What a repack makes for CUDA; `host` keeps the token tables in host memory."""
TOLERANCE = 0.1
"""Largest difference of a logit between the providers: six float16 steps at 30, where logits are capped."""
STEPS = 8
CASES = (
    Case("short", "a short prompt", ((2, 10, 77, 31),)),
    Case("long", "a prompt beyond the sliding window", (tuple(2 + 7 * n % 110 for n in range(48)),)),
    Case("chunks", "the same in chunks", (tuple(2 + 7 * n % 110 for n in range(48)),), chunk=7),
    Case("batch", "two rows of equal length", ((2, 10, 77, 31), (2, 9, 33, 61))),
)
QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory"


def machine(setting: Setting) -> Found:
    """The GPU and its driver as nvidia-smi tells them, and the versions of what is installed."""
    smi = shutil.which("nvidia-smi")
    gpu = subprocess.run([smi, f"--query-gpu={QUERY}", "--format=csv"], capture_output=True, text=True) if smi else None
    ort = load_onnxruntime(setting.provider)
    return {
        "gpu": gpu.stdout.strip().splitlines() if gpu else [],
        "onnxruntime_build": ort.get_build_info(),
        "kernel_table": cuda_kernels().onnxruntime,
        **environment().to_dict(),
    }


def gpu_tests(setting: Setting) -> Found:
    """The project's own tests for a GPU. A rehearsal runs them on the CPU provider."""
    written = setting.out / "gpu-tests.xml"
    variables = {**os.environ, **({"GEMMA4_SURGERY_GPU_TESTS": "cpu"} if setting.rehearsal else {})}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/cuda", f"--junitxml={written}"]
    subprocess.run(command, cwd=ROOT, env=variables, check=False, capture_output=True)
    (suite,) = ElementTree.parse(written).getroot().iter("testsuite")
    failures = {
        str(case.get("name")): str(fault.get("message")).splitlines()[0]
        for case in suite.iter("testcase")
        for fault in (*case.iter("failure"), *case.iter("error"))
    }
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    if counts["skipped"] == counts["tests"]:
        raise SurgeryError("every test was skipped: pytest found no CUDA device")
    return {**counts, "failed": failures}


def numbers(precision: str) -> Callable[[Setting], Found]:
    """Each form of the tiny export on the device, beside its source pair on the device and on the CPU."""

    def run(setting: Setting) -> Found:
        export = tiny(setting, precision)
        pair = export.pair(precision)
        cpu = record(TwoGraphModel.open(pair, Settings("cpu")), CASES, steps=STEPS)
        owners = {layer.index: layer.kv_source for layer in export.architecture.layers}
        found: Found = {}
        device: Any = None
        try:
            device = record(TwoGraphModel.open(pair, Settings(setting.provider)), CASES, steps=STEPS, follow=cpu)
            found["source pair"] = {"against the CPU": _agreement(agreement_of(cpu, device, owners, TOLERANCE))}
        except SurgeryError as error:
            found["source pair"] = {"error": str(error)}
        for form in FORMS:
            try:
                folder, refusal = made(setting, export, pair, form)
                merged = MergedModel(folder / "model.onnx", Settings(setting.provider))
                answers = record(merged, CASES, steps=STEPS, follow=cpu)
                against = {"the CPU": cpu, **({"the source pair": device} if device else {})}
                compared = {
                    f"against {name}": _agreement(agreement_of(other, answers, owners, TOLERANCE))
                    for name, other in against.items()
                }
                eos = export.config.get("eos_token_id", 1)
                ends = tuple(eos) if isinstance(eos, list) else (eos,)
                gates = check_generation(GenAI(folder, setting.provider), cpu.answers, ends, TOLERANCE, TOLERANCE)
                genai = {gate.name: "passed" if gate.passed else gate.detail for gate in gates}
                found[form] = {"foretold": refusal or "runs", **compared, "genai": genai}
            except SurgeryError as error:
                found[form] = {"error": str(error)}
        return found

    return run


def tiny(setting: Setting, precision: str) -> Export:
    """The tiny export that has this precision: made where it is not there yet."""
    name = "tiny-e2b-qat" if precision == "q2f16" else "tiny-e2b"
    root = setting.work / name
    if not root.is_dir() or precision not in open_export(root).pairs:
        build(name, precision, root)
    return open_export(root)


def made(setting: Setting, export: Export, pair: GraphPair, form: str) -> tuple[Path, str]:
    """A form's folder for CUDA; and why a repack would refuse to make it: then it is made for the CPU, to be tried."""
    target = setting.work / f"{export.root.name}-{pair.precision}-{form}"
    if target.exists():
        shutil.rmtree(target)
    recipe = FORMS[form](pair.embed)
    try:
        return build_folder(export, pair, recipe, target, provider="cuda", weights="link").folder, ""
    except SurgeryError as error:
        why = str(error).removeprefix(f"{pair.decoder}: ")
        return build_folder(export, pair, recipe, target, weights="link").folder, why


def _agreement(found: Agreement) -> Found:
    return {
        "logits off by": max(found.max_abs, found.regrouped_max_abs),
        "caches off by": found.cache_max_abs,
        "least cosine": min(case.cosine for case in found.cases),
        "token faults": sum(case.token_faults for case in found.cases),
        "not finite": sum(case.merged_not_finite for case in found.cases),
    }


def placement(setting: Setting) -> Found:
    """Where the real provider puts the nodes, and what it copies, beside the prediction; then where they ran."""
    from validation.cuda.placement import compare
    from validation.cuda.stubs import prepare

    paths: dict[str, Path] = {}
    for precision in ("fp16", "q4f16"):
        export = tiny(setting, precision)
        pair = export.pair(precision)
        paths |= {f"{precision} {form}": made(setting, export, pair, form)[0] / "model.onnx" for form in FORMS}
    found: Found = {}
    for name, path in paths.items():
        expected = predict(Model.open(path))
        ran = profile_run(path, setting.provider)
        found[name] = {
            "nodes": len(expected.assignments),
            "foretold": {
                "cuda": len(expected.on("cuda")),
                "cpu": len(expected.on("cpu")),
                "copies": len(expected.copies),
            },
            "ran": {"cuda": len(ran.on("cuda")), "cpu": len(ran.on("cpu")), "copies": len(ran.copies)},
            "fallen": [f"{each.operator} {each.node}" for each in ran.fallen(expected)][:5],
        }
    if setting.rehearsal and setting.stubs is None:
        return found
    for (name, path), real in zip(paths.items(), _assigned(setting, [*paths.values()], prepare), strict=True):
        if "error" in real:
            found[name]["error"] = real["error"]
            continue
        compared = compare(name, path, real)
        found[name]["provider"] = {
            "agree": compared.agree,
            "differ": [list(entry) for entry in compared.differ][:5],
            "same copies": compared.same_copies,
            "capture": {"provider": compared.captured, "foretold": compared.predicted.can_be_captured},
        }
    return found


def _assigned(setting: Setting, paths: list[Path], prepare: Callable[[str, Path], Any]) -> list[Any]:
    """What the provider says of each graph: in this process, or over stub libraries."""
    if setting.stubs is None:
        from validation.cuda.real_provider import assignments

        return [assignments(str(path)) for path in paths]
    import json

    runtime = prepare(cuda_kernels().onnxruntime, setting.stubs)
    answers: list[Any] = json.loads(runtime.run("validation.cuda.real_provider", "assign", *map(str, paths)))
    return answers


def media(setting: Setting) -> Found:
    """A folder with images and sound, through the proof that a repack ends with."""
    import surgery

    found: Found = {}
    for precision in ("q4f16", "fp16"):
        export = tiny(setting, precision)
        target = setting.work / f"media-{precision}"
        options = surgery.RepackOptions(
            precision=precision, modalities=("image", "audio"), provider=setting.provider, force=True
        )
        try:
            proof = surgery.repack(export.root, target, options).proof
            gates = proof.gates if proof is not None else ()
            found[precision] = {"gates": len(gates), "failed": {g.name: g.detail for g in gates if not g.passed}}
        except GateFailed as error:
            found[precision] = {"failed": {g.name: g.detail for g in error.report.gates if not g.passed}}
        except SurgeryError as error:
            found[precision] = {"error": re.sub(r"\s+", " ", str(error))}
    return found
