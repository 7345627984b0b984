"""Datasets: what a run trains and validates on. Start reading in ``base.py``.

A dataset is one module with ``build(config, splits) -> Datasets`` and one row of ``KINDS``.
"""

import difflib
import importlib
from collections.abc import Sequence

import numpy as np

from ppap.data.base import SPLITS, Datasets, SegmentationDataset
from ppap.data.limits import set_max_pixels
from ppap.data.loading import EpochSampler, train_loader, val_loader
from ppap.errors import DataError, UsageError
from ppap.pictures.palette import MAX_COLOURS, palette
from ppap.settings.config import DataConfig

__all__ = [
    "KINDS",
    "Datasets",
    "EpochSampler",
    "SegmentationDataset",
    "build_dataset",
    "build_datasets",
    "class_colours",
    "train_loader",
    "val_loader",
]

KINDS = {
    "scenes": "ppap.data.scenes",
    "folder": "ppap.data.folder",
    "cocostuff27": "ppap.data.cocostuff",
    "cocostuff15": "ppap.data.cocostuff",
    "cocostuff3": "ppap.data.cocostuff",
    "cityscapes27": "ppap.data.cityscapes",
    "potsdam3": "ppap.data.potsdam",
    "imagenet_s": "ppap.data.imagenet_s",
}
"""DataConfig.kind -> module, imported on first use."""


def build_datasets(config: DataConfig, splits: tuple[str, ...] = SPLITS) -> Datasets:
    """The splits of the dataset that the settings name, all their files checked.

    Args:
        config: the data settings of a run.
        splits: those to build; the others are None.

    Returns:
        ``train``, ``val`` (None where there is none) and a one-sentence ``description``.

    Raises:
        DataError: missing, unreadable or inconsistent files; the message lists the problems and the remedies.
        UsageError: an unknown kind, or a setting this kind needs is not given.
    """
    return _build(config, splits)


def build_dataset(config: DataConfig, split: str) -> SegmentationDataset:
    """One split, ``"train"`` or ``"val"``; the other one is read only to learn the number of classes.

    Raises:
        DataError: as :func:`build_datasets`, or there is no such split.
        UsageError: as :func:`build_datasets`, or another word for ``split``.
    """
    if split not in SPLITS:
        raise UsageError(f"there is no split {split!r}; give {' or '.join(SPLITS)}")
    dataset = getattr(_build(config, (split,)), split)
    if dataset is None:
        raise DataError(f"the dataset {config.kind!r} has no {split} split")
    return dataset


def class_colours(kind: str, classes: int, ids: Sequence[int] = ()) -> np.ndarray:
    """(classes, 3) uint8 RGB: the customary colours of a data set where it has any, else ``palette``.

    Args:
        kind: of the data.
        classes: number of colours.
        ids: id of each class in files, -1 = none: an id has the same colour whatever others there are; empty
            = 0, 1, ...
    """
    module = importlib.import_module(KINDS[kind]) if kind in KINDS else None
    customary = getattr(module, "COLOURS", ())
    if len(customary) == classes:
        return np.array(customary, np.uint8)
    if len(ids) != classes:
        return palette(classes)
    colours = palette(min(max(ids) + 1 + classes, MAX_COLOURS))
    free = iter(sorted({*range(len(colours))} - {*ids}))
    return colours[[i if i >= 0 else next(free) for i in ids]]


def _build(config: DataConfig, splits: tuple[str, ...]) -> Datasets:
    if config.kind not in KINDS:
        near = difflib.get_close_matches(config.kind, KINDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(KINDS)}"
        raise UsageError(f"--data.kind is {config.kind!r}; {hint}")
    set_max_pixels(config.max_pixels)
    return importlib.import_module(KINDS[config.kind]).build(config, splits)
