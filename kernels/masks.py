"""Packed masks over patches: int32 words, bit k of word w = column 32 w + k."""

from typing import NamedTuple

import torch


class PackedMasks(NamedTuple):
    """The two sets of every anchor over N patches, 1 bit per entry.

    Attributes:
        positive: (A, ceil(N / 32)) int32, the positives without the anchor itself.
        kept: (A, ceil(N / 32)) int32, positives and negatives (the denominator of Eq. 8) without the anchor
            itself.
        anchors: (A,) int64 row of each anchor among the patches, or None when every patch is an anchor.
    """

    positive: torch.Tensor
    kept: torch.Tensor
    anchors: torch.Tensor | None = None


def num_words(num_patches: int) -> int:
    """Words per row that hold `num_patches` bits."""
    return (num_patches + 31) // 32


def pack_masks(mask: torch.Tensor) -> torch.Tensor:
    """Pack a boolean mask (..., N) into int32 words (..., ceil(N / 32)).

    Bit k of word w is column 32 w + k; bits past the last column are 0.

    Raises:
        ValueError: `mask` is not a boolean tensor of at least one dimension.
    """
    if mask.dtype != torch.bool or mask.dim() < 1:
        raise ValueError(f"mask is {mask.dtype} of shape {tuple(mask.shape)}; give a boolean tensor (..., N)")
    columns = mask.shape[-1]
    words = num_words(columns)
    if words == 0:
        return torch.zeros((*mask.shape[:-1], 0), dtype=torch.int32, device=mask.device)
    bits = torch.zeros((*mask.shape[:-1], words * 32), dtype=torch.uint8, device=mask.device)
    bits[..., :columns] = mask
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    packed = (bits.view(*mask.shape[:-1], words * 4, 8) * weights).sum(-1, dtype=torch.uint8)
    return packed.view(torch.int32)


def unpack_masks(words: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Boolean mask (..., num_patches) of int32 words; inverse of :func:`pack_masks`.

    Raises:
        ValueError: `words` is not int32, or its last size is not ceil(num_patches / 32).
    """
    if words.dtype != torch.int32 or words.dim() < 1 or words.shape[-1] != num_words(num_patches):
        raise ValueError(
            f"words is {words.dtype} of shape {tuple(words.shape)}; "
            f"give int32 (..., {num_words(num_patches)}) for {num_patches} patches"
        )
    octets = words.contiguous().view(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    bits = (octets.unsqueeze(-1) >> shifts) & 1
    return bits.view(*words.shape[:-1], 32 * words.shape[-1])[..., :num_patches].bool()
