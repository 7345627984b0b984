"""Processes for one case each: forked, as Python and torch start in seconds and fork in milliseconds.

The process that forks has one thread, so that none of torch is lost on the way.
"""

import mmap
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ppap.cli import run

HUNG = 999
"""Code of a process that was killed for its time."""
CRASHED = 98
"""Code of a process whose function raised."""


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    """Exit code; negative = the signal that killed it."""
    text: str
    """All that it printed."""
    value: Any = None
    """What its function returned."""

    @property
    def failed(self) -> bool:
        """Whether it hung or ended by an exception that no command should let through."""
        return self.code in (HUNG, CRASHED) or "Traceback (most recent call last)" in self.text


class Child:
    """A forked process that runs a function and keeps what it prints."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._printed = tempfile.TemporaryFile()
        self._value = tempfile.TemporaryFile()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._work(function)

    def _work(self, function: Callable[[], Any]) -> None:
        code = CRASHED
        try:
            for number in (1, 2):
                os.dup2(self._printed.fileno(), number)
            value = function()
            code = value if isinstance(value, int) else 0
            pickle.dump(value, self._value)
            self._value.flush()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def send(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def ended(self) -> bool:
        """Whether it is at its end, which stays to be taken by :meth:`wait`."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self, seconds: float = 60) -> Ended:
        """Its end; killed after so many seconds."""
        until, code = time.monotonic() + seconds, None
        while code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                code = HUNG
            else:
                time.sleep(0.002)
        self._printed.seek(0)
        self._value.seek(0)
        try:
            value = pickle.load(self._value)
        except EOFError:
            value = None
        return Ended(code, self._printed.read().decode(errors="replace"), value)


def call(function: Callable[[], Any], seconds: float = 120) -> Ended:
    """A function in a process of its own."""
    return Child(function).wait(seconds)


def command(main: Callable[[Sequence[str]], Any], *argv: object) -> Callable[[], int]:
    """A command as the shell runs it: its exit code."""
    return lambda: run(main, [str(argument) for argument in argv])


def hooked(owner: Any, name: str, before: Callable[[], Any]) -> None:
    """Let a function or method call `before` first, from now on in this process."""
    real = getattr(owner, name)

    def replaced(*args: Any, **options: Any) -> Any:
        before()
        return real(*args, **options)

    setattr(owner, name, replaced)


class Counter:
    """A number that a forked process counts up and this one reads."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    def add(self) -> None:
        """One more."""
        self._memory[:] = (self.value + 1).to_bytes(8, "little")

    @property
    def value(self) -> int:
        """How many."""
        return int.from_bytes(self._memory[:], "little")


def killed_at(function: Callable[[], Any], counter: Counter, count: int, delay: float) -> Ended:
    """A process killed by SIGKILL `delay` seconds after `counter` has grown by `count`, if it lives."""
    target, child = counter.value + count, Child(function)
    until = time.monotonic() + 120
    while counter.value < target and not child.ended() and time.monotonic() < until:
        time.sleep(0.0005)
    time.sleep(delay)
    if not child.ended():
        child.send(signal.SIGKILL)
    return child.wait()


def written_outside(before: dict[Path, tuple[int, int]], folder: Path) -> list[str]:
    """Files below a folder that are not as :func:`listing` found them before."""
    now = listing(folder)
    return sorted(str(path) for path in {*before, *now} if before.get(path) != now.get(path))


def listing(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every file below a folder."""
    stats = ((path, path.lstat()) for path in folder.rglob("*") if not path.is_dir())
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats}
