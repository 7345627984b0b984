"""Synthetic outdoor scenes with labels, generated on the fly: nothing is stored and nothing is downloaded.

They serve demonstrations and tests; numbers measured on them say nothing about photographs. A pinhole camera
stands some metres above flat ground and looks along z; x points right, all lengths are metres. Painters
(``ppap/data/scene_painters.py``) put one element each onto a canvas with a depth buffer
(``ppap/data/scene_canvas.py``), so occlusion and scale follow. Colours overlap between classes on purpose
(water takes the sky's, walls and cars any, roads and sand share theirs) and the light changes with the scene:
texture, shape and place tell classes apart.

There are two difficulties: ``hard`` has more objects and some right in front of the camera, stronger changes
of scale and height, wider palettes, and fog, dusk and rain.
"""

import hashlib
from typing import Literal

import numpy as np
from PIL import Image

from ppap.data.base import SPLITS, Datasets, SegmentationDataset
from ppap.data.scene_canvas import LOOKS, Canvas, develop
from ppap.data.scene_painters import (
    CLASS_NAMES,
    GRASS,
    ROAD,
    SAND,
    SKY,
    WATER,
    paint_building,
    paint_car,
    paint_ground,
    paint_road,
    paint_sky,
    paint_tree,
    paint_wood,
)
from ppap.data.transforms import Geometry
from ppap.errors import UsageError
from ppap.settings.config import DataConfig

STREAMS = (*SPLITS, "pretrain")
"""Scenes of different streams differ whatever their seeds; backbones are pretrained on the last one alone."""

Difficulty = Literal["easy", "hard"]


