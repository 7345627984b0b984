"""Synthetic outdoor scenes with labels, generated on the fly: nothing is stored and nothing is downloaded.

They serve demonstrations and tests; numbers measured on them say nothing about photographs. A pinhole camera
stands some metres above flat ground and looks along z; x points right, all lengths are metres. Painters put
one element each onto a canvas with a depth buffer, so occlusion and scale follow. Colours overlap between
classes on purpose (water takes the sky's, walls and cars any, roads and sand share theirs) and the light
changes with the scene: texture, shape and place tell classes apart.
"""

import colorsys
import hashlib

import numpy as np
from PIL import Image
from scipy import ndimage

from ppap.config import DataConfig
from ppap.data.base import SPLITS, Datasets, SegmentationDataset
from ppap.data.transforms import Geometry
from ppap.errors import UsageError

CLASS_NAMES = ("sky", "water", "grass", "tree", "road", "building", "vehicle", "sand")
SKY, WATER, GRASS, TREE, ROAD, BUILDING, VEHICLE, SAND = range(len(CLASS_NAMES))


class ScenesDataset(SegmentationDataset):
    """``length`` scenes of one split, ``size`` pixels wide and high before the geometry is applied."""

    def __init__(self, geometry: Geometry, split: str, length: int, size: int, seed: int):
        super().__init__(geometry, len(CLASS_NAMES), CLASS_NAMES)
        self.split, self.length, self.size, self.seed = split, length, size, seed

    def __len__(self) -> int:
        return self.length

    def fingerprint(self) -> str:
        settings = (self.geometry, self.split, self.length, self.size, self.seed)
        digest = hashlib.sha256(repr(settings).encode())
        # A few scenes stand for all: they change when the generator does.
        for i in range(0, self.length, max(self.length // 4, 1)):
            picture, ids = self.load(i)
            digest.update(picture.tobytes() + ids.tobytes())
        return digest.hexdigest()

    def name(self, i: int) -> str:
        return f"scene_{self.split}_{i:05d}"

    def load(self, i: int) -> tuple[Image.Image, np.ndarray]:
        pixels, label = make_scene(self.seed, self.split, i, self.size)
        return Image.fromarray(pixels), label


def build(config: DataConfig, splits: tuple[str, ...] = SPLITS) -> Datasets:
    """The splits asked for; called through ``ppap.data.build_datasets``."""
    if config.classes not in (None, len(CLASS_NAMES)) or config.class_names not in ((), CLASS_NAMES):
        raise UsageError(
            f"the scenes have the {len(CLASS_NAMES)} classes {', '.join(CLASS_NAMES)}; "
            "leave out --data.classes and --data.class-names"
        )
    size, built = config.scenes_size, {}
    for split in splits:
        train = split == "train"
        geometry = Geometry(config.resolution if train else config.eval_resolution, config.interpolation)
        length = config.scenes_train if train else config.scenes_val
        built[split] = ScenesDataset(geometry, split, length, size, config.scenes_seed)
    counts = " and ".join(f"{len(dataset)} {split}" for split, dataset in built.items())
    text = f"{counts} synthetic scenes of {size}x{size} pixels, {len(CLASS_NAMES)} classes."
    return Datasets(built.get("train"), built.get("val"), text)


def make_scene(seed: int, split: str, index: int, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Generate one scene, a pure function of its arguments.

    Args:
        seed: of the whole set.
        split: ``"train"`` or ``"val"``; the two never share a scene.
        index: number of the scene, 0 or more.
        size: side [pixels], at least 16.

    Returns:
        (size, size, 3) uint8 RGB, (size, size) uint8 class ids; no pixel is ignored.
    """
    seeds = np.random.SeedSequence(seed % 2**64, spawn_key=(SPLITS.index(split), index))
    canvas = Canvas(np.random.default_rng(seeds), size)
    paint_sky(canvas)
    (compose_street, compose_meadow, compose_coast)[canvas.rng.choice(3, p=[0.35, 0.35, 0.3])](canvas)
    return develop(canvas), canvas.label


class Canvas:
    """Colours, labels and depth of a scene, and what all painters share: camera, light and noise."""

    def __init__(self, rng: np.random.Generator, size: int):
        self.rng, self.size = rng, size
        self.rgb = np.zeros((size, size, 3), np.float32)
        self.label = np.zeros((size, size), np.uint8)
        self.depth = np.full((size, size), np.inf, np.float32)
        self.haze = np.ones(3, np.float32)  # colour of the sky at the horizon
        self.height = rng.uniform(2.2, 5)  # of the camera
        self.horizon = rng.uniform(0.3, 0.5)  # fraction of the image from the top
        self.sun = int(rng.choice([-1, 1]))  # side it shines from
        self.shade = rng.uniform(0.45, 0.9)  # brightness of what lies in shadow
        self._tiles: dict[float, np.ndarray] = {}
        steps = (np.arange(size, dtype=np.float32) + 0.5) / size
        self.cols, self.rows = steps[None] - 0.5, steps[:, None] - np.float32(self.horizon)
        # Ground that each pixel sees: depth z and sideways x. Rows at or above the horizon see none (z < 0).
        z = np.where(self.rows > 0, self.height / np.where(self.rows > 0, self.rows, 1), -1)
        self.z = np.broadcast_to(z.astype(np.float32), (size, size))
        self.x = self.cols * self.z

    def colour(self, hue: tuple, saturation: tuple, value: tuple) -> np.ndarray:
        """(3,) float32 RGB drawn from ranges of hue, saturation and value, 0..1."""
        h, s, v = (self.rng.uniform(*span) for span in (hue, saturation, value))
        return np.float32(colorsys.hsv_to_rgb(h % 1, s, v))

    def noise(self, shape: tuple[int, int], grain: float) -> np.ndarray:
        """(h, w) noise of mean 0 and deviation 1 from a shared tile, features ``grain`` pixels wide."""
        grain = 0.0 if grain < 0.6 else 2.0 ** round(np.log2(min(grain, self.size / 8)))
        if grain not in self._tiles:
            tile = self.rng.standard_normal((self.size, self.size), np.float32)
            tile = ndimage.gaussian_filter(tile, grain, mode="wrap", truncate=3)
            self._tiles[grain] = np.tile((tile - tile.mean()) / (tile.std() + 1e-6), (2, 2))
        top, left = self.rng.integers(self.size, size=2)
        return self._tiles[grain][top : top + shape[0], left : left + shape[1]]

    def ground_noise(self, mask: np.ndarray, along_x: float, along_z: float) -> np.ndarray:
        """(pixels of mask,) noise lying on the ground; features below a pixel, far away, fade out."""
        x, z = self.x[mask], self.z[mask]
        points, tile = (z * (2.5 / along_z), x * (2.5 / along_x)), self.noise(self.z.shape, 1)
        values = ndimage.map_coordinates(tile, points, order=1, mode="grid-wrap")
        pixels = self.size * np.minimum(along_x / z, along_z * self.height / z**2)
        return values * np.clip(pixels / 2, 0, 1)

    def window(self, x: float, z: float, width: float, height: float) -> tuple | None:
        """Pixels, u (1, w), v (h, 1) of an upright rectangle at (x, z), 0 left and below; None = unseen."""
        left, right = ((side / z + 0.5) * self.size for side in (x - width / 2, x + width / 2))
        foot, top = ((self.horizon + up / z) * self.size for up in (self.height, self.height - height))
        r0, r1 = max(round(top), 0), min(round(foot), self.size)
        c0, c1 = max(round(left), 0), min(round(right), self.size)
        if r1 <= r0 or c1 <= c0 or foot - top < 2:
            return None
        u = (np.arange(c0, c1, dtype=np.float32) + 0.5 - left) / (right - left)
        v = (foot - 0.5 - np.arange(r0, r1, dtype=np.float32)) / (foot - top)
        return (slice(r0, r1), slice(c0, c1)), u[None], v[:, None]

    def paste(self, place: tuple, kind: int, z: np.ndarray | float, layers: list[tuple]) -> None:
        """Put layers ``(mask, colour)``, the last on top, where nothing nearer than ``z`` stands."""
        visible, rgb = z < self.depth[place] * 1.02, self.rgb[place]
        for part, colour in layers:
            rgb = np.where((part & visible)[..., None], colour, rgb)
        mask = visible & np.logical_or.reduce([part for part, _ in layers])
        self.rgb[place], self.label[place] = rgb, np.where(mask, kind, self.label[place])
        self.depth[place] = np.where(mask, z, self.depth[place])

    def shadow(self, x: float, z: float, width: float, length: float) -> None:
        """Darken an ellipse on the ground, away from the sun; call before the object itself is pasted."""
        rows = np.abs(self.z[:, 0] - z) < length
        across = (self.x[rows] - x + self.sun * width * 0.4) / width
        dark = np.clip(1.4 - 4 * (across**2 + ((self.z[rows] - z) / length) ** 2), 0, 0.85 - 0.6 * self.shade)
        self.rgb[rows] *= 1 - (dark * (self.depth[rows] == self.z[rows]))[..., None]


def develop(canvas: Canvas) -> np.ndarray:
    """What air and camera do: haze, colour of the light, exposure, blur, noise. (size, size, 3) uint8."""
    rng = canvas.rng
    air = 1 - np.exp(-np.minimum(canvas.depth, 1e4) / np.float32(rng.uniform(80, 500)))
    rgb = canvas.rgb + (canvas.haze - canvas.rgb) * (air * (canvas.label != SKY))[..., None]
    grey = rgb.mean(-1, keepdims=True)
    rgb = grey + (rgb - grey) * np.float32(rng.uniform(0.45, 1.1))
    light = np.float32(rng.uniform(0.9, 1.1, 3) * rng.uniform(0.75, 1.1))
    rgb = np.clip(rgb * light, 0, 1.2) ** np.float32(rng.uniform(0.8, 1.3))
    rgb = ndimage.gaussian_filter(rgb, (0.45, 0.45, 0), truncate=2.5)
    rgb += rng.standard_normal(rgb.shape, np.float32) * np.float32(rng.uniform(0.005, 0.025))
    return (np.clip(rgb, 0, 1) * 255).astype(np.uint8)


def paint_sky(canvas: Canvas) -> None:
    """A gradient from zenith to horizon, with clouds that are wider than high."""
    rng, size = canvas.rng, canvas.size
    hue, most = ((0.58, 0.75), (0.06, 0.6), (0.9, 0.35))[rng.choice(3, p=[0.75, 0.15, 0.1])]
    zenith = canvas.colour((hue - 0.04, hue + 0.04), (0.05, most), (0.45, 0.95))
    canvas.haze = 0.35 * zenith + 0.65 * canvas.colour((0.02, 0.15), (0, 0.3), (0.75, 1))
    up = np.clip(-canvas.rows / np.float32(canvas.horizon), 0, 1)[..., None]
    canvas.rgb[:] = canvas.haze + (zenith - canvas.haze) * up**0.8
    clouds = canvas.noise((size, size), size / 16) + 0.6 * canvas.noise((size, size), size / 32)
    clouds = clouds[np.arange(size) * 5 // 2 % size, :, None]
    cover = np.clip(0.5 * clouds + np.float32(rng.uniform(-0.9, 0.5)), 0, 1) * np.minimum(up * 4, 0.9)
    white = (0.85 + 0.15 * canvas.haze) * np.float32(rng.uniform(0.75, 1)) * (0.92 + 0.05 * clouds)
    canvas.rgb += (white - canvas.rgb) * cover


def paint_wood(canvas: Canvas, height: float, z: float) -> None:
    """A far wood along the whole horizon."""
    size = canvas.size
    tops = 1 + 0.25 * canvas.noise((1, size), size / 12) + 0.15 * canvas.noise((1, size), 1)
    up = canvas.height - canvas.rows * z
    light = 1 + 0.2 * canvas.noise((size, size), 1)[..., None]
    leaves = canvas.colour((0.08, 0.4), (0.15, 0.6), (0.2, 0.5)) * light
    canvas.paste(np.s_[:, :], TREE, z, [((up > 0) & (up < np.maximum(tops, 0.1) * height), leaves)])


def paint_ground(canvas: Canvas, kind: int, mask: np.ndarray) -> None:
    """Cover the part of the ground that ``mask`` (H, W) selects with water, grass, road or sand."""
    mask = mask & (canvas.z > 0)
    if mask.any():
        canvas.rgb[mask] = {WATER: _water, GRASS: _grass, ROAD: _road, SAND: _sand}[kind](canvas, mask)
        canvas.label[mask] = kind
        canvas.depth[mask] = canvas.z[mask]


def _water(canvas: Canvas, mask: np.ndarray) -> np.ndarray:
    # Far water mirrors the sky at grazing angles, near water shows its own colour; crests lie along x.
    own = canvas.colour((0.3, 0.65), (0.15, 0.7), (0.2, 0.65))
    mirror = 0.8 * (1 - np.exp(-canvas.z[mask] / 25))[:, None]
    waves = canvas.ground_noise(mask, 5, 0.9) + 0.7 * canvas.ground_noise(mask, 14, 3)
    streaks = ndimage.uniform_filter1d(canvas.noise(mask.shape, 0), max(canvas.size // 12, 2), axis=1)[mask]
    light = 1 + canvas.rng.uniform(0.06, 0.15) * (waves + 1.5 * streaks)
    glint = canvas.rng.uniform(0, 0.6) * np.clip(waves + 2 * streaks - 2.2, 0, 0.5)
    return (own + (0.9 * canvas.haze - own) * mirror) * light[:, None] + glint[:, None]


def _grass(canvas: Canvas, mask: np.ndarray) -> np.ndarray:
    # Upright blades near the camera, meadows of another green behind.
    base = canvas.colour((0.13, 0.37), (0.3, 0.75), (0.3, 0.65))
    other = base * canvas.rng.uniform(0.65, 1.25, 3)
    blend = np.clip(0.5 + 0.5 * canvas.ground_noise(mask, 12, 20), 0, 1)[:, None]
    blades = ndimage.uniform_filter1d(canvas.noise(mask.shape, 0), max(canvas.size // 42, 2), axis=0)[mask]
    light = 1 + 0.36 * np.clip(9 / canvas.z[mask], 0.25, 1) * blades + 0.1 * canvas.ground_noise(mask, 1, 2)
    return (base + (other - base) * blend) * light[:, None]


def _road(canvas: Canvas, mask: np.ndarray) -> np.ndarray:
    base = canvas.colour(((0.02, 0.15), (0.5, 0.75))[canvas.rng.integers(2)], (0, 0.25), (0.25, 0.62))
    light = 1 + 0.05 * canvas.ground_noise(mask, 3, 9) + 0.025 * canvas.noise(mask.shape, 0)[mask]
    return base * light[:, None]


def _sand(canvas: Canvas, mask: np.ndarray) -> np.ndarray:
    # Dunes, footprints (dark hollows) and grain.
    base = canvas.colour((0.04, 0.15), (0.1, 0.5), (0.5, 0.95))
    hollows = np.clip(canvas.ground_noise(mask, 0.9, 0.9) - 1, 0, 2)
    grain = 0.045 * canvas.noise(mask.shape, 0)[mask]
    return base * (1 + 0.07 * canvas.ground_noise(mask, 6, 6) - 0.14 * hollows + grain)[:, None]


def paint_road(canvas: Canvas, centre: np.ndarray | float, half: float, marked: bool) -> None:
    """A road along z: ``centre`` is its middle at each pixel, ``half`` its half width."""
    offset = np.abs(canvas.x - centre)
    paint_ground(canvas, ROAD, offset < half)
    if marked:
        line = (offset < 0.12 + 0.4 * canvas.z / canvas.size) & (canvas.z % 7 < 4)
        line = (line | (np.abs(offset - half + 0.4) < 0.12)) & (canvas.label == ROAD) & (canvas.z < 70)
        canvas.rgb[line] = 0.35 * canvas.rgb[line] + 0.65 * canvas.rng.uniform(0.8, 1)


def paint_tree(canvas: Canvas, x: float, z: float, height: float) -> None:
    """A trunk with a crown of leafy balls."""
    rng = canvas.rng
    width = height * rng.uniform(0.55, 0.95)
    canvas.shadow(x, z, width, width)
    window = canvas.window(x, z, width, height)
    if window is None:
        return
    place, u, v = window
    side, inside, relief = u * 2 - 1, np.float32(-1), np.float32(0)
    for _ in range(rng.integers(5, 9)):
        r = rng.uniform(0.18, 0.26)
        du, dv = (side - rng.uniform(-0.5, 0.5)) / (2 * r), (v - rng.uniform(0.5, 0.78)) / r
        ball = 1 - du**2 - dv**2
        relief = np.where(ball > inside, 0.6 * (canvas.sun * du + dv), relief)
        inside = np.maximum(inside, ball)
    grain = canvas.size * height / z / 22
    leaves = canvas.noise(inside.shape, grain) + 0.5 * canvas.noise(inside.shape, grain / 2)
    light = np.clip(1 + (1 - canvas.shade) * (relief + v - 0.65) + 0.22 * leaves, 0.25, 1.8)[..., None]
    crown = canvas.colour((0.03, 0.45), (0.3, 0.75), (0.25, 0.6)) * light
    bark = canvas.colour((0.02, 0.1), (0.15, 0.5), (0.15, 0.45)) * (1 + 4 * canvas.sun * side[..., None])
    trunk = (np.abs(side) < 0.06 + 0.03 * (1 - v)) & (v < 0.5)
    canvas.paste(place, TREE, z, [(trunk, np.clip(bark, 0.05, 1)), (inside + 0.13 * leaves > 0, crown)])


def paint_building(canvas: Canvas, x: float, z: float, size: np.ndarray) -> None:
    """A block of (width, height, depth) with its front at z and a side receding; low ones have a roof."""
    rng, (width, height, depth) = canvas.rng, size
    hue = rng.choice([0.04, 0.12, 0.58, 0.3])
    wall = canvas.colour((hue - 0.04, hue + 0.06), (0, 0.5), (0.4, 0.95))
    glass = canvas.haze * rng.uniform(0.15, 0.65) + rng.uniform(0, 0.2)
    step, storey, pane = rng.uniform(1.6, 3.2), rng.uniform(2.6, 3.4), rng.uniform(0.35, 0.75)
    canvas.shadow(x, z + depth / 2, width * 1.3, depth * 1.2)

    def wall_at(along: np.ndarray, far: np.ndarray, seen: np.ndarray, light: float) -> None:
        # all (1, W): metres along the wall, its depth, and the columns that see it
        along, far = along[seen], far[seen]
        up = canvas.height - canvas.rows * far
        rows = ((up > 0) & (up < height)).any(1)
        place, up = np.ix_(rows, seen[0]), up[rows]
        mask = (up > 0) & (up < height)
        window = (along % step < step * pane) & (np.abs(up % storey - 1.5) < 0.75) & (up < height - 0.5)
        plain = wall * (1 + 0.035 * canvas.noise(up.shape, 1) - 0.12 * (up > height - 0.35))[..., None]
        canvas.paste(place, BUILDING, far[None], [(mask, light * plain), (mask & window, light * glass)])

    left, right, cols = x - width / 2, x + width / 2, canvas.cols
    far = (left if left > 0 else min(right, 0)) / np.where(np.abs(cols) < 1e-4, 1e-4, cols)
    wall_at(far, far, (far > z) & (far < z + depth), canvas.shade if canvas.sun * x > 0 else 1)
    front = (cols * z > left) & (cols * z < right)
    wall_at(cols * z - left, np.full_like(cols, z), front, 0.5 + canvas.shade / 2)
    roof = rng.uniform(1.5, 3.5)
    window = canvas.window(x, z, width * 1.1, height + roof)
    if height < 9 and window is not None:
        place, u, v = window
        up = (v * (height + roof) - height) / roof
        mask = (up > -0.08) & (np.abs(u * 2 - 1) < 1 - 0.3 * np.maximum(up, 0))
        light = 1 - 0.15 * (up * 7 % 1 < 0.4) + 0.05 * canvas.noise(mask.shape, 0)
        tiles = canvas.colour((0, 0.1), (0.1, 0.7), (0.25, 0.65)) * light[..., None]
        canvas.paste(place, BUILDING, z * 0.99, [(mask, tiles)])


def paint_car(canvas: Canvas, x: float, z: float, view: str) -> None:
    """A car, van or bus seen from its ``"side"``, ``"front"`` or ``"back"``."""
    kind = canvas.rng.choice(3, p=[0.65, 0.2, 0.15])
    length, width, height = ((4.3, 1.9, 1.5), (5.2, 2.1, 2.2), (10, 2.5, 3.1))[kind]
    across = length if view == "side" else width
    canvas.shadow(x, z, across * 1.2, 3)
    window = canvas.window(x, z, across, height)
    if window is None:
        return
    place, u, v = window
    u = u if canvas.rng.random() < 0.5 else 1 - u
    side, belt, edge = view == "side", 0.45 if kind else 0.58, np.minimum(u, 1 - u)
    slant = 0.02 if kind else (0.19 if side else 0.04) + 0.3 * (v - belt)
    body, cabin = (v > 0.3 / height) & (v < belt) & (edge > 0), (v >= belt) & (v < 0.98) & (edge > slant)
    pane = cabin & (v > belt + 0.05) & (v < (0.8 if kind else 0.92)) & (edge > slant + 0.03)
    pane &= (u * length % 1.4 > 0.14) | (not side)
    spokes = np.hypot(edge * length - 0.85, v * height - 0.36)
    wheel = spokes < 0.36 if side else (v < 0.25) & (np.abs(edge - 0.1) < 0.07)
    lamp = body & (np.abs(v - belt * 0.8) < 0.08) & (edge < (0.03 if side else 0.15))
    rear = lamp & ((u > 0.5) if side else view == "back")
    paint = canvas.colour((0, 1), (0, 0.9), (0.2, 0.95)) * (0.72 + 0.45 * v[..., None])
    layers = [(body | cabin, paint), (body & (v < belt * 0.45), 0.5 * paint), (wheel, 0.07)]
    layers += [(wheel & side & (spokes < 0.18), 0.5), (pane, 0.1 + 0.3 * canvas.haze * v[..., None])]
    layers += [(lamp, np.float32([1, 0.96, 0.82])), (rear, np.float32([0.82, 0.09, 0.07]))]
    canvas.paste(place, VEHICLE, z, layers)


def compose_street(canvas: Canvas) -> None:
    """A marked road between two rows of buildings, with cars and street trees."""
    rng = canvas.rng
    half, shift = rng.uniform(3.2, 5.5), rng.uniform(-2.5, 2.5)
    paint_ground(canvas, rng.choice([GRASS, ROAD, SAND], p=[0.55, 0.35, 0.1]), canvas.z > 0)
    paint_wood(canvas, rng.uniform(6, 16), 160)
    paint_road(canvas, shift, half, marked=True)
    for sign in (-1, 1):
        edge, z = half + rng.uniform(2.5, 6), rng.uniform(7, 16)
        while z < 130:
            size = rng.uniform((8, 5, 8), (16, 20, 20))
            if rng.random() < 0.75:
                paint_building(canvas, shift + sign * (edge + size[0] / 2), z, size)
            z += size[2] + rng.uniform(0, 6)
        for tree in rng.uniform(9, 60, rng.integers(0, 5)):
            paint_tree(canvas, shift + sign * (half + 1.5), tree, rng.uniform(4, 9))
    _traffic(canvas, shift, half, rng.integers(2, 5))


def compose_meadow(canvas: Canvas) -> None:
    """Meadows or a park: a bending road, a pond, trees, houses or a skyline behind."""
    rng = canvas.rng
    paint_ground(canvas, GRASS, canvas.z > 0)
    paint_wood(canvas, rng.uniform(3, 18), 150)
    for x in rng.uniform(-70, 70, rng.choice([0, 9])):
        paint_building(canvas, x, 110, rng.uniform((10, 10, 10), (20, 35, 20)))
    if rng.random() < 0.7:
        wide, deep, x, z = rng.uniform(9, 18), rng.uniform(6, 9), rng.uniform(-8, 8), rng.uniform(12, 25)
        rim = ((canvas.x - x) / wide) ** 2 + ((canvas.z - z) / deep) ** 2 + 0.12 * np.sin(canvas.x / 2.5)
        paint_ground(canvas, SAND, rim < rng.uniform(0.6, 1.7))
        paint_ground(canvas, WATER, rim < 1)
    shift, bend, half = rng.uniform(-6, 6), rng.uniform(-0.01, 0.01), rng.uniform(1.5, 4)
    paint_road(canvas, shift + bend * canvas.z**2, half, marked=half > 2.2)
    for _ in range(rng.integers(3, 12)):
        z, sign = rng.uniform(9, 60), rng.choice([-1, 1])
        x = shift + bend * z**2 + sign * (half + rng.uniform(2.5, 18))
        if rng.random() < 0.8:
            paint_tree(canvas, x, z, rng.uniform(4, 11))
        else:
            paint_building(canvas, x + sign * 7, z + 8, rng.uniform((8, 4, 6), (14, 7, 12)))
    _traffic(canvas, shift, half, rng.integers(0, 3), bend)


def compose_coast(canvas: Canvas) -> None:
    """Water up to the horizon or to one side, a beach, perhaps a road or lawn, huts and trees."""
    rng = canvas.rng
    sign, slope, shore = rng.choice([-1, 1]), rng.uniform(0, 1.2), rng.uniform(12, 20)
    bays = 1.2 * np.sin(canvas.x / 5 + rng.uniform(0, 6))
    seaward = canvas.z * (1 - 0.6 * slope) + 1.5 * sign * slope * canvas.x + bays - shore
    paint_ground(canvas, WATER, canvas.z > 0)
    paint_ground(canvas, SAND, seaward < 0)
    canvas.rgb[(np.abs(seaward - 0.5) < 0.35) & (canvas.z > 0)] = 0.85  # foam
    near, strip = rng.uniform(6.5, 9), rng.choice([GRASS, ROAD, SAND])
    paint_ground(canvas, strip, canvas.z < near)
    if rng.random() < 0.5:
        paint_wood(canvas, rng.uniform(5, 20), 200)
    for _ in range(rng.integers(0, 3)):
        size = rng.uniform((5, 3, 5), (9, 8, 8))
        paint_building(canvas, -sign * rng.uniform(5, 14), rng.uniform(14, 26), size)
    for _ in range(rng.integers(0, 5)):
        paint_tree(canvas, -sign * rng.uniform(2.5, 10), rng.uniform(9, 22), rng.uniform(3, 7))
    if strip == ROAD or rng.random() < 0.3:
        paint_car(canvas, rng.uniform(-4, 4), near * rng.uniform(0.85, 1.3), "side")


def _traffic(canvas: Canvas, shift: float, half: float, cars: int, bend: float = 0.0) -> None:
    for z in canvas.rng.uniform(8, 34, cars):
        lane = canvas.rng.choice([-1, 1])
        paint_car(canvas, shift + bend * z**2 + lane * half / 2, z, "back" if lane > 0 else "front")
    if canvas.rng.random() < 0.35:
        paint_car(canvas, shift + canvas.rng.uniform(-1, 1) * half, canvas.rng.uniform(10, 22), "side")
