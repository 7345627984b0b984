"""Which patches become positives of an anchor, step by step of the propagation (the paper's Fig. 5)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ppap.data import SegmentationDataset
from ppap.evaluation.patches import patch_labels
from ppap.kernels import PropagationConfig, propagate
from ppap.model import PPAPNet, patch_rows
from ppap.pictures import strip

_RIGHT, _WRONG, _PLAIN = (40, 200, 90), (235, 70, 60), (250, 200, 40)
_MARK = (255, 0, 255)
_DIM = 0.35  # share of its brightness that a patch outside the set keeps
_HEAD = 14  # pixels above a cell, for its numbers
_LARGEST = 400  # pixels of the longer side of a cell, so that the picture stays near 2000
_TRIES = 256  # random patches among which anchors with positives are looked for


class Example(NamedTuple):
    """One anchor and its positives."""

    anchor: int
    """Row of the features."""
    positives: Tensor
    """(T + 1, N) bool: after 0, 1, ... T steps."""
    same_class: Tensor | None = None
    """(N,) bool: patches of the anchor's class; None without labels."""

    def counts(self) -> list[int]:
        """Number of positives after every step."""
        return self.positives.sum(dim=1).tolist()

    def precision(self) -> list[float | None]:
        """Share of the anchor's class among them [fraction]; None where unknown or empty."""
        if self.same_class is None:
            return [None] * len(self.positives)
        return [self.same_class[p].float().mean().item() if p.any() else None for p in self.positives]

    def describe(self) -> list[str]:
        """After every step, in words: the number of positives and the share of the anchor's class."""
        pairs = zip(self.counts(), self.precision(), strict=True)
        return [str(n) if share is None else f"{n}, {100 * share:.0f} % right" for n, share in pairs]

    def to_dict(self) -> dict[str, Any]:
        """Counts and precision, as plain containers for JSON."""
        return {"patch": self.anchor, "positives": self.counts(), "precision": self.precision()}


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
    *,
    anchors: int = 4,
    seed: int = 0,
) -> list[Example]:
    """A picture with a row per anchor and columns for up to four of the steps; other patches are dark.

    Positives of the anchor's class are green and others red; all are yellow where the class is not known.
    The anchor is framed; above each picture stands the number of positives, with the share of its class.

    Args:
        net: network; its frozen features, without dropout, are compared.
        dataset: images.
        indices: of the images that are compared; anchors come from any of them.
        cfg: thresholds, steps and sigmas.
        path: PNG to write; nothing is written where no patch has positives.
        anchors: rows.
        seed: of the anchors.

    Returns:
        What was drawn.
    """
    device, patch = next(net.parameters()).device, net.backbone.patch_size
    samples = [dataset[i] for i in indices]
    features = net.features(torch.stack([sample["image"] for sample in samples]).to(device))
    grid = (features.shape[2], features.shape[3])
    found = examples(patch_rows(features), cfg, anchors, seed)
    if not found:
        return []
    if dataset.labelled:
        label = torch.stack([sample["label"] for sample in samples])
        padding = (0, grid[1] * patch - label.shape[2], 0, grid[0] * patch - label.shape[1])
        classes = patch_labels(torch.nn.functional.pad(label, padding, value=-1), patch)
        found = [example._replace(same_class=_same_class(classes, example.anchor)) for example in found]
    images = [dataset.pixels(i) for i in indices]
    shown = sorted({0, min(1, cfg.steps), cfg.steps // 2, cfg.steps})  # more would be too small to see
    rows = [[_cell(images, grid, patch, e, t) for t in (None, *shown)] for e in found]
    titles = ["anchor", *(f"positives after {t} steps" for t in shown)]
    strip(rows, titles, path, cell=max(rows[0][0].shape[:2]))
    return found


def _same_class(classes: Tensor, anchor: int) -> Tensor | None:
    return classes == classes[anchor] if classes[anchor] >= 0 else None


def _cell(
    images: Sequence[np.ndarray], grid: tuple[int, int], patch: int, example: Example, step: int | None
) -> np.ndarray:
    """All images in a block, the positives after a step (None = none drawn) lit, the anchor in a frame."""
    per_image, same = grid[0] * grid[1], example.same_class
    pictures = []
    for i, image in enumerate(images):
        picture = Image.fromarray(image)
        if step is not None:
            part = slice(i * per_image, (i + 1) * per_image)
            own = None if same is None else same[part]
            picture = _lit(picture, example.positives[step][part], own, grid, patch)
        if example.anchor // per_image == i:
            y, x = (patch * value for value in divmod(example.anchor % per_image, grid[1]))
            box = (x - 2, y - 2, x + patch + 1, y + patch + 1)
            ImageDraw.Draw(picture).rectangle(box, outline=_MARK, width=3 if len(images) > 2 else 2)
        pictures.append(np.asarray(picture))
    rows = min(len(pictures), 2)
    columns = -(-len(pictures) // rows)
    pictures += [np.full_like(pictures[0], 255)] * (rows * columns - len(pictures))
    lines = [np.concatenate(pictures[r * columns : (r + 1) * columns], axis=1) for r in range(rows)]
    block = np.concatenate(lines)
    if max(block.shape) > _LARGEST:
        size = tuple(round(side * _LARGEST / max(block.shape)) for side in block.shape[1::-1])
        block = np.asarray(Image.fromarray(block).resize(size, Image.Resampling.BOX))
    head = Image.new("RGB", (block.shape[1], _HEAD), (255, 255, 255))
    if step is not None:
        ImageDraw.Draw(head).text((2, 1), example.describe()[step], fill=(0, 0, 0))
    return np.concatenate([np.asarray(head), block])


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
