"""Images and labels in a folder: the data set, and how its files are read.

``layouts.py`` finds the files, ``folder_check.py`` checks them, ``ids.py`` says which ids are classes.
Where there are no validation images, a fixed sample of the training images stands in, without labels:
validation then draws pictures and has no metrics.
"""

import functools
import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ppap.data.base import SPLITS, Datasets, SegmentationDataset
from ppap.data.deep import sampled_range
from ppap.data.folder_check import LabelCounts, Readers, by, check, facts_of, partner, present_ids
from ppap.data.ids import Classes, choose_classes
from ppap.data.images import Reading, read_image
from ppap.data.label_files import LabelReader, choose_colours
from ppap.data.layouts import Layout, SplitFiles, find_layout
from ppap.data.transforms import Geometry
from ppap.errors import DataError, UsageError
from ppap.settings.config import DataConfig

UNLABELLED_CLASSES = 27
AS_STORED = Readers()
PICTURES = 16  # training images that stand in for missing validation images


class FolderDataset(SegmentationDataset):
    """Images of one split, and their labels; some may have none."""

    def __init__(self, files: SplitFiles, geometry: Geometry, classes: Classes, readers: Readers = AS_STORED):
        """Args: the files, the geometry of the split, the classes, and how files are read."""
        super().__init__(geometry, len(classes.ids), classes.names, labelled=files.labels is not None)
        self.ids, self.ignored_ids = classes.ids, classes.ignored
        self._names = list(files.images)
        self._images = [paths[0] for paths in files.images.values()]
        self._labels = None if files.labels is None else [partner(files, name) for name in self._names]
        self.readers, self.facts = readers, facts_of(readers)
        # Stored id -> class; -1 = ignored, -2 = an id that must not occur.
        self._classes = np.full(256, -2, np.int32)
        for number, stored in enumerate(classes.ids):
            if 0 <= stored < 256:  # ids are 8-bit, clusters may be more
                self._classes[stored] = number
        self._classes[list(classes.ignored)] = -1

    def __len__(self) -> int:
        return len(self._images)

    def name(self, i: int) -> str:
        return self._names[i]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.geometry, self._classes.tolist(), self._names)).encode())
        if self.readers != AS_STORED:
            digest.update(repr(self.readers).encode())
        missing = [i for i, path in enumerate(self._labels or ()) if path is None]
        digest.update(repr(missing).encode() if missing else b"")
        for path in (*self._images, *(path for path in self._labels or () if path is not None)):
            found = os.stat(path)
            digest.update(_content(path, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
        return digest.hexdigest()

    def original(self, i: int) -> Image.Image:
        return read_image(self._images[i], self.readers.images)

    def load(self, i: int) -> tuple[Image.Image, np.ndarray | None]:
        picture = self.original(i)
        if self._labels is None:
            return picture, None
        if self._labels[i] is None:
            return picture, np.full(picture.size[::-1], -1, np.int32)
        stored = self.readers.labels(self._labels[i])
        ids = self._classes[stored]
        if ids.shape != picture.size[::-1]:
            sizes = f"{by(ids.shape[::-1])} for an image of {by(picture.size)} pixels"
            raise DataError(
                f"{self._labels[i]}: {sizes}; labels must match the image after its EXIF rotation"
            )
        if ids.min() == -2:
            stray = stored[ids == -2].min()
            raise DataError(
                f"{self._labels[i]}: id {stray} is neither one of {self.classes} classes nor ignored"
            )
        return picture, ids


@functools.cache
def _content(path: Path, *state: int) -> bytes:
    """Hash of a file; read once in a process while its number, its size and its times of change stay."""
    return hashlib.sha256(path.read_bytes()).digest()


def build(config: DataConfig, splits: tuple[str, ...] = SPLITS) -> Datasets:
    """Find, check and wrap the splits; called through ``ppap.data.build_datasets``.

    Raises:
        DataError: no such folder, no images, or the problems :func:`check` found.
        UsageError: --data.root is not given.
    """
    if config.root is None:
        raise UsageError("--data.root is not given; name the folder that holds the images")
    layout = find_layout(config.root, config.images, config.labels)
    wanted = [s for s in splits if s in layout.splits]
    if "train" in splits and "train" not in layout.splits:
        raise DataError(f"{layout.root}: {layout.form} has no train folder; add it, or use no split folders")
    if "val" in splits and "val" not in wanted:
        wanted.append("train")
    readers, config, notes = _readers(layout, config)
    known = len(config.label_ids) or config.classes or len(config.class_names)
    # Training and validation must agree on the classes, so the labels of the other split count too.
    others = [] if known else [s for s in layout.splits if layout.splits[s].labels is not None]
    counts = check(layout, config, tuple(dict.fromkeys([*wanted, *others])), readers)
    classes = _classes_of(counts, config, layout)
    built = {}
    for split in splits:
        side = config.resolution if split == "train" else config.eval_resolution
        files = layout.splits.get(split) or _stand_in(layout.splits["train"])
        built[split] = FolderDataset(files, Geometry(side, config.interpolation), classes, readers)
        if split in counts:
            pixels = [counts[split].pixels[i] if 0 <= i < 256 else 0 for i in classes.ids]
            built[split].label_counts = np.array(pixels, np.int64)
    if "val" in built and "val" in counts:
        built["val"].unscored = _scores_see_nothing(layout, counts["val"], classes, config)
    notes += [
        f"labels for {found.labelled} of {len(layout.splits[split].images)} {word} images"
        for split, word in (("train", "training"), ("val", "validation"))
        if split in built and (found := counts.get(split))
        if found.labelled < len(layout.splits[split].images)
    ]
    text = _describe(layout, built, known, replace(classes, notes=(*classes.notes, *notes)))
    return Datasets(built.get("train"), built.get("val"), text)


def _readers(layout: Layout, config: DataConfig) -> tuple[Readers, DataConfig, list[str]]:
    """How images and labels are read, settings with the names of a legend, and what to say about it."""
    notes = []
    images = [paths[0] for files in layout.splits.values() for paths in files.images.values()]
    value_range = () if config.value_range == (0, 65535) else config.value_range  # the same as none
    reading = Reading(config.bands, value_range, config.exif)
    if not config.value_range and (found := sampled_range(images, reading)):
        reading = replace(reading, value_range=found)
        notes.append(
            f"more than 8 bits: values {found[0]:g} to {found[1]:g}, 99 % of a sample, become black to white "
            "(--data.value-range)"
        )
    labels = {
        path: None
        for files in layout.splits.values()
        for paths in (files.labels or {}).values()
        for path in paths[:1]
    }
    # Where ids are given, as those of a run are, files hold them unless colours are given too.
    unknown = [] if config.label_ids and not config.label_colours else list(labels)
    colours, names, note = choose_colours(layout.root, unknown, config.label_colours)
    if note:
        notes.append(note)
    if names and not config.class_names and not config.label_ids and config.classes in (None, len(names)):
        config = replace(config, class_names=names)
    return Readers(reading, LabelReader(colours)), config, notes


def _scores_see_nothing(
    layout: Layout, found: LabelCounts, classes: Classes, config: DataConfig
) -> str | None:
    """Why scores would see no class of the validation labels; None where they see some.

    Raises:
        DataError: the labels have no class at all.
    """
    seen = [i for i in classes.ids if 0 <= i < 256 and i not in classes.ignored]
    if not found.pixels[seen].sum():
        held = ", ".join(map(str, np.flatnonzero(found.pixels)[:8]))
        raise DataError(
            f"{layout.root}: the validation labels hold no class (only ids {held}); write them again, change "
            "--data.ignore-ids, or remove them to train without scores"
        )
    if not found.cropped[seen].sum():
        return (
            f"{layout.root}: the validation labels have classes only outside the centre crop of "
            f"{config.eval_resolution} pixels, all that scores see; label the middle of the pictures, "
            "crop the files, or remove the labels to train without scores"
        )
    return None


def _stand_in(train: SplitFiles) -> SplitFiles:
    names = list(train.images)
    chosen = np.sort(np.random.default_rng(0).permutation(len(names))[:PICTURES])
    return SplitFiles({names[i]: train.images[names[i]] for i in chosen})


def _classes_of(counts: dict[str, LabelCounts], config: DataConfig, layout: Layout) -> Classes:
    """Classes of the labels, or as many as are asked for where there are none."""
    present = present_ids(counts)
    if present:
        try:
            return choose_classes(present, config)
        except DataError as error:
            raise DataError(f"{layout.root}: {error}") from None
    if config.label_ids:
        return choose_classes((), config)
    count = config.classes or len(config.class_names) or UNLABELLED_CLASSES
    names = config.class_names or tuple(f"class {c}" for c in range(count))
    return Classes(tuple(range(count)), config.ignore_ids, names)


def _describe(layout: Layout, built: dict[str, SegmentationDataset], known: int, classes: Classes) -> str:
    parts = []
    for split, word in (("train", "training"), ("val", "validation")):
        if split in built and split in layout.splits:
            labels = "labelled" if built[split].labelled else "no labels"
            parts.append(f"{len(built[split])} {word} images ({labels})")
    labelled = any(files.labels is not None for files in layout.splits.values())
    source = "" if known else " from the labels" if labelled else " by default, there being no labels"
    parts.append(f"{len(classes.ids)} {'class' if len(classes.ids) == 1 else 'classes'}{source}")
    if labelled and len(classes.ids) == 1:
        parts.append("a single class: every score will be 100 %")
    parts += classes.notes
    if "val" in built and "val" not in layout.splits:
        parts.append("no validation images: pictures of training images, no metrics")
    elif "val" in built and not built["val"].labelled:
        parts.append("no validation labels: pictures, no metrics")
    if layout.unused:
        parts.append(f"not used: {', '.join(layout.unused)}")
    parts += layout.notes
    return f"{layout.root}: found: {layout.form}; {'; '.join(parts)}."
