"""Finding wrong and missing files before any long work, and saying so in one message."""

import os
import struct
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ppap.data.images import verify_image
from ppap.data.limits import check_file
from ppap.errors import DataError
from ppap.stopping import each

SHOWN = 5  # names per kind of problem in one message
_EDGE = 32  # bytes read at either end of a file
_CHUNK = 256  # files per job: one job a file would hold a million results in memory
_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB\x60\x82"
_JPEG, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_MAT, _MAT_HEADER = b"MATLAB 5.0", 128
_MAT_COMPRESSED = 15


def existing_folder(root: str | Path) -> Path:
    """--data.root with ``~`` resolved.

    Raises:
        DataError: there is no such folder.
    """
    path = Path(root).expanduser()
    if not path.is_dir():
        raise DataError(f"{path}: {'not a' if path.exists() else 'no such'} folder; give another --data.root")
    return path


def read_list(path: Path) -> str:
    """Text of a list of ids or names.

    Raises:
        DataError: it cannot be read, or is no plain text.
    """
    try:
        check_file(path)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the list cannot be read ({error}); give plain UTF-8 text") from None


class Problems:
    """Problems by kind; a kind is a headline, which follows the number, and a remedy."""

    def __init__(self, kinds: Mapping[str, tuple[str, str]]) -> None:
        self.kinds = kinds
        self.found: dict[str, list[str]] = {}

    def add(self, kind: str, text: str) -> None:
        """Add one problem: the file, and what is wrong with it unless the headline says so."""
        self.found.setdefault(kind, []).append(text)

    def raise_if_any(self, subject: str) -> None:
        """Raise the DataError that lists what was found: numbers, remedies, and up to five names each."""
        if not self.found:
            return
        lines = [f"{subject} cannot be used yet:"]
        for kind, (headline, remedy) in self.kinds.items():
            texts = self.found.get(kind, [])
            if texts:
                lines.append(f"{len(texts):,} {headline}; {remedy}:")
                lines += [f"  {text}" for text in texts[:SHOWN]]
                lines += [f"  ... and {len(texts) - SHOWN:,} more"] if len(texts) > SHOWN else []
        raise DataError("\n".join(lines))


def in_threads(function: Callable, jobs: Sequence, what: str, unit: str = "image") -> Iterable[Any]:
    """``map`` on threads (decoders run outside the interpreter lock), with a progress bar on a terminal."""
    from tqdm import tqdm

    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        done, quiet = pool.map(function, jobs), not sys.stderr.isatty()
        yield from each(tqdm(done, what, len(jobs), leave=False, unit=unit, disable=quiet))
    finally:  # also after Ctrl-C: do not start what is still waiting
        pool.shutdown(cancel_futures=True)


def find_incomplete(path: Callable[[int], str], count: int, what: str) -> tuple[list[int], dict[int, str]]:
    """Look at both ends of many files (:func:`check_complete`).

    Args:
        path: number -> file.
        count: how many files there are.
        what: word of the progress bar.

    Returns:
        The numbers of files that do not exist, and number -> message of those that are damaged.
    """

    def look(start: int) -> list[tuple[int, str | None]]:
        found: list[tuple[int, str | None]] = []
        for i in range(start, min(start + _CHUNK, count)):
            try:
                check_complete(path(i))
            except FileNotFoundError:
                found.append((i, None))
            except DataError as error:
                found.append((i, str(error)))
        return found

    found = [x for part in in_threads(look, range(0, count, _CHUNK), what, "x256 files") for x in part]
    return [i for i, text in found if text is None], {i: text for i, text in found if text is not None}


def check_complete(path: str) -> None:
    """Check that a file is a JPEG, PNG or MATLAB file from its first to its last byte, without decoding it.

    A JPEG must end with its end marker, a PNG with its last chunk, a MATLAB file with its last variable.
    Whatever is not evidently right, such as another format or bytes after the end, is left to
    ``images.verify_image``, which decides more slowly.

    Raises:
        FileNotFoundError: no such file.
        DataError: empty, cut off, or no readable image.
    """
    try:
        check_file(path)
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(_EDGE)
            file.seek(max(size - _EDGE, 0))
            tail = file.read(_EDGE)
            if head.startswith(_MAT):
                return _check_mat(file, size, path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if head.startswith(_JPEG) and _JPEG_END in tail:
        return None
    if head.startswith(_PNG) and tail.endswith(_PNG_END):
        return None
    if head.startswith(b"MATLAB"):
        raise DataError(f"{path}: a MATLAB file of version 7.3; save it again with version 5 to 7")
    verify_image(path)
    return None


def _check_mat(file: Any, size: int, path: str) -> None:
    """Walk from variable to variable by their lengths; the last one must end where the file does."""
    place = _MAT_HEADER
    file.seek(126)
    order = ">" if file.read(2) == b"MI" else "<"
    while place < size:
        file.seek(place)
        tag = file.read(8)
        if len(tag) < 8:
            break
        kind, length = struct.unpack(f"{order}II", tag)
        place += 8 + length + (0 if kind == _MAT_COMPRESSED else -length % 8)
    if place != size or size <= _MAT_HEADER:
        raise DataError(f"{path}: the file is cut off; copy it again")
