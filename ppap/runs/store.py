"""Arrays that take long to compute, kept on disk: a folder of them is there whole, or not at all.

They are made in a folder aside, by one process at a time, and renamed into place when every byte is on the
disk; ``meta.json`` has a checksum of each, which is compared once in every process that reads them.
"""

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ppap.errors import DataError
from ppap.runs.disk import sha256_of, to_disk
from ppap.runs.lock import FolderLock
from ppap.settings.plain import parse_json

# Part of what names a folder: one that was kept without checksums is never read.
_FORMAT = 2
_SETTLE = 2.0  # seconds of work that a kill may cost
_BLOCK = 1 << 22  # bytes written at once
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_VERIFIED: set[tuple[Any, ...]] = set()
"""What this process has verified: a folder, and size and time of each of its files."""


class Kind(NamedTuple):
    """Shape and type of an array."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def size(self) -> int:
        """Bytes of its values."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class Part:
    """Arrays on the way: what is marked is on the disk seconds later, and not computed again after a stop.

    Not at once: waiting for the disk batch after batch takes longer than a GPU's forward pass.
    """

    def __init__(self, store: "Store", path: Path) -> None:
        self._store, self.path = store, path
        self.arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r+") for name in store.kinds}
        self._done = np.load(path / "done.npy", mmap_mode="r+")
        self._marked: list[np.ndarray] = []
        self._settled = time.monotonic()

    @property
    def left(self) -> np.ndarray:
        """Indices of the rows to compute."""
        return np.flatnonzero(self._done == 0)

    def mark(self, rows: np.ndarray) -> None:
        """Note that rows were written into :attr:`arrays`.

        Raises:
            DataError: the disk refuses.
        """
        self._marked.append(rows)
        if time.monotonic() - self._settled > _SETTLE:
            self.settle()

    def settle(self) -> None:
        """Put what was marked since on the disk.

        Raises:
            DataError: the disk refuses.
        """
        try:
            for array in self.arrays.values():
                array.flush()
            # Only now: what is noted as done can be trusted after a power cut.
            for rows in self._marked:
                self._done[rows] = 1
            self._done.flush()
            self._marked, self._settled = [], time.monotonic()
        except OSError as error:
            raise self._store.refused(error) from None


