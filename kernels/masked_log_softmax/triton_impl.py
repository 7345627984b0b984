"""``masked_log_softmax`` in Triton: logits live in registers, a tile at a time; masks arrive as bits.

With x the logits in powers of two, l their log-sum-exp over the kept set and P the positives of a row:
    loss = (l - mean of x over P) ln 2,    weight = 2^(x - l) [kept] - [P] / |P|,
and d loss / d z follows from the weights by two library products.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from ..budget import row_chunks, rows_within
from ..precision import FP16_WEIGHT_SCALE, power_of_two_above
from ..tiles import bits as layout
from ..tiles import launch, occupancy
from ..tiles.bits import Bits
from ..tiles.planes import Planes, fill, plane_count, planes, planes_product
from ..tiles.sizes import COLUMN_BLOCK, padded, padded_channels
from .triton_kernels import combine_kernel, log_sum_exp_kernel, weights_kernel

# Below this bound of |x|, in powers of two, the bound itself serves as the shift: no exponential of a
# difference of logits leaves float32's normal range, and no maximum is taken. The price is the rounding of
# the shift in the last bits of a loss that is exactly 0.
TIGHT_BOUND = 50.0
# Rounding of the operands may lengthen rows a little.
SLACK = 1.01


@dataclass(frozen=True)
class Logits:
    """x = z_i . z_j log2(e) / temperature of some anchors (one at least) and all patches: never stored.

    Attributes:
        left: embeddings of the anchors.
        right: embeddings of the patches.
        scale: scalar, turns products of planes into x.
        bound: (C,) float32, no |x| of a row is larger.
        tight: scalar, not 0 where all bounds are below TIGHT_BOUND.
        positive: positives of the anchors.
        kept: kept patches of the anchors.
        flags: tiles with positives, see :func:`.occupancy.flags`.
        count_C: (C,) int64, numbers of positives.
    """

    left: Planes
    right: Planes
    scale: torch.Tensor
    bound: torch.Tensor
    tight: torch.Tensor
    positive: Bits
    kept: Bits
    flags: torch.Tensor
    count_C: torch.Tensor

    def log_sum_exp(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses (C,) [nats] and log-sum-exp (C,) [powers of two] over the kept patches."""
        parts = [torch.empty(self.positive.counts.shape, device=self.scale.device) for _ in range(3)]
        config = self._run(log_sum_exp_kernel, "log_sum_exp", (self.bound, *parts))
        loss_C, lse_C = torch.empty_like(self.bound), torch.empty_like(self.bound)
        per_tile = config.block_n // 128
        per_program = launch.rows_per_program()
        combine_kernel[(triton.cdiv(self.positive.rows, per_program),)](
            *parts,
            self.count_C,
            loss_C,
            lse_C,
            self.positive.rows,
            self.positive.groups // per_tile,
            ROWS=per_program,
            BLOCK=256,
            **launch.ROW_OPTIONS,
        )
        return loss_C, lse_C

    def weights(self, lse_C: torch.Tensor) -> Planes:
        """d loss / d logits (C, N) of every anchor as operands, 0 in rows without positives."""
        shape = (self.positive.counts.shape[0], self.positive.groups * 128)
        high = torch.empty(shape, dtype=self.right.high.dtype, device=self.scale.device)
        low = torch.empty_like(high) if self.right.split else None
        self._run(weights_kernel, "weights", (lse_C, self.count_C, high, low))
        return Planes(high, low, 1 / FP16_WEIGHT_SCALE, self.positive.rows, self.positive.columns)

    def _run(self, kernel: triton.JITFunction, name: str, arguments: tuple) -> launch.Launch:
        """Launch a kernel over all tiles; `arguments` stand before the sizes."""

        def start(config: launch.Launch, options: dict[str, object]) -> None:
            bits = self.positive
            grid = launch.tiles(bits.rows, bits.groups * 128, config.block_m, config.block_n)
            kernel[grid](
                launch.source(self.left.high, config.block_m, config.block_k, config.tma),
                launch.source(self.left.low, config.block_m, config.block_k, config.tma),
                launch.source(self.right.high, config.block_n, config.block_k, config.tma),
                launch.source(self.right.low, config.block_n, config.block_k, config.tma),
                bits.words,
                self.kept.words,
                self.flags,
                self.scale,
                self.tight,
                *arguments,
                bits.rows,
                bits.groups,
                BLOCK_N=config.block_n,
                BLOCK_K=config.block_k,
                BAND=launch.BAND,
                **options,
            )

        return launch.run(name, self.right, (self.positive.rows, self.positive.columns), start)


