"""What a chat says of a folder whose tokenizer or template is damaged: the runtime's words, and no defect of ours."""

from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
from places import TINY

import surgery
from surgery.errors import SurgeryError
from surgery.runtime.genai import template_of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("damaged") / "out"
    surgery.repack(TINY, out, surgery.RepackOptions(precision="q4", validate=False))
    return out


def _a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("tokenizer.json", _a_folder, "og.Tokenizer"),
        ("tokenizer.json", lambda path: path.write_text("[1"), "og.Tokenizer"),
        ("tokenizer_config.json", lambda path: path.write_text("words"), "og.Tokenizer"),
    ],
)
def test_a_damaged_side_file_is_told(
    name: str, damage: Callable[[Path], object], words: str, made: Path, tmp_path: Path
) -> None:
    folder = Path(copytree(made, tmp_path / "folder"))
    damage(folder / name)
    with pytest.raises(SurgeryError, match=words):
        "".join(surgery.generate(folder, "hello", new_tokens=2))


def test_a_template_that_is_not_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ bos_token }}\xff")
    with pytest.raises(SurgeryError, match=r"chat_template.jinja is not UTF-8: invalid start byte at byte 15"):
        template_of(tmp_path)
