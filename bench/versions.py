"""Versions that are tested, as ``pyproject.toml`` states them: ``python -m bench.versions triton``.

``python -m bench.versions oldest`` and ``newest`` print what pip lays over the environment to test those.
"""

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # before Python 3.11; pytest brings it
    import tomli as tomllib

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def settings() -> dict:
    """The whole of pyproject.toml."""
    return tomllib.loads(PROJECT.read_text())


def tested(package: str) -> list[str]:
    """Versions of ``python``, ``torch`` or ``triton`` that the tests run with, oldest first."""
    return settings()["tool"]["ppap"]["versions"][package]["tested"]


def overlay(end: str) -> list[str]:
    """Requirements of the ``oldest`` or the ``newest`` versions, for pip without dependencies."""
    others = settings()["tool"]["ppap"]["overlay"][end]
    if end == "oldest":
        return [f"torch=={tested('torch')[0]}", f"triton=={tested('triton')[0]}", *others]
    # torch is what pip chose for the environment.
    return [f"triton=={tested('triton')[-1]}", *others]


if __name__ == "__main__":
    print(*(overlay(sys.argv[1]) if sys.argv[1] in ("oldest", "newest") else tested(sys.argv[1])))
