"""Pictures and sounds are known by their first bytes and their headers, before a native library reads them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from surgery.errors import RequestError
from surgery.files.media import check_image, check_sound
from surgery.verify.media_samples import sample_picture, sample_sound

PNG, WAV = sample_picture(8, 6), sample_sound(0.1)
JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(9) + b"\xff\xff\xc0\x00\x11\x08\x00\x06\x00\x08" + bytes(12)
FLAC = b"fLaC\x80\x00\x00\x22" + bytes(10) + (44_100 << 4).to_bytes(3, "big") + bytes(30)
FRAME = b"\xff\xfb\x90\x00" + bytes(100)
MP3 = b"ID3\x04\x00\x00\x00\x00\x00\x05" + bytes(5) + FRAME


def wave(form: bytes, data: bytes = b"data\x04\x00\x00\x00abcd") -> bytes:
    return b"RIFF\x24\x00\x00\x00WAVE" + form + data


@pytest.mark.parametrize("check, data", [
    (check_image, PNG), (check_image, JPEG), (check_sound, WAV), (check_sound, FLAC), (check_sound, MP3), (check_sound, FRAME),
])  # fmt: skip
def test_what_the_runtime_reads_passes(check: Callable[[Path], None], data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    check(tmp_path / "file")


@pytest.mark.parametrize("check, data, sentence", [
    (check_image, WAV, "no PNG or JPEG picture: it begins with RIFF"),
    (check_image, b"GIF89a", "GIF, which the runtime does not read"),
    (check_image, b"", "is empty"),
    (check_image, b"text", "74 65 78 74"),
    (check_image, PNG[:20], "is damaged: its header tells no size"),
    (check_image, PNG[:20] + b"\x01" + PNG[21:], "is damaged"),
    (check_image, sample_picture(8, 0), "8 x 0 pixels"),
    (check_image, JPEG[:20], "is damaged"),
    (check_image, b"\xff\xd8\xff\xe0\x00\x00" + bytes(9), "is damaged"),
    (check_sound, PNG, "no WAV, FLAC or MP3 sound: it begins with PNG"),
    (check_sound, b"OggS" + bytes(9), "OggS, which the runtime does not read"),
    (check_sound, WAV[:40], "is damaged: it has no samples"),
    (check_sound, wave(b""), "no header in front"),
    (check_sound, wave(b"fmt \x10\x00\x00\x00" + struct.pack("<HHIIHH", 85, 1, 16_000, 0, 0, 16)), "form 85"),
    (check_sound, wave(b"fmt \x10\x00\x00\x00" + struct.pack("<HHIIHH", 1, 0, 16_000, 0, 0, 16)), "0 channels"),
    (check_sound, FLAC[:18] + bytes(40), "no sampling rate"),
    (check_sound, MP3[:15], "no frame of sound"),
])  # fmt: skip
def test_anything_else_is_a_sentence(check: Callable[[Path], None], data: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(RequestError, match=sentence):
        check(tmp_path / "file")


@pytest.mark.parametrize("check", [check_image, check_sound])
def test_what_is_no_file_is_a_sentence(check: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="does not exist"):
        check(tmp_path / "none")
    with pytest.raises(RequestError, match="cannot be read: Is a directory"):
        check(tmp_path)
