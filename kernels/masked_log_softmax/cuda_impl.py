"""``masked_log_softmax`` in the CUDA library: partial log-sum-exps per tile, then weights, then two products.

With x the logits in powers of two, l their log-sum-exp over the kept set and P the positives of a row:
    loss = (l - mean of x over P) ln 2,    weight = 2^(x - l) [kept] - [P] / |P|.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .. import native_cuda as cuda
from ..budget import row_chunks, rows_within
from ..precision import FP16_WEIGHT_SCALE, operand, product, scaled_operand
from .native_impl import Sets

_WEIGHT_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Logits:
    """x = z_i . z_j log2(e) / temperature of some anchors (one at least) and all patches: never stored."""

    own: cuda.Operand
    patches: cuda.Operand
    sets: Sets
    temperature: float
    precision: str

    def log_sum_exp(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses (C,) [nats] and log-sum-exp (C,) [powers of two] over the kept patches."""
        rows, count_C = self.own.values.shape[0], self.sets.num_positive
        tiles = -(-self.patches.values.shape[0] // cuda.library().ppap_cuda_tile())
        top, total, hit = (torch.empty((tiles, rows), device=count_C.device) for _ in range(3))
        self._call("log_sum_exp", top, total, hit)
        largest_C = top.amax(dim=0)
        base_C = largest_C.masked_fill(largest_C == -torch.inf, 0.0)
        sums = torch.where(total == 0, 0.0, total * torch.exp2(top - base_C))
        lse_C = base_C + sums.sum(dim=0).log2()
        mean_C = hit.sum(dim=0) / count_C.clamp(min=1)
        return torch.where(count_C > 0, (lse_C - mean_C) * math.log(2), 0.0), lse_C

    def weights(self, lse_C: torch.Tensor) -> torch.Tensor:
        """d loss / d logits (N, C) times 2^14 in the type of the product to come, 0 without positives."""
        has_C = self.sets.num_positive > 0
        share_C = has_C.float() / self.sets.num_positive.clamp(min=1)
        lse_C = torch.where(has_C, lse_C, torch.inf).contiguous()
        shape = (self.patches.values.shape[0], self.own.values.shape[0])
        out = torch.empty(shape, dtype=weight_type(self.precision), device=lse_C.device)
        self._call("weights", lse_C, share_C, out)
        return out

    def _call(self, name: str, *out: torch.Tensor) -> None:
        scale = self.own.unit * self.patches.unit * (math.log2(math.e) / self.temperature)
        (rows, width), patches = self.own.values.shape, self.patches.values.shape[0]
        operands = (self.own.values, rows, self.patches.values, patches, width, scale)
        masks = (self.sets.positive, self.sets.kept, self.sets.positive.shape[1])
        cuda.call(name, *operands, *masks, *out, precision=self.precision)


def weight_type(precision: str) -> torch.dtype:
    """Type in which the library writes weights."""
    return _WEIGHT_TYPES[precision]


def gradient(
    weights_NC: torch.Tensor, patches: cuda.Operand, rows_CE: torch.Tensor, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights^T z (C, E), weights rows (N, E)) by the vendor's library."""
    own_CE = product(weights_NC.T, operand(patches.values, precision))
    rows_op, rows_scale = scaled_operand(rows_CE, precision)
    other_NE = product(weights_NC, rows_op)
    return own_CE * (patches.unit / FP16_WEIGHT_SCALE), other_NE * (rows_scale / FP16_WEIGHT_SCALE)


def masked_log_softmax(
    z_AE: torch.Tensor,
    z_NE: torch.Tensor,
    positive_AW: torch.Tensor,
    kept_AW: torch.Tensor,
    temperature: float,
    precision: str,
    memory_budget: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss [nats] and log-sum-exp [powers of two] of every anchor; embeddings are float32."""
    loss_A, lse_A = z_AE.new_zeros(z_AE.shape[0]), z_AE.new_full((z_AE.shape[0],), -torch.inf)
    masks = (positive_AW, kept_AW)
    for chunk, logits in _chunks(z_AE, z_NE, masks, temperature, precision, memory_budget):
        loss_A[chunk], lse_A[chunk] = logits.log_sum_exp()
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
    """Gradients (A, E) and (N, E) in float32; logits are recomputed."""
    dz_AE, dz_NE = torch.zeros_like(z_AE), torch.zeros_like(z_NE)
    masks = (positive_AW, kept_AW)
    for chunk, logits in _chunks(z_AE, z_NE, masks, temperature, precision, memory_budget):
        row_C1 = dloss_A[chunk, None] / temperature
        weights_NC = logits.weights(lse_A[chunk])
        own_CE, other_NE = gradient(weights_NC, logits.patches, z_AE[chunk] * row_C1, precision)
        dz_AE[chunk] = own_CE * row_C1
        dz_NE += other_NE
    return dz_AE, dz_NE


def _chunks(
    z_AE: torch.Tensor,
    z_NE: torch.Tensor,
    masks: tuple[torch.Tensor, torch.Tensor],
    temperature: float,
    precision: str,
    memory_budget: int,
) -> Iterator[tuple[slice, Logits]]:
    """Chunks of anchors within the budget and their logits; none without anchors or patches."""
    num_anchors, (num_patches, width) = z_AE.shape[0], z_NE.shape
    if num_anchors == 0 or num_patches == 0:
        return
    patches, own = cuda.Operand.of(z_NE, precision), cuda.Operand.of(z_AE, precision)
    for chunk in row_chunks(num_anchors, rows_within(memory_budget, bytes_per_anchor(num_patches, width))):
        (positive, num_positive), (kept, _) = (cuda.from_public(words[chunk], num_patches) for words in masks)
        yield (
            chunk,
            Logits(own.take(chunk), patches, Sets(positive, kept, num_positive), temperature, precision),
        )


def bytes_per_anchor(num_patches: int, width: int) -> int:
    """Bytes of temporaries that one anchor needs: two bits and a weight a patch, partial results, rows."""
    return num_patches // 4 + 2 + 4 * num_patches + 20 * (num_patches // 64 + 1) + 32 * width + 128
