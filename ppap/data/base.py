"""The contract of a dataset.

A new dataset is one file with a subclass and a ``build`` function, and one row in the table of
``ppap/data/__init__.py``.
"""

import hashlib
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ppap.data.transforms import Geometry, normalise
from ppap.errors import DataError

SPLITS = ("train", "val")


class SegmentationDataset(Dataset[dict[str, Any]]):
    """Images of one split, with or without labels, all cut to one square size.

    A subclass gives :meth:`__len__`, :meth:`name` and :meth:`load`; everything else follows. It must be
    picklable and hold no open file, since loader processes work on copies of it.

    Attributes:
        classes: number of classes C.
        class_names: C names in the order of their ids.
        labelled: whether there are labels; without them every label is -1.
        geometry: resizing and crop of this split.
        ids: C ids that files have for the classes, -1 = none; what pictures and written masks show.
        ignored_ids: ids of files that are left out.
        facts: how files are read, as plain containers for a checkpoint.
        unscored: why scores would see no class in the crops of this split; None = they see some, or nobody
            looked.
        label_counts: (C,) int64 labelled pixels per class at original size; None = nobody counted them.
    """

    def __init__(
        self, geometry: Geometry, classes: int, class_names: tuple[str, ...] = (), labelled: bool = True
    ):
        """Args as the attributes; no names = class 0, class 1, ..."""
        self.geometry = geometry
        self.classes = classes
        self.class_names = tuple(class_names) or tuple(f"class {c}" for c in range(classes))
        self.labelled = labelled
        self.ids: tuple[int, ...] = tuple(range(classes))
        self.ignored_ids: tuple[int, ...] = ()
        self.facts: dict[str, Any] = {}
        self.unscored: str | None = None
        self.label_counts: np.ndarray | None = None
        if len(self.class_names) != classes:
            raise DataError(f"{len(self.class_names)} class names for {classes} classes; name every class")

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, i: int) -> str:
        """Name of image ``i``, unique within the split, usable as a relative path without suffix."""
        raise NotImplementedError

    def load(self, i: int) -> tuple[Image.Image, np.ndarray | None]:
        """Picture and ids as stored: PIL RGB, and (H, W) integer ids 0..C-1 or -1, or None without labels."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hash of everything that the samples follow from; another hash means other samples.

        This one reads every image; a subclass may have a cheaper way.
        """
        digest = hashlib.sha256(repr((self.geometry, self.classes, len(self))).encode())
        for i in range(len(self)):
            picture, ids = self.load(i)
            digest.update(picture.tobytes())
            digest.update(b"" if ids is None else np.ascontiguousarray(ids, np.int32).tobytes())
        return digest.hexdigest()

    def original(self, i: int) -> Image.Image:
        """The uncropped picture, PIL RGB, upright."""
        return self.load(i)[0]

    def pixels(self, i: int) -> np.ndarray:
        """(H, W, 3) uint8: the picture before normalisation, in the geometry of the sample's image."""
        return self.geometry.image(self.original(i))

    def __getitem__(self, i: int) -> dict[str, Any]:
        """One sample.

        Args:
            i: 0 .. len - 1.

        Returns:
            A dict of image (3, H, W) float32, normalised; label (H, W) int64, 0..C-1 or -1 = ignored; index,
            the int ``i``.

        Raises:
            IndexError: no such image.
            DataError: a file is missing, unreadable or inconsistent.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        picture, ids = self.load(i)
        image = normalise(self.geometry.image(picture))
        if ids is None:
            label = torch.full(image.shape[1:], -1, dtype=torch.int64)
        else:
            label = torch.from_numpy(self.geometry.label(ids))
        return {"image": image, "label": label, "index": int(i)}


class Datasets(NamedTuple):
    """Both splits of a dataset; a split that does not exist, or was not asked for, is None."""

    train: SegmentationDataset | None
    val: SegmentationDataset | None
    description: str
    """One sentence for the first lines of a run: what was found, how much of it, and what that means."""
