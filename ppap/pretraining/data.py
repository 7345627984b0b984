"""Unlabelled squares for pretraining, one per draw: draw n is a pure function of the settings and n.

Where a teacher's features of them are kept, the same squares come again in every epoch: ``count`` is how
many there are (None = all draws differ), ``number(n)`` which one draw n shows, ``square(i)`` square i.
"""

import hashlib

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ppap.data.deep import Reading, sampled_range
from ppap.data.folder_check import check
from ppap.data.images import read_image
from ppap.data.layouts import Layout, SplitFiles, find_layout
from ppap.data.limits import set_max_pixels
from ppap.data.loading import EpochSampler, steps_loader
from ppap.data.scenes import make_scene
from ppap.data.transforms import resized_size
from ppap.errors import UsageError
from ppap.settings.config import DataConfig
from ppap.settings.pretraining import PretrainConfig


class _Order:
    """Which of `count` images a draw shows: all of them, in a new order every epoch."""

    def __init__(self, count: int, config: PretrainConfig) -> None:
        self.sampler = EpochSampler(count, config.train.batch_size, config.train.seed)
        self.per_epoch = self.sampler.steps_per_epoch * config.train.batch_size
        self._known: tuple[int, np.ndarray] = (0, self.sampler.order(0))

    def image(self, n: int) -> int:
        epoch, place = divmod(n, self.per_epoch)
        if self._known[0] != epoch:
            self._known = (epoch, self.sampler.order(epoch))
        return int(self._known[1][place])


class SceneDraws(Dataset):
    """Generated scenes of a stream that nothing else reads: a new one per draw, or some over and over."""

    def __init__(self, config: PretrainConfig):
        """Raises: DataError where there are fewer scenes than one batch."""
        self.config = data = config.data
        self.order = _Order(data.scenes, config) if data.scenes else None
        self.count = data.scenes or None
        # Every process keeps the scenes that it has made: they take ten times longer to make than to crop.
        self._made: dict[int, torch.Tensor] = {}
        count = f"{data.scenes} " if data.scenes else ""
        self.origin = f"{count}synthetic scenes ({data.difficulty})"
        self.description = f"{self.origin} of {data.resolution} pixels" + ("" if count else ", all new")

    def __getitem__(self, n: int) -> torch.Tensor:
        """(3, S, S) uint8 RGB."""
        return self._make(n) if self.order is None else self.square(self.number(n))

    def number(self, n: int) -> int:
        """Which scene draw n shows."""
        return n if self.order is None else self.order.image(n)

    def name(self, n: int) -> str:
        """What draw n shows, for messages."""
        return f"scene {self.number(n)}"

    def square(self, i: int) -> torch.Tensor:
        """Scene i, which is kept: (3, S, S) uint8 RGB."""
        if i not in self._made:
            self._made[i] = self._make(i)
        return self._made[i]

    def fingerprint(self) -> str:
        """Hash of everything that the squares follow from."""
        data = self.config
        settings = (data.scenes, data.resolution, data.difficulty, data.seed)
        digest = hashlib.sha256(repr(settings).encode())
        for i in range(4):  # a few stand for all: they change when the generator does
            digest.update(self._make(i).numpy().tobytes())
        return digest.hexdigest()

    def _make(self, scene: int) -> torch.Tensor:
        data, level = self.config, self.config.difficulty
        level = ("easy", "hard")[scene % 2] if level == "both" else level
        pixels, _ = make_scene(data.seed, "pretrain", scene, data.resolution, level)
        return torch.from_numpy(pixels).permute(2, 0, 1)


class FolderDraws(Dataset):
    """Images of a folder in a new order every epoch, each time another square of them; with --objective
    distill the same ones, --distill.squares of each image."""

    def __init__(self, config: PretrainConfig):
        """Find and verify the images.

        Raises:
            UsageError: --data.root is not given.
            DataError: no such folder, unreadable images, or fewer than one batch.
        """
        data = config.data
        if data.root is None:
            raise UsageError("--data.root is not given; name the folder that holds the images")
        set_max_pixels(data.max_pixels)
        layout = find_layout(data.root)
        images = layout.splits["train" if "train" in layout.splits else "val"].images
        # Labels are no business of pretraining, so only the images are looked at.
        bare = Layout(layout.root, {"train": SplitFiles(images)}, layout.form)
        check(bare, DataConfig(kind="folder", root=data.root), ("train",))
        self.root, self.paths = layout.root, [paths[0] for paths in images.values()]
        self.reading = Reading(value_range=sampled_range(self.paths, Reading()) or ())
        self.side, self.seed = data.resolution, config.train.seed
        # 0 = a random square for every draw
        self.squares = config.distill.squares if config.objective.kind == "distill" else 0
        self.order = _Order(len(self.paths) * max(self.squares, 1), config)
        self.count = len(self.paths) * self.squares or None
        what = f"{self.squares} fixed squares of each" if self.squares > 1 else "labels not read"
        what = "the middle square of each" if self.squares == 1 else what
        self.description = f"{layout.root}: {layout.form}; {len(self.paths)} images, {what}"
        if self.reading.value_range:
            self.description += "; values {:g} to {:g} become black to white".format(
                *self.reading.value_range
            )
        self.origin = f"{len(self.paths)} images of a folder"

    def __getitem__(self, n: int) -> torch.Tensor:
        """(3, S, S) uint8 RGB."""
        if self.squares:
            return self.square(self.number(n))
        return self._cut(self.number(n), np.random.default_rng((self.seed % 2**63, n)).random(2))

    def number(self, n: int) -> int:
        """Which image, or which of the fixed squares, draw n shows."""
        return self.order.image(n)

    def name(self, n: int) -> str:
        """File that draw n shows a part of, for messages."""
        path = self.paths[self.number(n) // max(self.squares, 1)]
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def square(self, i: int) -> torch.Tensor:
        """One of the fixed squares, ``squares`` of each image in turn: (3, S, S) uint8 RGB."""
        image, place = divmod(i, self.squares)
        return self._cut(image, np.full(2, place / (self.squares - 1) if self.squares > 1 else 0.5))

    def fingerprint(self) -> str:
        """Hash of everything that the fixed squares follow from; reads every file."""
        digest = hashlib.sha256(repr((self.side, self.squares, len(self.paths))).encode())
        for path in self.paths:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def _cut(self, image: int, place: np.ndarray) -> torch.Tensor:
        """The square whose upper left corner lies at these shares (x, y) of the room that there is."""
        picture = read_image(self.paths[image], self.reading)
        picture = picture.resize(resized_size(*picture.size, self.side), Image.Resampling.BILINEAR)
        room = np.array(picture.size) - self.side
        left, top = np.minimum(place * (room + 1), room).astype(int)
        square = picture.crop((left, top, left + self.side, top + self.side))
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)


Draws = SceneDraws | FolderDraws


def build_draws(config: PretrainConfig) -> Draws:
    """The images that the settings name.

    Raises:
        UsageError, DataError: see :class:`FolderDraws`.
    """
    return SceneDraws(config) if config.data.kind == "scenes" else FolderDraws(config)


def draws_loader(draws: Dataset, config: PretrainConfig, start_step: int, pin_memory: bool) -> DataLoader:
    """Batches (B, 3, S, S) uint8 of steps `start_step` to the last."""
    train = config.train
    return steps_loader(
        draws, train.batch_size, range(start_step, train.steps), config.data.workers, pin_memory=pin_memory
    )
