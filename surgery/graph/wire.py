"""What an ONNX file may hold: looked at before protobuf reads it.

protobuf makes 160 bytes of memory of two bytes of a file, hands out names of any length, and text that is none. What is
refused here, in a sentence, nothing behind it need expect.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from surgery.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from google.protobuf.descriptor import Descriptor

MOST_ENTRIES = 1_000_000
"""Nodes, operands, attributes, dimensions and all else that one file lists: 20 times what the decoder of E2B has."""
LONGEST_NAME = 4096
"""Bytes of a name: ten times what exporters write."""
HIGHEST_RANK = 64
"""Dimensions of one tensor, as in numpy."""
_TEXTS = ("doc_string", "value")
"""Fields that hold text of any length, not a name: documentation, and what a metadata entry says."""
_LONGEST_VARINT = 63
"""Bits before the last byte of a number."""

_SOUND: set[bytes] = set()
"""SHA-256 of what was walked to its end: a job opens the same graphs several times, and a digest takes a hundredth."""

Fields = dict[int, Any]
"""Number of a field -> the fields of the message that it holds, or the name of the field where that is text."""


def check_wire(data: bytes, path: Path) -> None:
    """Walk a serialized ModelProto, once in a process. Raises ModelError for lists and names that no export has, and text
    that is none.

    Bytes that protobuf will not parse are no concern of it, unless it cannot tell what follows: DecodeError.
    """
    digest = hashlib.sha256(data).digest()
    if digest not in _SOUND:
        _walk(data, path)
        _SOUND.add(digest)


def _walk(data: bytes, path: Path) -> None:
    from google.protobuf.message import DecodeError

    shape, entries, pending = _shape_fields(), 0, [(0, len(data), _model_fields())]
    try:
        while pending:
            at, end, fields = pending.pop()
            before = entries
            while at < end:
                entries += 1
                if entries > MOST_ENTRIES:
                    raise ModelError(f"{path} lists more than {MOST_ENTRIES:,} nodes, names, attributes and dimensions")
                tag, at = (data[at], at + 1) if data[at] < 128 else _number(data, at)
                kind = tag & 7
                if kind == 2:
                    size, at = (data[at], at + 1) if data[at] < 128 else _number(data, at)
                    held = fields.get(tag >> 3)
                    if isinstance(held, dict):
                        pending.append((at, at + size, held))
                    elif held is not None:
                        _check_text(data[at : at + size], held, path)
                    at += size
                elif kind == 0:
                    _, at = _number(data, at)
                elif kind in (1, 5):
                    at += 8 if kind == 1 else 4
                else:
                    raise DecodeError(f"a field of wire type {kind}")
            if fields is shape:
                check_rank("a value", entries - before, path)
    except IndexError:
        return


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A number, seven bits a byte, and where it ends. Raises IndexError where it does not."""
    value, shift = data[at], 0
    while value >> shift > 127:
        at, shift = at + 1, shift + 7
        if shift > _LONGEST_VARINT:
            raise IndexError
        value += (data[at] - 1) << shift  # the bit that said that more follows is taken back
    return value, at + 1


def check_rank(what: str, rank: int, path: Path) -> None:
    """Raises ModelError for more dimensions than any code takes."""
    if rank > HIGHEST_RANK:
        raise ModelError(f"{path}: {what} has {rank:,} dimensions; at most {HIGHEST_RANK} are expected")


def _check_text(data: bytes, field: str, path: Path) -> None:
    if len(data) > LONGEST_NAME and field not in _TEXTS:
        raise ModelError(
            f"{path} has a name of {len(data):,} bytes, {data[:40]!r}...; at most {LONGEST_NAME:,} are read"
        )
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        raise ModelError(
            f"{path} is damaged: the {'text' if field in _TEXTS else 'name'} {data!r} is not UTF-8"
        ) from None


def _model_fields() -> Fields:
    from onnx import ModelProto

    return _fields(ModelProto.DESCRIPTOR)


def _shape_fields() -> Fields:
    from onnx import TensorShapeProto

    return _fields(TensorShapeProto.DESCRIPTOR)


_KNOWN: dict[str, Fields] = {}


def _fields(message: Descriptor) -> Fields:
    """Made once of each message: graphs and nodes hold each other."""
    if message.full_name not in _KNOWN:
        found = _KNOWN[message.full_name] = {}
        for field in message.fields:
            if field.type == field.TYPE_MESSAGE:
                found[field.number] = _fields(field.message_type)
            elif field.type == field.TYPE_STRING:
                found[field.number] = field.name
    return _KNOWN[message.full_name]
