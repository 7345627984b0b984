"""Values that come from files: JSON of any kind parsed, and compared with the types that they stand for."""

import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

_LARGEST = 2**64
"""Whole numbers from here on are no setting: no machine counts so far."""


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is none, or is nested deeper than anything that is written here.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that a hint says; lists stand for tuples, whole numbers for floats."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in options)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in options)
    if hint is float:
        return isinstance(value, float) or (fits(value, int) and abs(value) < _LARGEST)
    if hint is int:
        return type(value) is int and abs(value) < _LARGEST
    if origin in (tuple, list):
        return isinstance(value, list | tuple) and _all_fit(value, options, origin)
    if origin is dict:
        return isinstance(value, dict) and all(fits(v, options[1]) for v in value.values())
    return isinstance(value, types.NoneType if hint is None else hint)


def _all_fit(values: Any, options: tuple[Any, ...], origin: Any) -> bool:
    if origin is list or options[-1] is Ellipsis:
        return all(fits(value, options[0]) for value in values)
    return len(values) == len(options) and all(map(fits, values, options))


def said(hint: Any) -> str:
    """A type in words, for messages."""
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def misfit(values: Mapping[str, Any], hints: Mapping[str, Any]) -> str | None:
    """What to say of the first value that is not of its type; None where all are, or are missing."""
    for name, hint in hints.items():
        if name in values and not fits(values[name], hint):
            shown = repr(values[name])
            shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
            return f"{name} is {shown}; wanted {said(hint)}"
    return None
