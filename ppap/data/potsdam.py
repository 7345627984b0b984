"""Potsdam with 3 classes: aerial photographs, in 200 x 200 blocks or in another tool's tiles.

Below --data.root or its folder ``potsdam``, either the prepared blocks ``imgs/{n}.mat`` (``img``, uint8 RGB
and infrared), ``gt/{n}.mat`` (``gt``, ids 0..5, 255 = unlabelled) with ``labelled_train.txt`` and
``labelled_test.txt``; or mmsegmentation's conversion, ``img_dir/{train,val}`` and ``ann_dir/{train,val}``
(ids 1..6, 0 = unlabelled). Infrared is dropped. ``ppap prepare potsdam3`` cuts raw tiles into the blocks.
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from ppap.data.base import SPLITS, Datasets
from ppap.data.checks import read_list
from ppap.data.images import find_images
from ppap.data.matlab import read_matrix
from ppap.data.pairs import IdTable, PairedFiles, Part, assemble, check_classes, data_root, name_array
from ppap.errors import DataError
from ppap.settings.config import DataConfig

CLASSES = {
    "roads and cars": (255, 255, 255),
    "buildings and clutter": (0, 0, 255),
    "vegetation and trees": (0, 255, 0),
}
"""Name -> colour: ISPRS's of impervious surfaces, buildings and trees."""
NAMES = tuple(CLASSES)
COLOURS = tuple(CLASSES.values())
COARSE = (0, 1, 2, 2, 0, 1)
"""Class of the ids 0 road, 1 building, 2 low vegetation, 3 tree, 4 car, 5 clutter."""
LISTS = {"train": ("labelled_train.txt", 4545), "val": ("labelled_test.txt", 855)}
"""Split -> its list of block numbers and how many there are."""


def build(config: DataConfig, splits: tuple[str, ...] = SPLITS) -> Datasets:
    """Find, check and wrap the splits; called through ``ppap.data.build_datasets``."""
    root = data_root(config)
    check_classes(config, NAMES)
    for base in (root, root / "potsdam"):
        if (base / "imgs").is_dir():
            return assemble(config, root, {split: _blocks(base, split) for split in splits}, NAMES)
        if (base / "img_dir").is_dir():
            return assemble(config, root, {split: _tiles(base, split) for split in splits}, NAMES)
    raw = any(root.rglob("top_potsdam_*_RGBIR.tif"))
    if raw:
        raise DataError(
            f"{root}: raw tiles; cut them with ppap prepare potsdam3 --root {root} --out DIR, "
            "then give --data.root DIR"
        )
    raise DataError(
        f"{root}: neither imgs/ and gt/ of .mat files nor img_dir/ and ann_dir/; name another --data.root, "
        "or cut the raw tiles, 4_Ortho_RGBIR and the labels beside it, with ppap prepare potsdam3"
    )


def read_block(path: str) -> Image.Image:
    """The RGB picture of a block; infrared is dropped.

    Raises:
        DataError: unreadable, or not (H, W, 4 or 3) uint8 under ``img``.
    """
    pixels = read_matrix(path, "img")
    if pixels.ndim != 3 or pixels.shape[2] not in (3, 4) or pixels.dtype != np.uint8:
        raise DataError(f"{path}: img is {pixels.dtype} {pixels.shape}; it must be uint8 (H, W, 4)")
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, :3]))


def read_block_ids(path: str) -> np.ndarray:
    """(H, W) int32 classes, -1 = ignored (255, or -1), of a block.

    Raises:
        DataError: unreadable, not (H, W) integers under ``gt``, or an id that is neither 0..5 nor ignored.
    """
    ids = read_matrix(path, "gt")
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise DataError(f"{path}: gt is {ids.dtype} {ids.shape}; it must be (H, W) integers")
    ids = ids.astype(np.int64)
    wrong = (ids != 255) & (ids != -1) & ((ids < 0) | (ids >= len(COARSE)))
    if wrong.any():
        raise DataError(f"{path}: id {ids[wrong].min()} is none of the Potsdam ids (0 to 5, 255)")
    return np.array((*COARSE, -1), np.int32)[np.where(ids < 0, len(COARSE), ids).clip(max=len(COARSE))]


def tile_table() -> IdTable:
    """Reader of mmsegmentation's labels: 0 = ignored, then the six ids plus one."""
    return IdTable((-1, *COARSE) + (-2,) * (255 - len(COARSE)), "mmsegmentation's Potsdam ids (0 to 6)")


def _blocks(base: Path, split: str) -> Part:
    name, count = LISTS[split]
    path = base / name
    if not path.is_file():
        raise DataError(f"{path}: no such list of block numbers; add it, or prepare the raw tiles")
    numbers = []
    for i, line in enumerate(read_list(path).splitlines(), 1):
        if line.strip() and not (line.strip().isascii() and line.strip().isdigit()):
            raise DataError(f"{path}, line {i}: {line.strip()[:40]!r} is no block number")
        numbers += [int(line)] if line.strip() else []
    if not numbers or len(set(numbers)) != len(numbers):
        raise DataError(f"{path}: {'no numbers' if not numbers else 'numbers that stand there twice'}")
    prefixes = [str(base / folder) + os.sep for folder in ("imgs", "gt")]
    files = PairedFiles(name_array([str(n) for n in numbers]), (prefixes[0], ".mat"), (prefixes[1], ".mat"))
    form = f"{name}, imgs and gt (.mat)"
    return Part(files, read_block_ids, form, (count,), read_picture=read_block)


def _tiles(base: Path, split: str) -> Part:
    folders = [base / "img_dir" / split, base / "ann_dir" / split]
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; mmsegmentation's layout has it")
    names = [{n for n, paths in find_images(f).items() if paths[0].suffix == ".png"} for f in folders]
    if not names[0]:
        raise DataError(f"{folders[0]}: no .png images; convert the raw tiles again")
    stems = name_array(sorted(names[0] | names[1]))
    prefixes = [str(folder) + os.sep for folder in folders]
    form = f"img_dir/{split} with ann_dir/{split} (mmsegmentation's tiles, any number)"
    return Part(PairedFiles(stems, (prefixes[0], ".png"), (prefixes[1], ".png")), tile_table(), form)
