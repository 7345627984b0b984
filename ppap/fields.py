"""What the dataclasses of settings share: names of methods, and what is required or refused."""

from typing import Any, Literal

import tyro

REQUIRED = tyro.conf.arg(help_behavior_hint="(required)")
"""Help shows so what has an empty default only for the command to refuse it with a message of its own."""

Method = Literal["ppap", "frozen", "fixed", "tps", "ans", "random", "oracle", "hp", "stego"]


def check_field(ok: bool, name: str, value: Any, remedy: str) -> None:
    """Refuse an impossible value with a ValueError that names option, value and remedy."""
    if not ok:
        raise ValueError(f"--{name} is {value!r}; {remedy}")
