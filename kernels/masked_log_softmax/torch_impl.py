"""``masked_log_softmax`` in plain torch with an analytic gradient, one chunk of anchors at a time.

With s = softmax over the kept set and P the positives of anchor i:
    dL_i / dl_ij = s_ij - [j in P_i] / |P_i|,  0 where P_i is empty.
"""

import torch

from ..budget import row_chunks, rows_within
from ..masks import unpack_masks
from ..precision import product, scaled_operand, weight_operand


def masked_log_softmax(
    z_AE: torch.Tensor,
    z_NE: torch.Tensor,
    positive_AW: torch.Tensor,
    kept_AW: torch.Tensor,
    temperature: float,
    precision: str,
    memory_budget: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and log-sum-exp of every anchor; embeddings are in the accumulator's dtype."""
    num_anchors, num_patches = z_AE.shape[0], z_NE.shape[0]
    loss_A, lse_A = z_AE.new_empty(num_anchors), z_AE.new_empty(num_anchors)
    (za_op, za_scale), (zn_op, zn_scale) = scaled_operand(z_AE, precision), scaled_operand(z_NE, precision)
    scale = za_scale * zn_scale / temperature
    for chunk in row_chunks(num_anchors, _rows(memory_budget, z_NE)):
        logits_CN = product(za_op[chunk], zn_op.T).mul_(scale)
        positive_CN = unpack_masks(positive_AW[chunk], num_patches)
        kept_CN = unpack_masks(kept_AW[chunk], num_patches)
        num_positives_C = positive_CN.sum(dim=1)
        loss_A[chunk], shifted_lse_C, shift_C = loss_rows(logits_CN, positive_CN, kept_CN, num_positives_C)
        lse_A[chunk] = shifted_lse_C + shift_C
    return loss_A, lse_A


def masked_log_softmax_backward(
    dloss_A: torch.Tensor,
    z_AE: torch.Tensor,
    z_NE: torch.Tensor,
    positive_AW: torch.Tensor,
    kept_AW: torch.Tensor,
    lse_A: torch.Tensor,
    temperature: float,
    precision: str,
    memory_budget: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients (A, E) and (N, E) in the accumulator's dtype; logits are recomputed."""
    dz_AE, dz_NE = torch.zeros_like(z_AE), torch.zeros_like(z_NE)
    (za_op, za_scale), (zn_op, zn_scale) = scaled_operand(z_AE, precision), scaled_operand(z_NE, precision)
    scale = za_scale * zn_scale / temperature
    for chunk in row_chunks(z_AE.shape[0], _rows(memory_budget, z_NE)):
        logits_CN = product(za_op[chunk], zn_op.T).mul_(scale)
        positive_CN = unpack_masks(positive_AW[chunk], z_NE.shape[0])
        kept_CN = unpack_masks(kept_AW[chunk], z_NE.shape[0])
        num_positives_C = positive_CN.sum(dim=1)
        weights_CN = gradient_rows(logits_CN, positive_CN, kept_CN, num_positives_C, lse_A[chunk])
        weights_op, weight_scale = weight_operand(weights_CN, precision)
        row_C1 = dloss_A[chunk, None] / temperature
        dz_AE[chunk] = product(weights_op, zn_op) * (zn_scale / weight_scale) * row_C1
        add_transposed(dz_NE, weights_op, z_AE[chunk] * row_C1, weight_scale, precision)
    return dz_AE, dz_NE


def _rows(memory_budget: int, z_NE: torch.Tensor) -> int:
    return rows_within(memory_budget, bytes_per_anchor(z_NE.shape[0], z_NE.shape[1], z_NE.element_size()))


def bytes_per_anchor(num_patches: int, width: int, element_size: int) -> int:
    """Bytes of temporaries that one anchor needs: logits, weights, their operand, unpacked masks."""
    return (3 * element_size + 8) * num_patches + 4 * element_size * width


def loss_rows(
    logits_CN: torch.Tensor,
    positive_CN: torch.Tensor,
    kept_CN: torch.Tensor,
    num_positives_C: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, log-sum-exp and shift, each (C,), of a chunk of logits, which are shifted in place.

    The shift is the largest kept logit: embeddings of any norm are safe, and the loss is a difference of
    small numbers. The log-sum-exp is that of the shifted logits.
    """
    masked_CN = logits_CN.masked_fill(~kept_CN, -torch.inf)
    top_C = masked_CN.amax(dim=1) if masked_CN.shape[1] else masked_CN.new_zeros(masked_CN.shape[0])
    top_C = top_C.masked_fill_(top_C == -torch.inf, 0.0)
    lse_C = masked_CN.sub_(top_C[:, None]).exp_().sum(dim=1).log_()
    logits_CN.sub_(top_C[:, None])
    mean_C = torch.mul(logits_CN, positive_CN, out=masked_CN).sum(dim=1) / num_positives_C.clamp(min=1)
    return torch.where(num_positives_C > 0, lse_C - mean_C, 0.0), lse_C, top_C


def gradient_rows(
    logits_CN: torch.Tensor,
    positive_CN: torch.Tensor,
    kept_CN: torch.Tensor,
    num_positives_C: torch.Tensor,
    lse_C: torch.Tensor,
) -> torch.Tensor:
    """dL_i / dl_ij (C, N) of a chunk, in the storage of its logits."""
    some_C = num_positives_C > 0
    # Outside the kept set, and in a row without positives, a logit may exceed the log-sum-exp by any amount:
    # mask before the exponential, not after.
    weights_CN = logits_CN.sub_(torch.where(some_C, lse_C, 0.0)[:, None])
    weights_CN.masked_fill_(~kept_CN, -torch.inf).masked_fill_(~some_C[:, None], -torch.inf).exp_()
    share_C = some_C.to(weights_CN.dtype) / num_positives_C.clamp(min=1)
    return weights_CN.addcmul_(positive_CN.to(weights_CN.dtype), share_C[:, None], value=-1)


def add_transposed(
    dz_NE: torch.Tensor, weights_op: torch.Tensor, rows_CE: torch.Tensor, weight_scale: float, precision: str
) -> None:
    """dz += weights^T rows / weight_scale, in place, for the :func:`weight_operand` of (C, N) weights."""
    rows_op, rows_scale = scaled_operand(rows_CE, precision)
    dz_NE += product(weights_op.T, rows_op) * (rows_scale / weight_scale)
