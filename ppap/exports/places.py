"""Where exports go: new files and folders only, whole or not at all."""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ppap.errors import DataError, UsageError
from ppap.reports.measure import check_writable


def check_new(out: Path) -> None:
    """Refuse an export that would replace anything, or could not be written.

    Args:
        out: file or folder to come; an empty folder may be there.

    Raises:
        UsageError: it is there already.
        DataError: its folder cannot be written.
    """
    if os.path.lexists(out) and not _is_empty_folder(out):
        raise UsageError(f"--out {out} exists already; give another, or remove it")
    check_writable(out)


def require(packages: Sequence[str], wanted: str) -> None:
    """Refuse what needs packages that are not installed.

    Args:
        packages: names to import.
        wanted: what needs them, such as ``--format onnx``.

    Raises:
        UsageError: names those that are missing.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{wanted} needs {', '.join(missing)}: pip install {' '.join(missing)}")


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A path in a hidden folder beside `out`, to be written in the block; what is there then gets its place.

    Raises:
        UsageError: something has the name by now.
        DataError: the disk refuses, or what the block reads cannot be read.
    """
    folder = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.new-", dir=out.parent))
        yield folder / out.name
        made = sorted(folder.iterdir())
        for path in made:
            check_new(out.with_name(path.name))
        for path in made:
            target = out.with_name(path.name)
            if target.is_dir():
                target.rmdir()
            path.rename(target)
    except OSError as error:
        what = error.strerror or error
        if error.filename is not None and not _is_of(Path(error.filename).absolute(), out.absolute()):
            raise DataError(f"cannot read {error.filename} ({what}); {out} is not written") from None
        raise DataError(f"cannot write {out} ({what}); give another --out") from None
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _is_of(path: Path, out: Path) -> bool:
    """Whether a path is `out`, a folder above it, or in the hidden folder beside it."""
    new = f".{out.name}.new-"
    beside = any(part.parent == out.parent and part.name.startswith(new) for part in (path, *path.parents))
    return beside or path in (out, *out.parents)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())