class Store:
    """The folder of arrays that follow from a description."""

    def __init__(
        self, root: Path, meta: dict[str, Any], kinds: dict[str, Kind], *, what: str, remedy: str
    ) -> None:
        """Find its place; nothing is written yet.

        Args:
            root: folder of all such folders.
            meta: all that the arrays follow from, for JSON; a hash of it names the folder.
            kinds: the arrays by name; all have one row per item.
            what: they are, for messages, such as "features".
            remedy: what to do where the disk refuses, such as "give another --data.cache-dir".
        """
        text = json.dumps({"format": _FORMAT, **meta}, sort_keys=True)
        self.meta = {"format": _FORMAT, **meta, "hash": hashlib.sha256(text.encode()).hexdigest()[:16]}
        self.root, self.kinds, self.what, self.remedy = root, kinds, what, remedy
        self.path = root / self.meta["hash"]

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(kind.size for kind in self.kinds.values())

    @contextmanager
    def made(self) -> Iterator[Part | None]:
        """None where the arrays are there; else what to fill, which becomes the folder at the block's end.

        Where another process makes the very same arrays, that is said and waited for.

        Raises:
            DataError: the arrays are damaged, the disk is too small, or the folder cannot be written.
        """
        if self.path.exists():
            self.verify()
            yield None
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self.refused(error) from None
        lock = FolderLock(self.root, str(self.path), f".{self.path.name}.lock")
        lock.wait(f"{self.what}: another process makes {self.path}; waiting for it")
        try:
            if self.path.exists():  # made while this one waited
                self.verify()
                yield None
                return
            part = self._part(locked=lock.file is not None)
            try:
                yield part
            except BaseException:
                with suppress(DataError):  # the first error is the one to tell
                    part.settle()
                raise
            part.settle()
            self._finish(part)
        finally:
            lock.release()

    def verify(self) -> None:
        """Compare the arrays with their checksums, once in a process.

        Damage is refused and not repaired: a disk that changes bits is something to know about, and what is
        there may be another run's.

        Raises:
            DataError: a file is missing or damaged.
        """
        meta = self._read_meta()
        key = self._state()
        if key in _VERIFIED:
            return
        with tqdm(total=self.size, unit="B", unit_scale=True, desc="verifying", disable=None) as bar:
            for name in self.kinds:
                try:
                    found = sha256_of(self.path / f"{name}.npy", bar.update)
                except OSError as error:
                    raise self._damaged(f"{name}.npy", str(error.strerror or error)) from None
                if found != meta["checksums"].get(name):
                    raise self._damaged(f"{name}.npy", "it differs from its checksum")
        _VERIFIED.add(key)

    def refused(self, error: OSError) -> DataError:
        """The error for a disk that refuses."""
        if error.errno in _FULL:
            return self._too_small()
        return DataError(f"cannot write {self.path} ({error.strerror or error}); {self.remedy}")

    def _too_small(self) -> DataError:
        free = shutil.disk_usage(self.root).free
        return DataError(
            f"the {self.what} need {self.size} bytes ({self.size / 2**30:.1f} GiB), {self.root} has "
            f"{free / 2**30:.1f} GiB free; {self.remedy}"
        )

    def _damaged(self, name: str, reason: str) -> DataError:
        return DataError(
            f"{self.path / name} is damaged ({reason}); remove the folder {self.path}, and the {self.what} "
            "are computed again"
        )

    def _read_meta(self) -> dict[str, Any]:
        try:
            meta = parse_json((self.path / "meta.json").read_bytes())
            checksums = meta.pop("checksums")
            if meta != json.loads(json.dumps(self.meta)) or not isinstance(checksums, dict):
                raise ValueError("it describes other arrays")
        except OSError as error:
            raise self._damaged("meta.json", str(error.strerror or error)) from None
        except (ValueError, KeyError, AttributeError, TypeError):
            raise self._damaged("meta.json", "it is cut, or describes other arrays") from None
        return {**meta, "checksums": checksums}

    def _state(self) -> tuple[Any, ...]:
        files = (self.path / f"{name}.npy" for name in self.kinds)
        try:
            return (
                str(self.path.resolve()),
                *((s.st_size, s.st_mtime_ns) for s in (f.stat() for f in files)),
            )
        except OSError as error:
            name = Path(error.filename or self.path).name
            raise self._damaged(name, str(error.strerror or error)) from None

    def _part(self, locked: bool) -> Part:
        """What an earlier start left, or empty arrays with all their room on the disk."""
        # Without a lock another process may be at work there too: each then makes a folder of its own.
        path = self.root / (f".{self.path.name}.part" if locked else f".{self.path.name}.{uuid.uuid4().hex}")
        if (path / "done.npy").exists():
            try:
                return Part(self, path)
            except (OSError, ValueError):  # cut by a failing disk: nothing of it is worth more than a start
                print(f"{self.what}: {path} is damaged and begun anew", flush=True)
        try:
            shutil.rmtree(path, ignore_errors=True)
            if self.size > shutil.disk_usage(self.root).free:
                raise self._too_small()
            path.mkdir()
            for name, kind in self.kinds.items():
                _allocate(path / f"{name}.npy", kind)
            rows = next(iter(self.kinds.values())).shape[0]
            np.save(path / "new.npy", np.zeros(rows, np.uint8))
            (path / "new.npy").rename(path / "done.npy")
        except OSError as error:
            shutil.rmtree(path, ignore_errors=True)
            raise self.refused(error) from None
        return Part(self, path)

    def _finish(self, part: Part) -> None:
        """Write the checksums and put the folder into its place."""
        try:
            with tqdm(total=self.size, unit="B", unit_scale=True, desc="checksums", disable=None) as bar:
                checksums = {name: sha256_of(part.path / f"{name}.npy", bar.update) for name in self.kinds}
            text = json.dumps({**self.meta, "checksums": checksums}, indent=2) + "\n"
            (part.path / "meta.json").write_text(text, encoding="utf-8")
            for file in [*part.path.iterdir(), part.path]:
                to_disk(file)
            try:
                part.path.rename(self.path)
            except OSError:
                if not self.path.exists():  # else another process, without a lock, was faster
                    raise
                shutil.rmtree(part.path, ignore_errors=True)
                self.verify()
            to_disk(self.root)
            (self.path / "done.npy").unlink(missing_ok=True)  # last: a kill before costs no row
        except OSError as error:
            raise self.refused(error) from None
        _VERIFIED.add(self._state())


def _allocate(path: Path, kind: Kind) -> None:
    """An array of zeros with its room on the disk.

    A sparse file would end the process by SIGBUS where the disk is full in the middle of the work.
    """
    np.lib.format.open_memmap(path, mode="w+", dtype=kind.dtype, shape=kind.shape)
    size = path.stat().st_size
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
                return
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                    raise
        file.seek(size - kind.size)
        for start in range(0, kind.size, _BLOCK):
            file.write(bytes(min(_BLOCK, kind.size - start)))
    to_disk(path)
