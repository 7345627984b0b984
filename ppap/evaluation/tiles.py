"""Masks of pictures too large to be seen at once: overlapping tiles, each of them a picture to the network.

Scores of tiles are added under weights that fall off towards the edges of each, so that no seam shows. What
is held at a time is the patch scores of a few rows of tiles and the pixels of one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ppap.data.rasters import Source
from ppap.data.transforms import Geometry
from ppap.errors import UsageError
from ppap.evaluation.views import Lookout, View
from ppap.stopping import each

OVERLAP = 0.25
MAX_OVERLAP = 0.5


@dataclass(frozen=True)
class Tiling:
    """How a picture is cut."""

    tile: int
    """Side of a tile [pixels of the picture]."""
    resolution: int
    """Side at which the network sees it [pixels]."""
    overlap: float = OVERLAP
    """Least share of a tile's side that the next one covers too."""

    def __post_init__(self) -> None:
        if self.tile < 1:
            raise UsageError(f"--tile is {self.tile}; give at least 1 pixel")
        if not 0 <= self.overlap <= MAX_OVERLAP:
            raise UsageError(f"--tile-overlap is {self.overlap}; give 0 to {MAX_OVERLAP}")

    def sides(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of the tiles of a picture [pixels]: the tile's, or the picture's where smaller."""
        return min(self.tile, size[0]), min(self.tile, size[1])

    def seen(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) [pixels] at which the network sees each tile of a picture."""
        width, height = (max(1, round(side * self.resolution / self.tile)) for side in self.sides(size))
        return width, height

    def starts(self, length: int) -> list[int]:
        """First pixel of each tile along a side of `length` pixels, evenly spread."""
        side = min(self.tile, length)
        step = max(1, int(side * (1 - self.overlap)))
        count = 1 + -(-(length - side) // step)
        return [round(i * (length - side) / max(1, count - 1)) for i in range(count)]

    def count(self, size: tuple[int, int]) -> int:
        """Number of tiles of a picture of (width, height) pixels."""
        return len(self.starts(size[0])) * len(self.starts(size[1]))


def ramp(side: int, overlap: float) -> Tensor:
    """(side,) weights along a tile: 1 in the middle, falling off over the overlap at both ends, never 0."""
    reach = max(1.0, side * overlap)
    place = torch.arange(side, dtype=torch.float32) + 0.5
    return torch.minimum(place, side - place).div(reach).clamp(max=1)


def label_tiles(
    source: Source,
    lookout: Lookout,
    tiling: Tiling,
    geometry: Geometry,
    batch_size: int = 1,
) -> Iterator[tuple[int, Tensor]]:
    """Channels of a picture, band of rows after band.

    Args:
        source: the picture.
        lookout: the network.
        tiling: how it is cut.
        geometry: how tiles are resized.
        batch_size: tiles that go through the network at once.

    Yields:
        The first row of a band, and (rows, width) int64: the channel of each pixel, on the CPU.
    """
    lefts, tops = (tiling.starts(side) for side in source.size)
    (width, height), rows = tiling.sides(source.size), {}
    for i, top in enumerate(tops):
        rows[top] = _row(source, lookout, tiling, geometry, batch_size, top)
        end = tops[i + 1] if i + 1 < len(tops) else source.size[1]
        yield top, _blended(rows, lefts, (width, height), (top, end), source.size[0], tiling.overlap)
        rows = {first: views for first, views in rows.items() if first + height > end}


def _row(
    source: Source, lookout: Lookout, tiling: Tiling, geometry: Geometry, batch_size: int, top: int
) -> list[View]:
    """Views of the tiles of one row."""
    lefts, (width, height) = tiling.starts(source.size[0]), tiling.sides(source.size)
    seen, views = tiling.seen(source.size), []
    for start in each(range(0, len(lefts), batch_size)):
        parts = [source.region(left, top, width, height) for left in lefts[start : start + batch_size]]
        views += [found.view for found in lookout.look([geometry.scaled(part, seen) for part in parts])]
    return views


def _blended(
    rows: dict[int, Sequence[View]],
    lefts: Sequence[int],
    tile: tuple[int, int],
    band: tuple[int, int],
    width: int,
    overlap: float,
) -> Tensor:
    """(rows of the band, width) int64: channels with the largest sum of weighted scores."""
    size, (top, end) = (tile[1], tile[0]), band
    some = next(iter(rows.values()))[0].scores
    falloff = ramp(size[0], overlap)[:, None] * ramp(size[1], overlap)
    falloff = falloff.to(some.device)
    parts = []  # view, its weights in the band, where it lies in the band, which of its rows
    for first, views in rows.items():
        inside = slice(max(top - first, 0), min(end - first, size[0]))
        place = slice(first + inside.start - top, first + inside.stop - top)
        for left, view in zip(lefts, views, strict=True):
            length = view.weight(size)
            weight = falloff if length is None else falloff / length
            parts.append((view, weight[inside], (place, slice(left, left + size[1])), inside))
    best = torch.full((end - top, width), -torch.inf, device=some.device)
    labels = torch.zeros((end - top, width), dtype=torch.int64, device=some.device)
    for channel in range(len(some)):
        total = torch.zeros_like(best)
        for view, weight, place, inside in parts:
            total[place] += view.at(channel, size)[inside] * weight
        labels[total > best] = channel
        best = torch.maximum(best, total)
    return labels.cpu()


def labels_of(bands: Iterator[tuple[int, Tensor]], size: tuple[int, int], table: Tensor) -> np.ndarray:
    """(height, width) of the bands of :func:`label_tiles`, each channel replaced by its value in `table`.

    Args:
        bands: of a picture.
        size: its (width, height).
        table: (channels,) integers, whose type the result has.
    """
    out = np.empty((size[1], size[0]), table.numpy().dtype)
    for top, channels in bands:
        out[top : top + len(channels)] = table[channels].numpy()
    return out
