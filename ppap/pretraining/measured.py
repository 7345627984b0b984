"""The images that a distilled student is measured on, with labels where there are any."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ppap.data import build_dataset
from ppap.data.base import SegmentationDataset
from ppap.data.folder import UNLABELLED_CLASSES, FolderDataset, Layout, SplitFiles, check, find_layout
from ppap.data.ids import Classes
from ppap.data.scenes import ScenesDataset
from ppap.data.transforms import Geometry
from ppap.errors import DataError
from ppap.runs.randomness import drawn_order
from ppap.settings.config import DataConfig
from ppap.settings.pretraining import PretrainConfig

_SCENES_SEED = 1000  # as ``ppap.pretraining.measure``: no preset's evaluation reads them


@dataclass(frozen=True)
class Measured:
    """Squares, cut from the middle of images."""

    pixels: Tensor
    """(M, 3, S, S) uint8 RGB."""
    labels: Tensor | None
    """(M, S, S) int64, -1 = ignored; None = there are none."""
    classes: int
    """Of the labels; without any, as many clusters as ``ppap train`` takes then."""
    description: str
    """What they are, in a few words."""


def measured_images(config: PretrainConfig) -> Measured:
    """``distill.measured`` images at ``data.resolution``: validation images where there are any.

    Raises:
        DataError: files that cannot be read, labels included, or fewer than two images.
    """
    side, wanted = config.data.resolution, config.distill.measured
    geometry = Geometry(side, "bilinear")
    if config.data.kind == "scenes":
        level = "easy" if config.data.difficulty == "both" else config.data.difficulty
        dataset = ScenesDataset(geometry, "val", wanted, side, _SCENES_SEED, level)
        what = f"held-out scenes ({level})"
    else:
        dataset, what = _of_folder(config, geometry)
    if len(dataset) < 2:
        raise DataError("neighbours in other images are compared at the end: give at least 2 images")
    chosen = np.sort(drawn_order(len(dataset), 0, 6)[:wanted]).tolist()
    pixels = torch.stack([torch.from_numpy(dataset.pixels(i)).permute(2, 0, 1) for i in chosen])
    text = f"{len(chosen)} {what} of {side} pixels, "
    if not dataset.labelled:
        return Measured(pixels, None, UNLABELLED_CLASSES, text + "no labels")
    labels = torch.stack([dataset[i]["label"] for i in chosen])
    return Measured(pixels, labels, dataset.classes, f"{text}{dataset.classes} classes")


def _of_folder(config: PretrainConfig, geometry: Geometry) -> tuple[SegmentationDataset, str]:
    side = geometry.resolution
    data = DataConfig(
        kind="folder",
        root=config.data.root,
        resolution=side,
        eval_resolution=side,
        interpolation=geometry.interpolation,
    )
    layout = find_layout(config.data.root)
    splits = [split for split in ("val", "train") if split in layout.splits]
    labelled = [s for s in splits if config.distill.labels and layout.splits[s].labels is not None]
    split = (labelled or splits)[0]
    what = {"val": "validation images", "train": "training images"}[split]
    if labelled:
        try:
            return build_dataset(data, split), what
        except DataError as error:
            hint = "; or --distill.no-labels, which leaves the labels alone"
            raise DataError(f"{error}{hint}") from None
    files = SplitFiles(layout.splits[split].images)
    check(Layout(layout.root, {split: files}, layout.form), data, (split,))
    ids = tuple(range(UNLABELLED_CLASSES))
    classes = Classes(ids, data.ignore_ids, tuple(f"class {i}" for i in ids))
    return FolderDataset(files, geometry, classes), what