def gradient(
    weights: Planes, right: Planes, rows_CE: torch.Tensor, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights z (C, E), weights^T rows (N, E)): logits are z_i . z_j, every weight reaches both rows."""
    block = launch.row_block(rows_CE.device)
    other = planes(rows_CE, precision, block, scaled=True)
    return planes_product(weights, right), planes_product(weights, other, transposed=True)


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
    for chunk, logits in _chunks(
        z_AE, z_NE, positive_AW, kept_AW, temperature, precision, memory_budget, False
    ):
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
    for chunk, logits in _chunks(
        z_AE, z_NE, positive_AW, kept_AW, temperature, precision, memory_budget, True
    ):
        row_C1 = dloss_A[chunk, None] / temperature
        weights = logits.weights(lse_A[chunk])
        own_CE, other_NE = gradient(weights, logits.right, z_AE[chunk] * row_C1, precision)
        dz_AE[chunk] = own_CE * row_C1
        dz_NE += other_NE
    return dz_AE, dz_NE


def _chunks(
    z_AE: torch.Tensor,
    z_NE: torch.Tensor,
    positive_AW: torch.Tensor,
    kept_AW: torch.Tensor,
    temperature: float,
    precision: str,
    memory_budget: int,
    backward: bool,
) -> Iterator[tuple[slice, Logits]]:
    """Chunks of anchors within the budget and their logits; none without anchors or patches."""
    num_anchors, (num_patches, width) = z_AE.shape[0], z_NE.shape
    if num_anchors == 0 or num_patches == 0:
        return
    block, factor = launch.row_block(z_NE.device), math.log2(math.e) / temperature
    units = [None if precision == "bf16" else power_of_two_above(z) for z in (z_AE, z_NE)]
    norm_N = torch.empty(num_patches, device=z_NE.device)
    right = fill(z_NE, precision, COLUMN_BLOCK, unit=units[1], norm=norm_N)
    norm_scale = norm_N.amax() * (SLACK * factor)
    per_row = 2 * layout.bytes_per_row(num_patches) + bytes_per_anchor(
        num_patches, width, precision, backward, block
    )
    for chunk in row_chunks(num_anchors, rows_within(memory_budget, per_row, block)):
        positive, kept = (
            layout.from_public(words[chunk], num_patches, block) for words in (positive_AW, kept_AW)
        )
        bound_C = torch.empty(positive.rows, device=z_NE.device)
        left = fill(z_AE[chunk], precision, block, unit=units[0], norm=bound_C, norm_scale=norm_scale)
        scale = torch.as_tensor(left.unit * right.unit * factor, device=z_NE.device)
        tight = (bound_C.amax() < TIGHT_BOUND).to(torch.int32)
        found = occupancy.flags(positive, block), positive.totals()
        yield chunk, Logits(left, right, scale, bound_C, tight, positive, kept, *found)


def bytes_per_anchor(num_patches: int, width: int, precision: str, backward: bool, row_block: int) -> int:
    """Bytes of temporaries that one anchor needs besides its bits: partial results or weights, and rows."""
    columns, channels = padded(num_patches, COLUMN_BLOCK), padded_channels(width)
    tiles = 2 * plane_count(precision) * columns if backward else 3 * 4 * columns // 128
    lists = occupancy.bytes_per_row(num_patches, row_block)
    return tiles + lists + (16 + 4 * plane_count(precision)) * channels + 64
