"""The command that measures a GPU: what it does when steps fail, hang or crash; and what a token costs on paper."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from places import TINY

from surgery.folder.building import plan
from surgery.source.export import open_export
from validation.cuda import __main__ as command
from validation.cuda import steps as listed
from validation.cuda.correctness import FORMS
from validation.cuda.cost import CARDS, cost_of
from validation.cuda.evidence import EVIDENCE, page, results
from validation.cuda.steps import Found, Setting, Step


def good(setting: Setting) -> Found:
    return {"timings": [], "provider": setting.provider}


def bad(_: Setting) -> Found:
    raise ValueError("no such kernel")


def crash(_: Setting) -> Found:
    os._exit(139)


def hang(_: Setting) -> Found:
    time.sleep(600)
    return {}


STEPS = (
    Step("bad", "Bad", bad),
    Step("crash", "Crash", crash),
    Step("hang", "Hang", hang),
    Step("after", "After what failed", good, needs=("bad",)),
    Step("tokens", "Tokens", lambda _: {}),
)


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    """With STEPS in place of the real ones; a step's process is a fork of this one."""
    monkeypatch.setattr(command, "steps", lambda: STEPS)
    monkeypatch.setattr("validation.cuda.evidence.steps", lambda: STEPS)
    monkeypatch.setattr(command, "SHORTEST", 0.1)
    monkeypatch.setattr(command, "in_own_process", forked)
    return Setting(tmp_path / "out", rehearsal=True)


REAL = command.in_own_process


def forked(setting: Setting, step: Step, seconds: float) -> dict[str, object]:
    """The real one, with a fork in place of a new Python, which would know nothing of STEPS."""

    class Forked:
        def __init__(self, *_: object, timeout: float, **__: object) -> None:
            child = os.fork()
            if not child:
                os._exit(command.run_step(setting, step.name))
            until = time.monotonic() + min(timeout, 1.0)
            while time.monotonic() < until:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    self.returncode = os.waitstatus_to_exitcode(status)
                    return
                time.sleep(0.01)
            os.kill(child, 9)
            os.waitpid(child, 0)
            raise command.subprocess.TimeoutExpired("step", timeout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.subprocess, "run", Forked)
        return REAL(setting, step, seconds)


def test_what_fails_hangs_or_crashes_leaves_the_others_alone(setting: Setting) -> None:
    assert command.run(setting, 60, []) == 1
    found = results(setting.out)
    outcomes = {name: result["outcome"] for name, result in found.items()}
    assert outcomes == {"bad": "failed", "crash": "failed", "hang": "out of time", "after": "not run", "tokens": "done"}
    assert found["bad"]["error"] == "ValueError: no such kernel"
    assert "code 139" in found["crash"]["error"] and found["after"]["error"] == "it needs bad"


def test_the_next_call_runs_again_what_is_not_done(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.run(setting, 60, ["bad", "tokens"]) == 1
    before = (setting.out / "tokens.json").stat().st_mtime_ns
    monkeypatch.setattr(command, "steps", lambda: (Step("bad", "Bad", good), *STEPS[3:]))
    assert command.run(setting, 60, ["bad", "after", "tokens"]) == 0
    assert (setting.out / "tokens.json").stat().st_mtime_ns == before
    assert command.run(setting, 60, ["nonsense"]) == 2


def test_a_rehearsal_says_so_first_and_is_no_evidence(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    command.run(setting, 60, ["tokens", "bad"])
    text = (setting.out / "cuda.md").read_text()
    assert text.index("A rehearsal on the CPU provider") < text.index("## Not done")
    assert "- Bad: ValueError: no such kernel" in text and "- Hang: not run" in text
    monkeypatch.setattr("sys.argv", ["cuda", str(setting.out), "--page"])
    assert command.main() == 1
    result = json.loads((setting.out / "tokens.json").read_text())
    assert "rehearsal" not in page({"tokens": {**result, "provider": "cuda"}})


def test_no_rehearsal_is_committed_as_evidence() -> None:
    assert not EVIDENCE.exists() or "rehearsal" not in EVIDENCE.read_text()


def test_the_real_steps_have_names_of_their_own_and_need_earlier_ones() -> None:
    names = [step.name for step in listed.steps()]
    assert len(set(names)) == len(names)
    for step in listed.steps():
        assert all(names.index(needed) < names.index(step.name) for needed in step.needs)


def test_bytes_of_a_token_are_the_decoders_weights_and_what_attention_reads() -> None:
    export = open_export(TINY)
    pair = export.pair("q4f16")
    found = {
        form: cost_of(plan(pair, export, recipe(pair.embed))[0], export.architecture, in_place=form == "fast")
        for form, recipe in FORMS.items()
    }
    apart = sum(path.stat().st_size for path in pair.decoder.parent.glob(f"{pair.decoder.name}_data*"))
    assert apart <= found["unique"].weights <= apart + pair.decoder.stat().st_size
    fast = found["fast"]
    sliding, full = 2 * 16 * 2, 2 * 32 * 2  # a row of keys and values of the one KV head, float16; the window is 8
    assert fast.bytes_behind(100) - fast.bytes_behind(0) == 8 * 8 * sliding + 2 * 100 * full
    assert found["unique"].bytes_behind(100) > fast.bytes_behind(100)
    assert found["aliased"].bytes_behind(100) > found["unique"].bytes_behind(100)
    assert found["host"].host_rows == found["unique"].rows > 0 == fast.host_rows
    assert fast.kernels < found["unique"].kernels and min(CARDS.values()) > 1e11
