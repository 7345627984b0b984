"""Signals that ask for an end, heard between two steps, images or items of whatever is under way.

Ctrl-C, SIGTERM, SIGHUP (a terminal that closes) and SIGUSR1 (a scheduler's warning) are the same request; a
second one ends at once. A loop that can save hears it in a :class:`StopRequest`; all others go through
:func:`each`, which ends them by :class:`Interrupted` while a command listens.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

from ppap.errors import Stopped

Item = TypeVar("Item")

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)


_same_for = 0.0


def same_request(seconds: float) -> None:
    """Signals within that time are one request: where a terminal and a launcher both send it."""
    global _same_for
    _same_for = seconds


class Interrupted(Stopped):
    """A command ended between two items; the same command goes on, or starts anew where nothing was kept."""


class _Heard:
    """Handlers of the signals, for the time of a ``with`` block."""

    said = ""

    def __init__(self) -> None:
        self.asked, self._when = False, 0.0

    def __enter__(self) -> Any:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # nohup: whoever started this one does not want it to hear of the terminal's end.
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if time.monotonic() - self._when < _same_for:
                return
            raise KeyboardInterrupt
        self.asked, self._when = True, time.monotonic()
        print(f"\n{self.said}; press Ctrl-C again to end at once", file=sys.stderr, flush=True)


class StopRequest(_Heard):
    """A request that the loop inside honours between steps; one that came just before counts."""

    said = "stopping after this step and saving"

    def __enter__(self) -> "StopRequest":
        super().__enter__()
        for outer in _LISTENING:  # what came before the loop began is the loop's to hear
            self.asked, outer.asked, self._when = self.asked or outer.asked, False, outer._when
        return self


class Listening(_Heard):
    """A command listens: its loops of :func:`each` end when asked."""

    said = "stopping at the next image or item"

    def __enter__(self) -> "Listening":
        super().__enter__()
        _LISTENING.append(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        _LISTENING.remove(self)
        super().__exit__(*exc_info)


_LISTENING: list[Listening] = []


def check() -> None:
    """End here if a command was asked to.

    Raises:
        Interrupted: it was.
    """
    if any(outer.asked for outer in _LISTENING):
        raise Interrupted(
            "stopped before the end; give the same command again: what is finished on disk is kept"
        )


def each(items: Iterable[Item]) -> Iterator[Item]:
    """The items, until a command is asked to end: what was done with the last one is done in full.

    Raises:
        Interrupted: between two of them.
    """
    for item in items:
        check()
        yield item
    check()


def ignore() -> None:
    """In a process that works for this one: only the main one decides when to stop."""
    for number in SIGNALS:
        if number != signal.SIGTERM:  # by which the main process ends it
            signal.signal(number, signal.SIG_IGN)
