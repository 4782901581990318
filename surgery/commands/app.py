"""The command line as a whole: its commands, and how it ends.

Data goes to stdout, talk and progress to stderr. Exit codes: 0 done, 1 a gate failed or a difference was found, 2
trouble. Imports that cost time stay inside the commands: `--help` must be quick.
"""

from __future__ import annotations

import functools
import inspect as inspection
import io
import os
import sys
import typing
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from surgery.commands.apply import apply
from surgery.commands.bench import bench
from surgery.commands.console import be_quiet, data, guard_runners_log
from surgery.commands.diff import diff
from surgery.commands.doctor import doctor
from surgery.commands.generate import generate
from surgery.commands.git import git_diff, git_setup, git_textconv
from surgery.commands.help import GENERAL, WIDEST, Command, Group, examples
from surgery.commands.inspect import inspect
from surgery.commands.list_passes import passes
from surgery.commands.repack import repack
from surgery.commands.review import comment, review
from surgery.commands.strip import strip
from surgery.commands.validate import validate
from surgery.commands.vocabulary import vocabulary
from surgery.errors import GateFailed, SurgeryError, printable, unforeseen
from surgery.version import VERSION

app = typer.Typer(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDEST},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Repack community ONNX exports of Gemma 4 for ONNX Runtime GenAI: bit-exact, without torch or re-export.",
    epilog="Exit codes: 0 done; 1 a gate failed or a difference was found; 2 trouble. docs/commands.md lists the "
    "environment variables.\n\n"
    + examples(
        "repack onnx-community/gemma-4-E2B-it-ONNX out/",
        'generate out/ "Why is the sky blue?"',
        "repack -h",
    ),
)
_Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", rich_help_panel=GENERAL, help="No talk and no progress on stderr; what goes wrong is said."
    ),
]


def _with_quiet(command: Callable[..., None]) -> Callable[..., None]:
    """The command with one option more, which each of them has."""

    @functools.wraps(command)
    def asked(*arguments: Any, quiet: bool = False, **options: Any) -> None:
        if quiet:
            be_quiet()
        command(*arguments, **options)

    hints = {**typing.get_type_hints(command, include_extras=True), "quiet": _Quiet}
    known = inspection.signature(command).parameters.values()
    parameters = [one.replace(annotation=hints[one.name]) for one in known]
    parameters.append(
        inspection.Parameter("quiet", inspection.Parameter.KEYWORD_ONLY, default=False, annotation=_Quiet)
    )
    asked.__signature__ = inspection.Signature(parameters)  # type: ignore[attr-defined]
    asked.__annotations__ = hints
    return asked


