"""The canvas that painters of synthetic scenes share: camera, depth buffer, colours, noise, weather.

``ppap/data/scenes.py`` composes scenes, ``ppap/data/scene_painters.py`` holds their parts.
"""

import colorsys
import functools
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

_GROUND_TILE = 512  # side of the noise that lies on the ground [tile pixels]
_GROUND_GRAIN = 4.0  # its features [tile pixels]: smooth enough to be sampled without interpolation


@dataclass(frozen=True)
class Look:
    """Ranges that a difficulty draws from; lengths in metres, angles as fractions of the image."""

    height: tuple[float, float]
    """Camera above the ground."""
    horizon: tuple[float, float]
    """Horizon below the image's top edge."""
    focal: tuple[float, float]
    """Focal length in units of the image side; varies the scale of everything."""
    crowd: float
    """Factor of the number of trees and vehicles."""
    occluders: int
    """Largest number of trees and vehicles right in front of the camera."""
    spread: float
    """How far colours leave the usual range of their class; 0 = not at all."""
    weather: tuple[float, float, float, float]
    """Odds of clear air, fog, dusk and rain."""


LOOKS = {
    "easy": Look((2.2, 5), (0.3, 0.5), (0.9, 1.1), 1, 0, 0, (1, 0, 0, 0)),
    "hard": Look((1.6, 8), (0.18, 0.58), (0.7, 2), 1.6, 2, 1, (0.4, 0.2, 0.2, 0.2)),
}
WEATHER = ("clear", "fog", "dusk", "rain")


