"""Images and labels in a folder: finding out how it is laid out, checking every file, reading samples.

Layouts, tried in this order:

- ``images/{train,val}`` and, optionally, ``labels/{train,val}`` (also ``imgs`` + ``labels``, ``img_dir`` +
  ``ann_dir``); a label is a PNG of class ids with the relative path of its image. Either split may lack
  labels.
- ``images`` + ``labels`` without split folders: all of it is the training split.
- any other folder: its images, at any depth, without labels.

Where there are no validation images, a fixed sample of the training images stands in, without labels:
validation then draws pictures and has no metrics.
"""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ppap.data.base import SPLITS, Datasets, SegmentationDataset
from ppap.data.checks import SHOWN, Problems, in_threads
from ppap.data.ids import Classes, choose_classes
from ppap.data.images import SUFFIXES, find_images, read_image, read_label, verify_image
from ppap.data.transforms import Geometry
from ppap.errors import DataError, UsageError
from ppap.settings.config import DataConfig

PAIRS = (("images", "labels"), ("imgs", "labels"), ("img_dir", "ann_dir"))
UNLABELLED_CLASSES = 27
PICTURES = 16  # training images that stand in for missing validation images


@dataclass(frozen=True)
class SplitFiles:
    """The files of one split; ``labels`` is None where the split has no label folder."""

    images: dict[str, list[Path]]
    labels: dict[str, list[Path]] | None = None
    label_dir: Path | None = None


@dataclass(frozen=True)
class Layout:
    """What :func:`find_layout` found: the splits that exist and a few words about the folder."""

    root: Path
    splits: dict[str, SplitFiles]
    form: str
    unused: tuple[str, ...] = ()


@dataclass
class LabelCounts:
    """What the labels of one split hold, at original size."""

    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    """(256,) int64: pixels per stored id."""
    files: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    """(256,) int64: files that hold the id."""
    first: dict[int, Path] = field(default_factory=dict)
    """id -> first file, in the order of names, that holds it."""


class FolderDataset(SegmentationDataset):
    """Images of one split; see the module's docstring for the layouts."""

    def __init__(self, files: SplitFiles, geometry: Geometry, classes: Classes):
        """Args: the files, the geometry of the split, and the classes."""
        super().__init__(geometry, len(classes.ids), classes.names, labelled=files.labels is not None)
        self.ids, self.ignored_ids = classes.ids, classes.ignored
        self._names = list(files.images)
        self._images = [paths[0] for paths in files.images.values()]
        self._labels = None if files.labels is None else [files.labels[name][0] for name in self._names]
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
        for path in (*self._images, *(self._labels or ())):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def original(self, i: int) -> Image.Image:
        return read_image(self._images[i])

    def load(self, i: int) -> tuple[Image.Image, np.ndarray | None]:
        picture = self.original(i)
        if self._labels is None:
            return picture, None
        stored = read_label(self._labels[i])
        ids = self._classes[stored]
        if ids.shape != picture.size[::-1]:
            sizes = f"{_by(ids.shape[::-1])} for an image of {_by(picture.size)} pixels"
            raise DataError(
                f"{self._labels[i]}: {sizes}; labels must match the image after its EXIF rotation"
            )
        if ids.min() == -2:
            stray = stored[ids == -2].min()
            raise DataError(
                f"{self._labels[i]}: id {stray} is neither one of {self.classes} classes nor ignored"
            )
        return picture, ids


def build(config: DataConfig, splits: tuple[str, ...] = SPLITS) -> Datasets:
    """Find, check and wrap the splits; called through ``ppap.data.build_datasets``.

    Raises:
        DataError: no such folder, no images, or the problems :func:`check` found.
        UsageError: --data.root is not given.
    """
    if config.root is None:
        raise UsageError("--data.root is not given; name the folder that holds the images")
    layout = find_layout(config.root)
    wanted = [s for s in splits if s in layout.splits]
    if "train" in splits and "train" not in layout.splits:
        raise DataError(f"{layout.root}: {layout.form} has no train folder; add it, or use no split folders")
    if "val" in splits and "val" not in wanted:
        wanted.append("train")
    known = len(config.label_ids) or config.classes or len(config.class_names)
    # Training and validation must agree on the classes, so the labels of the other split count too.
    others = [] if known else [s for s in layout.splits if layout.splits[s].labels is not None]
    counts = check(layout, config, tuple(dict.fromkeys([*wanted, *others])))
    classes = _classes_of(counts, config, layout)
    built = {}
    for split in splits:
        side = config.resolution if split == "train" else config.eval_resolution
        files = layout.splits.get(split) or _stand_in(layout.splits["train"])
        built[split] = FolderDataset(files, Geometry(side, config.interpolation), classes)
        if split in counts:
            pixels = [counts[split].pixels[i] if 0 <= i < 256 else 0 for i in classes.ids]
            built[split].label_counts = np.array(pixels, np.int64)
    return Datasets(built.get("train"), built.get("val"), _describe(layout, built, known, classes))


