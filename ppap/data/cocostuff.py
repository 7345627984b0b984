"""COCO-Stuff with 27 coarse classes, or 15 (stuff only) or 3 (sky, plant, ground).

Below --data.root, or its folder ``cocostuff`` or ``coco``: images in ``images/{train2017,val2017}`` or
``{train2017,val2017}``; labels (stuffthingmaps: 8-bit PNG, COCO-Stuff id - 1, 255 = unlabelled) in
``annotations/``, ``stuffthingmaps/``, ``stuffthingmaps_trainval2017/`` or beside the images. Training images
are crops (``ppap/data/crops.py``) unless --data.crop none. ``ppap/data/coco_lists.py`` has the lists of ids.
"""

import os
from pathlib import Path

from ppap.data.base import SPLITS, Datasets
from ppap.data.coco_lists import find_list
from ppap.data.crops import CROPS, crop_places, crop_table, find_crops
from ppap.data.pairs import IdTable, PairedFiles, Part, assemble, check_classes, data_root, name_array
from ppap.errors import DataError
from ppap.settings.config import DataConfig

NAMES = (
    "electronic",
    "appliance",
    "food",
    "furniture",
    "indoor",
    "kitchen",
    "accessory",
    "animal",
    "outdoor",
    "person",
    "sports",
    "vehicle",
    "ceiling",
    "floor",
    "food (stuff)",
    "furniture (stuff)",
    "raw material",
    "textile",
    "wall",
    "window",
    "building",
    "ground",
    "plant",
    "sky",
    "solid",
    "structural",
    "water",
)
"""The 27 classes in the order of their ids; 0..11 are things."""

# First and last fine id, class: the ids 0..181 without gaps.
_RUNS = (
    *((0, 0, 9), (1, 8, 11), (9, 14, 8), (15, 24, 7), (25, 32, 6), (33, 42, 10), (43, 50, 5), (51, 60, 2)),
    *((61, 70, 3), (71, 76, 0), (77, 82, 1), (83, 90, 4), (91, 92, 17), (93, 93, 22), (94, 95, 20)),
    *((96, 96, 22), (97, 97, 15), (98, 98, 25), (99, 99, 16), (100, 100, 13), (101, 102, 12), (103, 104, 17)),
    *((105, 105, 23), (106, 107, 15), (108, 108, 17), (109, 109, 15), (110, 110, 21), (111, 111, 15)),
    *((112, 112, 25), (113, 117, 13), (118, 118, 22), (119, 119, 26), (120, 121, 14), (122, 122, 15)),
    *((123, 123, 22), (124, 125, 21), (126, 126, 24), (127, 127, 20), (128, 128, 22), (129, 129, 15)),
    *((130, 130, 17), (131, 131, 16), (132, 132, 15), (133, 133, 22), (134, 134, 24), (135, 135, 21)),
    *((136, 136, 17), (137, 137, 25), (138, 138, 16), (139, 139, 21), (140, 140, 17), (141, 141, 22)),
    *((142, 142, 16), (143, 144, 21), (145, 145, 25), (146, 146, 21), (147, 147, 26), (148, 148, 21)),
    *((149, 149, 24), (150, 150, 20), (151, 151, 17), (152, 152, 14), (153, 153, 21), (154, 154, 26)),
    *((155, 155, 15), (156, 156, 23), (157, 157, 20), (158, 158, 21), (159, 159, 24), (160, 160, 15)),
    *((161, 161, 24), (162, 162, 22), (163, 163, 25), (164, 164, 15), (165, 165, 20), (166, 167, 17)),
    *((168, 168, 22), (169, 169, 14), (170, 176, 18), (177, 178, 26), (179, 180, 19), (181, 181, 24)),
)
COARSE = tuple(coarse for first, last, coarse in _RUNS for _ in range(first, last + 1))
"""Class 0..26 of each fine id 0..181."""

_STUFF = 12  # the first class that is stuff
SUBSETS = {
    "cocostuff27": tuple(range(27)),
    "cocostuff15": (-1,) * _STUFF + tuple(range(15)),
    "cocostuff3": tuple({23: 0, 22: 1, 21: 2}.get(c, -1) for c in range(27)),
}
"""DataConfig.kind -> its class of each of the 27; -1 = ignored."""
TRAIN_LISTS = {"cocostuff27": "full", "cocostuff15": "7", "cocostuff3": "few6"}

_BASES = ("", "cocostuff", "coco")
_IMAGES = ("images/{}", "{}")
_LABELS = ("annotations/{}", "stuffthingmaps/{}", "stuffthingmaps_trainval2017/{}", "labels/{}", "{}")
_FOLDERS = {"train": "train2017", "val": "val2017"}


