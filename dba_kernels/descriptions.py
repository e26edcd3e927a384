"""Reading what a file says of itself: every field there, of its kind and within its range, or it is refused."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
Check = tuple[Callable[[Any], bool], str]
"""Whether a value will do, and in words which would."""

MAX_COUNT = 2**63 - 1


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e300 and math.isfinite(value)


COUNT: Check = is_count, "a count"
NUMBER: Check = is_number, "a finite number"
NOT_NEGATIVE: Check = (lambda value: is_number(value) and value >= 0), "a finite number >= 0"
NUMBER_OR_NONE: Check = (lambda value: value is None or is_number(value)), "a finite number or null"
SHAPE: Check = (
    lambda value: isinstance(value, (list, tuple)) and all(map(is_count, value)) and math.prod(value) <= MAX_COUNT,
    "a shape",
)
TEXTS: Check = (lambda value: isinstance(value, (list, tuple)) and all(isinstance(x, str) for x in value), "texts")
SHA256: Check = (
    lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
    "a SHA-256 in hexadecimal",
)


def one_of(known: Any) -> Check:
    return (lambda value: isinstance(value, str) and value in known), f"one of {', '.join(map(repr, known))}"


def within(low: float, high: float) -> Check:
    """A number in [low, high], to the rounding of what was measured."""
    slack = 1e-6 * (high - low)
    return (lambda value: is_number(value) and low - slack <= value <= high + slack), f"a number in [{low:g}, {high:g}]"


def check_fields(what: str, entry: Any, checks: dict[str, Check], optional: Any = ()) -> dict[str, Any]:
    """``entry`` if it is an object with these fields and no others.

    Args:
        what: names the entry in errors.
        optional: fields that may be missing.

    Raises:
        ValueError: naming the field, what was expected and what it holds.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{what}: expected an object, got {_shown(entry)}")
    for name in (name for name in checks if name not in entry and name not in optional):
        raise ValueError(f"{what}: expected a field {name!r}, got none")
    for name in (name for name in entry if name not in checks):
        raise ValueError(f"{what}: expected no field {name!r}; a newer version may know it: install that")
    for name, value in entry.items():
        fits, expected = checks[name]
        if not fits(value):
            raise ValueError(f"{what}: expected {expected} as {name!r}, got {_shown(value)}")
    return entry


def read(kind: type[T], what: str, entry: Any, checks: dict[str, Check]) -> T:
    """A dataclass from the object that ``dataclasses.asdict`` made of it; lists become tuples.

    Raises:
        ValueError: see :func:`check_fields`.
    """
    fields: Any = dataclasses.fields(kind)  # type: ignore[arg-type]
    optional = [field.name for field in fields if field.default is not dataclasses.MISSING]
    known = check_fields(what, entry, checks, optional)
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
