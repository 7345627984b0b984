"""A folder of masks that ``ppap predict`` wrote, to be written in other forms."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ppap.data.images import naming, stored_size
from ppap.data.scan import scan
from ppap.errors import DataError, UsageError
from ppap.reports.masks import find_images, is_begun, read_legend
from ppap.stopping import each


@dataclass(frozen=True)
class MaskClass:
    """One class of masks."""

    id: int
    """Pixel value."""
    name: str
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Masks:
    """A folder of masks, checked."""

    folder: Path
    classes: tuple[MaskClass, ...]
    """Those of the legend, in the order of their ids."""
    ignored: int
    """Pixel value without a class."""
    files: dict[str, Path]
    """Name, relative to the folder and without suffix -> mask."""
    images: dict[str, Path]
    """Name -> the image that it is the mask of; empty = not given."""

    def file_name(self, name: str) -> str:
        """Name of the image, with '/' between folders; NAME.jpg if the images were not given."""
        return f"{name}{self.images[name].suffix if name in self.images else '.jpg'}"

    def read(self, name: str) -> np.ndarray:
        """(H, W) int32 ids of a mask; -1 = no class.

        Raises:
            DataError: unreadable, or it has an id that the legend lacks.
        """
        path = self.files[name]
        with naming(path, "a mask", ("PNG",)), Image.open(path) as picture:
            values = np.array(picture).astype(np.int32)
        if values.ndim != 2:
            raise DataError(f"{path} holds colours, not ids; give the folder as `ppap predict` wrote it")
        known = {one.id for one in self.classes}
        values[values == self.ignored] = self.ignored if self.ignored in known else -1
        strange = {*np.unique(values).tolist()} - known - {-1}
        if strange:
            raise DataError(
                f"{path} has the id {min(strange)}, which {self.folder / 'legend.json'} lacks: it is of "
                "another run or other names; predict it again with the others"
            )
        return values

    def each(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, ids) of all masks."""
        for name in each(self.files):
            yield name, self.read(name)


def open_masks(folder: str, images: Sequence[str] = ()) -> Masks:
    """Look at a folder of masks, and at the images that they are of.

    Args:
        folder: of ``ppap predict``.
        images: the images that it was given; empty = none are needed.

    Raises:
        UsageError: the folder is not finished.
        DataError: no such folder, no legend, no masks, or a mask without an image of its size.
    """
    place = Path(folder)
    if not place.is_dir():
        raise DataError(f"there is no folder {folder}; give one that `ppap predict` wrote masks to")
    legend = read_legend(place)
    found = scan(place, masks_too=True).images
    files = {name: path for name, paths in found.items() for path in paths if path.suffix == ".png"}
    if not files:
        raise DataError(
            f"{folder} has no masks; write some: python -m ppap.predict RUN IMAGES --out {folder}"
        )
    if is_begun(place):
        raise UsageError(f"{folder} is not finished; give its ppap predict command again, which goes on")
    classes = (MaskClass(one["id"], one["name"], tuple(one["rgb"])) for one in legend["classes"])
    ordered = tuple(sorted(classes, key=lambda one: one.id))
    return Masks(place, ordered, legend["ignored_id"], files, _images_of(files, images))


def _images_of(files: dict[str, Path], given: Sequence[str]) -> dict[str, Path]:
    if not given:
        return {}
    images = find_images(given)
    for name, path in files.items():
        if name not in images:
            raise DataError(f"{path} has no image among --images; give all images that were predicted")
        size = stored_size(path)
        stored = stored_size(images[name])
        if sorted(stored) != sorted(size):  # EXIF may have turned it
            raise DataError(
                f"{images[name]} has {stored[0]} x {stored[1]} pixels, its mask {path} {size[0]} x "
                f"{size[1]}; give the images that the masks are of"
            )
    return {name: images[name] for name in files}
