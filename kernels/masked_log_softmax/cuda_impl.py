"""``masked_log_softmax`` in the CUDA library (``csrc/cuda/masked_log_softmax.cu``), then two products.

With x the logits in powers of two, l their log-sum-exp over the kept set and P the positives of a row:
    loss = (l - mean of x over P) ln 2,    weight = 2^(x - l) [kept] - [P] / |P|.
"""

import math

import torch

from .. import native_cuda as cuda
from ..budget import rows_within
from ..precision import FP16_WEIGHT_SCALE, operand, product, scaled_operand
from ..relation_masks.cuda_impl import from_words
from ..relation_masks.sets import Sets
from .chunks import Settings, Target

__all__ = ["UNIT", "bytes_per_anchor", "chunk", "chunk_rows", "from_words", "prepare", "weight_type"]

# Of log-sum-exps [nats].
UNIT = math.log(2)

_WEIGHT_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Embeddings as the library reads them.
prepare = cuda.Operand.of


def chunk_rows(z_NE: torch.Tensor, settings: Settings, with_gradient: bool) -> int:
    """Anchors per chunk."""
    return rows_within(settings.memory_budget, bytes_per_anchor(*z_NE.shape))


def bytes_per_anchor(num_patches: int, width: int) -> int:
    """Bytes of temporaries that one anchor needs: two bits and a weight a patch, partial results, rows."""
    return num_patches // 4 + 2 + 4 * num_patches + 20 * (num_patches // 64 + 1) + 32 * width + 128


def chunk(
    own: cuda.Operand,
    patches: cuda.Operand,
    sets: Sets[torch.Tensor],
    settings: Settings,
    lse_C: torch.Tensor | None = None,
    target: Target | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Losses [nats] and log-sum-exp [powers of two], (C,) each.

    A log-sum-exp that is given is not formed again; x is never stored.
    """
    scale = own.unit * patches.unit * (math.log2(math.e) / settings.temperature)
    (rows, width), num_patches = own.values.shape, patches.values.shape[0]
    operands = (own.values, rows, patches.values, num_patches, width, scale)
    masks = (sets.positive, sets.kept, sets.positive.shape[1])
    loss_C = None
    if lse_C is None:
        tiles = -(-num_patches // cuda.library().ppap_cuda_tile())
        top, total, hit = torch.empty((3, tiles, rows), device=scale.device)
        cuda.call("log_sum_exp", *operands, *masks, top, total, hit, precision=settings.precision)
        loss_C, lse_C = _combine(top, total, hit, sets.num_positive)
    if target is not None:
        has_C = sets.num_positive > 0
        share_C = has_C.float() / sets.num_positive.clamp(min=1)
        masked_C = torch.where(has_C, lse_C, torch.inf).contiguous()
        weights_NC = torch.empty(
            (num_patches, rows), dtype=weight_type(settings.precision), device=scale.device
        )
        cuda.call("weights", *operands, *masks, masked_C, share_C, weights_NC, precision=settings.precision)
        _add_gradient(weights_NC, own, patches, settings.precision, target)
    return loss_C, lse_C


def _combine(
    top: torch.Tensor, total: torch.Tensor, hit: torch.Tensor, count_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and log-sum-exp from partial results (tiles, C)."""
    largest_C = top.amax(dim=0)
    base_C = largest_C.masked_fill(largest_C == -torch.inf, 0.0)
    sums = torch.where(total == 0, 0.0, total * torch.exp2(top - base_C))
    lse_C = base_C + sums.sum(dim=0).log2()
    mean_C = hit.sum(dim=0) / count_C.clamp(min=1)
    return torch.where(count_C > 0, (lse_C - mean_C) * math.log(2), 0.0), lse_C


def weight_type(precision: str) -> torch.dtype:
    """Type in which the library writes d loss / d logits times 2^14."""
    return _WEIGHT_TYPES[precision]


def _add_gradient(
    weights_NC: torch.Tensor, own: cuda.Operand, patches: cuda.Operand, precision: str, target: Target
) -> None:
    """Every weight reaches both rows of its logit, by the vendor's products."""
    row_C1 = target.row_C[:, None]
    own_CE = product(weights_NC.T, operand(patches.values, precision))
    rows_op, rows_scale = scaled_operand(own.values * own.unit * row_C1, precision)
    target.own[target.rows] += own_CE * (patches.unit / FP16_WEIGHT_SCALE) * row_C1
    target.dz_NE.add_(product(weights_NC, rows_op) * (rows_scale / FP16_WEIGHT_SCALE))
