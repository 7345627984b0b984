"""What the public data sets share: images and labels by name, ids by a table, and the check of their files.

Checked before a run: that every file is there and complete (``checks.check_complete``, no decoding), that
their number is the data set's, and that a few dozen pairs spread over each split decode to legal ids. A file
that turns out bad later is a DataError with its name. ``ppap prepare NAME --check`` decodes them all.
"""

import hashlib
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ppap.data.base import Datasets, SegmentationDataset
from ppap.data.checks import Problems, existing_folder, find_incomplete, in_threads
from ppap.data.images import read_image, read_label
from ppap.data.transforms import Geometry
from ppap.errors import DataError, UsageError
from ppap.settings.config import DataConfig

DECODED = 48  # pairs per split that are decoded before a run
WORDS = {"train": "training", "val": "validation"}
PROBLEMS = {
    "missing": ("images are missing", "add them, or accept the rest with --data.partial"),
    "count": (
        "counts of images differ from the data set's",
        "add the rest, or accept it with --data.partial",
    ),
    "unlabelled": ("images have no label", "add the files named"),
    "damaged": ("files are damaged", "copy them again from their archive"),
    "content": ("pairs cannot be used", "check that the folders hold this data set in its own encoding"),
}


@dataclass(frozen=True)
class PairedFiles:
    """Images and labels that follow from names. Arrays of bytes: a million names take 40 MB."""

    names: np.ndarray
    """(n,) bytes: paths relative to the folders, without suffix."""
    image: tuple[str, str]
    """What stands before and after the name in an image's path."""
    label: tuple[str, str] | None
    """The same for labels; None = there are none."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        """Name of image ``i``."""
        return os.fsdecode(self.names[i])

    def image_path(self, i: int) -> str:
        """Path of image ``i``."""
        return self.name(i).join(self.image)

    def label_path(self, i: int) -> str:
        """Path of label ``i``."""
        return self.name(i).join(self.label)


@dataclass(frozen=True)
class IdTable:
    """Reads labels whose 256 possible ids have a class each."""

    classes: tuple[int, ...]
    """Class of each id 0..255; -1 = ignored, -2 = must not occur."""
    encoding: str
    """What the ids are, for messages."""

    def __call__(self, path: str) -> np.ndarray:
        """(H, W) int32 classes, -1 = ignored, of a PNG.

        Raises:
            DataError: as ``images.read_label``, or an id that must not occur.
        """
        return self.of(read_label(path), path)

    def of(self, ids: np.ndarray, path: str) -> np.ndarray:
        """(H, W) int32 classes of (H, W) uint8 ids that were read from `path`."""
        result = np.array(self.classes, np.int32)[ids]
        if (result == -2).any():
            stray = sorted(set(ids[result == -2].tolist()))
            raise DataError(f"{path}: id {stray[0]} is none of {self.encoding}")
        return result


@dataclass(frozen=True)
class Part:
    """One split as it was found."""

    files: PairedFiles
    read_ids: Callable[[str], np.ndarray]
    """Label file -> (H, W) int32 classes, -1 = ignored; picklable, with a repr of its settings alone."""
    form: str
    """Where it was found, in a few words."""
    counts: tuple[int, ...] = ()
    """Numbers of images that are complete; empty = any."""
    short: tuple[str, ...] = ()
    """What is known to be missing apart from single files, such as frames of a city."""
    read_picture: Callable[[str], Image.Image] = read_image
    """Image file -> PIL RGB."""


class PairedDataset(SegmentationDataset):
    """One split of a public data set."""

    def __init__(self, part: Part, geometry: Geometry, class_names: Sequence[str]):
        super().__init__(geometry, len(class_names), tuple(class_names), part.files.label is not None)
        self.files, self._read_ids, self._read_picture = part.files, part.read_ids, part.read_picture

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        return self.files.name(i)

    def fingerprint(self) -> str:
        """From names, sizes and times of change: reading a hundred thousand images would take too long."""
        reader = _lasting(self._read_ids)
        digest = hashlib.sha256(repr((self.geometry, self.class_names, reader)).encode())
        for i in range(len(self)):
            for path in [self.files.image_path(i)] + ([self.files.label_path(i)] if self.labelled else []):
                found = os.stat(path)
                digest.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
        return digest.hexdigest()

    def original(self, i: int) -> Image.Image:
        return self._read_picture(self.files.image_path(i))

    def load(self, i: int) -> tuple[Image.Image, np.ndarray | None]:
        picture = self.original(i)
        if not self.labelled:
            return picture, None
        path = self.files.label_path(i)
        ids = self._read_ids(path)
        if ids.shape != picture.size[::-1]:
            label, image = (f"{w}x{h}" for w, h in (ids.shape[::-1], picture.size))
            raise DataError(f"{path}: {label} for an image of {image} pixels ({self.files.image_path(i)})")
        return picture, ids


def _lasting(reader: Callable[[str], np.ndarray]) -> object:
    """What stands for a reader in a hash: the same in every process, as an address in memory is not."""
    named = f"{reader.__module__}.{reader.__qualname__}" if inspect.isfunction(reader) else reader
    if " at 0x" in repr(named):
        raise TypeError(f"{named!r} is another one in every process; give its class a __repr__")
    return named


def name_array(names: Sequence[str]) -> np.ndarray:
    """Names as ``PairedFiles`` holds them."""
    return np.array([os.fsencode(name) for name in names])


def data_root(config: DataConfig) -> Path:
    """--data.root as a folder that exists.

    Raises:
        UsageError: it is not given.
        DataError: there is no such folder.
    """
    if config.root is None:
        raise UsageError(f"--data.root is not given; name the folder of {config.kind}")
    return existing_folder(config.root)


def check_classes(config: DataConfig, names: Sequence[str]) -> None:
    """Refuse another number of classes, other names or other ignored ids than the data set's.

    Raises:
        UsageError: as said.
    """
    given = config.classes or len(config.class_names) or len(names)
    if given != len(names) or config.class_names not in ((), tuple(names)):
        raise UsageError(
            f"{config.kind} has its own {len(names)} classes; leave out --data.classes and --data.class-names"
        )
    if config.ignore_ids != (255,):
        raise UsageError(f"{config.kind} has its own ignored ids; leave out --data.ignore-ids")


def assemble(config: DataConfig, root: Path, parts: dict[str, Part], names: Sequence[str]) -> Datasets:
    """Check the files of each split and wrap them.

    Args:
        config: resolution, interpolation and ``partial``.
        root: named in messages.
        parts: split -> what was found.
        names: of the classes.

    Raises:
        DataError: all problems in one message.
    """
    problems, built, notes = Problems(PROBLEMS), {}, []
    for split, part in parts.items():
        side = config.resolution if split == "train" else config.eval_resolution
        part = _check_files(part, split, config.partial, problems)
        built[split] = PairedDataset(part, Geometry(side, config.interpolation), names)
        if not problems.found:
            _check_content(built[split], split, problems)
        labels = "labelled" if built[split].labelled else "no labels"
        notes.append(f"{len(part.files):,} {WORDS[split]} images ({labels}) from {part.form}")
        if part.counts and len(part.files) not in part.counts:
            notes[-1] += f", a part of {_wanted(part.counts)}"
    problems.raise_if_any(f"{root} ({config.kind})")
    notes.append(f"{len(names)} classes")
    notes.append("every file is complete" + ("" if config.partial else ", none is missing"))
    text = f"{config.kind} in {root}: {'; '.join(notes)}."
    return Datasets(built.get("train"), built.get("val"), text)


def _check_files(part: Part, split: str, partial: bool, problems: Problems) -> Part:
    """Add what is missing or damaged to `problems`; the part without missing images if that is accepted."""
    files = part.files
    missing, damaged = find_incomplete(files.image_path, len(files), f"check {split} images")
    for text in damaged.values():
        problems.add("damaged", text)
    there = np.delete(np.arange(len(files)), missing).tolist()
    if files.label is not None:
        unlabelled, damaged = find_incomplete(
            lambda k: files.label_path(there[k]), len(there), f"check {split} labels"
        )
        for k in unlabelled:
            i = there[k]
            problems.add("unlabelled", f"{files.image_path(i)}: no {files.label_path(i)}")
        for text in damaged.values():
            problems.add("damaged", text)
    if partial:
        kept = np.delete(files.names, missing)
        if not len(kept):
            problems.add("count", f"{part.form}: no {WORDS[split]} images at all")
        return Part(**{**vars(part), "files": PairedFiles(kept, files.image, files.label)})
    for i in missing:
        problems.add("missing", files.image_path(i))
    for text in part.short:
        problems.add("count", text)
    if part.counts and len(files) not in part.counts and not part.short:
        problems.add("count", f"{part.form}: {len(files):,} {WORDS[split]} images of {_wanted(part.counts)}")
    return part


def _check_content(dataset: PairedDataset, split: str, problems: Problems) -> None:
    """Decode pairs spread over the split."""
    chosen = np.unique(np.linspace(0, len(dataset) - 1, DECODED).astype(int)).tolist()

    def decode(i: int) -> str | None:
        try:
            dataset.load(i)
        except DataError as error:
            return str(error)
        return None

    for text in in_threads(decode, chosen, f"decode some {split} pairs"):
        if text is not None:
            problems.add("content", text)


def _wanted(counts: Sequence[int]) -> str:
    return " or ".join(f"{count:,}" for count in counts)
