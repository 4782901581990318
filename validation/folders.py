"""The files of every folder that the project writes, by SHA-256: what a change to the code changed in what it makes.

    python -m validation.folders WORK --record before.json     every tiny export x precision x form
    python -m validation.folders WORK --against before.json     the same again; each file that differs, by name

Left out are the files that name versions or measurements: report, model card, manifest. `--sources DIR` holds exports
that were made before, so that two versions of the project read the same ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

FIXTURES = ("tiny-e2b", "tiny-e4b", "tiny-31b")
PRECISIONS = ("fp32", "fp16", "q4", "q4f16", "quantized")
FORMS: dict[str, tuple[str, ...]] = {
    "aliased": ("repack",),
    "unique": ("repack", "--kv-layout", "unique"),
    "fast": ("repack", "--preset", "fast"),
    "genai-0.12": ("repack", "--target", "genai-0.12"),
    "to-fp16": ("repack", "--to-fp16"),
    "media": ("repack", "--modalities", "text,image,audio"),
    "strip": ("strip",),
}
LEFT_OUT = {"report.md", "report.json", "README.md", "manifest.json"}


def digests(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of each file that is compared."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in LEFT_OUT)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def made(source: Path, precision: str, form: str, work: Path) -> dict[str, str] | str:
    """The files of one folder, or the first line of the refusal."""
    from typer.testing import CliRunner

    from surgery.commands.app import app

    target = work / "folder"
    shutil.rmtree(target, ignore_errors=True)
    command, *options = FORMS[form]
    arguments = [command, str(source), str(target), "--precision", precision, "--ep", "cpu", "--no-validate", *options]
    result = CliRunner().invoke(app, arguments)
    return digests(target) if result.exit_code == 0 else f"refused: {result.exception}"


def record(sources: Path, work: Path) -> dict[str, dict[str, str] | str]:
    """`fixture precision form` -> its files. The exports are made below `sources` where they are not there yet."""
    from fixtures import build

    found = {}
    for fixture in FIXTURES:
        if not (sources / fixture).is_dir():
            build(fixture, "all", sources / fixture)
        for precision in PRECISIONS:
            for form in FORMS:
                found[f"{fixture} {precision} {form}"] = made(sources / fixture, precision, form, work)
    return found


def differences(before: dict[str, dict[str, str] | str], after: dict[str, dict[str, str] | str]) -> list[str]:
    """One line for each folder that is not as it was, with the files that differ."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        if not isinstance(old, dict) or not isinstance(new, dict):
            lines.append(
                f"{name}: {old if isinstance(old, str) else 'made'} -> {new if isinstance(new, str) else 'made'}"
            )
            continue
        files = sorted(file for file in old.keys() | new.keys() if old.get(file) != new.get(file))
        lines.append(f"{name}: {', '.join(files)}")
    return lines


def main() -> int:
    """0 where nothing differs or a record was written, 1 where something does."""
    parser = argparse.ArgumentParser(prog="python -m validation.folders", description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--sources", type=Path, help="exports; default: WORK/sources")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--record", type=Path, metavar="FILE")
    chosen.add_argument("--against", type=Path, metavar="FILE")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    found = record(options.sources or options.work / "sources", options.work)
    if options.record is not None:
        options.record.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{len(found)} folders recorded in {options.record}")
        return 0
    lines = differences(json.loads(options.against.read_text()), found)
    for line in lines:
        print(line)
    print(f"{len(found) - len(lines)} of {len(found)} folders are what they were")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
