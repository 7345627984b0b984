"""The lists of COCO-Stuff ids that papers train and evaluate on.

The lists ``Coco164kFull_Stuff_Coarse.txt`` and ``..._7.txt`` are part of the package
(``assets/cocostuff/lists.npz``): the first as steps from id to id, the second as a bit for each of its ids. A
``curated`` folder beside the images is read instead, so that any list can be used.
"""

import functools
import importlib.resources
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ppap.data.checks import read_list
from ppap.errors import DataError

FILES = {
    "full": "Coco164kFull_Stuff_Coarse.txt",
    "7": "Coco164kFull_Stuff_Coarse_7.txt",
    "few6": "Coco164kFew_Stuff_6.txt",
}
"""Name of a list -> its file in ``curated/{train2017,val2017}``."""


@functools.cache
def packaged(folder: str, which: str) -> np.ndarray:
    """(n,) int64 ids, ascending, of a list in the package.

    Args:
        folder: ``"train2017"`` (full 97,702, 7 49,629 ids) or ``"val2017"`` (4,172, 2,175).
        which: ``"full"`` or ``"7"``.
    """
    raw = importlib.resources.files("ppap").joinpath("assets/cocostuff/lists.npz").read_bytes()
    with np.load(io.BytesIO(raw)) as lists:
        full = np.cumsum(lists[f"{folder}_steps"], dtype=np.int64)
        if which == "full":
            return full
        return full[np.unpackbits(lists[f"{folder}_7"], count=len(full)).astype(bool)]


def as_text(ids: np.ndarray) -> str:
    """A list as it is distributed: 12 digits a line."""
    return "".join(f"{i:012d}\n" for i in ids)


def find_list(places: Sequence[Path], folder: str, which: str) -> tuple[np.ndarray, str]:
    """A list from ``{place}/curated/{folder}`` if it is there, else from the package.

    Args:
        places: folders that may have a ``curated`` folder.
        folder, which: as for :func:`packaged`; also ``"few6"``, which the package does not have.

    Returns:
        (n,) int64 ids in the order of the list, and where it came from.

    Raises:
        DataError: a line that is no id, an id twice, an empty list, or few6 is nowhere.
    """
    for place in places:
        path = place / "curated" / folder / FILES[which]
        if path.is_file():
            return _read(path), str(path)
    if which == "few6":
        raise DataError(
            f"{places[0] / 'curated' / folder / FILES[which]}: no such list, and it is not in the package; "
            "add it, or take the images of list 7 with --data.coco-list 7"
        )
    return packaged(folder, which), f"the package ({FILES[which]})"


def _read(path: Path) -> np.ndarray:
    ids = []
    for number, line in enumerate(read_list(path).splitlines(), 1):
        text = line.strip()
        if not text:
            continue
        if not (text.isascii() and text.isdigit() and len(text) <= 12):
            raise DataError(f"{path}, line {number}: {text[:40]!r} is no id of up to 12 digits")
        ids.append(int(text))
    if not ids:
        raise DataError(f"{path}: the list is empty; remove it to use the package's, or fill it")
    if len(set(ids)) != len(ids):
        raise DataError(f"{path}: {len(ids) - len(set(ids))} ids stand there twice; remove them")
    return np.array(ids, np.int64)
