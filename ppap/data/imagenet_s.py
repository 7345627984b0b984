"""ImageNet-S with 919, 300 or 50 classes and "other" as class 0.

Below --data.root, its folder ``ImageNetS{C}`` or ``imagenet-s/ImageNetS{C}``: ``train/{wnid}/*.JPEG``,
``validation/{wnid}/*.JPEG`` with ``validation-segmentation/{wnid}/*.png``, and ``train-semi`` with
``train-semi-segmentation``. A mask is RGB: id = R + 256 G; 0 = other, 1..C = rank of the category among the
sorted ones, 1000 = ignored. Training images have no labels; those of ``train-semi`` do.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ppap.data.base import SPLITS, Datasets
from ppap.data.checks import read_list
from ppap.data.images import naming
from ppap.data.limits import check_size
from ppap.data.pairs import PairedFiles, Part, assemble, check_classes, data_root, name_array
from ppap.errors import DataError, UsageError
from ppap.settings.config import DataConfig

COUNTS = {
    919: {"train": 1_183_322, "train-semi": 9_190, "validation": 12_419},
    300: {"train": 384_862, "train-semi": 3_000, "validation": 4_097},
    50: {"train": 64_431, "train-semi": 500, "validation": 752},
}
"""Categories C -> folder -> images."""
IGNORED_ID = 1000


class MaskReader:
    """Reads masks; a class, so that loader processes can be given one."""

    def __init__(self, categories: int):
        """Args: C; ids above it are refused."""
        self.categories = categories

    def __repr__(self) -> str:
        return f"MaskReader({self.categories})"

    def __call__(self, path: str) -> np.ndarray:
        """(H, W) int32 classes 0..C, -1 = ignored.

        Raises:
            DataError: unreadable, not RGB, or an id above C that is not 1000.
        """
        with naming(path, "a PNG mask"), Image.open(path, formats=("PNG",)) as image:
            check_size(image.size, path)
            mode, pixels = image.mode, np.array(image)
        if mode not in ("RGB", "RGBA"):
            raise DataError(f"{path}: a mask of mode {mode}; ImageNet-S masks are RGB, id = R + 256 G")
        ids = pixels[:, :, 0] + np.int32(256) * pixels[:, :, 1]
        wrong = (ids > self.categories) & (ids != IGNORED_ID)
        if wrong.any():
            raise DataError(
                f"{path}: id {ids[wrong].min()} with {self.categories} categories; is it of another variant?"
            )
        return np.where(ids == IGNORED_ID, -1, ids)


def build(config: DataConfig, splits: tuple[str, ...] = SPLITS) -> Datasets:
    """Find, check and wrap the splits; called through ``ppap.data.build_datasets``."""
    root = data_root(config)
    base, categories = find_variant(root, config.classes)
    names = class_names(base, categories)
    check_classes(replace(config, classes=None) if config.classes == categories else config, names)
    parts = {}
    for split in splits:
        folder = config.imagenet_s_train if split == "train" else "validation"
        parts[split] = images_of(base, folder, categories)
    return assemble(config, root, parts, names)


def find_variant(root: Path, classes: int | None) -> tuple[Path, int]:
    """Folder of the variant and its number of categories.

    Args:
        root: the variant's folder or one above it.
        classes: 919, 300 or 50 (one more, with the class other, is understood); None = the one that is there.

    Raises:
        UsageError: another number, or several variants and no number.
        DataError: none is there.
    """
    wanted = classes if classes in COUNTS else classes - 1 if classes is not None else None
    if wanted is not None and wanted not in COUNTS:
        raise UsageError(f"--data.classes is {classes}; imagenet_s has 919, 300 or 50")
    found = {}
    for c in COUNTS:
        for base in (root / f"ImageNetS{c}", root / "imagenet-s" / f"ImageNetS{c}"):
            if base.is_dir():
                found.setdefault(c, base)
        if root.name == f"ImageNetS{c}":
            found[c] = root
    if not found and (root / "validation").is_dir():
        number = len([p for p in (root / "validation").iterdir() if p.is_dir()])
        guess = wanted or number
        if guess not in COUNTS:
            raise UsageError(f"{root}: {number} categories; say which with --data.classes 919, 300 or 50")
        found[guess] = root
    if wanted is not None and wanted in found:
        return found[wanted], wanted
    if len(found) == 1 and wanted is None:
        return next((base, c) for c, base in found.items())
    if wanted is None and found:
        raise UsageError(
            f"{root} has several variants; choose one with --data.classes {' or '.join(map(str, found))}"
        )
    raise DataError(
        f"{root}: no folder ImageNetS{wanted or '{919,300,50}'} and no validation; give another --data.root"
    )


def class_names(base: Path, categories: int) -> tuple[str, ...]:
    """``other`` and the wnids in the order of their ids; numbers where the tree lacks categories."""
    validation = base / "validation"
    wnids = sorted(p.name for p in validation.iterdir() if p.is_dir()) if validation.is_dir() else []
    listed = base / f"ImageNetS_categories_im{categories}.txt"
    if listed.is_file():
        wnids = read_list(listed).split()
    if len(wnids) != categories:
        wnids = [f"category {c}" for c in range(1, categories + 1)]
    return ("other", *wnids)


def images_of(base: Path, folder: str, categories: int) -> Part:
    """The images of ``train``, ``train-semi`` or ``validation``, sorted by path.

    Raises:
        DataError: no such folders, or no images.
    """
    images, masks = base / folder, base / f"{folder}-segmentation"
    for needed in (images,) if folder == "train" else (images, masks):
        if not needed.is_dir():
            raise DataError(f"{needed}: no such folder; docs/datasets.md says how the tree is made")
    names = set(_names(images, ".JPEG"))
    if folder != "train":
        names |= set(_names(masks, ".png"))
    if not names:
        raise DataError(f"{images}: no {{wnid}}/*.JPEG; docs/datasets.md says how the tree is made")
    label = None if folder == "train" else (str(masks) + os.sep, ".png")
    files = PairedFiles(name_array(sorted(names)), (str(images) + os.sep, ".JPEG"), label)
    return Part(files, MaskReader(categories), f"{base.name}/{folder}", (COUNTS[categories][folder],))


def _names(folder: Path, end: str) -> list[str]:
    found = []
    for entry in os.scandir(folder):
        if entry.is_dir():
            inside = os.listdir(entry.path)
            found += [f"{entry.name}/{file}"[: -len(end)] for file in inside if file.endswith(end)]
    return found
