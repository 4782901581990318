"""What JSON of a stranger's may hold, and how values are taken out of it: by key, kind and range, or as a dataclass."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from surgery.errors import SurgeryError

MOST_DIGITS = 40
"""Of a number: model_max_length has 31 in the wild, and a float can still hold it."""


def whole_number(text: str) -> int:
    """For json.loads, as `parse_int`. Raises ValueError for a number that nothing could use."""
    if len(text) > MOST_DIGITS:
        raise ValueError(f"it holds the number {text[:20]}..., which has {len(text):,} digits")
    return int(text)


def finite_number(text: str) -> float:
    """For json.loads, as `parse_float`. Raises ValueError where a float would be infinite."""
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"it holds the number {text[:40]}, which is larger than any float")
    return value


def refuse_constant(name: str) -> None:
    """For json.loads, as `parse_constant`."""
    raise ValueError(f"it holds {name}, which JSON does not have")


@dataclass(frozen=True)
class JsonValues:
    """The values of an object. `where` is how errors name it, `error` is what they are."""

    values: Mapping[str, Any]
    where: str
    error: type[SurgeryError]

    def whole(self, key: str, *, default: int | None = None, least: int = 1, most: int = 2**31 - 1) -> int:
        """A whole number; without a default, it must be there."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._wrong(key, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, *, default: float | None = None, least: float, most: float) -> float:
        """A finite number; without a default, it must be there."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise self._wrong(key, f"a number from {least:g} to {most:g}")
        return float(value)

    def flag(self, key: str, *, default: bool | None = None) -> bool:
        """A truth value; without a default, it must be there."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def _value(self, key: str, default: Any) -> Any:
        """What is there, the default where nothing or null is."""
        value = self.values.get(key)
        if value is None and default is None:
            raise self.error(f"{self.where} has no {key}")
        return default if value is None else value

    def _wrong(self, key: str, wanted: str) -> SurgeryError:
        return self.error(f"{self.where}: {key} is {repr(self.values.get(key))[:40]}; {wanted} is expected")


_PLAIN: dict[Any, Any] = {NoneType: NoneType, str: str, int: int, bool: bool, float: int | float}


def typed(kind: Any, value: Any) -> Any:
    """A value of JSON as the type that it was: frozen dataclasses, tuples and mappings of plain values.

    What an object holds beside the fields of its dataclass is left out. Raises TypeError for any other value, and
    ValueError for a tuple of another length.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for one in inner:
            with contextlib.suppress(TypeError):
                return typed(one, value)
    elif kind is Any or kind is value is None or (origin is Literal and value in inner):
        return value
    elif origin is tuple and isinstance(value, list):
        kinds = inner[:1] * len(value) if inner[1:] == (...,) else inner
        return tuple(typed(one, each) for one, each in zip(kinds, value, strict=True))
    elif origin in (Mapping, dict) and isinstance(value, dict):
        return {key: typed(inner[1], each) for key, each in value.items()}
    elif dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        hints = _hints(kind)
        return kind(**{name: typed(hints[name], value[name]) for name in hints if name in value})
    elif kind in _PLAIN and isinstance(value, _PLAIN[kind]):
        return value
    raise TypeError(f"{value!r} is no {kind}")


_hints = functools.cache(get_type_hints)
