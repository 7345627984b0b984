"""The frozen teacher of ``--objective distill``: what it is, what it says of a square, and keeping that.

Legend: B squares, S their side in pixels, h w the teacher's patch grid, D its channels.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ppap.errors import NumberError, PpapError, UsageError
from ppap.methods.guidance import PATCHES
from ppap.nets.backbone import Backbone, build_backbone
from ppap.nets.conditioning import Halves, Split
from ppap.nets.feature_cache import cache_root, weights_hash
from ppap.pretraining.data import Draws
from ppap.pretraining.views import normalised
from ppap.runs.randomness import drawn_order
from ppap.runs.store import Kind, Part, Store
from ppap.settings.config import ModelConfig
from ppap.settings.distillation import DistillConfig
from ppap.settings.pretraining import PretrainConfig

_USUAL_SIDE = 224  # what most public ViTs were trained at [pixels]
_OPTIONS = {
    "--model.weights-key": "--distill.teacher-key",
    "--model.weights": "--teacher",
    "--model.backbone": "--distill.teacher-backbone",
    "--model.heads": "--distill.teacher-heads",
}


def check_settings(config: PretrainConfig) -> None:
    """Refuse what cannot be distilled, before anything is read.

    Raises:
        UsageError: no teacher, an untrained one, one that no objective asks for, or squares that never come
            again where features are to be kept.
    """
    aim = config.distill
    if config.objective.kind != "distill":
        if aim.teacher is not None:
            raise UsageError(f"--teacher {aim.teacher} is for --objective distill; add that, or leave it out")
        return
    if aim.teacher is None:
        raise UsageError(
            "--teacher is not given; --objective distill needs trained weights, such as --teacher "
            "vit_small_patch14_dinov2.lvd142m, a .pth or .safetensors file, or a directory"
        )
    if aim.teacher == "random":
        raise _untrained(aim.teacher)
    if config.data.kind == "scenes" and not config.data.scenes and aim.cache:
        raise UsageError(
            "--data.scenes 0 makes a new scene for every draw, and the teacher's features of those cannot be "
            "kept; give --data.scenes 2048, or --distill.no-cache"
        )


def _untrained(name: str) -> UsageError:
    return UsageError(f"--teacher {name}: these weights were never trained; give a network that was")


class Teacher:
    """A frozen backbone that looks at whole squares, at a resolution of its own."""

    BATCH = 8
    """Squares of a forward pass outside of training."""

    def __init__(self, config: DistillConfig, device: torch.device, amp: torch.dtype | None = None) -> None:
        """Load the weights.

        Args:
            config: ``teacher`` and how it is opened; ``resolution``.
            device: where it runs.
            amp: type of its forward pass; None = fp32.

        Raises:
            UsageError, DataError, NumberError: as ``build_backbone``, with the teacher's options named; a
                resolution that is no multiple of the patch, or less than two patches; an untrained network.
        """
        self.config, self.device, self.amp = config, device, amp
        self.backbone = _open(config).to(device)
        patch = self.backbone.patch_size
        self.side = config.resolution or max(round(_USUAL_SIDE / patch), 2) * patch
        if self.side % patch or self.side < 2 * patch:
            near = max(round(self.side / patch), 2) * patch
            raise UsageError(
                f"--distill.resolution {self.side} does not fit the teacher's patch of {patch} pixels; give "
                f"a multiple of it, at least two patches, such as {near}"
            )
        self.sha256 = weights_hash(self.backbone)
        self._kept: np.ndarray | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (h, w) of a square."""
        return (self.side // self.backbone.patch_size,) * 2

    @torch.no_grad()
    def maps(self, pixels: Tensor) -> Tensor:
        """Patch features (B, D, h, w), fp32, of squares (B, 3, S, S), 0..1, on the device."""
        if pixels.shape[2] != self.side:
            pixels = F.interpolate(pixels, (self.side, self.side), mode="bilinear", antialias=True)
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            return self.backbone(normalised(pixels)).float()

    def maps_of(self, draws: Draws, pixels: Tensor, first: int) -> Tensor:
        """:meth:`maps` of draws ``first`` and the following, whose squares are `pixels`, kept or not."""
        if self._kept is None:
            return self.maps(pixels)
        numbers = [draws.number(n) for n in range(first, first + len(pixels))]
        return torch.from_numpy(self._kept[numbers]).to(self.device).float()

    def keep(self, draws: Draws, should_stop: Callable[[], bool]) -> None:
        """Compute the features of every square, but for those on disk from before; later ones are read.

        Raises:
            DataError: the disk is too small, the folder cannot be written, or what it holds is damaged.
            NumberError: a feature does not fit half precision.
            InterruptedError: `should_stop` said so; what was computed stays.
        """
        meta = self._describe(draws)
        store = Store(
            cache_root(self.config.cache_dir),
            meta,
            {"features": Kind(tuple(meta["shape"]), np.float16)},
            what="teacher's features",
            remedy="give another --distill.cache-dir, or --distill.no-cache",
        )
        size = store.size / 2**20
        with store.made() as part:
            if part is None:
                print(f"teacher: {size:.0f} MiB of features read from {store.path}", flush=True)
            else:
                to_go = f"{len(part.left)} of {draws.count} squares to go"
                print(f"teacher: {size:.0f} MiB of features into {store.path}, {to_go}", flush=True)
                self._fill(part, draws, should_stop)
        self._kept = np.load(store.path / "features.npy", mmap_mode="r")

    def _fill(self, part: Part, draws: Draws, should_stop: Callable[[], bool]) -> None:
        left = part.left
        for numbers in tqdm(
            [left[i : i + self.BATCH] for i in range(0, len(left), self.BATCH)], desc="teacher", disable=None
        ):
            maps = self.maps(self._pixels(draws, numbers)).half()
            if not torch.isfinite(maps).all():
                raise NumberError("a feature of the teacher does not fit fp16; give --distill.no-cache")
            part.arrays["features"][numbers] = maps.cpu().numpy()
            part.mark(numbers)
            if should_stop():
                raise InterruptedError

    def survey(self, draws: Draws, seed: int, should_stop: Callable[[], bool]) -> tuple[Split, int]:
        """Moments of the features of two halves of some squares, all if they are few, and how many.

        Raises:
            InterruptedError: `should_stop` said so.
        """
        wanted = -(-PATCHES // (self.grid[0] * self.grid[1]))
        count = draws.count or wanted
        order = drawn_order(count, seed % 2**64, 5)[:wanted]
        halves = Halves()
        for start in tqdm(range(0, len(order), self.BATCH), desc="survey", leave=False, disable=None):
            numbers = order[start : start + self.BATCH]
            if self._kept is not None:
                maps = torch.from_numpy(self._kept[numbers]).float()
            else:
                maps = self.maps(self._pixels(draws, numbers)).cpu()
            halves.add(maps)
            if should_stop():
                raise InterruptedError
        return halves.split(), len(order)

    def _pixels(self, draws: Draws, numbers: np.ndarray) -> Tensor:
        squares = torch.stack([draws.square(int(i)) for i in numbers])
        return squares.to(self.device).float() / 255

    def _describe(self, draws: Draws) -> dict[str, Any]:
        return {
            "shape": [draws.count, self.backbone.width, *self.grid],
            "teacher": self.backbone.spec,
            "weights": self.sha256,
            "data": draws.fingerprint(),
        }


def _open(config: DistillConfig) -> Backbone:
    model = ModelConfig(
        backbone=config.teacher_backbone,
        weights=config.teacher,
        weights_key=config.teacher_key,
        heads=config.teacher_heads,
        pos_interp=config.pos_interp,
    )
    try:
        backbone = build_backbone(model)
    except PpapError as error:
        text = str(error)
        for theirs, ours in _OPTIONS.items():
            text = text.replace(theirs, ours)
        raise type(error)(text) from None
    if backbone.is_random:
        raise _untrained(config.teacher)
    return backbone
