"""Bytes on the disk: their checksum, and that they are there."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

_BLOCK = 1 << 22  # bytes read at once


def sha256_of(path: Path, read: Callable[[int], object] = lambda count: None) -> str:
    """sha256 of a file, in hex; `read` is told how many bytes were read since its last call.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            read(len(block))
    return digest.hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place and rename it: a stop at any moment leaves no half of it there.

    Raises:
        OSError: the disk refuses; what was there stays.
    """
    aside = path.with_name(f"{path.name}.new")
    aside.write_text(text, encoding="utf-8")
    to_disk(aside)
    aside.replace(path)


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would outlive a power cut.

    Raises:
        OSError: the disk fails.
    """
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