def build(config: DataConfig, splits: tuple[str, ...] = SPLITS) -> Datasets:
    """Find, check and wrap the splits; called through ``ppap.data.build_datasets``."""
    root = data_root(config)
    names = class_names(config.kind)
    check_classes(config, names)
    parts = {}
    for split in splits:
        cropped = split == "train" and config.crop == "five"
        parts[split] = _crops(config, root) if cropped else whole_images(config, root, split)
    return assemble(config, root, parts, names)


def class_names(kind: str) -> tuple[str, ...]:
    """Names of the classes of one of ``SUBSETS``, in the order of their ids."""
    classes = SUBSETS[kind]
    return tuple(NAMES[classes.index(c)] for c in range(max(classes) + 1))


def label_table(kind: str) -> IdTable:
    """Reader of the labels as distributed: 0..181, 255 = ignored."""
    fine = tuple(SUBSETS[kind][c] for c in COARSE)
    unused = (-2,) * (255 - len(fine))
    return IdTable((*fine, *unused, -1), "the COCO-Stuff ids of stuffthingmaps (0 to 181, 255)")


def list_name(config: DataConfig, split: str) -> str:
    """Key of ``coco_lists.FILES`` that a split takes."""
    train = TRAIN_LISTS[config.kind] if config.coco_list == "auto" else config.coco_list
    if split == "train":
        return train
    return "few6" if config.kind == "cocostuff3" and train == "few6" else "7"


def whole_images(config: DataConfig, root: Path, split: str) -> Part:
    """The uncropped images of a split's list.

    Raises:
        DataError: no such folders, or labels of another encoding.
    """
    folder = _FOLDERS[split]
    base, images, labels = _find_folders(root, folder, config.kind)
    which = list_name(config, split)
    ids, source = find_list((base, root), folder, which)
    names = name_array([f"{i:012d}" for i in ids])
    files = PairedFiles(names, (str(images) + os.sep, ".jpg"), (str(labels) + os.sep, ".png"))
    _refuse_converted(labels, files)
    form = f"{images.relative_to(root)} with {labels.relative_to(root)}, list {which} of {source}"
    return Part(files, label_table(config.kind), form, (len(ids),))


def _find_folders(root: Path, folder: str, kind: str) -> tuple[Path, Path, Path]:
    """(base, image folder, label folder) of ``train2017`` or ``val2017``."""
    seen = None
    for base in (root / b for b in _BASES):
        for images in (base / form.format(folder) for form in _IMAGES):
            if not images.is_dir():
                continue
            seen = seen or images
            for labels in (base / form.format(folder) for form in _LABELS):
                if labels.is_dir() and (labels != images or _holds_pngs(labels)):
                    return base, images, labels
    if seen is None:
        raise DataError(
            f"{root}: no images/{folder} and no {folder} folder of {kind}; unzip {folder}.zip into images/ "
            "there, or name another --data.root (docs/datasets.md has the tree)"
        )
    raise DataError(
        f"{root}: {seen.relative_to(root)} has no labels; unzip stuffthingmaps_trainval2017.zip into "
        "annotations/ there"
    )


def _holds_pngs(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.name.endswith(".png") for entry in entries)


def _refuse_converted(labels: Path, files: PairedFiles) -> None:
    if not os.path.exists(files.label_path(0)) and (labels / f"{files.name(0)}_labelTrainIds.png").exists():
        raise DataError(
            f"{labels}: only *_labelTrainIds.png, a conversion with other ids; unzip "
            "stuffthingmaps_trainval2017.zip there"
        )


def _crops(config: DataConfig, root: Path) -> Part:
    """The five-crop folder, whose number of crops must be that of a list."""
    places = [root, *(root / b for b in _BASES[1:])]
    if root.resolve().name in _BASES[1:]:
        places.append(root.resolve().parent)
    files, folder = find_crops(crop_places(config, places), "cocostuff27", config.crop_ratio, config.kind)
    asked = list_name(config, "train")
    # Which images the crops are of cannot be seen but by their number.
    known = [asked] if config.coco_list != "auto" else list(dict.fromkeys([asked, "full", "7", "few6"]))
    counts = {}
    for which in known:
        try:
            counts[which] = CROPS * len(find_list((*places,), _FOLDERS["train"], which)[0])
        except DataError:
            if which != "few6":
                raise
    matching = [which for which, count in counts.items() if count == len(files)]
    form = f"{folder}: crops of list {matching[0]}" if matching else f"{folder}: crops of no known list"
    return Part(files, crop_table(SUBSETS[config.kind]), form, tuple(dict.fromkeys(counts.values())))
