"""Images and scores for the measurements of the dense CRF; needs numpy and torch alone."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE, CLASSES = 320, 27
CELL = 8
"""Side of the patches that the made-up logits come from [pixels]."""


def logits_of(label: Tensor, classes: int, seed: int) -> Tensor:
    """Logits (C, H, W) as of a network of patches: label (H, W) averaged per patch, noise, resized."""
    height, width = label.shape
    patches = (max(height // CELL, 1), max(width // CELL, 1))
    shares = F.adaptive_avg_pool2d(F.one_hot(label, classes).permute(2, 0, 1)[None].float(), patches)
    noise = torch.randn(shares.shape, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(6 * shares + 1.5 * noise, (height, width), mode="bilinear")[0].contiguous()


def coloured_noise(seed: int = 0) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8 random colours, smoothed: some five lattice vertices per pixel."""
    coarse = np.random.default_rng(seed).integers(0, 256, (1, 3, SIDE // 2, SIDE // 2)).astype(np.float32)
    smooth = F.interpolate(torch.from_numpy(coarse), (SIDE, SIDE), mode="bilinear")
    return np.ascontiguousarray(smooth[0].permute(1, 2, 0).to(torch.uint8).numpy())


def smooth_regions(seed: int = 0) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8 regions of slowly varying colour, with edges and grain.

    About as many lattice vertices per pixel, half a one, as photographs have.
    """
    rng = np.random.default_rng(seed)
    g = torch.Generator().manual_seed(seed)
    shades = F.interpolate(
        torch.rand(1, 3, 5, 5, generator=g), (SIDE, SIDE), mode="bicubic", align_corners=True
    )
    points = rng.uniform(0, SIDE, (12, 2))
    grid = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij"), axis=-1)
    region = ((grid[:, :, None] - points) ** 2).sum(axis=-1).argmin(axis=-1)
    image = 0.5 * shades[0].permute(1, 2, 0).numpy() + 0.5 * rng.uniform(0, 1, (12, 3))[region]
    image = 255 * image + rng.normal(0, 3, image.shape)
    return np.ascontiguousarray(image.clip(0, 255).astype(np.uint8))