class Canvas:
    """Colours, labels and depth of a scene, and what all painters share: camera, light and noise."""

    def __init__(self, rng: np.random.Generator, size: int, look: Look):
        self.rng, self.size, self.look = rng, size, look
        self.rgb = np.zeros((size, size, 3), np.float32)
        self.label = np.zeros((size, size), np.uint8)
        self.depth = np.full((size, size), np.inf, np.float32)
        self.haze = np.ones(3, np.float32)  # colour of the sky at the horizon
        self.weather = WEATHER[rng.choice(4, p=look.weather)]
        self.height = rng.uniform(*look.height)  # of the camera
        self.horizon = rng.uniform(*look.horizon)  # fraction of the image from the top
        self.focal = float(np.exp(rng.uniform(*np.log(look.focal))))
        self.sun = self.side()  # side it shines from
        overcast = self.weather in ("fog", "rain")
        self.shade = rng.uniform(0.75, 0.95) if overcast else rng.uniform(0.45, 0.9)  # brightness in shadow
        # Directions that pixels look into: x and y per metre of depth, y upwards from -1 at 45 degrees.
        steps = (np.arange(size, dtype=np.float32) + 0.5) / size
        self.cols = (steps[None] - 0.5) / np.float32(self.focal)
        self.rows = (steps[:, None] - np.float32(self.horizon)) / np.float32(self.focal)
        # Ground that each pixel sees: depth z and sideways x. Rows at or above the horizon see none (z < 0).
        z = np.where(self.rows > 0, self.height / np.where(self.rows > 0, self.rows, 1), -1)
        self.z = np.broadcast_to(z.astype(np.float32), (size, size))
        self.x = self.cols * self.z

    def side(self) -> int:
        """-1 or 1, at even odds."""
        return 1 if self.rng.random() < 0.5 else -1

    def colour(self, hue: tuple, saturation: tuple, value: tuple) -> np.ndarray:
        """(3,) float32 RGB drawn from ranges of hue, saturation and value, 0..1, widened by the look."""
        wide = self.look.spread
        h = self.rng.uniform(hue[0] - 0.05 * wide, hue[1] + 0.05 * wide)
        s = self.rng.uniform(saturation[0] * (1 - 0.4 * wide), min(saturation[1] + 0.15 * wide, 1))
        v = self.rng.uniform(value[0] * (1 - 0.3 * wide), min(value[1] + 0.1 * wide, 1))
        return np.float32(colorsys.hsv_to_rgb(h % 1, s, v))

    def noise(self, shape: tuple[int, int], grain: float | tuple[float, float]) -> np.ndarray:
        """(h, w) noise of mean 0 and deviation 1; features ``grain`` (or vertical, horizontal) pixels wide.

        A random cut-out, randomly mirrored, of a tile that is made once per process: read it, never write it.
        """
        grains = grain if isinstance(grain, tuple) else (grain, grain)
        tile = _noise_tile(2 * self.size, *(_rounded(g, self.size) for g in grains))
        top, left, mirror = self.rng.integers((self.size + 1, self.size + 1, 4))
        cut = tile[top : top + shape[0], left : left + shape[1]]
        return cut[:: 1 - 2 * (mirror & 1), :: 1 - (mirror & 2)]

    def ground_noise(self, mask: np.ndarray, along_x: float, along_z: float) -> np.ndarray:
        """(pixels of mask,) noise lying on the ground; features below a pixel, far away, fade out."""
        x, z = self.x[mask], self.z[mask]
        # About 10 tile pixels per feature.
        scale, start = np.float32(2.5 * _GROUND_GRAIN), self.rng.integers(_GROUND_TILE, size=2)
        row = (z * (scale / np.float32(along_z)) + start[0]).astype(np.int32) % _GROUND_TILE
        col = np.floor(x * (scale / np.float32(along_x)) + start[1]).astype(np.int32) % _GROUND_TILE
        values = _noise_tile(_GROUND_TILE, _GROUND_GRAIN, _GROUND_GRAIN)[row, col]
        pixels = self.size * self.focal * np.minimum(along_x / z, along_z * self.height / z**2)
        return values * np.clip(pixels / 2, 0, 1)

    def window(self, x: float, z: float, width: float, height: float) -> tuple | None:
        """Pixels, u (1, w), v (h, 1) of an upright rectangle at (x, z), 0 left and below; None = unseen."""
        left, right = self._column(x - width / 2, z), self._column(x + width / 2, z)
        foot, top = self._row(self.height, z), self._row(self.height - height, z)
        r0, r1 = max(round(top), 0), min(round(foot), self.size)
        c0, c1 = max(round(left), 0), min(round(right), self.size)
        if r1 <= r0 or c1 <= c0 or foot - top < 2:
            return None
        u = (np.arange(c0, c1, dtype=np.float32) + np.float32(0.5 - left)) / np.float32(right - left)
        v = (np.float32(foot - 0.5) - np.arange(r0, r1, dtype=np.float32)) / np.float32(foot - top)
        return (slice(r0, r1), slice(c0, c1)), u[None], v[:, None]

    def _column(self, x: float, z: float) -> float:
        return (x / z * self.focal + 0.5) * self.size

    def _row(self, below: float, z: float) -> float:
        return (below / z * self.focal + self.horizon) * self.size

    def paste(self, place: tuple, kind: int, z: np.ndarray | float, layers: list[tuple]) -> None:
        """Put layers ``(mask, colour)``, the last on top, where nothing nearer than ``z`` stands.

        ``place`` is a pair of slices.
        """
        depth, rgb = self.depth[place], self.rgb[place]
        visible = z < depth * 1.02
        covered = np.zeros_like(visible)
        for part, colour in layers:
            part = part & visible
            np.copyto(rgb, colour, where=part[..., None])
            covered |= part
        np.copyto(self.label[place], kind, where=covered)
        np.copyto(depth, z, where=covered)

    def shadow(self, x: float, z: float, width: float, length: float) -> None:
        """Darken an ellipse on the ground, away from the sun; call before the object itself is pasted."""
        middle = x - self.sun * width * 0.4
        near, far = max(z - 0.6 * length, 0.5), z + 0.6 * length
        r0, r1 = int(max(self._row(self.height, far), 0)), int(min(self._row(self.height, near), self.size))
        # Columns of the nearer, wider end, on both sides of the image's middle.
        ends = [self._column(middle + side * width * 0.6, depth) for side in (-1, 1) for depth in (near, far)]
        c0, c1 = int(max(min(ends), 0)), int(min(max(ends) + 1, self.size))
        if r1 <= r0 or c1 <= c0:
            return
        place = np.s_[r0:r1, c0:c1]
        across, along = (self.x[place] - middle) / width, (self.z[place] - z) / length
        dark = np.clip(1.4 - 4 * (across**2 + along**2), 0, 0.85 - 0.6 * self.shade).astype(np.float32)
        self.rgb[place] *= 1 - (dark * (self.depth[place] == self.z[place]))[..., None]


