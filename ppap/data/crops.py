"""Five-crop folders: four corners and the centre of each training image, as the published code reads them.

``cropped/{name}_five_crop_{ratio}/img/train/{n}.jpg`` and ``label/train/{n}.png``, n = 5 * image + crop
without holes; a label is class + 1, 0 = ignored. ``ppap prepare`` makes them (``ppap/preparation/crops.py``).
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppap.data.pairs import IdTable, PairedFiles
from ppap.errors import DataError
from ppap.settings.config import DataConfig

CROPS = 5
MANIFEST = "crops.json"
"""In a folder made by ``ppap prepare``: its settings and how many crops belong there."""


def read_manifest(path: Path) -> dict[str, Any]:
    """What ``ppap prepare`` wrote about a folder it makes.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        remedy = "remove the folder and make it again with ppap prepare"
        raise DataError(f"{path}: cannot be read ({error}); {remedy}") from None


def folder_name(name: str, ratio: float) -> str:
    """Folder of the crops, below ``cropped``; `name` is ``cocostuff27`` or ``cityscapes``."""
    return f"{name}_five_crop_{ratio}"


def crop_table(classes: Sequence[int] | None = None) -> IdTable:
    """Reader of crop labels: id - 1, or ``classes[id - 1]`` where the task has fewer classes than the 27."""
    classes = range(27) if classes is None else classes
    return IdTable((-1, *classes) + (-2,) * (255 - len(classes)), "the ids of crops (0 to 27)")


def crop_places(config: DataConfig, places: list[Path]) -> list[Path]:
    """Folders that may hold ``cropped``: --data.crop-root alone if it is given, else `places`."""
    return places if config.crop_root is None else [Path(config.crop_root).expanduser()]


def find_crops(places: Sequence[Path], name: str, ratio: float, kind: str) -> tuple[PairedFiles, str]:
    """The first crop folder below the places given: ``{place}/cropped/...``.

    Args:
        places: folders, the likelier first.
        name, ratio: as for :func:`folder_name`.
        kind: of the data set, for the remedy.

    Returns:
        Its files, named by their numbers, and the folder.

    Raises:
        DataError: there is none, numbers have holes, or images and labels differ in number.
    """
    tried = list(dict.fromkeys(place / "cropped" / folder_name(name, ratio) for place in places))
    folder = next((path for path in tried if path.is_dir()), None)
    if folder is None:
        others = f" (nor {', '.join(map(str, tried[1:]))})" if tried[1:] else ""
        raise DataError(
            f"{tried[0]}: no such folder of crops{others}; make it with ppap prepare {kind} "
            f"--root {places[0]}, or train on whole images with --data.crop none"
        )
    images, suffix = _numbers(folder / "img" / "train", (".jpg", ".png"))
    labels, _ = _numbers(folder / "label" / "train", (".png",))
    _check_numbers(folder, images, labels, kind)
    names = np.arange(len(images)).astype("S")
    prefixes = [str(folder / what / "train") + os.sep for what in ("img", "label")]
    return PairedFiles(names, (prefixes[0], suffix), (prefixes[1], ".png")), str(folder)


def _numbers(folder: Path, suffixes: tuple[str, ...]) -> tuple[np.ndarray, str]:
    """Sorted numbers of the files in a folder and their suffix; other files are refused."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; crops need img/train and label/train")
    found: dict[str, list[int]] = {}
    for file in os.listdir(folder):
        stem, suffix = os.path.splitext(file)
        if file.startswith(".") or file.endswith(".part"):
            continue
        if not (stem.isascii() and stem.isdigit()) or suffix not in suffixes or str(int(stem)) != stem:
            raise DataError(
                f"{folder / file}: not a crop; they are called 0{suffixes[0]}, 1{suffixes[0]}, ..."
            )
        found.setdefault(suffix, []).append(int(stem))
    if len(found) != 1:
        what = "no crops" if not found else f"crops of several types ({', '.join(sorted(found))})"
        raise DataError(f"{folder}: {what}; make them with ppap prepare")
    ((suffix, numbers),) = found.items()
    return np.sort(np.array(numbers)), suffix


def _check_numbers(folder: Path, images: np.ndarray, labels: np.ndarray, kind: str) -> None:
    remedy = f"remove the folder and make it again with ppap prepare {kind}"
    manifest = folder / MANIFEST
    if manifest.is_file():
        wanted = read_manifest(manifest).get("crops")
        if not isinstance(wanted, int):
            raise DataError(f"{manifest}: it says no number of crops; {remedy}")
        if not len(images) == len(labels) == wanted:
            raise DataError(
                f"{folder}: {len(images):,} images and {len(labels):,} labels of {wanted:,}: ppap prepare "
                "was stopped or files were removed; give the same ppap prepare command again, it goes on"
            )
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images):,} images but {len(labels):,} labels; {remedy}")
    for what, numbers in (("img", images), ("label", labels)):
        holes = np.setdiff1d(np.arange(numbers[-1] + 1), numbers)
        if len(holes):
            names = ", ".join(map(str, holes[:CROPS]))
            more = f" and {len(holes) - CROPS:,} more" if len(holes) > CROPS else ""
            raise DataError(f"{folder / what / 'train'}: the numbers {names}{more} are missing; {remedy}")
    if len(images) % CROPS:
        raise DataError(f"{folder}: {len(images):,} crops are no multiple of five; {remedy}")