def find_layout(root: str | os.PathLike) -> Layout:
    """Recognise the layout of a folder and list its files, without opening any.

    Args:
        root: the folder; ``~`` is expanded.

    Returns:
        The splits that exist (``train``, ``val`` or both), and how the folder is laid out.

    Raises:
        DataError: no such folder, no images, or labels without a folder of images.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"{root}: {'not a' if root.exists() else 'no such'} folder; give --data.root DIR")
    for image_dir, label_dir in PAIRS:
        pictures, labels = root / image_dir, root / label_dir
        if pictures.is_dir() and (labels.is_dir() or any((pictures / s).is_dir() for s in SPLITS)):
            return _paired_layout(root, pictures, labels)
    for label_dir in dict.fromkeys(pair[1] for pair in PAIRS):
        if (root / label_dir).is_dir():
            image_dirs = " or ".join(f"{i}/" for i, label in PAIRS if label == label_dir)
            raise DataError(f"{root}: {label_dir}/ exists but its images do not; put them in {image_dirs}")
    return Layout(root, {"train": SplitFiles(_images_of(root))}, "a folder of images")


def _paired_layout(root: Path, pictures: Path, labels: Path) -> Layout:
    present = [s for s in SPLITS if (pictures / s).is_dir()]
    label_splits = [s for s in SPLITS if (labels / s).is_dir()]
    for split in label_splits:
        if split not in present:
            there, missing = f"{labels.name}/{split}", f"{pictures.name}/{split}"
            raise DataError(f"{root}: {there} exists but {missing} does not; add images or remove the labels")
    if not present:
        files = SplitFiles(_images_of(pictures), _labels_of(labels), labels)
        return Layout(root, {"train": files}, f"{pictures.name} with {labels.name}, no split folders")
    if labels.is_dir() and not label_splits and find_images(labels):
        wanted = " or ".join(f"{labels.name}/{s}" for s in present)
        raise DataError(
            f"{root}: {labels.name} has no split folders, {pictures.name} has; move them to {wanted}"
        )
    splits = {}
    for split in present:
        has_labels = split in label_splits
        splits[split] = SplitFiles(
            _images_of(pictures / split),
            _labels_of(labels / split) if has_labels else None,
            labels / split if has_labels else None,
        )
    form = f"{pictures.name}/{{{','.join(present)}}}"
    form += f" with {labels.name}/{{{','.join(label_splits)}}}" if label_splits else ""
    folders = sorted(p.name for p in pictures.iterdir() if p.is_dir() and not p.name.startswith("."))
    unused = tuple(f"{pictures.name}/{name}" for name in folders if name not in SPLITS)
    return Layout(root, splits, form, unused)


def check(layout: Layout, config: DataConfig, splits: tuple[str, ...] = SPLITS) -> dict[str, LabelCounts]:
    """Check every file before the first training step, and count the labels in the same pass.

    All problems are collected first: unreadable or truncated images and labels, images without a label,
    labels without an image, two images of one name, sizes that differ, stray ids. Images are verified rather
    than decoded (``images.verify_image`` says what that finds), labels are decoded; threads share the work.

    Args:
        layout: from :func:`find_layout`.
        config: ``classes`` or ``class_names`` decide which ids are stray; without both, none is.
        splits: the splits to check; those the layout lacks are skipped.

    Returns:
        split -> counts, for the splits with labels.

    Raises:
        DataError: one message with the number of problems of each kind, up to five names and the remedy.
    """
    problems = Problems(KINDS_OF_PROBLEMS)
    counts: dict[str, LabelCounts] = {}
    for split in splits:
        if split not in layout.splits:
            continue
        files = layout.splits[split]
        _check_names(files, problems)
        jobs = [(paths[0], _partner(files, name)) for name, paths in files.images.items()]
        found = LabelCounts()
        for (_, label), (histogram, errors) in zip(
            jobs, in_threads(_check_pair, jobs, f"check {split}"), strict=True
        ):
            for kind, text in errors:
                problems.add(kind, text)
            if histogram is not None:
                found.pixels += histogram
                found.files += histogram > 0
                for i in np.flatnonzero(histogram):
                    found.first.setdefault(int(i), label)
        if files.labels is not None:
            counts[split] = found
    _check_ids(counts, config, problems)
    problems.raise_if_any(f"{layout.root} ({layout.form})")
    return counts


KINDS_OF_PROBLEMS = {
    "image": ("images that cannot be read", "replace or remove them"),
    "double": ("images share their name with another one", "rename one of each, or remove it"),
    "missing": (
        "images have no label",
        "add the PNG named, or remove the image, or the whole label folder",
    ),
    "orphan": ("labels have no image", "remove them, or add images with their relative path"),
    "label": ("labels that cannot be used", "write them again as said"),
    "size": ("labels differ from their image in size", "they must match after the image's EXIF rotation"),
    "stray": ("label ids are neither classes nor ignored", "give the option named if the id is meant"),
}


def _check_names(files: SplitFiles, problems: Problems) -> None:
    for paths in files.images.values():
        for path in paths[1:]:
            problems.add("double", f"{path} and {paths[0].name}")
    if files.labels is None:
        return
    for name, paths in files.images.items():
        if name not in files.labels:
            problems.add("missing", f"{paths[0]}: no {files.label_dir / name}.png")
    for name, paths in files.labels.items():
        if name not in files.images:
            problems.add("orphan", str(paths[0]))


def _check_pair(job: tuple[Path, Path | None]) -> tuple[np.ndarray | None, list[tuple[str, str]]]:
    """One image and its label: the label's histogram (256,), and ``(kind, text)`` of each problem."""
    image, label = job
    size = histogram = None
    errors = []
    try:
        size = verify_image(image)
    except DataError as error:
        errors.append(("image", str(error)))
    if label is not None:
        try:
            ids = read_label(label)
            histogram = np.array(Image.fromarray(ids).histogram())
            if size is not None and size != ids.shape[::-1]:
                errors.append(("size", f"{label}: {_by(ids.shape[::-1])} for an image of {_by(size)} pixels"))
        except DataError as error:
            errors.append(("label", str(error)))
    return histogram, errors


