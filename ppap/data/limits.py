"""What is refused before a byte of pixels is decoded: files that are none, and pictures that are too large.

The limit on pixels is one number of the process, as Pillow's own is: every reader of images and labels is
under it, and loader processes inherit it.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from ppap.errors import DataError
from ppap.settings.data import DataConfig

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a folder"),
)
_limit: int = DataConfig().max_pixels


def max_pixels() -> int:
    """Most pixels of an image or a label."""
    return _limit


def set_max_pixels(limit: int) -> None:
    """Refuse images and labels of more pixels, from here on.

    Pillow's own limit, which is lower than the default, is raised where it would come before; it stays where
    it is higher, or was switched off.
    """
    global _limit
    _limit = limit
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, limit)


@contextmanager
def at_most(limit: int) -> Iterator[None]:
    """:func:`set_max_pixels` for the time of a ``with`` block, Pillow's limit included."""
    before, theirs = _limit, Image.MAX_IMAGE_PIXELS
    set_max_pixels(limit)
    try:
        yield
    finally:
        set_max_pixels(before)
        Image.MAX_IMAGE_PIXELS = theirs


def check_size(size: tuple[int, ...], name: Any) -> None:
    """Refuse a picture by the size that its header says.

    Args:
        size: two sides [pixels], in either order.
        name: of the file, for the message.

    Raises:
        DataError: it has more pixels than the limit.
    """
    pixels = size[0] * size[1]
    if pixels > _limit:
        raise DataError(
            f"{name}: {size[0]} x {size[1]} are {pixels} pixels, the limit is {_limit}; make it smaller, or "
            "give a larger --data.max-pixels (ppap predict: --max-pixels)"
        )


def check_file(path: Any) -> None:
    """Refuse to open what is no file: a pipe waits for ever, a device may never end.

    Args:
        path: a path; of anything else, and where there is nothing, nothing is asked.

    Raises:
        DataError: the message says what it is.
    """
    if not isinstance(path, str | os.PathLike):
        return
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # whoever opens it says why it cannot
        return
    for is_kind, word in _KINDS:
        if is_kind(mode):
            raise DataError(f"{Path(path)}: it is {word}, no file; remove it")
