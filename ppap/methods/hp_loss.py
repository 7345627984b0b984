"""HP's contrastive loss over hidden positives, chunk by chunk, with the gradient formed in the forward pass.

Legend: N patches, A anchors among them, E channels of an embedding, C anchors of a chunk, R rows of a tile.

For an anchor i, a_ij and b_ij say whether j is a task-agnostic and a task-specific positive:

    m_ij   = a_ij + lambda b_ij,   n_i = sum_j m_ij
    Q_i    = the task-agnostic positives and a random share rho of all patches, without i
    logp_ij = z_i.z_j / tau - log sum_{q in Q_i} exp(z_i.z_q / tau)
    L_c    = -(tau / tau_0) mean_i [ r_i / n_i sum_j m_ij logp_ij ],   r_i = n_i / mean_i n_i, or 1

over the anchors of the chunk with a task-agnostic positive; the others are skipped, also where they have
task-specific ones. A chunk without any such anchor gives 0 (the published code: NaN).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_TEMPORARIES = 7  # fp32 matrices of the size of a tile that are alive together


class Positives(NamedTuple):
    """Sets of some anchors."""

    agnostic: Tensor
    """(R, N) bool: positives in the frozen features."""
    specific: Tensor | None
    """(R, N) bool: positives in the averaged head's code; None where their weight is 0."""


class HPLoss(NamedTuple):
    """Loss of a batch, and mean sizes per anchor."""

    loss: Tensor
    """Scalar: mean over the chunks, and over the embeddings given."""
    positives: Tensor
    """Task-agnostic positives."""
    specific: Tensor
    """Task-specific positives."""
    negatives: Tensor
    """Patches of the denominator that are no task-agnostic positives."""


class HPSettings(NamedTuple):
    """Constants of :func:`hp_loss`."""

    temperature: float
    base_temperature: float
    chunk: int
    """Anchors C per chunk; a last partial chunk is kept."""
    reweighting: bool
    memory_budget: int
    """Limit of the temporaries [bytes]; a tile has at least one row."""


def hp_loss(
    embeddings: tuple[Tensor, ...],
    anchors: Tensor,
    positives: Callable[[Tensor], Positives],
    weight: float,
    kept: Tensor,
    settings: HPSettings,
) -> HPLoss:
    """Mean over chunks and embeddings of L_c.

    Args:
        embeddings: z and, with local mixing, z_mix: (N, E) each, unit rows; they receive the gradient. Each
            stands on both sides of its own products, over the same sets.
        anchors: (A,) int64, different patches.
        positives: sets of some of the anchors (R,), without the anchors themselves.
        weight: lambda of the task-specific positives.
        kept: (C, N) bool, the random patches of the denominator; row k serves the k-th anchor of every chunk.
        settings: see there.

    Returns:
        The loss is differentiable once in every embedding.
    """
    dtype = torch.promote_types(embeddings[0].dtype, torch.float32)
    with torch.autocast(embeddings[0].device.type, enabled=False):
        embeddings = tuple(z.to(dtype) for z in embeddings)
        loss, sizes = _HPLoss.apply(anchors, positives, weight, kept, settings, *embeddings)
        return HPLoss(loss, *sizes.unbind())


class _HPLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchors, positives, weight, kept, settings, *embeddings):
        grads = [torch.zeros_like(z) for z in embeddings]
        chunks = anchors.split(settings.chunk)
        loss = embeddings[0].new_zeros(())
        sizes = embeddings[0].new_zeros(3)
        scale = settings.temperature / settings.base_temperature / (len(chunks) * len(embeddings))
        for rows in chunks:
            value, found = _chunk(embeddings, grads, positives, weight, kept, settings, rows, scale)
            loss += value
            sizes += found
        ctx.save_for_backward(*grads)
        sizes = sizes / len(anchors)
        ctx.mark_non_differentiable(sizes)
        return loss, sizes

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss, _):
        return (None,) * 5 + tuple(dloss * grad for grad in ctx.saved_tensors)


def _chunk(embeddings, grads, positives, weight, kept, settings, rows, scale) -> tuple[Tensor, Tensor]:
    """Adds the gradient of one chunk to `grads`; its share of the loss, and summed sizes of the sets."""
    count = len(embeddings[0])
    tile = _tile_rows(count, settings)
    tiles = rows.split(tile)
    sets = [positives(part) for part in tiles]
    agnostic = torch.cat([found.agnostic.sum(dim=1) for found in sets])
    specific = torch.zeros_like(agnostic)
    if weight > 0:
        specific = torch.cat([found.specific.sum(dim=1) for found in sets])
    total = agnostic + weight * specific.to(embeddings[0].dtype)  # n_i
    valid = agnostic > 0
    if settings.reweighting:
        share = valid / (total * valid).sum().clamp(min=1)
    else:
        share = valid / (total.clamp(min=1) * valid.sum().clamp(min=1))
    share = share * scale
    loss, negatives = embeddings[0].new_zeros(()), 0
    per_anchor = (values.split(tile) for values in (kept[: len(rows)], total, share))
    for part, found, own_kept, own_total, own_share in zip(tiles, sets, *per_anchor, strict=True):
        denominator = found.agnostic | own_kept
        denominator.scatter_(1, part[:, None], False)
        negatives = negatives + denominator.sum() - found.agnostic.sum()
        pulled = found.agnostic.to(total.dtype)  # m_ij
        if weight > 0:
            pulled.add_(found.specific, alpha=weight)
        for z, grad in zip(embeddings, grads, strict=True):
            loss += _tile(z, grad, part, denominator, pulled, own_total, own_share, settings.temperature)
    return loss, torch.stack([agnostic.sum(), specific.sum(), negatives]).to(loss.dtype)


def _tile(z, grad, part, denominator, pulled, total, share, temperature) -> Tensor:
    """Loss of a tile of anchors; adds its gradient in both sides of the products."""
    anchors = z[part]
    logits = (anchors @ z.T).div_(temperature)
    # Anchors whose share is 0 may have an empty denominator: their rows must not give NaN.
    inside = logits.masked_fill(~denominator, -torch.inf)
    top = inside.amax(dim=1, keepdim=True)
    top = torch.where(torch.isfinite(top), top, 0)
    mass = inside.sub_(top).exp_()
    sums = mass.sum(dim=1, keepdim=True)
    sums = sums + (sums == 0)
    lse = (sums.log() + top)[:, 0]
    loss = -(share * ((pulled * logits).sum(dim=1) - total * lse)).sum()
    dlogits = mass.mul_(total[:, None] / sums).sub_(pulled)
    dlogits.mul_((share / temperature)[:, None])
    grad.index_add_(0, part, dlogits @ z)
    grad.addmm_(dlogits.T, anchors)
    return loss


def _tile_rows(count: int, settings: HPSettings) -> int:
    """Rows of a tile, after what the sets of a chunk take: two bits of every pair, as bytes."""
    sets = 2 * min(settings.chunk, count) * count
    return max((settings.memory_budget - sets) // (4 * _TEMPORARIES * count), 1)
