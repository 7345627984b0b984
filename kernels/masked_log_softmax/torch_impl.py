"""``masked_log_softmax`` in plain torch with an analytic gradient: a matrix of logits of a chunk of anchors.

With s = softmax over the kept set and P the positives of anchor i:
    dL_i / dl_ij = s_ij - [j in P_i] / |P_i|,  0 where P_i is empty.
"""

from dataclasses import dataclass

import torch

from ..budget import rows_within
from ..precision import product, scaled_operand, weight_operand
from ..relation_masks.sets import Sets
from ..relation_masks.torch_impl import from_words
from .chunks import Settings, Target

__all__ = ["UNIT", "Embeddings", "bytes_per_anchor", "chunk", "chunk_rows", "from_words", "prepare"]

# Of log-sum-exps [nats].
UNIT = 1.0


@dataclass(frozen=True)
class Embeddings:
    """Rows of z.

    Attributes:
        values: (rows, E) in the accumulator's dtype.
        operand: the values divided by `scale`, as they enter products.
        scale: scalar.
    """

    values: torch.Tensor
    operand: torch.Tensor
    scale: torch.Tensor

    @property
    def width(self) -> int:
        """Channels."""
        return self.values.shape[1]

    def take(self, rows: torch.Tensor | slice) -> "Embeddings":
        """Some rows."""
        return Embeddings(self.values[rows], self.operand[rows], self.scale)


def prepare(z: torch.Tensor, precision: str) -> Embeddings:
    """Embeddings as they enter products."""
    return Embeddings(z, *scaled_operand(z, precision))


def chunk_rows(z_NE: torch.Tensor, settings: Settings, with_gradient: bool) -> int:
    """Anchors per chunk."""
    per_anchor = bytes_per_anchor(z_NE.shape[0], z_NE.shape[1], z_NE.element_size())
    return rows_within(settings.memory_budget, per_anchor)


def bytes_per_anchor(num_patches: int, width: int, element_size: int) -> int:
    """Bytes of temporaries that one anchor needs: logits, weights, their operand, unpacked masks."""
    return (3 * element_size + 8) * num_patches + 4 * element_size * width


def chunk(
    own: Embeddings,
    patches: Embeddings,
    sets: Sets[torch.Tensor],
    settings: Settings,
    lse_C: torch.Tensor | None = None,
    target: Target | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Losses and log-sum-exp [nats], (C,) each; a log-sum-exp that is given is not formed again."""
    logits_CN = product(own.operand, patches.operand.T)
    logits_CN *= own.scale * patches.scale / settings.temperature
    loss_C = None
    if lse_C is None:
        loss_C, of_shifted_C, shift_C = _loss_rows(logits_CN, sets)
        lse_C = of_shifted_C + shift_C
    else:
        of_shifted_C = lse_C
    if target is not None:
        _add_gradient(_gradient_rows(logits_CN, sets, of_shifted_C), own, patches, settings.precision, target)
    return loss_C, lse_C


def _loss_rows(
    logits_CN: torch.Tensor, sets: Sets[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, log-sum-exp and shift, each (C,), of a chunk of logits, which are shifted in place.

    The shift is the largest kept logit: embeddings of any norm are safe, and the loss is a difference of
    small numbers. The log-sum-exp is that of the shifted logits.
    """
    masked_CN = logits_CN.masked_fill(~sets.kept, -torch.inf)
    top_C = masked_CN.amax(dim=1)
    top_C = top_C.masked_fill_(top_C == -torch.inf, 0.0)
    lse_C = masked_CN.sub_(top_C[:, None]).exp_().sum(dim=1).log_()
    logits_CN.sub_(top_C[:, None])
    mean_C = torch.mul(logits_CN, sets.positive, out=masked_CN).sum(dim=1) / sets.num_positive.clamp(min=1)
    return torch.where(sets.num_positive > 0, lse_C - mean_C, 0.0), lse_C, top_C


def _gradient_rows(logits_CN: torch.Tensor, sets: Sets[torch.Tensor], lse_C: torch.Tensor) -> torch.Tensor:
    """dL_i / dl_ij (C, N) of a chunk, in the storage of its logits."""
    some_C = sets.num_positive > 0
    # Outside the kept set, and in a row without positives, a logit may exceed the log-sum-exp by any amount:
    # mask before the exponential, not after.
    weights_CN = logits_CN.sub_(torch.where(some_C, lse_C, 0.0)[:, None])
    weights_CN.masked_fill_(~sets.kept, -torch.inf).masked_fill_(~some_C[:, None], -torch.inf).exp_()
    share_C = some_C.to(weights_CN.dtype) / sets.num_positive.clamp(min=1)
    return weights_CN.addcmul_(sets.positive.to(weights_CN.dtype), share_C[:, None], value=-1)


def _add_gradient(
    weights_CN: torch.Tensor, own: Embeddings, patches: Embeddings, precision: str, target: Target
) -> None:
    """Logits are z_i.z_j / tau: every weight reaches row i by z_j and row j by z_i."""
    weights_op, weight_scale = weight_operand(weights_CN, precision)
    row_C1 = target.row_C[:, None]
    own_CE = product(weights_op, patches.operand) * (row_C1 * (patches.scale / weight_scale))
    target.own[target.rows] += own_CE
    rows_op, rows_scale = scaled_operand(own.values * row_C1, precision)
    target.dz_NE.add_(product(weights_op.T, rows_op) * (rows_scale / weight_scale))
