"""STEGO's correlation loss: codes follow the features' similarities, above a shift.

Legend: B images, S x S random points per image, a and b numbers of points (S^2 of them), D channels of the
features, E of the code. F[n, a, b] is the cosine of the features at point a of image n and point b of its
partner, C[n, a, b] that of the codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Unit vectors of a map at some points: bilinear between patches, then L2-normalised (eps 1e-10).

    Args:
        maps: (B, D, h, w).
        points: (B, S, S, 2), x and y in -1..1 from the centre of the first to that of the last patch
            (``align_corners=True``), border values beyond.

    Returns:
        (B, S^2, D), fp32 (float64 for float64).
    """
    with torch.autocast(maps.device.type, enabled=False):
        maps = maps if maps.dtype == torch.float64 else maps.float()
        found = F.grid_sample(maps, points.to(maps.dtype), padding_mode="border", align_corners=True)
        return F.normalize(found, dim=1, eps=1e-10).flatten(2).transpose(1, 2)


def correlation_loss(
    features: tuple[Tensor, Tensor],
    codes: tuple[Tensor, Tensor],
    shift: float,
    *,
    pointwise: bool = True,
    zero_clamp: bool = True,
) -> Tensor:
    """Mean over n, a, b of -max(C, 0) (F'' - shift).

    F' = F - mean_b F is centred for every point a; F'' = F' - mean F' + mean F, where these means are over
    the whole batch. Only the second point is centred, so F'' is not symmetric. No gradient through F.

    Args:
        features: unit vectors (B, S^2, D) of the images and of their partners, at the same points as
        codes: (B, S^2, E), which receive the gradient.
        shift: b.
        pointwise: centre; off = F as it is.
        zero_clamp: negative C count as 0, without gradient; off = as they are.
    """
    with torch.autocast(features[0].device.type, enabled=False):
        with torch.no_grad():
            similar = features[0] @ features[1].transpose(1, 2)
            if pointwise:
                mean = similar.mean()
                similar = similar - similar.mean(dim=2, keepdim=True)
                similar = similar - similar.mean() + mean
        code = codes[0] @ codes[1].transpose(1, 2)
        code = code.clamp(min=0) if zero_clamp else code
        return -(code * (similar - shift)).mean()


def other_images(count: int, device: torch.device) -> Tensor:
    """A partner for each of `count` images: a random permutation, its fixed points moved on by one.

    No image is its own partner (but a single one); an image can be the partner of two, since a moved fixed
    point meets another. Follows torch's global generator of `device`.
    """
    order = torch.randperm(count, device=device)
    own = torch.arange(count, device=device)
    return torch.where(order == own, order + 1, order) % count
