"""Unlabelled squares for pretraining, one per draw: draw n is a pure function of the settings and n."""

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ppap.config import DataConfig
from ppap.data.folder import Layout, SplitFiles, check, find_layout
from ppap.data.images import read_image
from ppap.data.loading import EpochSampler, steps_loader
from ppap.data.scenes import make_scene
from ppap.data.transforms import resized_size
from ppap.errors import UsageError
from ppap.pretraining.config import PretrainConfig, SourceConfig


class SceneDraws(Dataset):
    """A new generated scene for every draw, of a stream that nothing else reads."""

    def __init__(self, config: SourceConfig):
        self.config = config
        self.description = f"synthetic scenes ({config.difficulty}) of {config.resolution} pixels, all new"
        self.origin = f"synthetic scenes ({config.difficulty})"

    def __getitem__(self, n: int) -> torch.Tensor:
        """(3, S, S) uint8 RGB."""
        config, level = self.config, self.config.difficulty
        level = ("easy", "hard")[n % 2] if level == "both" else level
        pixels, _ = make_scene(config.seed, "pretrain", n, config.resolution, level)
        return torch.from_numpy(pixels).permute(2, 0, 1)


class FolderDraws(Dataset):
    """Images of a folder in a new order every epoch, each time another square of them."""

    def __init__(self, config: PretrainConfig):
        """Find and verify the images.

        Raises:
            UsageError: --data.root is not given.
            DataError: no such folder, unreadable images, or fewer than one batch.
        """
        data = config.data
        if data.root is None:
            raise UsageError("--data.root is not given; name the folder that holds the images")
        layout = find_layout(data.root)
        images = layout.splits["train" if "train" in layout.splits else "val"].images
        # Labels are no business of pretraining, so only the images are looked at.
        bare = Layout(layout.root, {"train": SplitFiles(images)}, layout.form)
        check(bare, DataConfig(kind="folder", root=data.root), ("train",))
        self.paths = [paths[0] for paths in images.values()]
        self.side, self.seed = data.resolution, config.train.seed
        self.sampler = EpochSampler(len(self.paths), config.train.batch_size, config.train.seed)
        self.per_epoch = self.sampler.steps_per_epoch * config.train.batch_size
        self._order: tuple[int, np.ndarray] = (0, self.sampler.order(0))
        self.description = f"{layout.root}: {layout.form}; {len(self.paths)} images, labels not read"
        self.origin = f"{len(self.paths)} images of a folder"

    def __getitem__(self, n: int) -> torch.Tensor:
        """(3, S, S) uint8 RGB."""
        epoch, place = divmod(n, self.per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self.sampler.order(epoch))
        picture = read_image(self.paths[self._order[1][place]])
        picture = picture.resize(resized_size(*picture.size, self.side), Image.Resampling.BILINEAR)
        left, top = (
            np.random.default_rng((self.seed % 2**63, n)).random(2) * (np.array(picture.size) - self.side + 1)
        ).astype(int)
        square = picture.crop((left, top, left + self.side, top + self.side))
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def build_draws(config: PretrainConfig) -> SceneDraws | FolderDraws:
    """The images that the settings name.

    Raises:
        UsageError, DataError: see :class:`FolderDraws`.
    """
    return SceneDraws(config.data) if config.data.kind == "scenes" else FolderDraws(config)


def draws_loader(draws: Dataset, config: PretrainConfig, start_step: int, pin_memory: bool) -> DataLoader:
    """Batches (B, 3, S, S) uint8 of steps `start_step` to the last."""
    train = config.train
    return steps_loader(
        draws, train.batch_size, range(start_step, train.steps), config.data.workers, pin_memory=pin_memory
    )
