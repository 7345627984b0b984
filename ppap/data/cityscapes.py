"""Cityscapes with 27 classes: fine annotations, label ids 7..33.

Below --data.root or its folder ``cityscapes``: ``leftImg8bit/`` and ``gtFine/`` with ``{split}/{city}/``,
with ``{split}/`` or with neither, where the city tells the split. Labels are the 8-bit
``*_gtFine_labelIds.png``. Training images are crops (``ppap/data/crops.py``) unless --data.crop none.
"""

import os
from collections import Counter
from pathlib import Path

from ppap.data.base import SPLITS, Datasets
from ppap.data.crops import CROPS, crop_places, crop_table, find_crops
from ppap.data.pairs import IdTable, PairedFiles, Part, assemble, check_classes, data_root, name_array
from ppap.errors import DataError
from ppap.settings.config import DataConfig

CLASSES = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "parking": (250, 170, 160),
    "rail track": (230, 150, 140),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "guard rail": (180, 165, 180),
    "bridge": (150, 100, 100),
    "tunnel": (150, 120, 90),
    "pole": (153, 153, 153),
    "polegroup": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "caravan": (0, 0, 90),
    "trailer": (0, 0, 110),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}
"""Name -> customary colour, in the order of the classes (label id - 7)."""
NAMES = tuple(CLASSES)
COLOURS = tuple(CLASSES.values())

FRAMES = {
    "train": {
        **{"aachen": 174, "bochum": 96, "bremen": 316, "cologne": 154, "darmstadt": 85, "dusseldorf": 221},
        **{"erfurt": 109, "hamburg": 248, "hanover": 196, "jena": 119, "krefeld": 99, "monchengladbach": 94},
        **{"strasbourg": 365, "stuttgart": 196, "tubingen": 144, "ulm": 95, "weimar": 142, "zurich": 122},
    },
    "val": {"frankfurt": 267, "lindau": 59, "munster": 174},
}
"""Split -> city -> frames with fine annotations."""
FIRST_ID, LAST_ID = 7, 33
IMAGE, LABEL = "_leftImg8bit.png", "_gtFine_labelIds.png"


def build(config: DataConfig, splits: tuple[str, ...] = SPLITS) -> Datasets:
    """Find, check and wrap the splits; called through ``ppap.data.build_datasets``."""
    root = data_root(config)
    check_classes(config, NAMES)
    parts = {}
    for split in splits:
        cropped = split == "train" and config.crop == "five"
        parts[split] = _crops(config, root) if cropped else whole_images(root, split)
    return assemble(config, root, parts, NAMES)


def label_table() -> IdTable:
    """Reader of label ids: 0..6 and 255 (-1 in 8 bits) are ignored, 7..33 are the classes."""
    classes = range(LAST_ID - FIRST_ID + 1)
    unused = (-2,) * (255 - LAST_ID - 1)
    return IdTable((*(-1,) * FIRST_ID, *classes, *unused, -1), "the Cityscapes label ids (0 to 33)")


def whole_images(root: Path, split: str) -> Part:
    """The uncropped frames of a split, sorted by name.

    Raises:
        DataError: no such folders, or labels of another encoding.
    """
    base = next((b for b in (root, root / "cityscapes") if (b / "leftImg8bit").is_dir()), None)
    if base is None:
        raise DataError(
            f"{root}: no leftImg8bit folder; unzip leftImg8bit_trainvaltest.zip and "
            "gtFine_trainvaltest.zip there, or name another --data.root"
        )
    if not (base / "gtFine").is_dir():
        raise DataError(f"{base}: leftImg8bit has no gtFine beside it; unzip gtFine_trainvaltest.zip there")
    within = split if (base / "leftImg8bit" / split).is_dir() else ""
    if (base / "gtFine" / split).is_dir() != bool(within):
        raise DataError(f"{base}: leftImg8bit and gtFine do not both have a folder {split}; move the files")
    folders = [base / part / within for part in ("leftImg8bit", "gtFine")]
    found = [_stems(folder, end) for folder, end in zip(folders, (IMAGE, LABEL), strict=True)]
    if not within:
        found = [[s for s in stems if _city(s) in FRAMES[split]] for stems in found]
    stems = sorted({*found[0], *found[1]})
    if not stems:
        raise DataError(f"{folders[0]}: no {split} frames called CITY_000000_000000{IMAGE}; unzip them there")
    if not found[1]:
        _refuse_converted(folders[1])
    depth = "CITY" if "/" in stems[0] else "no folders of cities"
    places = [f"{part}/{within}".rstrip("/") for part in ("leftImg8bit", "gtFine")]
    prefixes = [str(folder) + os.sep for folder in folders]
    files = PairedFiles(name_array(stems), (prefixes[0], IMAGE), (prefixes[1], LABEL))
    form = f"{' with '.join(places)} ({depth})"
    return Part(files, label_table(), form, (sum(FRAMES[split].values()),), _short(stems, split))


def _stems(folder: Path, end: str) -> list[str]:
    """``{city}/{city}_{seq}_{frame}`` or without the folder, of all files that end as said."""
    found = []
    for entry in os.scandir(folder):
        if entry.is_dir():
            inside = os.listdir(entry.path)
            found += [f"{entry.name}/{file}"[: -len(end)] for file in inside if file.endswith(end)]
        elif entry.name.endswith(end):
            found.append(entry.name[: -len(end)])
    return found


def _city(stem: str) -> str:
    return stem.rsplit("/", 1)[-1].split("_")[0]


def _short(stems: list[str], split: str) -> tuple[str, ...]:
    there = Counter(map(_city, stems))
    texts = [f"{c}: {there[c]} of {n} frames" for c, n in FRAMES[split].items() if there[c] != n]
    return (*texts, *(f"{c}: no city of {split}" for c in there if c not in FRAMES[split]))


def _refuse_converted(folder: Path) -> None:
    if _stems(folder, "_gtFine_labelTrainIds.png"):
        raise DataError(
            f"{folder}: only *_labelTrainIds.png (19 classes); the 27 classes need *_gtFine_labelIds.png "
            "from gtFine_trainvaltest.zip"
        )


def _crops(config: DataConfig, root: Path) -> Part:
    above = [root.resolve().parent] if root.resolve().name == "cityscapes" else []
    places = [root, root / "cityscapes", *above]
    files, folder = find_crops(crop_places(config, places), "cityscapes", config.crop_ratio, config.kind)
    count = CROPS * sum(FRAMES["train"].values())
    return Part(files, crop_table(), f"{folder}: crops", (count,))
