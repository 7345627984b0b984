"""Older checkpoints of a run: ``checkpoints/step-00000100`` beside ``last`` and ``best``.

Their files are the same ones on the disk as those of ``last`` were (hard links), where the file system has
links: a checkpoint is never written into, only replaced by another folder.
"""

import os
import re
import shutil
from pathlib import Path

from ppap.errors import DataError
from ppap.runs.disk import to_disk

_NAME = re.compile(r"step-(\d+)")


def step_folders(checkpoints: Path) -> list[Path]:
    """The complete ones below a run's folder of checkpoints, oldest first."""
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if (path / "manifest.json").exists()), key=step_of)


def is_kept(path: Path) -> bool:
    """Whether a folder is one of them, by its name."""
    return _NAME.fullmatch(path.name) is not None


def step_of(path: Path) -> int:
    """The step in its name; -1 for other folders."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def keep(folder: Path, step: int, count: int | None = None) -> Path:
    """Keep a complete checkpoint under the number of its step; remove older ones once it is on the disk.

    Args:
        folder: ``checkpoints/last``.
        step: its step.
        count: how many to keep, this one among them; None = all.

    Raises:
        DataError: the disk refuses; all that was there stays.
    """
    place = folder.with_name(f"step-{step:08d}")
    aside = folder.with_name(f".{place.name}.new")
    try:
        for left in folder.parent.glob(".step-*.*"):  # of a kill: .new, not complete; .old, replaced
            shutil.rmtree(left, ignore_errors=True)
        aside.mkdir()
        for file in sorted(folder.iterdir()):
            _link(file, aside / file.name)
        to_disk(aside)
        if place.exists():  # of an earlier way through this step
            old = folder.with_name(f".{place.name}.old")
            os.rename(place, old)
            os.rename(aside, place)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(aside, place)
        to_disk(folder.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        reason = error.strerror or error
        raise DataError(f"cannot write {place}: {reason}; free space or give --train.keep 0") from None
    if count is not None:
        older = [path for path in step_folders(folder.parent) if path != place and step_of(path) < step]
        for path in older[: len(older) - (count - 1)] if len(older) >= count else []:
            shutil.rmtree(path, ignore_errors=True)
    return place


def run_of(path: Path) -> tuple[Path, Path | None]:
    """A run directory, and which of its older checkpoints a path names; None where it names the run."""
    real = path.resolve()
    if _NAME.fullmatch(real.name) and real.parent.name == "checkpoints" and (real / "manifest.json").exists():
        return real.parent.parent, real
    return path, None


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links: what stays is a copy
        shutil.copyfile(source, target)
        to_disk(target)