def _rounded(grain: float, size: int) -> float:
    """Powers of two, so that few tiles serve all; 0 = every pixel by itself."""
    return 0.0 if grain < 0.6 else 2.0 ** round(np.log2(min(grain, size / 8)))


@functools.lru_cache(maxsize=64)
def _noise_tile(side: int, tall: float, wide: float) -> np.ndarray:
    """(side, side) float32 of mean 0, deviation 1, wrapping around; the same in every process."""
    rng = np.random.default_rng((side, int(tall * 16), int(wide * 16)))
    tile = rng.standard_normal((side, side), np.float32)
    tile = ndimage.gaussian_filter(tile, (tall, wide), mode="wrap", truncate=3)
    tile = (tile - tile.mean()) / (tile.std() + 1e-6)
    tile.flags.writeable = False
    return tile


def develop(canvas: Canvas, sky: int) -> np.ndarray:
    """What air and camera do: weather, colour of the light, exposure, blur, noise. (size, size, 3) uint8."""
    rng, rgb = canvas.rng, canvas.rgb
    sight = {"fog": (18, 70), "rain": (40, 150)}.get(canvas.weather, (80, 500))
    air = 1 - np.exp(-np.minimum(canvas.depth, 1e4) / np.float32(rng.uniform(*sight)))
    if canvas.weather == "fog":
        rgb += (canvas.haze - rgb) * np.float32(0.8) * (canvas.label == sky)[..., None]
    rgb += (canvas.haze - rgb) * (air * (canvas.label != sky))[..., None]
    grey = (rgb @ np.full(3, 1 / 3, np.float32))[..., None]
    rgb = grey + (rgb - grey) * np.float32(rng.uniform(0.45, 1.1))
    light = rng.uniform(0.9, 1.1, 3) * rng.uniform(0.75, 1.1)
    if canvas.weather == "dusk":
        light *= rng.uniform(0.45, 0.75) * np.array([rng.uniform(0.8, 1.35), 1, rng.uniform(0.75, 1.4)])
    rgb = np.clip(rgb * np.float32(light), 0, 1.2) ** np.float32(rng.uniform(0.8, 1.3))
    if canvas.weather == "rain":
        drops = np.clip(canvas.noise(grey.shape[:2], (canvas.size / 32, 0)) - 1.6, 0, 1)[..., None]
        rgb = 0.12 + 0.7 * rgb + np.float32(rng.uniform(0.05, 0.25)) * drops
    for axis in (0, 1):
        _soften(np.moveaxis(rgb, axis, 0))
    noise = rng.uniform(0.005, 0.025) * (1.6 if canvas.weather == "dusk" else 1)
    rgb += rng.standard_normal(rgb.shape, np.float32) * np.float32(noise)
    return (np.clip(rgb, 0, 1) * 255).astype(np.uint8)


def _soften(rows: np.ndarray) -> None:
    """Blur along the first axis, in place: a Gaussian of 0.45 pixels."""
    side = np.float32(0.0726)
    edge = rows[1:-1] * (1 - 2 * side) + (rows[:-2] + rows[2:]) * side
    rows[1:-1] = edge
