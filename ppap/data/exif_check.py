"""Whether labels were drawn on rotated or on stored pixels: their borders lie where the picture has edges."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ppap.data.images import UPRIGHT

_SIDE = 256  # pixels: enough to see borders


class Evidence(NamedTuple):
    """How much stronger than elsewhere the edges of a picture are along the borders of its label."""

    image: Path
    upright: float
    """With the label as it is."""
    stored: float
    """With the label turned as the picture was."""


def borders_agree(image: Path, picture: Image.Image, ids: np.ndarray, turn: int) -> Evidence:
    """Compare both ways to lay a label over its picture.

    Args:
        image: file, for messages.
        picture: upright.
        ids: (H, W) integer ids of the label as stored, of the upright picture's size.
        turn: EXIF orientation 2..8 of the picture.
    """
    small = picture.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    edges = _steps(np.asarray(small, np.float64))
    label = Image.fromarray(ids.astype(np.uint8)).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
    ways = [np.asarray(label), np.asarray(label.transpose(UPRIGHT[turn]))]
    share = [_along(edges, _steps(way.astype(np.float64)) > 0) for way in ways]
    return Evidence(image, *share)


def _steps(values: np.ndarray) -> np.ndarray:
    """Differences to the right and lower neighbour, (H - 1, W - 1)."""
    return np.abs(np.diff(values, axis=1)[:-1]) + np.abs(np.diff(values, axis=0)[:, :-1])


def _along(edges: np.ndarray, borders: np.ndarray) -> float:
    wide = borders.copy()
    wide[1:] |= borders[:-1]
    wide[:, 1:] |= borders[:, :-1]
    return float(edges[wide].mean() / max(edges.mean(), 1e-9)) if wide.any() else 1.0
