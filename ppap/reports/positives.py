"""Which patches become positives of an anchor, step by step, and of HP (the paper's Fig. 5)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ppap.data import SegmentationDataset
from ppap.data.patch_labels import labels_of
from ppap.kernels import PropagationConfig, propagate
from ppap.methods.hidden_positives import hidden_positives, pool_radius
from ppap.nets.model import PPAPNet, patch_rows
from ppap.pictures.drawing import strip

_RIGHT, _WRONG, _PLAIN = (40, 200, 90), (235, 70, 60), (250, 200, 40)
_MARK = (255, 0, 255)
_DIM = 0.35  # share of its brightness that a patch outside the set keeps
_HEAD = 14  # pixels above a cell, for its numbers
_MARGIN = 10  # pixels beside a cell
_TRIES = 256  # random patches among which anchors with positives are looked for


class Example(NamedTuple):
    """One anchor and its positives."""

    anchor: int
    """Row of the features."""
    positives: Tensor
    """(T + 1, N) bool: after 0, 1, ... T steps."""
    same_class: Tensor | None = None
    """(N,) bool: patches of the anchor's class; None without labels."""
    hidden: Tensor | None = None
    """(N,) bool: HP's positives; None where they were not asked for."""

    def counts(self) -> list[int]:
        """Number of positives after every step."""
        return self.positives.sum(dim=1).tolist()

    def precision(self) -> list[float | None]:
        """Share of the anchor's class among them [fraction]; None where unknown or empty."""
        return [self.precision_of(positives) for positives in self.positives]

    def precision_of(self, positives: Tensor) -> float | None:
        """Share of the anchor's class in a set (N,) bool [fraction]; None where unknown or empty."""
        if self.same_class is None or not positives.any():
            return None
        return self.same_class[positives].float().mean().item()

    def describe(self, positives: Tensor) -> str:
        """A set (N,) bool in words: its patches, and how many percent of them have the anchor's class."""
        count, _, share = self.numbers(positives).partition(", ")
        patches = f"{count} patch{'' if count == '1' else 'es'}"
        return f"{patches}, {share} of its class" if share else patches

    def numbers(self, positives: Tensor) -> str:
        """:meth:`describe` without words, for tables and narrow pictures."""
        count, share = int(positives.sum()), self.precision_of(positives)
        return str(count) if share is None else f"{count}, {100 * share:.0f} %"

    def to_dict(self) -> dict[str, Any]:
        """Counts and precision, as plain containers for JSON."""
        values = {"patch": self.anchor, "positives": self.counts(), "precision": self.precision()}
        if self.hidden is not None:
            values["hp"] = {"positives": int(self.hidden.sum()), "precision": self.precision_of(self.hidden)}
        return values


class Look(NamedTuple):
    """What a picture shows, and how large."""

    anchors: int = 4
    """Rows."""
    seed: int = 0
    """Of the anchors."""
    width: int = 1600
    """Width at most [pixels]; images are made smaller, never larger."""


class _Block(NamedTuple):
    """The images as they stand in one cell."""

    images: Sequence[np.ndarray]
    """(H, W, 3) uint8 each."""
    grid: tuple[int, int]
    """Patch rows and columns of an image."""
    patch: int
    """Side of a patch [pixels]."""
    scale: float
    """By which an image is made smaller."""


@torch.no_grad()
def examples(features: Tensor, cfg: PropagationConfig, count: int, seed: int = 0) -> list[Example]:
    """Random anchors that have positives after the last step, and their sets after every step.

    Args:
        features: (N, D) guidance of some images, any norm.
        cfg: thresholds, steps and sigmas.
        count: number of anchors wanted.
        seed: of the draw.

    Returns:
        At most `count`; fewer where few patches have positives.
    """
    order = np.random.Philox(key=[seed, 1]).random_raw(len(features)).argsort()
    tried = torch.from_numpy(order[:_TRIES]).to(features.device)
    last = propagate(features, tried, cfg, precision="fp32")
    found = torch.nonzero(last.num_positives > 0)[:, 0]
    chosen = tried[found[:count]].sort().values
    if not len(chosen):
        return []
    rows = torch.arange(len(chosen), device=features.device)
    sets = [
        propagate(features, chosen, replace(cfg, steps=t), precision="fp32").positives(rows).cpu()
        for t in range(cfg.steps + 1)
    ]
    return [Example(int(anchor), torch.stack([s[i] for s in sets])) for i, anchor in enumerate(chosen)]


