"""Runs that other people shared on the hub, by name: ``hf-hub:OWNER/NAME``."""

from pathlib import Path

from ppap.errors import DataError
from ppap.nets.hub import Repository, repository_name

SCHEME = "hf-hub:"
_FILES = ("manifest.json", "config.json", "model.safetensors")


def is_shared(path: str | Path) -> bool:
    """Whether this names a run on the hub."""
    return str(path).startswith(SCHEME)


def local_run(path: str | Path) -> str | Path:
    """A run or checkpoint on this disk: `path` itself, or where the files of ``hf-hub:OWNER/NAME`` now lie.

    Raises:
        UsageError: the name is none.
        DataError: no such repository, none that ``ppap push`` made, or it cannot be had from here.
    """
    if not is_shared(path):
        return path
    name = repository_name(str(path))
    assert name is not None  # with a scheme it is a name, or refused
    repository = Repository(*name, what="run")
    found = [repository.get(file) for file in _FILES]
    for file, place in zip(_FILES, found, strict=True):
        if place is None:
            why = f" ({repository.reason}, and it is not in the hub's cache)" if repository.reason else ""
            raise DataError(f"{path} has no {file}{why}; give a repository that ppap push made")
    places = {place.parent for place in found if place is not None}
    if len(places) > 1:
        raise DataError(f"{path} was changed while it was fetched; give the command again")
    return places.pop()
