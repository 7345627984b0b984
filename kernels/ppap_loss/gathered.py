"""``ppap_loss`` of many ranks, gathered: every rank has all rows, and its own anchors."""

from collections.abc import Callable

import torch

from .groups import Groups
from .messages import Ranks, add_up, add_up_rows, gather_rows
from .settings import Result, Settings

# (features, z, anchors, anchors per group, settings) -> loss, gradient, its scale, counts: one process's op.
OneLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, Settings], Result]


def gathered_bytes(rows: int, width: int, code_width: int, size: int, accumulated: int) -> int:
    """Bytes that gathering keeps on a rank: rows of all, and gradients of up to three runs of anchors.

    Args:
        rows: patches of all ranks.
        width: channels of the guidance.
        code_width: channels of z.
        size: bytes of a number of either.
        accumulated: bytes of a number of the gradient.
    """
    return rows * ((width + code_width) * size + 3 * code_width * accumulated)


def gathered_loss(
    one: OneLoss,
    features_ND: torch.Tensor,
    z_NE: torch.Tensor,
    anchors_A: torch.Tensor,
    settings: Settings,
    ranks: Ranks,
) -> Result:
    """Loss over all ranks' anchors, and the gradient of this rank's rows.

    The op of one process runs on this rank's anchors: once for whole groups, once for the part of a group at
    either end. What an end's group has on other ranks decides the weight of its part.
    """
    keys_ND, all_NE = gather_rows(features_ND, ranks), gather_rows(z_NE, ranks)
    groups, own_A = Groups(ranks, settings.group), anchors_A + ranks.first_row
    runs = [
        (one(keys_ND, all_NE, own_A[run], settings.group if whole else run.stop - run.start, settings), whole)
        for run, whole in groups.parts()
    ]
    counts = [torch.cat([anchors_A[:0], *(found[k] for found, _ in runs)]) for k in (3, 4)]
    valid_A = counts[0] > 0
    valid_K, index_A = groups.valid(valid_A), groups.index(anchors_A.device)
    dtype = runs[0][0].loss.dtype if runs else settings.accumulator
    loss, dz_NE = z_NE.new_zeros((), dtype=dtype), None
    for (found, whole), (run, _) in zip(runs, groups.parts(), strict=True):
        own = index_A[run]
        # A run of whole groups is the mean of their means; a part is a mean of its own valid anchors.
        share = (own[-1] - own[0] + 1).to(dtype)
        if not whole:
            share = valid_A[run].sum().to(dtype) / valid_K[own[0]].clamp(min=1).to(dtype)
        share = share / groups.total
        loss = loss + found.loss * share
        if settings.with_gradient:
            part_NE = found.dz * (found.dz_scale * share)
            dz_NE = part_NE if dz_NE is None else dz_NE.add_(part_NE)
    if settings.with_gradient and dz_NE is None:
        dz_NE = z_NE.new_zeros(all_NE.shape, dtype=dtype)
    own_NE = z_NE.new_zeros((0, z_NE.shape[1]), dtype=dtype) if dz_NE is None else add_up_rows(dz_NE, ranks)
    return Result(add_up(loss, ranks), own_NE, torch.ones_like(loss), *counts)
