"""Options and files that several tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

FIXTURES = Path(__file__).parent.parent / "fixtures"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-docs", action="store_true", help="write what the commands print into README.md")
    parser.addoption("--real", metavar="DIR", help="a folder of real .onnx files, searched at every depth")
    parser.addoption("--mutations", type=int, default=400, help="mutated inputs that test_hostile.py tries")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`real_onnx`: each file below --real; one skipped test, which says why, where the option is not given."""
    if "real_onnx" not in metafunc.fixturenames:
        return
    folder = metafunc.config.getoption("--real")
    if folder is None:
        reason = "needs real files: pytest --real DIR"
        metafunc.parametrize("real_onnx", [pytest.param(None, marks=pytest.mark.skip(reason=reason))], ids=["none"])
        return
    files = sorted(Path(folder).rglob("*.onnx"))
    if not files:
        raise pytest.UsageError(f"--real {folder}: no .onnx file is below it")
    metafunc.parametrize("real_onnx", files, ids=[str(file.relative_to(folder)) for file in files])
