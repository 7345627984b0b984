"""Classes of patches, from a map of labels per pixel.

Legend: B images, H W pixels, N = B h w patches.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LabelRule = Literal["majority", "centre", "nearest"]


def patch_labels(label: Tensor, patch_size: int) -> Tensor:
    """Most frequent class of each patch.

    Args:
        label: (B, H, W) int64, ids below 0 are ignored; H and W are multiples of the patch.
        patch_size: side of a patch [pixels].

    Returns:
        (N,) int64; -1 where every pixel is ignored. The lowest id of equals.

    Raises:
        ValueError: H or W is no multiple of the patch.
    """
    blocks = blocks_of(label[..., None], patch_size)[..., 0]
    classes = max(int(blocks.max()) + 1, 1) if blocks.numel() else 1  # one where nothing is labelled
    counts = F.one_hot(blocks.clamp(min=-1) + 1, classes + 1).sum(dim=1)[:, 1:]
    # argmax promises no order among equals; adding a fraction that falls with the id does.
    falling = torch.linspace(0.5, 0, counts.shape[1], dtype=torch.float64)
    best = (counts + falling).argmax(dim=1)
    return torch.where(counts.sum(dim=1) > 0, best, -1)


def labels_of(label: Tensor, patch_size: int, rule: LabelRule = "majority") -> Tensor:
    """Class of each patch of a batch of label maps.

    Args:
        label: (B, H, W) int64, -1 = ignored; the network pads sides that are no multiple of the patch, and so
            does this, with ignored pixels.
        patch_size: side of a patch [pixels].
        rule: ``majority`` = most frequent class of its labelled pixels; ``centre`` = class of the pixel below
            and right of its middle; ``nearest`` = class of its upper left pixel, which is what nearest
            resizing of the label to the grid takes.

    Returns:
        (N,) int64, -1 = ignored.
    """
    label = F.pad(label, (0, -label.shape[2] % patch_size, 0, -label.shape[1] % patch_size), value=-1)
    if rule == "majority":
        return patch_labels(label, patch_size)
    offset = patch_size // 2 if rule == "centre" else 0
    return label[:, offset::patch_size, offset::patch_size].reshape(-1)


def blocks_of(values: Tensor, patch_size: int) -> Tensor:
    """Pixels by patch: (B, H, W, M) -> (N, patch_size ** 2, M), patches in (image, row, column) order."""
    images, height, width, last = values.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"{height} x {width} pixels are no multiple of the patch of {patch_size}")
    values = values.unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size)).transpose(2, 3)
    return values.reshape(-1, patch_size * patch_size, last)
