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
    name = repository_name(str(path), str(path))
    assert name is not None  # with a scheme it is a name, or refused
    repository, places = Repository(*name, what="run"), set()
    for file in _FILES:  # the weights last, after what shows that it is a run
        place = repository.get(file)
        if place is None:
            why = f" ({repository.reason}, and it is not in the hub's cache)" if repository.reason else ""
            raise DataError(f"{path} has no {file}{why}; give a repository that ppap push made")
        if file == _FILES[0] and "state.pt" in place.read_text(encoding="utf-8", errors="replace"):
            raise DataError(f"{path} holds a checkpoint that ppap push did not make; let its owner push it")
        places.add(place.parent)
    if len(places) > 1:
        raise DataError(f"{path} was changed while it was fetched; give the command again")
    return places.pop()