_HUB = "onnx-community/gemma-4-E2B-it-ONNX"
_MAKE, _USE, _LOOK, _CHANGES, _HERE = (
    "Make a folder", "Use it", "Look into models", "See what changed", "This computer",
)  # fmt: skip
COMMANDS: tuple[tuple[Callable[..., None], str, str, str], ...] = (
    (repack, _MAKE, "Turn an export into a folder that ONNX Runtime GenAI loads.", examples(
        f"repack {_HUB} out/",
        f"repack {_HUB} out/ --preset fast --precision q4",
        f"repack {_HUB} out/ --modalities text,image,audio",
        f"repack {_HUB} out/ --dry-run",
    )),
    (strip, _MAKE, "Take the two graphs for text out of an export.", examples(
        f"strip {_HUB} out/",
        f"strip {_HUB} out/ --precision q4f16 --push-to you/gemma-4-text",
    )),
    (vocabulary, _MAKE, "Propose the tokens that stay.", examples(
        f"vocabulary {_HUB} --corpus texts.txt -o kept.txt",
        f"vocabulary {_HUB} --corpus texts.txt --keep-scripts latin --size 65536 -o kept.txt",
        f"repack {_HUB} out/ --vocabulary kept.txt --corpus texts.txt",
    )),
    (apply, _MAKE, "Apply passes to any ONNX file.", examples(
        "apply fold-logits-to-keep in.onnx out.onnx",
        "apply 'rename-io,fold-logits-to-keep{keep=all}' in.onnx out.onnx",
        "passes",
    )),
    (generate, _USE, "Chat with a folder, or ask it once.", examples(
        "generate out/",
        'generate out/ "Why is the sky blue?"',
        "generate out/ - --system 'Summarise.' < text.txt",
        "generate out/ 'What is this?' --image photo.jpg",
        "generate out/ --tools tools.json",
    )),
    (validate, _USE, "Prove a folder: structure, numbers, runtime.", examples(
        "validate out/",
        f"validate out/ --against {_HUB} --quick",
        "validate out/ --threshold kl=0.01 --prompts mine.txt",
        "validate out/ --save-golden recorded.safetensors",
    )),
    (bench, _USE, "Measure speed and memory.", examples(
        "bench out/",
        f"bench out/ --against {_HUB} --contexts 128,2048",
        "bench out/ --profile",
    )),
    (inspect, _LOOK, "Show interface, layers, KV caches, bytes.", examples(
        f"inspect {_HUB}",
        "inspect out/model.onnx",
        "inspect out/ --ep cuda",
    )),
    (passes, _LOOK, "List the passes and their options.", examples("passes", "passes --json")),
    (diff, _CHANGES, "Report what differs between two models.", examples(
        "diff before.onnx after.onnx",
        "diff owner/name@v1 owner/name@v2",
        "diff old/ new/ --policy numerics",
        "diff old/ new/ --output report.html --output report.md",
    )),
    (review, _CHANGES, "Compare the models of two commits.", examples(
        "review main",
        "review main HEAD --policy breaking",
        "review main HEAD --output report.md --output report.svg",
    )),
    (comment, _CHANGES, "Put a report on a pull request.", examples("comment OWNER/REPO#7 report.md")),
    (git_setup, _CHANGES, "Let git diff show what changed in .onnx files.", examples(
        "git-setup", "git-setup --global", "git-setup --unset",
    )),
    (doctor, _HERE, "Show what is installed, and what is wrong.", examples("doctor", "doctor --json")),
)  # fmt: skip
"""Each command, what it is for, its line among the others, and how it is used."""
for _command, _panel, _line, _examples in COMMANDS:
    app.command(cls=Command, rich_help_panel=_panel, short_help=_line, epilog=_examples)(_with_quiet(_command))
app.command(hidden=True)(git_textconv)
app.command(hidden=True)(git_diff)


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"gemma4-surgery {VERSION}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. Every way out that is not a result is exit code 2, because 1 means that a gate failed;
    a signal is 128 and its number, after what was staged is gone.
    """
    from surgery.files.atomic import unwind_when_told_to_stop

    unwind_when_told_to_stop()
    guard_runners_log()
    try:
        code = app(standalone_mode=False)
        raise SystemExit(code if isinstance(code, int) else 0)
    except SystemExit as stop:
        if isinstance(stop.code, int) and stop.code > 128:
            notes = getattr(stop, "__notes__", None) or ["nothing was written"]
            sys.stderr.write(f"\nstopped: {'; '.join(printable(note) for note in notes)}\n")
            _leave(stop.code)
        raise
    except SurgeryError as error:
        _complain(error)
        _leave(2)
    except GateFailed as failed:
        from surgery.commands.rendering import show_report

        show_report(data(), failed.report)
        sys.stderr.write("error: a gate failed, so the folder was not written; --no-validate writes it unproven\n")
        _leave(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(2)
    except Exception as error:
        if not _tell_usage(error):
            _complain(unforeseen(error))
        _leave(2)


def _tell_usage(error: Any) -> bool:
    """Say what is wrong with the words of a command line, if that is what the error is about. The class of such errors
    is click's, which typer may have a copy of."""
    if not hasattr(error, "format_message"):
        return False
    if len(sys.argv) > 1:  # without words, it is the help
        error.message = printable(error.message)
    told = io.StringIO()
    error.show(told)
    sys.stderr.write("".join(f"{printable(line)}\n" for line in told.getvalue().splitlines()))
    return True


def _complain(error: SurgeryError) -> None:
    sys.stderr.write(f"error: {error}\n")
    if error.hint:
        sys.stderr.write(f"hint: {error.hint}\n")


def _leave(code: int) -> NoReturn:
    """End at once: downloads that are under way in other threads would keep a normal exit waiting."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
