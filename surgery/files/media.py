"""Whether a file is a picture or a sound that onnxruntime-genai reads, told by its first bytes and its header.

Its image library ends the process on a file that is neither PNG nor JPEG, and on a header that is damaged.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from surgery.errors import RequestError
from surgery.files.safe_reading import read_regular

_MOST = 256 * 2**20
"""Bytes of a file: a wave file of half an hour, and of 30 seconds the model hears."""
_SIDE = 65_535
"""Pixels that a JPEG can have in a row or a column; of a larger PNG, the copy in memory alone is gigabytes."""
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""Markers of a JPEG that begin a frame: these tell its size."""
_WAVES = (1, 3, 0xFFFE)
"""Forms of samples in a wave file: whole numbers, floats, and the header that says so elsewhere."""


def check_image(path: Path) -> None:
    """Raise RequestError for what is no PNG or JPEG with a size."""
    data = _bytes(path, "a PNG or a JPEG picture")
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        sides = _png_sides(data)
    elif data.startswith(b"\xff\xd8\xff"):
        sides = _jpeg_sides(data)
    else:
        raise RequestError(f"{path} is no PNG or JPEG picture: it begins with {_kind(data)}")
    if sides is None:
        raise RequestError(f"{path} is damaged: its header tells no size of a picture")
    if not all(0 < side <= _SIDE for side in sides):
        raise RequestError(f"{path} is {sides[0]:,} x {sides[1]:,} pixels; 1 to {_SIDE:,} each way are expected")


def check_sound(path: Path) -> None:
    """Raise RequestError for what is no WAV, FLAC or MP3 with samples."""
    data = _bytes(path, "a WAV, FLAC or MP3 sound")
    if data.startswith(b"RIFF") and data[8:12] == b"WAVE":
        fault = _wave_fault(data)
    elif data.startswith(b"fLaC"):
        rate = int.from_bytes(data[18:21], "big") >> 4
        fault = "" if len(data) > 42 and data[4] & 0x7F == 0 and rate else "its header tells no sampling rate"
    elif data.startswith(b"ID3") or _is_mp3_frame(data):
        fault = "" if _is_mp3_frame(_behind_tag(data)) else "no frame of sound stands behind its tag"
    else:
        raise RequestError(f"{path} is no WAV, FLAC or MP3 sound: it begins with {_kind(data)}")
    if fault:
        raise RequestError(f"{path} is damaged: {fault}")


def _bytes(path: Path, wanted: str) -> bytes:
    try:
        data = read_regular(path, _MOST)
    except FileNotFoundError:
        raise RequestError(f"{path} does not exist") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    if not data:
        raise RequestError(f"{path} is empty; {wanted} is expected")
    return data


def _kind(data: bytes) -> str:
    """What a file may be, by its first bytes."""
    known = {b"RIFF": "RIFF, as a sound or a WebP picture does", b"fLaC": "fLaC, as a sound does",
             b"ID3": "ID3, as a sound does", b"\x89PNG": "PNG, as a picture does",
             b"\xff\xd8\xff": "a JPEG picture's bytes", b"GIF8": "GIF, which the runtime does not read",
             b"BM": "BM, as a BMP picture does, which the runtime does not read",
             b"OggS": "OggS, which the runtime does not read"}  # fmt: skip
    return next((words for start, words in known.items() if data.startswith(start)), f"{data[:8].hex(' ')} (hex)")


def _png_sides(data: bytes) -> tuple[int, int] | None:
    head = data[12:29]
    if len(data) < 33 or head[:4] != b"IHDR" or zlib.crc32(head) != int.from_bytes(data[29:33], "big"):
        return None
    width, height = struct.unpack(">II", head[4:12])
    return width, height


def _jpeg_sides(data: bytes) -> tuple[int, int] | None:
    """Walks from marker to marker up to the frame's."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in _FRAMES:
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        if marker == 0xFF:  # a fill byte
            at += 1
        elif length < 2:
            return None
        else:
            at += 2 + length
    return None


def _wave_fault(data: bytes) -> str:
    at, form = 12, None
    while at + 8 <= len(data):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        body = data[at + 8 : at + 8 + size]
        if name == b"fmt " and len(body) >= 16:
            kind, channels, rate = struct.unpack("<HHI", body[:8])
            if kind not in _WAVES or not channels or not rate:
                return f"its header tells form {kind}, {channels} channels and {rate} samples a second"
            form = body
        elif name == b"data":
            return "" if form and body else "it has no samples, or no header in front of them"
        at += 8 + size + size % 2
    return "it has no samples"


def _behind_tag(data: bytes) -> bytes:
    """What follows an ID3 tag, whose length is in 7 bits a byte."""
    if not data.startswith(b"ID3") or len(data) < 10:
        return data
    size = 0
    for byte in data[6:10]:
        size = size << 7 | byte & 0x7F
    return data[10 + size :].lstrip(b"\0")


def _is_mp3_frame(data: bytes) -> bool:
    """A frame's first bytes: 11 bits of 1, and no value that is reserved."""
    return (
        len(data) >= 4 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0 and data[1] & 0x18 != 0x08
        and data[1] & 0x06 != 0 and data[2] & 0xF0 != 0xF0 and data[2] & 0x0C != 0x0C
    )  # fmt: skip
