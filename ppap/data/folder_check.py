"""The check of a folder's files before the first step: all problems in one message, labels counted."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ppap.data.base import SPLITS
from ppap.data.checks import Problems, in_threads
from ppap.data.exif_check import Evidence, borders_agree
from ppap.data.ids import choose_classes
from ppap.data.images import Reading, orientation, read_image, stored_size, verify_image
from ppap.data.label_files import LabelReader
from ppap.data.layouts import Layout, SplitFiles
from ppap.data.transforms import Geometry
from ppap.errors import DataError
from ppap.settings.config import DataConfig

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


@dataclass
class LabelCounts:
    """What the labels of one split hold, at original size."""

    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    """(256,) int64: pixels per stored id."""
    files: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    """(256,) int64: files that hold the id."""
    cropped: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    """(256,) int64: pixels per id in the crops that the network sees."""
    first: dict[int, Path] = field(default_factory=dict)
    """id -> first file, in the order of names, that holds it."""
    labelled: int = 0
    """Images with a label."""


@dataclass(frozen=True)
class Readers:
    """How the files of a folder are read."""

    images: Reading = Reading()
    labels: LabelReader = LabelReader()


def check(
    layout: Layout, config: DataConfig, splits: tuple[str, ...] = SPLITS, readers: Readers | None = None
) -> dict[str, LabelCounts]:
    """Check every file before the first training step, and count the labels in the same pass.

    All problems are collected first: unreadable or truncated images and labels, labels without an image, two
    images of one name, sizes that differ, stray ids. Some images may lack a label. Images are verified rather
    than decoded (``images.verify_image`` says what that finds), labels are decoded; threads share the work.

    Args:
        layout: from ``layouts.find_layout``.
        config: what it says of classes decides which ids are stray; resolutions.
        splits: the splits to check; those the layout lacks are skipped.
        readers: of images and labels; None = as stored.

    Returns:
        split -> counts, for the splits with labels.

    Raises:
        DataError: one message with the number of problems of each kind, up to five names and the remedy.
    """
    readers = readers or Readers(Reading(exif=config.exif))
    problems, evidence = Problems(KINDS_OF_PROBLEMS), []
    counts: dict[str, LabelCounts] = {}
    for split in [s for s in splits if s in layout.splits]:
        files, found = layout.splits[split], LabelCounts()
        _check_names(files, problems)
        side = config.resolution if split == "train" else config.eval_resolution
        jobs = [
            (paths[0], partner(files, name), readers, Geometry(side)) for name, paths in files.images.items()
        ]
        results = in_threads(_check_pair, jobs, f"check {split}")
        for (_, label, _, _), (histograms, errors, seen) in zip(jobs, results, strict=True):
            for kind, text in errors:
                problems.add(kind, text)
            evidence += [seen] if seen is not None else []
            if histograms is not None:
                whole, cropped = histograms
                found.pixels += whole
                found.files += whole > 0
                found.cropped += cropped
                found.labelled += 1
                for i in np.flatnonzero(whole):
                    found.first.setdefault(int(i), label)
        if files.labels is not None:
            counts[split] = found
    _check_ids(counts, config, problems)
    some = all(found.labelled for found in counts.values())
    if {*problems.found} - ({"missing"} if some else set()):
        problems.raise_if_any(f"{layout.root} ({layout.form})")
    _check_turns(layout.root, evidence)
    return counts


def present_ids(counts: dict[str, LabelCounts]) -> list[int]:
    """Ids that occur in any split, sorted."""
    return sorted({i for found in counts.values() for i in found.first})


def partner(files: SplitFiles, name: str) -> Path | None:
    """The label of an image, if there is one."""
    return files.labels[name][0] if files.labels and name in files.labels else None


def _check_names(files: SplitFiles, problems: Problems) -> None:
    for paths in files.images.values():
        for path in paths[1:]:
            problems.add("double", f"{path} and {paths[0].name}")
    if files.labels is None:
        return
    for name, paths in files.images.items():
        if name not in files.labels:
            wanted = f"{files.label_dir / name}.png" if files.label_dir else "label beside it"
            problems.add("missing", f"{paths[0]}: no {wanted}")
    for name, paths in files.labels.items():
        if name not in files.images:
            problems.add("orphan", str(paths[0]))


def _check_pair(
    job: tuple[Path, Path | None, Readers, Geometry],
) -> tuple[tuple[np.ndarray, np.ndarray] | None, list[tuple[str, str]], Evidence | None]:
    """One image and its label: histograms (256,) of the label and its crop, problems, what EXIF says."""
    image, label, readers, geometry = job
    size = histograms = seen = None
    errors = []
    try:
        size = verify_image(image, readers.images)
    except DataError as error:
        errors.append(("image", str(error)))
    if label is not None:
        try:
            ids = readers.labels(label)
            if size is not None and size != ids.shape[::-1]:
                errors.append(("size", f"{label}: {_sizes(ids, image, size, readers.images)}"))
            histograms = _histogram(ids), _histogram(geometry.label(ids))
            if size == ids.shape[::-1]:
                seen = _turn_seen(image, ids, readers.images)
        except DataError as error:
            errors.append(("label", str(error)))
    return histograms, errors, seen


def _sizes(ids: np.ndarray, image: Path, size: tuple[int, int], reading: Reading) -> str:
    text = f"{by(ids.shape[::-1])} for an image of {by(size)} pixels"
    if reading.exif == "apply" and stored_size(image) == ids.shape[::-1]:
        text += ", which it is before its EXIF rotation; --data.exif ignore takes both as stored"
    return text


def _turn_seen(image: Path, ids: np.ndarray, reading: Reading) -> Evidence | None:
    """Whether a label was drawn on the rotated or on the stored pixels, where its size does not tell."""
    turn = orientation(image)
    if reading.exif == "ignore" or turn == 1 or (turn >= 5 and ids.shape[0] != ids.shape[1]):
        return None
    return borders_agree(image, read_image(image, reading), ids, turn)


def _check_turns(root: Path, evidence: Sequence[Evidence]) -> None:
    upright, stored = (sum(getattr(e, key) for e in evidence) for key in ("upright", "stored"))
    if stored > 1.2 * upright:
        worst = max(evidence, key=lambda e: e.stored - e.upright)
        raise DataError(
            f"{root}: the labels of {len(evidence)} images with EXIF rotation, such as {worst.image}, were "
            "drawn on the stored pixels: their borders fit the unrotated picture; give --data.exif ignore, "
            "or rotate the labels"
        )


def _histogram(ids: np.ndarray) -> np.ndarray:
    return np.array(Image.fromarray(ids.astype(np.uint8)).histogram())


def _check_ids(counts: dict[str, LabelCounts], config: DataConfig, problems: Problems) -> None:
    classes = len(config.label_ids) or config.classes or len(config.class_names)
    present = present_ids(counts)
    if not classes or not present or set(present) <= set(config.ignore_ids):
        return
    stray = choose_classes(present, config).stray
    for found in counts.values():
        for i in [i for i in stray if i in found.first]:
            ignore = " ".join(str(k) for k in sorted({*config.ignore_ids, *stray}))
            grow = f"{_options_for(stray, config)} or " if max(stray) < 255 else ""
            problems.add(
                "stray",
                f"{found.first[i]}: id {i} with {classes} classes, in {found.files[i]} files; "
                f"give {grow}--data.ignore-ids {ignore}",
            )


def _options_for(stray: Sequence[int], config: DataConfig) -> str:
    """The options that make the ids classes: those of which the present number comes."""
    if config.label_ids:
        return "--data.label-ids " + " ".join(map(str, [*config.label_ids, *stray]))
    classes = max(stray) + 1
    options = [f"--data.classes {classes}"] if config.classes else []
    options += [f"--data.class-names with {classes} names"] if config.class_names else []
    return " and ".join(options)


def by(size: tuple[int, ...]) -> str:
    """A size in words."""
    return "x".join(map(str, size))


def facts_of(readers: Readers) -> dict[str, Any]:
    """How files are read, as plain containers for a checkpoint."""
    return {
        "label_colours": [list(colour) for colour in readers.labels.colours],
        "bands": list(readers.images.bands),
        "value_range": list(readers.images.value_range),
        "exif": readers.images.exif,
    }
