"""The one form in which settings refuse an impossible value."""

from typing import Any


def check_field(ok: bool, name: str, value: Any, remedy: str) -> None:
    """Refuse an impossible value with a ValueError that names option, value and remedy."""
    if not ok:
        raise ValueError(f"--{name} is {value!r}; {remedy}")
