"""A picture and a sound to prove a folder with: real files, made here, of no meaning and with nothing flat in them."""

from __future__ import annotations

import io
import struct
import wave
import zlib

import numpy as np

RATE = 16_000
"""Samples a second of a sound."""


def sample_picture(width: int, height: int, tint: int = 0) -> bytes:
    """A PNG, RGB of 8 bits: a ramp across, a ramp down, and stripes that `tint` moves."""
    down, across = np.mgrid[0:height, 0:width]
    red, green = across * 255 // max(width - 1, 1), down * 255 // max(height - 1, 1)
    blue = (across + down + tint) * 3 % 256
    pixels = np.stack([red, green, blue], axis=-1).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # each row says first that no filter was used
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def sample_sound(seconds: float) -> bytes:
    """A WAV, one channel of 16 bits: a tone that rises from 300 Hz."""
    time = np.arange(int(seconds * RATE)) / RATE
    samples = (np.sin(2 * np.pi * (300 + 200 * time) * time) * 20_000).astype("<i2")
    written = io.BytesIO()
    with wave.open(written, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(RATE)
        writer.writeframes(samples.tobytes())
    return written.getvalue()
