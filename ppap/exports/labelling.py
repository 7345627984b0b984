"""Masks for programs in which people label images: CVAT's "Segmentation mask 1.1", and Datumaro's own format.

The library ``datumaro``, with which CVAT reads and writes both, writes them.
"""

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ppap.errors import DataError
from ppap.exports.coco import SUBSET
from ppap.exports.masks import MaskClass, Masks
from ppap.pictures.palette import MAX_COLOURS, palette

BACKGROUND = "background"
"""What CVAT's format calls pixels without a class."""


def check_names(masks: Masks) -> None:
    """Refuse names that CVAT's ``labelmap.txt`` cannot hold.

    Raises:
        DataError: names the class and the remedy.
    """
    seen: set[str] = set()
    for one in masks.classes:
        where = f"{masks.folder / 'legend.json'}: the class {one.id} is called {one.name!r}"
        remedy = "give it another name in names.json, and predict again"
        if one.name != one.name.strip() or not one.name or ":" in one.name or "\n" in one.name:
            raise DataError(
                f"{where}; labelmap.txt has no room for ':', line ends and outer spaces: {remedy}"
            )
        if one.name[0] == "#" or one.name == BACKGROUND:
            raise DataError(f"{where}, which labelmap.txt takes for something else: {remedy}")
        if one.name in seen:
            raise DataError(f"{where}, and so is another class; {remedy}")
        seen.add(one.name)


def write_cvat(masks: Masks, out: Path, with_images: bool) -> str:
    """Write a zip for CVAT: ``labelmap.txt``, ``ImageSets``, ``SegmentationClass``, ``SegmentationObject``.

    Every class of an image is one object.

    Args:
        masks: what to write, of :func:`check_names`.
        out: new file.
        with_images: copy the images too, into ``JPEGImages``.

    Returns:
        What was written, for people.
    """
    folder = out.with_name(f"{out.name}.folder")
    dataset = _dataset(masks, distinct_colours(masks.classes))
    dataset.export(str(folder), "voc_segmentation", save_media=with_images, label_map="source")
    made = shutil.make_archive(str(out.with_name(f"{out.name}.made")), "zip", folder)
    shutil.rmtree(folder)
    Path(made).rename(out)
    return f"{len(masks.files)} images, {len(masks.classes)} labels"


def write_datumaro(masks: Masks, out: Path, with_images: bool) -> str:
    """Write a folder of Datumaro's format, ids in masks as attributes; as :func:`write_cvat`."""
    _dataset(masks, [one.rgb for one in masks.classes]).export(str(out), "datumaro", save_media=with_images)
    return f"{len(masks.files)} images, {len(masks.classes)} labels"


def distinct_colours(classes: tuple[MaskClass, ...]) -> list[tuple[int, int, int]]:
    """Colours of classes, all different and none black: CVAT tells classes, and background, by them."""
    taken = {(0, 0, 0)}
    spare = (tuple(int(v) for v in colour) for colour in palette(MAX_COLOURS))
    own = {one.rgb for one in classes}
    found = []
    for one in classes:
        colour = one.rgb
        if colour in taken:
            colour = next(other for other in spare if other not in taken | own)
        taken.add(colour)
        found.append(colour)
    return found


def _dataset(masks: Masks, colours: list[tuple[int, int, int]]) -> Any:
    import datumaro as dm

    labels = dm.LabelCategories()
    for one in masks.classes:
        labels.add(one.name)
    categories = {
        dm.AnnotationType.label: labels,
        dm.AnnotationType.mask: dm.MaskCategories(dict(enumerate(colours))),
    }
    # Masks are read when they are written: once for all classes of an image.
    read = functools.lru_cache(maxsize=1)(masks.read)

    def items() -> Iterator[Any]:
        for name in masks.files:
            media = dm.Image.from_file(path=str(masks.images[name])) if name in masks.images else None
            present = {*np.unique(read(name)).tolist()}
            annotations = [
                dm.Mask(
                    image=functools.partial(_where, read, name, one.id),
                    label=place,
                    id=place + 1,
                    group=place + 1,
                    attributes={"mask_id": one.id},
                )
                for place, one in enumerate(masks.classes)
                if one.id in present
            ]
            yield dm.DatasetItem(id=name, subset=SUBSET, media=media, annotations=annotations)

    return dm.Dataset.from_iterable(list(items()), categories=categories, media_type=dm.Image)


def _where(read: Any, name: str, one: int) -> np.ndarray:
    """(H, W) bool: the pixels of a class."""
    return read(name) == one
