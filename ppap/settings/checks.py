"""What the dataclasses of settings refuse."""

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