def _check_ids(counts: dict[str, LabelCounts], config: DataConfig, problems: Problems) -> None:
    classes = len(config.label_ids) or config.classes or len(config.class_names)
    present = _present(counts)
    if not classes or not present or set(present) <= set(config.ignore_ids):
        return
    stray = choose_classes(present, config).stray
    for found in counts.values():
        for i in [i for i in stray if i in found.first]:
            ignore = " ".join(str(k) for k in sorted({*config.ignore_ids, *stray}))
            grow = f"{_options_for(max(stray) + 1, config)} or " if max(stray) < 255 else ""
            problems.add(
                "stray",
                f"{found.first[i]}: id {i} with {classes} classes, in {found.files[i]} files; "
                f"give {grow}--data.ignore-ids {ignore}",
            )


def _present(counts: dict[str, LabelCounts]) -> list[int]:
    return sorted({i for found in counts.values() for i in found.first})


def _options_for(classes: int, config: DataConfig) -> str:
    """The options that make it so many classes: those of which the present number comes."""
    options = [f"--data.label-ids with {classes - 1} too"] if config.label_ids else []
    options += [f"--data.classes {classes}"] if config.classes and not config.label_ids else []
    options += [f"--data.class-names with {classes} names"] if config.class_names else []
    return " and ".join(options)


def _images_of(folder: Path) -> dict[str, list[Path]]:
    found = find_images(folder)
    if not found:
        others = sorted({p.suffix.lower() for p in folder.rglob("*") if p.is_file() and p.suffix})
        hint = f" (it holds {', '.join(others[:SHOWN])})" if others else ""
        raise DataError(f"{folder}: no images{hint}; put files of type {', '.join(SUFFIXES)} there")
    return found


def _labels_of(folder: Path) -> dict[str, list[Path]]:
    pngs = {n: [p for p in paths if p.suffix.lower() == ".png"] for n, paths in find_images(folder).items()}
    return {name: paths for name, paths in pngs.items() if paths}


def _partner(files: SplitFiles, name: str) -> Path | None:
    return files.labels[name][0] if files.labels and name in files.labels else None


def _stand_in(train: SplitFiles) -> SplitFiles:
    names = list(train.images)
    chosen = np.sort(np.random.default_rng(0).permutation(len(names))[:PICTURES])
    return SplitFiles({names[i]: train.images[names[i]] for i in chosen})


def _classes_of(counts: dict[str, LabelCounts], config: DataConfig, layout: Layout) -> Classes:
    """Classes of the labels, or as many as are asked for where there are none."""
    present = _present(counts)
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
    parts.append(f"{len(classes.ids)} classes{source}")
    parts += classes.notes
    if "val" in built and "val" not in layout.splits:
        parts.append("no validation images: pictures of training images, no metrics")
    elif "val" in built and not built["val"].labelled:
        parts.append("no validation labels: pictures, no metrics")
    if layout.unused:
        parts.append(f"not used: {', '.join(layout.unused)}")
    return f"{layout.root}: {layout.form}; {'; '.join(parts)}."


def _by(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
