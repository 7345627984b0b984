"""Errors a user can act on, each with the exit code of its kind.

A message names the value that was wrong and what to do about it; the command line prints it without a
traceback.
"""

import difflib
import errno
from collections.abc import Collection


class PpapError(Exception):
    """Base of every error that the command line turns into one short message and an exit code."""

    exit_code = 1


class UsageError(PpapError):
    """A wrong argument, preset, field or combination of settings."""

    exit_code = 2


class DataError(PpapError):
    """A missing, unreadable or inconsistent input file: images, labels, weights or checkpoints."""

    exit_code = 3


class NumberError(PpapError):
    """Non-finite weights, features, loss or gradient."""

    exit_code = 4


class Stopped(PpapError):
    """The run was interrupted and its state has been saved."""

    exit_code = 75


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the machine or of a GPU, is exhausted."""
    text = str(error)
    words = ("out of memory", "can't allocate memory", "Cannot allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    kinds = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return kinds or (isinstance(error, RuntimeError | OSError) and any(word in text for word in words))


def disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or what a user may take of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def unknown_name(kind: str, name: str, valid: Collection[str]) -> UsageError:
    """The error for a `name` that no `kind` (preset, command, ...) has; it tells the nearest of `valid`."""
    near = difflib.get_close_matches(name, valid, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(f"no {kind} is called {name!r}; {hint}valid: {', '.join(valid)}")
