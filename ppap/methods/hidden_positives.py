"""Which patches are hidden positives of an anchor (HP, CVPR 2023): nearer to it than a reference pool.

The pool holds one random patch of each of M images. A patch's radius is its cosine with the nearest entry of
the pool, so it is large where patches are dense; two patches are positives of each other when their cosine
exceeds the radius of either. Legend: N patches, M entries of the pool, D channels, C a chunk of rows.

Products are in fp32 (float64 for float64); the published code takes fp16.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Entries of a tile of cosines that is held at a time: 64 MiB in fp32.
_TILE = 2**24


def pool_radius(features_ND: Tensor, pool_MD: Tensor) -> Tensor:
    """Cosine of every patch with the nearest entry of the pool: R_i = max_m cos(f_i, r_m).

    Args:
        features_ND: (N, D) floating, any norm; takes no gradient.
        pool_MD: (M, D) floating, any norm, M >= 1.

    Returns:
        (N,) float32 (float64 for float64 features).

    Raises:
        ValueError: shapes do not fit, or the pool is empty.
    """
    if features_ND.ndim != 2 or pool_MD.ndim != 2 or features_ND.shape[1] != pool_MD.shape[1]:
        raise ValueError(
            f"features {tuple(features_ND.shape)} and pool {tuple(pool_MD.shape)} do not fit; "
            "give (N, D) and (M, D)"
        )
    if len(pool_MD) == 0:
        raise ValueError("the reference pool is empty; give at least one patch")
    pool = unit_rows(pool_MD)
    rows = max(_TILE // len(pool), 1)
    with torch.autocast(features_ND.device.type, enabled=False):
        return torch.cat([(part @ pool.T).amax(dim=1) for part in unit_rows(features_ND).split(rows)])


def hidden_positives(
    features_ND: Tensor, radius_N: Tensor, rows: Tensor | slice, *, normalised: bool = False
) -> Tensor:
    """Hidden positives of some anchors: cos(f_i, f_j) > R_i or cos(f_i, f_j) > R_j, without i itself.

    Strict; symmetric up to the rounding of a product. A caller bounds the memory by the number of `rows`: the
    sets of different rows do not depend on each other.

    Args:
        features_ND: (N, D) floating, any norm; takes no gradient.
        radius_N: (N,) of :func:`pool_radius`.
        rows: the anchors, int64 (C,) or a slice of 0..N-1.
        normalised: the features come from :func:`unit_rows`, and need not be copied once more.

    Returns:
        (C, N) bool.
    """
    features = features_ND.detach() if normalised else unit_rows(features_ND)
    index = torch.arange(len(features), device=features.device)[rows]
    with torch.autocast(features.device.type, enabled=False):
        cosine_CN = features[index] @ features.T
    positive_CN = cosine_CN > torch.minimum(radius_N[index, None], radius_N[None, :])
    positive_CN[torch.arange(len(index), device=index.device), index] = False
    return positive_CN


def draw_pool(maps: Iterable[Tensor], size: int, seed: int, fill: int = 0) -> Tensor:
    """A reference pool: one uniformly drawn patch of every image, L2-normalised.

    Args:
        maps: feature maps (B, D, h, w) of batches of images; no more are taken than needed.
        size: entries M.
        seed, fill: the positions are a pure function of both; `fill` numbers the pools of a run.

    Returns:
        (M, D) float32 (float64 for float64), on the device of the maps.

    Raises:
        ValueError: fewer images than entries.
    """
    drawn, count = [], 0
    for batch in maps if size > 0 else ():
        drawn.append(draw_patches(batch[: size - count], seed, fill, count))
        count += len(drawn[-1])
        if count == size:
            break
    if count < max(size, 1):
        raise ValueError(f"{count} images for a reference pool of {size}; give a pool of at most {count}")
    return unit_rows(torch.cat(drawn))


def draw_patches(maps: Tensor, seed: int, fill: int, first: int = 0) -> Tensor:
    """One uniformly drawn patch of every feature map (B, D, h, w), as rows (B, D).

    Args:
        maps: those of the images number `first`, `first` + 1, ... of a pool.
        seed, fill: as for :func:`draw_pool`.
    """
    # Raw counter-based bits, which NumPy promises to keep; the two high bits keep them apart from those of
    # the sample order and of the anchors.
    key = np.array([seed, 2**63 | 2**62 | fill], dtype=np.uint64)
    bits = np.random.Philox(key=key).random_raw(first + len(maps))[first:] >> 1
    patches = maps.detach().flatten(2)  # (B, D, h w)
    position = torch.from_numpy(bits.astype(np.int64)).to(maps.device) % patches.shape[2]
    return patches[torch.arange(len(maps), device=maps.device), :, position]


def unit_rows(rows: Tensor) -> Tensor:
    """L2-normalised rows, detached, float32 (float64 for float64); a zero row stays zero."""
    rows = rows.detach()
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return F.normalize(rows, dim=1)
