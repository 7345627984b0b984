"""Folders that are begun once and gone on with, and files that are there only when they are complete."""

import json
import os
from pathlib import Path
from typing import Any

from ppap.data.crops import read_manifest
from ppap.errors import DataError, UsageError


def claim_folder(folder: Path, name: str, manifest: dict[str, Any]) -> None:
    """Begin a folder with its manifest, or see that it was begun with an equal one.

    Args:
        folder: new, empty, or begun before.
        name: of the manifest in it.
        manifest: the settings; plain values.

    Raises:
        UsageError: the folder was begun with other settings, or holds something else.
        DataError: it cannot be written, or its manifest cannot be read.
    """
    path, remedy = folder / name, "remove it, or give another --out"
    if path.is_file():
        there = read_manifest(path)
        changed = [f"{k} {there.get(k)!r}, now {v!r}" for k, v in manifest.items() if there.get(k) != v]
        if changed:
            raise UsageError(f"{folder} was begun with other settings ({'; '.join(changed)}); {remedy}")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already and was not made by ppap prepare; {remedy}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write {folder} ({error.strerror or error}); give another --out") from None
    write_whole(path, (json.dumps(manifest, indent=2) + "\n").encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under another name first, so that an interruption leaves no half of it.

    Raises:
        DataError: it cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DataError(f"cannot write {path} ({error.strerror or error}); make room and go on") from None
