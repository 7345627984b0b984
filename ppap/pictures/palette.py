"""Colours of classes that stay apart, for ordinary and for colour-blind eyes."""

import functools
from collections.abc import Sequence

import numpy as np

MAX_COLOURS = 1001

# Okabe and Ito's colours, told apart under the common forms of colour blindness; the rest of the palette
# grows from them.
_FIRST_COLOURS = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (213, 94, 0),
    (240, 228, 66),
)
_RGB_TO_LMS = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
_LMS_TO_OKLAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)
# Linear RGB as seen with protanopia and deuteranopia (Machado, Oliveira and Fernandes 2009, severity 1).
_COLOUR_BLIND = (
    ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
)


def palette(n: int) -> np.ndarray:
    """`n` distinct colours, the same for a class whatever `n` is: palette(5) begins palette(27).

    After seven fixed ones, each next colour is the one farthest from all before it, in the worst of normal
    vision, protanopia and deuteranopia. Greys are left out: they mean ignored.

    Args:
        n: number of colours, 0 to 1001.

    Returns:
        (n, 3) uint8 RGB.

    Raises:
        ValueError: `n` is out of range.
    """
    if not 0 <= n <= MAX_COLOURS:
        raise ValueError(f"palette: {n} colours asked for; give 0 to {MAX_COLOURS}")
    return _all_colours()[:n].copy()


@functools.cache
def _all_colours() -> np.ndarray:
    side = np.linspace(0, 255, 18).round()
    grid = np.stack(np.meshgrid(side, side, side, indexing="ij"), axis=-1).reshape(-1, 3)
    lightness, *opponent = _to_oklab(grid).T
    chroma = np.hypot(*opponent)
    # Neither too dark to see in a photograph nor too pale for a white page; visibly no grey, and not glaring.
    grid = grid[(lightness > 0.35) & (lightness < 0.94) & (chroma > 0.06) & (chroma < 0.26)]
    first = np.array(_FIRST_COLOURS, dtype=np.float64)
    seen, seen_first = _as_seen(grid), _as_seen(first)
    distance = np.min([_difference(seen, seen_first[:, i]) for i in range(len(first))], axis=0)
    chosen = []
    while len(first) + len(chosen) < MAX_COLOURS:
        chosen.append(distance.argmax())
        distance = np.minimum(distance, _difference(seen, seen[:, chosen[-1]]))
    return np.concatenate([first, grid[chosen]]).astype(np.uint8)


def _as_seen(colours: np.ndarray) -> np.ndarray:
    """(M, 3) sRGB -> (3, M, 3) OKLab of normal vision and, twice as long, of both colour blindnesses."""
    blind = [2 * _to_oklab(colours, matrix) for matrix in _COLOUR_BLIND]
    return np.stack([_to_oklab(colours), *blind])


def _difference(seen: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(M,) distances of colours to one, (3, M, 3) and (3, 3) of :func:`_as_seen`: the least of the three."""
    return np.linalg.norm(seen - other[:, None], axis=2).min(axis=0)


def _to_oklab(rgb: np.ndarray, vision: Sequence[Sequence[float]] | None = None) -> np.ndarray:
    """OKLab (Ottosson 2020) of (M, 3) sRGB values in 0..255, as seen through a colour-blindness matrix."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    if vision is not None:
        linear = np.clip(linear @ np.array(vision).T, 0, 1)
    return np.cbrt(linear @ np.array(_RGB_TO_LMS).T) @ np.array(_LMS_TO_OKLAB).T
