"""One process at a time writes a folder of results: a run, a set of seeds, a study, a folder of masks.

The operating system holds the lock, so that it ends with its process however that ends; a file that a killed
process left behind means nothing.
"""

import errno
import importlib
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ppap.errors import DataError, UsageError
from ppap.stopping import check

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"
_AGAIN = 0.5  # seconds between two looks at a lock that is waited for
_HELD: set["FolderLock"] = set()
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # the last two are Windows' words
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some network file systems


class FolderLock:
    """The right to write a folder, from :meth:`take` to :meth:`release`."""

    def __init__(self, folder: Path, option: str, name: str = NAME) -> None:
        """Find its place.

        Args:
            folder: it exists.
            option: how the command line names what is locked, such as ``--resume runs/a``.
            name: of the file; another one than the default locks a part of what the folder holds.
        """
        self.path, self.option = folder / name, option
        self.file: IO[bytes] | None = None

    def take(self) -> "FolderLock":
        """Take it at once, or not at all.

        Raises:
            UsageError: another process, or another part of this one, has it.
            DataError: the folder cannot be written, or its file system fails.
        """
        while True:
            try:
                file, made = self._open()
                if self._try(file, made):
                    return self
            except OSError as error:
                reason = error.strerror or error
                raise DataError(f"cannot write {self.path.parent} ({reason}); give another folder") from None

    def wait(self, said: str) -> "FolderLock":
        """Take it as soon as it is free; `said` is printed once where that is not at once.

        Raises:
            DataError: see :meth:`take`.
        """
        waiting = False
        while True:
            try:
                return self.take()
            except UsageError:
                if not waiting:
                    print(said, flush=True)
                waiting = True
            check()
            time.sleep(_AGAIN)

    def _open(self) -> tuple[IO[bytes], bool]:
        """The open file, and whether it was not there before."""
        # Without a buffer: closing one in a forked process could wait for a thread that is not there.
        try:
            return self.path.open("xb", buffering=0), True
        except FileExistsError:
            return self.path.open("ab", buffering=0), False

    def _try(self, file: IO[bytes], made: bool) -> bool:
        """Lock the open file and keep it; False where it is no longer the folder's.

        Raises:
            UsageError: it is taken.
            OSError: it cannot be locked.
        """
        try:
            _lock(file)
            if self._is_current(file):
                self.file = file
                _HELD.add(self)
                return True
        except OSError as error:
            if error.errno in _TAKEN:
                raise UsageError(
                    f"another process works on {self.option}; wait for it, or give another folder"
                ) from None
            if made:
                file.close()  # Windows removes no open file
                with suppress(OSError):
                    self.path.unlink()
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(f"{self.path.parent}: this file system has no locks", stacklevel=3)
            return True
        finally:
            if self.file is not file:
                file.close()
        return False  # who had it removed the file between the two steps

    def _is_current(self, file: IO[bytes]) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let others have it; without effect if it was not taken."""
        if self.file is None:
            return
        file, self.file = self.file, None
        _HELD.discard(self)
        try:
            # Nothing that goes wrong here is worth more than the error that may be under way: a file that is
            # left means nothing.
            with suppress(OSError):
                # Where someone removed our file, the one that is there now may be another's.
                if self._is_current(file):
                    if fcntl is None:  # Windows removes no open file
                        file.close()
                    self.path.unlink()
            with suppress(OSError):
                if fcntl is not None:
                    # Closing alone would not do while a forked process has the file open too.
                    fcntl.flock(file, fcntl.LOCK_UN)
        finally:
            file.close()

    def forget(self) -> None:
        """In a forked process: nothing is held here, and the parent keeps what it has."""
        file, self.file = self.file, None
        if file is not None:
            file.close()


@contextmanager
def alone(folder: Path, option: str) -> Iterator[None]:
    """Hold an existing folder; see :class:`FolderLock`."""
    lock = FolderLock(folder, option).take()
    try:
        yield
    finally:
        lock.release()


def _lock(file: IO[bytes]) -> None:
    """Lock an open file without waiting.

    Raises:
        OSError: it is locked already, or cannot be.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        importlib.import_module("msvcrt").locking(file.fileno(), 2, 1)  # 2 = LK_NBLCK: fail at once


def _forget() -> None:
    """In a forked process: its copies would keep the parent's locks after the parent's death."""
    for lock in _HELD:
        lock.forget()
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
