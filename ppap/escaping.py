"""Text of others on its way to people: names of files, folders and classes, and what weights say they are.

A name may hold anything: control characters that a terminal obeys, Markdown and HTML that a report would
show as something else. Whatever goes there goes through here.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

# Control characters but for the end of a line and the tabulator; marks that turn the direction of text, by
# which a name looks like another.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_MARKS = re.compile(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def visible(text: str, *, one_line: bool = False) -> str:
    """`text` with control characters written out, such as ``\\x1b``.

    Args:
        text: of whatever origin.
        one_line: the ends of lines are written out too.
    """
    text = _UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    return text.replace("\n", "\\n") if one_line else text


def some(names: Sequence[str], shown: int = 3) -> str:
    """The first `shown` names, visible on one line, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(visible(name, one_line=True) for name in names[:shown]) + more


def markdown(text: str) -> str:
    """`text` as a piece of a line of Markdown that shows just that: no mark-up, no HTML, no cell."""
    text = _MARKS.sub(lambda match: "\\" + match[0], visible(text, one_line=True))
    return re.sub("[&<>]", lambda match: _ENTITIES[match[0]], text)


class Visible:
    """Standard output on which control characters are written out, for the time of a ``with`` block.

    What draws on a terminal on purpose, progress bars and coloured help, goes to standard error or around it.
    """

    def __init__(self) -> None:
        self.stream: TextIO | None = None

    def __enter__(self) -> "Visible":
        self.stream, sys.stdout = sys.stdout, self  # type: ignore[assignment]
        return self

    def __exit__(self, *exc_info: object) -> None:
        if sys.stdout is self:
            sys.stdout = self.stream

    @staticmethod
    @contextmanager
    def lifted() -> Iterator[None]:
        """The stream itself, for text that is coloured on purpose and has no names of others in it."""
        outer = sys.stdout
        if isinstance(outer, Visible):
            sys.stdout = outer.stream
        try:
            yield
        finally:
            sys.stdout = outer

    def write(self, text: str) -> int:
        """Write text; the number of its characters."""
        self.stream.write(visible(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
