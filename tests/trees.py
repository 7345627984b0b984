"""Tiny trees of the public data sets, in their true layouts and encodings."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

COCO_FULL, COCO_7 = "Coco164kFull_Stuff_Coarse.txt", "Coco164kFull_Stuff_Coarse_7.txt"
COCO_FEW6 = "Coco164kFew_Stuff_6.txt"
COCO_IDS = (*range(182), 255)
CITYSCAPES_IDS = tuple(range(34))
CITIES = {"train": ("aachen", "zurich"), "val": ("frankfurt", "munster")}
POTSDAM_COLOURS = ((255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0))
"""RGB of the ids 0 road, 1 building, 2 low vegetation, 3 tree, 4 car, 5 clutter."""
POTSDAM_TILES = ("2_10", "7_12", "2_13")
"""Two of the 24 tiles with labels and one of the 14 without."""


def picture(size: tuple[int, int], seed: int) -> np.ndarray:
    """Noise on four flat quarters: (H, W, 3) uint8 of `size` = (W, H)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 200, (2, 2, 3)).repeat(-(-size[1] // 2), 0).repeat(-(-size[0] // 2), 1)
    return (coarse[: size[1], : size[0]] + rng.integers(0, 40, (size[1], size[0], 3))).astype(np.uint8)


def label(size: tuple[int, int], ids: Sequence[int], seed: int) -> np.ndarray:
    """(H, W) int64 in blocks of 4 x 4: all of `ids` where they fit, `seed` rotates them."""
    height, width = -(-size[1] // 4), -(-size[0] // 4)
    blocks = np.resize(np.roll(np.asarray(ids), -seed * 5), (height, width))
    return blocks.repeat(4, 0).repeat(4, 1)[: size[1], : size[0]]


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    """Write pixels where `path` says, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def coco_tree(
    root: Path,
    n: int = 4,
    n_val: int | None = None,
    *,
    size: tuple[int, int] = (64, 48),
    images: str = "images/{}",
    labels: str = "annotations/{}",
    ids: Sequence[int] = COCO_IDS,
) -> Path:
    """COCO-Stuff: `n` training and `n_val` (None = n) validation images with lists of their own.

    Args:
        images, labels: folders below `root`; {} = train2017 or val2017.
        size: (width, height) of each image [pixels].
    """
    for split, count in (("train2017", n), ("val2017", n if n_val is None else n_val)):
        numbers = [9 + 16 * k for k in range(count)]
        for k, number in enumerate(numbers):
            save(root / images.format(split) / f"{number:012d}.jpg", picture(size, k))
            ids_ = label(size, ids, k).astype(np.uint8)
            save(root / labels.format(split) / f"{number:012d}.png", ids_)
        folder = root / "curated" / split
        folder.mkdir(parents=True, exist_ok=True)
        for name in (COCO_FULL, COCO_7, COCO_FEW6):
            (folder / name).write_text("".join(f"{number:012d}\n" for number in numbers))
    return root


def five_crop_tree(
    root: Path, n: int = 20, name: str = "cocostuff27", *, size: tuple[int, int] = (32, 24), classes: int = 27
) -> Path:
    """`n` crops below root/cropped/{name}_five_crop_0.5, labels = class + 1, 0 = ignored."""
    folder = root / "cropped" / f"{name}_five_crop_0.5"
    for k in range(n):
        save(folder / f"img/train/{k}.jpg", picture(size, k))
        save(folder / f"label/train/{k}.png", label(size, range(classes + 1), k).astype(np.uint8))
    return root


def cityscapes_tree(
    root: Path, n: int = 2, n_val: int | None = None, *, size: tuple[int, int] = (64, 32), flat: bool = False
) -> Path:
    """Cityscapes: `n` images of each of two training cities and `n_val` (None = n) of two validation cities.

    Args:
        flat: no folders of splits and cities.
    """
    for split, cities in CITIES.items():
        for c, city in enumerate(cities):
            for k in range(n if split == "train" or n_val is None else n_val):
                stem = f"{city}_{k:06d}_000019"
                place = stem if flat else f"{split}/{city}/{stem}"
                seed = 7 * c + k
                save(root / f"leftImg8bit/{place}_leftImg8bit.png", picture(size, seed))
                ids = label(size, CITYSCAPES_IDS, seed).astype(np.uint8)
                save(root / f"gtFine/{place}_gtFine_labelIds.png", ids)
    return root


def potsdam_mat_tree(root: Path, n: int = 5, n_val: int = 2, *, side: int = 40, unlabelled: int = 1) -> Path:
    """Potsdam as prepared by STEGO: imgs/{n}.mat, gt/{n}.mat and the lists."""
    for folder in ("imgs", "gt"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for k in range(n + n_val + unlabelled):
        infrared = np.full((side, side, 1), 7, np.uint8)
        pixels = np.concatenate([picture((side, side), k), infrared], axis=2)
        scipy.io.savemat(root / f"imgs/{k}.mat", {"img": pixels})
        if k < n + n_val:
            scipy.io.savemat(
                root / f"gt/{k}.mat", {"gt": label((side, side), (*range(6), 255), k).astype(np.int32)}
            )
    parts = {"labelled_train": range(n), "labelled_test": range(n, n + n_val)}
    parts["unlabelled_train"] = range(n + n_val, n + n_val + unlabelled)
    for name, numbers in parts.items():
        (root / f"{name}.txt").write_text("".join(f"{k}\n" for k in numbers))
    return root


def potsdam_mmseg_tree(root: Path, n: int = 4, n_val: int = 2, *, side: int = 64) -> Path:
    """Potsdam as converted by mmsegmentation: img_dir and ann_dir, ids 0 = ignored, 1..6."""
    for split, tile, count in (("train", "2_10", n), ("val", "2_13", n_val)):
        for k in range(count):
            name = f"{tile}_{k * side}_0_{(k + 1) * side}_{side}.png"
            save(root / f"img_dir/{split}/{name}", picture((side, side), k))
            save(root / f"ann_dir/{split}/{name}", label((side, side), range(7), k).astype(np.uint8))
    return root


def potsdam_raw_tree(root: Path, *, side: int = 800, tiles: Sequence[str] = POTSDAM_TILES) -> Path:
    """Raw ISPRS tiles: RGBIR tifs, and labels in colours for those of the 24 tiles; a block is 400 pixels."""
    for k, tile in enumerate(tiles):
        pixels = np.concatenate([picture((side, side), k), np.full((side, side, 1), 9, np.uint8)], axis=2)
        save(root / f"4_Ortho_RGBIR/top_potsdam_{tile}_RGBIR.tif", pixels)
        if tile.split("_")[1] in ("10", "11", "12"):
            colours = np.array(POTSDAM_COLOURS, np.uint8)[label((side, side), range(6), k)]
            save(root / f"5_Labels_for_participants/top_potsdam_{tile}_label.tif", colours)
    return root


def imagenet_s_mask(ids: np.ndarray) -> np.ndarray:
    """(H, W) ids -> (H, W, 3) uint8: R + 256 G."""
    return np.stack([ids % 256, ids // 256, np.zeros_like(ids)], axis=-1).astype(np.uint8)


def imagenet_s_tree(
    root: Path,
    n: int = 2,
    classes: int = 50,
    *,
    categories: int = 3,
    size: tuple[int, int] = (48, 40),
    semi: int = 2,
) -> Path:
    """ImageNet-S below root/ImageNetS{classes}: `n` training and 2 validation images of each of the first
    `categories` classes, `semi` with masks for training; ids 0, that class, the last class and 1000.
    """
    base = root / f"ImageNetS{classes}"
    for c in range(categories):
        wnid = f"n{1440764 + c:08d}"
        for k in range(n):
            save(base / f"train/{wnid}/{wnid}_{k}.JPEG", picture(size, k), format="JPEG")
        parts = [("train-semi", f"{wnid}_{k}") for k in range(semi)]
        parts += [("validation", f"ILSVRC2012_val_{2 * c + k:08d}") for k in range(2)]
        for k, (folder, stem) in enumerate(parts):
            save(base / f"{folder}/{wnid}/{stem}.JPEG", picture(size, 10 * c + k), format="JPEG")
            mask = imagenet_s_mask(label(size, (0, c + 1, classes, 1000), 0))
            save(base / f"{folder}-segmentation/{wnid}/{stem}.png", mask)
    return base
