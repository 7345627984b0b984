"""Crops of a batch of images, their colours and masks, and which patches of two crops show the same place.

All of it runs on the batch's device from one generator, so that a step's views depend on its seed alone.

Legend: B images, V crops per image, h w patch grid, N = h w. Crops are ordered crop by crop: the first B
rows are the first crop of every image. A box is (centre x, centre y, half width, half height) in the
coordinates of the whole image, -1..1 from edge to edge; a mirrored crop has a negative half width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ppap.data.transforms import MEAN, STD
from ppap.settings.pretraining import ViewsConfig

# RGB to luma and two colour axes (YIQ); a rotation of the latter two turns the hue.
_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


class Crops(NamedTuple):
    """Some crops of every image of a batch."""

    images: Tensor
    """(V * B, 3, s, s) float32, normalised."""
    boxes: Tensor
    """(V, B, 4) float32."""


def make_crops(
    pixels: Tensor,
    count: int,
    size: int,
    scale: tuple[float, float],
    config: ViewsConfig,
    generator: torch.Generator,
) -> Crops:
    """`count` random crops of every image, each mirrored or not, with its own colours.

    Args:
        pixels: (B, 3, H, W) float32, 0..1.
        count: V.
        size: side of a crop [pixels].
        scale: range of its share of the image's area; the sides' ratio is 3/4 to 4/3.
        config: strength of the colour changes.
        generator: on the device of `pixels`.
    """
    batch, device = len(pixels), pixels.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, batch, generator=generator, device=device)

    area, ratio = uniform(*scale), uniform(-math.log(4 / 3), math.log(4 / 3)).exp().sqrt()
    half = torch.stack([area.sqrt() * ratio, area.sqrt() / ratio], dim=-1).clamp(max=1)
    centre = torch.stack([uniform(-1, 1), uniform(-1, 1)], dim=-1) * (1 - half)
    mirror = torch.where(uniform(0, 1) < 0.5, 1.0, -1.0)
    boxes = torch.cat([centre, half[..., :1] * mirror[..., None], half[..., 1:]], dim=-1)

    # Several samples per pixel where a crop shrinks the image to less than half.
    fine = max(1, int(max(pixels.shape[2:]) * math.sqrt(scale[1]) / size))
    grid = _places(boxes.reshape(-1, 4), (size * fine, size * fine))
    images = F.grid_sample(pixels.repeat(count, 1, 1, 1), grid, padding_mode="border", align_corners=False)
    images = F.avg_pool2d(images, fine) if fine > 1 else images
    images = change_colours(images, config, generator)
    if config.flatten:
        flat = torch.rand(len(images), 1, 1, 1, generator=generator, device=device) < config.flatten
        images = torch.where(flat, flattened(images), images)
    return Crops(normalised(images), boxes)


def normalised(images: Tensor) -> Tensor:
    """Float images (M, 3, H, W), 0..1, with ImageNet's mean and deviation taken out."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def _places(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Centres (M, h, w, 2) of the cells of boxes (M, 4), as F.grid_sample takes them."""
    cx, cy, hx, hy = boxes.unbind(1)
    zero = torch.zeros_like(cx)
    theta = torch.stack([hx, zero, cx, zero, hy, cy], dim=1).reshape(-1, 2, 3)
    return F.affine_grid(theta, [len(theta), 3, *grid], align_corners=False)


def sample_map(maps: Tensor, boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map of features of whole images at the centres of a crop's patches, bilinear.

    Args:
        maps: (B, D, h', w') of any grid.
        boxes: (B, 4) one crop of each image.
        grid: (h, w) patches of the crop.

    Returns:
        (B, h w, D), rows of patches in row-major order.
    """
    sampled = F.grid_sample(maps, _places(boxes, grid), padding_mode="border", align_corners=False)
    return sampled.flatten(2).transpose(1, 2)


def change_colours(images: Tensor, config: ViewsConfig, generator: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue of each image (M, 3, s, s), 0..1, changed at random."""
    count, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator, device=device)

    jitter = config.jitter
    bright, contrast, saturation = (uniform(1 - jitter, 1 + jitter) for _ in range(3))
    saturation = torch.where(uniform(0, 1) < config.grey, 0.0, saturation)
    angle = uniform(-1, 1) * (2 * math.pi * config.hue)
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], dim=1).reshape(-1, 3, 3)
    turn[:, 1:] *= saturation[:, None, None]
    axes = torch.tensor(_YIQ, device=device)
    matrix = torch.linalg.inv(axes) @ turn @ axes * (bright * contrast)[:, None, None]
    flat = images.flatten(2)
    mean = (flat.mean(dim=2) * torch.tensor(_YIQ[0], device=device)).sum(dim=1)
    offset = bright * (1 - contrast) * mean
    return (matrix @ flat + offset[:, None, None]).clamp(0, 1).view_as(images)


def flattened(images: Tensor) -> Tensor:
    """(M, 3, s, s) images, 0..1, without slow changes of brightness and colour: only textures and edges."""
    slow = F.avg_pool2d(F.pad(images, (4, 4, 4, 4), mode="reflect"), 9, stride=1)
    return ((images - slow) * 1.5 + 0.5).clamp(0, 1)


def draw_masks(count: int, patches: int, config: ViewsConfig, generator: torch.Generator) -> Tensor:
    """(count, patches) bool: which patches of each crop the student does not see."""
    device = generator.device
    low, high = config.mask_share
    share = low + (high - low) * torch.rand(count, generator=generator, device=device)
    share *= torch.rand(count, generator=generator, device=device) < config.mask_odds
    rank = torch.rand(count, patches, generator=generator, device=device).argsort(dim=1).argsort(dim=1)
    return rank < (share * patches).round()[:, None]


def hide_patches(images: Tensor, masks: Tensor, patch_size: int) -> Tensor:
    """Normalised images (M, 3, s, s) with the masked patches (M, N) set to the mean colour.

    No photograph has a patch without any noise, so a network tells masked patches from grey ones, and needs
    no mask token that the backbone would have to carry.
    """
    side = -(-images.shape[2] // patch_size)
    seen = (~masks).view(-1, 1, side, side).to(images.dtype)
    seen = seen.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    return images * seen[:, :, : images.shape[2], : images.shape[3]]


def match_patches(
    boxes: Tensor, grid: tuple[int, int], others: Tensor, other_grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """For every patch of a crop, the patch of another crop of the same image that its centre falls into.

    Args:
        boxes, others: (B, 4) boxes of both crops.
        grid, other_grid: their patch grids (h, w).

    Returns:
        index (B, N) int64 into the other crop's patches, 0 where there is none; found (B, N) bool.
    """
    rows, cols = ((torch.arange(n, device=boxes.device) + 0.5) * (2 / n) - 1 for n in grid)
    y, x = (axis.flatten() for axis in torch.meshgrid(rows, cols, indexing="ij"))
    cx, cy, hx, hy = (value[:, None] for value in boxes.unbind(1))
    ox, oy, ohx, ohy = (value[:, None] for value in others.unbind(1))
    # Crop -> image -> other crop, then from -1..1 to patch numbers.
    col = ((cx + hx * x - ox) / ohx + 1) * (other_grid[1] / 2)
    row = ((cy + hy * y - oy) / ohy + 1) * (other_grid[0] / 2)
    found = (col >= 0) & (col < other_grid[1]) & (row >= 0) & (row < other_grid[0])
    index = row.floor().long() * other_grid[1] + col.floor().long()
    return torch.where(found, index, 0), found
