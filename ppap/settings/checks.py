"""What the dataclasses of settings refuse."""

import math
import re
from typing import Any

_LARGEST_RATE = 1e6  # training diverges far below; 1e38 overflows inside torch's optimisers


def check_field(ok: bool, name: str, value: Any, remedy: str) -> None:
    """Refuse an impossible value with a ValueError that names option, value and remedy."""
    if not ok:
        raise ValueError(f"--{name} is {value!r}; {remedy}")


def check_rate(name: str, value: float, *, zero: bool = False) -> None:
    """Refuse what is no learning rate or, where it may be 0, no weight decay; see :func:`check_field`."""
    ok = 0 < value <= _LARGEST_RATE or (zero and value == 0)
    least = "0 to" if zero else "a positive number up to"
    check_field(ok, name, value, f"give {least} {_LARGEST_RATE:g}")


_CONDITIONS = {
    "none": None,
    "centre": None,
    "position": None,
    "whiten": (0, 1),
    "clip": (0, 1),
    "drop": (1, 4096),
}
"""Kind -> range of its number; None = it has none."""


def parse_condition(text: str, option: str = "model.condition") -> tuple[str, float]:
    """Kind and number (0 where it has none) of ``--model.condition``, but for auto.

    Args:
        text: what was given.
        option: that it was given to.

    Raises:
        ValueError: naming what may stand there.
    """
    kind, colon, number = text.partition(":")
    span = _CONDITIONS.get(kind, ())
    if span is None and not colon:
        return kind, 0.0
    if span and re.fullmatch(r"\d+" if kind == "drop" else r"\d*\.?\d+(e-?\d+)?", number):
        value = float(number)
        if math.isfinite(value) and 0 < value and span[0] <= value <= span[1]:
            return kind, value
    raise ValueError(
        f"--{option} is {text!r}; give none, centre, whiten:P (power, 0 < P <= 1), clip:S (share of "
        "the variance, 0 < S <= 1), drop:K (components, 1 or more), position or auto"
    )
