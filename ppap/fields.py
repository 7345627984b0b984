"""What the dataclasses of settings share: names of methods, and how an impossible value is refused."""

from typing import Any, Literal

Method = Literal["ppap", "frozen", "fixed", "tps", "ans", "random", "oracle", "hp", "stego"]


def check_field(ok: bool, name: str, value: Any, remedy: str) -> None:
    """Refuse an impossible value with a ValueError that names option, value and remedy."""
    if not ok:
        raise ValueError(f"--{name} is {value!r}; {remedy}")