class ScenesDataset(SegmentationDataset):
    """``length`` scenes of one stream, ``size`` pixels wide and high before the geometry is applied."""

    def __init__(
        self,
        geometry: Geometry,
        stream: str,
        length: int,
        size: int,
        seed: int,
        difficulty: Difficulty = "easy",
    ):
        super().__init__(geometry, len(CLASS_NAMES), CLASS_NAMES)
        self.stream, self.length, self.size, self.seed = stream, length, size, seed
        self.difficulty: Difficulty = difficulty

    def __len__(self) -> int:
        return self.length

    def fingerprint(self) -> str:
        settings = (self.geometry, self.stream, self.length, self.size, self.seed, self.difficulty)
        digest = hashlib.sha256(repr(settings).encode())
        # A few scenes stand for all: they change when the generator does.
        for i in range(0, self.length, max(self.length // 4, 1)):
            picture, ids = self.load(i)
            digest.update(picture.tobytes() + ids.tobytes())
        return digest.hexdigest()

    def name(self, i: int) -> str:
        return f"scene_{self.stream}_{i:05d}"

    def load(self, i: int) -> tuple[Image.Image, np.ndarray]:
        pixels, label = make_scene(self.seed, self.stream, i, self.size, self.difficulty)
        return Image.fromarray(pixels), label


def build(config: DataConfig, splits: tuple[str, ...] = SPLITS) -> Datasets:
    """The splits asked for; called through ``ppap.data.build_datasets``."""
    if config.classes not in (None, len(CLASS_NAMES)) or config.class_names not in ((), CLASS_NAMES):
        raise UsageError(
            f"the scenes have the {len(CLASS_NAMES)} classes {', '.join(CLASS_NAMES)}; "
            "leave out --data.classes and --data.class-names"
        )
    size, level, built = config.scenes_size, config.scenes_difficulty, {}
    for split in splits:
        train = split == "train"
        geometry = Geometry(config.resolution if train else config.eval_resolution, config.interpolation)
        length = config.scenes_train if train else config.scenes_val
        built[split] = ScenesDataset(geometry, split, length, size, config.scenes_seed, level)
    counts = " and ".join(f"{len(dataset)} {split}" for split, dataset in built.items())
    text = f"{counts} synthetic scenes ({level}) of {size}x{size} pixels, {len(CLASS_NAMES)} classes."
    return Datasets(built.get("train"), built.get("val"), text)


def make_scene(
    seed: int, stream: str, index: int, size: int = 128, difficulty: Difficulty = "easy"
) -> tuple[np.ndarray, np.ndarray]:
    """Generate one scene, a pure function of its arguments.

    Args:
        seed: of the whole set.
        stream: ``"train"``, ``"val"`` or ``"pretrain"``; no two of them share a scene.
        index: number of the scene, 0 or more.
        size: side [pixels], at least 16.
        difficulty: ``"easy"`` or ``"hard"``; see the module's docstring.

    Returns:
        (size, size, 3) uint8 RGB, (size, size) uint8 class ids; no pixel is ignored.
    """
    key = (STREAMS.index(stream), index, list(LOOKS).index(difficulty))
    seeds = np.random.SeedSequence(seed % 2**64, spawn_key=key)
    canvas = Canvas(np.random.default_rng(seeds), size, LOOKS[difficulty])
    paint_sky(canvas)
    (compose_street, compose_meadow, compose_coast)[canvas.rng.choice(3, p=[0.35, 0.35, 0.3])](canvas)
    place_occluders(canvas)
    return develop(canvas, SKY), canvas.label


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
        for tree in rng.uniform(9, 60, _crowd(canvas, 0, 5)):
            paint_tree(canvas, shift + sign * (half + 1.5), tree, rng.uniform(4, 9))
    _traffic(canvas, shift, half, _crowd(canvas, 2, 5))


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
    for _ in range(_crowd(canvas, 3, 12)):
        z, sign = rng.uniform(9, 60), canvas.side()
        x = shift + bend * z**2 + sign * (half + rng.uniform(2.5, 18))
        if rng.random() < 0.8:
            paint_tree(canvas, x, z, rng.uniform(4, 11))
        else:
            paint_building(canvas, x + sign * 7, z + 8, rng.uniform((8, 4, 6), (14, 7, 12)))
    _traffic(canvas, shift, half, _crowd(canvas, 0, 3), bend)


def compose_coast(canvas: Canvas) -> None:
    """Water up to the horizon or to one side, a beach, perhaps a road or lawn, huts and trees."""
    rng = canvas.rng
    sign, slope, shore = canvas.side(), rng.uniform(0, 1.2), rng.uniform(12, 20)
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
    for _ in range(_crowd(canvas, 0, 5)):
        paint_tree(canvas, -sign * rng.uniform(2.5, 10), rng.uniform(9, 22), rng.uniform(3, 7))
    if strip == ROAD or rng.random() < 0.3:
        paint_car(canvas, rng.uniform(-4, 4), near * rng.uniform(0.85, 1.3), "side")


def _traffic(canvas: Canvas, shift: float, half: float, cars: int, bend: float = 0.0) -> None:
    for z in canvas.rng.uniform(8, 34, cars):
        lane = canvas.side()
        paint_car(canvas, shift + bend * z**2 + lane * half / 2, z, "back" if lane > 0 else "front")
    if canvas.rng.random() < 0.35:
        paint_car(canvas, shift + canvas.rng.uniform(-1, 1) * half, canvas.rng.uniform(10, 22), "side")


def place_occluders(canvas: Canvas) -> None:
    """Trees and vehicles right in front of the camera, cut by the image's edges; none in easy scenes."""
    rng = canvas.rng
    for _ in range(rng.integers(canvas.look.occluders + 1)):
        z, side = canvas.height * rng.uniform(1.4, 2.8), canvas.side()
        x = side * rng.uniform(0.25, 0.6) * z / canvas.focal
        if rng.random() < 0.6:
            paint_tree(canvas, x, z, rng.uniform(0.8, 1.9) * canvas.height)
        else:
            paint_car(canvas, x, z, ("side", "front", "back")[rng.integers(3)])


def _crowd(canvas: Canvas, low: int, high: int) -> int:
    """A number of objects from low to high - 1, times the look's factor."""
    return round(canvas.rng.integers(low, high) * canvas.look.crowd)