@torch.no_grad()
def draw_positives(
    net: PPAPNet,
    dataset: SegmentationDataset,
    indices: Sequence[int],
    cfg: PropagationConfig,
    path: Path,
    look: Look | None = None,
    *,
    pool: Tensor | None = None,
) -> list[Example]:
    """A picture with a row per anchor and columns for up to four of the steps; other patches are dark.

    Positives of the anchor's class are green and others red; all are yellow where the class is not known.
    The anchor is framed; above each picture stands the number of positive patches and how many percent of
    them have the anchor's class.

    Args:
        net: network; its frozen features, conditioned and without dropout, are compared.
        dataset: images.
        indices: of the images that are compared; anchors come from any of them.
        cfg: thresholds, steps and sigmas.
        path: PNG to write; nothing is written where no patch has positives.
        look: rows and size; None = the defaults.
        pool: HP's reference pool (M, D), for a column of its positives; None = no such column.

    Returns:
        What was drawn.
    """
    look = look or Look()
    device, patch = next(net.parameters()).device, net.backbone.patch_size
    samples = [dataset[i] for i in indices]
    maps = net.compared(net.features(torch.stack([sample["image"] for sample in samples]).to(device)))
    grid, features = (maps.shape[2], maps.shape[3]), patch_rows(maps)
    found = examples(features, cfg, look.anchors, look.seed)
    if not found:
        return []
    if dataset.labelled:
        classes = labels_of(torch.stack([sample["label"] for sample in samples]), patch)
        found = [example._replace(same_class=_same_class(classes, example.anchor)) for example in found]
    if pool is not None:
        rows = torch.tensor([example.anchor for example in found], device=device)
        hidden = hidden_positives(features, pool_radius(features, pool), rows).cpu()
        found = [example._replace(hidden=own) for example, own in zip(found, hidden, strict=True)]
    shown = sorted({0, min(1, cfg.steps), cfg.steps // 2, cfg.steps})  # more would be too small to see
    titles = ["anchor", *(f"after {t} step{'s' if t != 1 else ''}" for t in shown)]
    titles += ["HP"] if pool is not None else []
    block = _block([dataset.pixels(i) for i in indices], grid, patch, look.width / len(titles))
    rows = []
    for example in found:
        sets = [None, *(example.positives[t] for t in shown)]
        sets += [example.hidden] if pool is not None else []
        rows.append([_cell(block, example, positives) for positives in sets])
    strip(rows, titles, path, cell=max(rows[0][0].shape[:2]))
    return found


def _block(images: Sequence[np.ndarray], grid: tuple[int, int], patch: int, width: float) -> _Block:
    across = _across(len(images))
    room = (width - _MARGIN) / across
    return _Block(images, grid, patch, min(1.0, max(room, grid[1]) / images[0].shape[1]))


def _across(images: int) -> int:
    """Images in a line of a cell; two lines where there is more than one image."""
    return -(-images // min(images, 2))


def _same_class(classes: Tensor, anchor: int) -> Tensor | None:
    return classes == classes[anchor] if classes[anchor] >= 0 else None


def _cell(block: _Block, example: Example, positives: Tensor | None) -> np.ndarray:
    """All images, those of a set (N,) bool lit (None = nothing is), the anchor in a frame."""
    grid, patch = block.grid, block.patch
    per_image, same = grid[0] * grid[1], example.same_class
    pictures = []
    for i, image in enumerate(block.images):
        picture = Image.fromarray(image)
        if positives is not None:
            part = slice(i * per_image, (i + 1) * per_image)
            own = None if same is None else same[part]
            picture = _lit(picture, positives[part], own, grid, patch)
        size = tuple(max(1, round(side * block.scale)) for side in picture.size)
        picture = picture.resize(size, Image.Resampling.BOX)
        if example.anchor // per_image == i:
            y, x = (patch * block.scale * v for v in divmod(example.anchor % per_image, grid[1]))
            side = patch * block.scale
            box = (round(x) - 2, round(y) - 2, round(x + side) + 1, round(y + side) + 1)
            ImageDraw.Draw(picture).rectangle(box, outline=_MARK, width=2)
        pictures.append(np.asarray(picture))
    across = _across(len(pictures))
    lines = -(-len(pictures) // across)
    pictures += [np.full_like(pictures[0], 255)] * (lines * across - len(pictures))
    rows = [np.concatenate(pictures[r * across : (r + 1) * across], axis=1) for r in range(lines)]
    sheet = np.concatenate(rows)
    head = Image.new("RGB", (sheet.shape[1], _HEAD), (255, 255, 255))
    if positives is not None:
        draw, text = ImageDraw.Draw(head), example.describe(positives)
        if draw.textlength(text) > head.width - 2:
            text = example.numbers(positives)
        draw.text((2, 1), text, fill=(0, 0, 0))
    return np.concatenate([np.asarray(head), sheet])


def _lit(
    picture: Image.Image, positives: Tensor, same: Tensor | None, grid: tuple[int, int], patch: int
) -> Image.Image:
    def pixels(mask: Tensor) -> np.ndarray:
        big = mask.view(grid).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
        return big[: picture.height, : picture.width].numpy()[..., None]

    image = np.asarray(picture, dtype=np.float32)
    colour = np.where(pixels(same), np.float32(_RIGHT), np.float32(_WRONG)) if same is not None else _PLAIN
    lit = np.where(pixels(positives), 0.45 * image + 0.55 * np.float32(colour), _DIM * image)
    return Image.fromarray(lit.round().astype(np.uint8))
