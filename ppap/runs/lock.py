"""One process at a time writes a folder of results: a run, a set of seeds, a study, a folder of masks.

The operating system holds the lock, so that it ends with its process however that ends; a file that a killed
process left behind means nothing.
"""

import errno
import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ppap.errors import DataError, UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"
_HELD: set[IO[str]] = set()
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some network file systems


class FolderLock:
    """The right to write a folder, from :meth:`take` to :meth:`release`."""

    def __init__(self, folder: Path, option: str) -> None:
        """Args: an existing folder; how the command line names it, such as ``--resume runs/a``."""
        self.path, self.option = folder / NAME, option
        self.file: IO[str] | None = None

    def take(self) -> "FolderLock":
        """Take it at once, or not at all.

        Raises:
            UsageError: another process, or another part of this one, has it.
            DataError: the folder cannot be written.
        """
        while True:
            try:
                file = self.path.open("a")
            except OSError as error:
                reason = error.strerror or error
                raise DataError(f"cannot write {self.path.parent} ({reason}); give another folder") from None
            try:
                _lock(file)
            except OSError as error:
                file.close()
                if error.errno in _NO_LOCKS:
                    warnings.warn(f"{self.path.parent}: this file system has no locks", stacklevel=2)
                    return self
                raise UsageError(
                    f"another process works on {self.option}; wait for it, or give another folder"
                ) from None
            if self._is_current(file):
                self.file = file
                _HELD.add(file)
                return self
            file.close()  # who had it removed the file between the two steps

    def _is_current(self, file: IO[str]) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let others have it; without effect if it was not taken."""
        if self.file is None:
            return
        file, self.file = self.file, None
        _HELD.discard(file)
        if fcntl is None:  # Windows removes no open file
            file.close()
        self.path.unlink(missing_ok=True)
        if fcntl is not None:
            # Closing alone would not do while a forked process has the file open too.
            fcntl.flock(file, fcntl.LOCK_UN)
            file.close()


@contextmanager
def alone(folder: Path, option: str) -> Iterator[None]:
    """Hold an existing folder; see :class:`FolderLock`."""
    lock = FolderLock(folder, option).take()
    try:
        yield
    finally:
        lock.release()


def _lock(file: IO[str]) -> None:
    """Lock an open file without waiting.

    Raises:
        OSError: it is locked already, or cannot be.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        importlib.import_module("msvcrt").locking(file.fileno(), 2, 1)  # 2 = LK_NBLCK: fail at once


def _forget() -> None:
    """In a forked process: its copies keep the parent's locks after the parent's death."""
    for file in _HELD:
        os.close(file.fileno())
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
