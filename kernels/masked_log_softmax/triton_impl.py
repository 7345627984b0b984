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

from ..common import FP16_WEIGHT_SCALE, row_chunks, rows_within
from ..tiles import bits as layout
from ..tiles import launch
from ..tiles.bits import Bits
from ..tiles.planes import Planes, padded, plane_count, planes, planes_product
from .triton_kernels import combine_kernel, log_sum_exp_kernel, weights_kernel

# Below this bound of |x|, in powers of two, the bound itself serves as the shift: no exponential of a
# difference of logits leaves float32's normal range, and no maximum is taken. The price is the rounding of
# the shift in the last bits of a loss that is exactly 0.
_TIGHT_BOUND = 50.0


@dataclass(frozen=True)
class Embeddings:
    """Rows of z as operands, with what bounds their products.

    Attributes:
        planes: operands, scaled by the largest magnitude where 16 bits need it.
        norms: (rows,) float32 Euclidean norms.
    """

    planes: Planes
    norms: torch.Tensor

    @classmethod
    def of(cls, z: torch.Tensor, precision: str, multiple: int) -> "Embeddings":
        """Embeddings of float32 z (rows, E)."""
        return cls(planes(z, precision, multiple, scaled=True), torch.linalg.vector_norm(z, dim=1))

    def gather(self, index: torch.Tensor, multiple: int) -> "Embeddings":
        """Some rows."""
        return Embeddings(self.planes.gather(index, multiple), self.norms[index])


class Logits:
    """x = z_i . z_j log2(e) / temperature of some anchors (one at least) and all patches: never stored.

    Args:
        left: embeddings of the anchors.
        right: embeddings of the patches.
        temperature: divides the products.
        positive: positives of the anchors.
        kept: kept patches of the anchors.
    """

    def __init__(
        self, left: Embeddings, right: Embeddings, temperature: float, positive: Bits, kept: Bits
    ) -> None:
        self.left, self.right, self.positive, self.kept = left.planes, right.planes, positive, kept
        factor = math.log2(math.e) / temperature
        unit = self.left.unit * self.right.unit * factor
        self.scale = unit if isinstance(unit, torch.Tensor) else torch.full_like(right.norms[0], unit)
        # Rounding of the operands may lengthen rows a little.
        self.bound = left.norms * (right.norms.amax() * (1.01 * factor))
        self.tight = (self.bound.amax() < _TIGHT_BOUND).to(torch.int32)
        self.occupied = positive.occupied(launch.row_block(right.norms.device))
        self.count_C = positive.totals()

    def log_sum_exp(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses (C,) [nats] and log-sum-exp (C,) [powers of two] over the kept patches."""
        parts = [torch.empty(self.positive.counts.shape, device=self.scale.device) for _ in range(3)]
        config = self._run(log_sum_exp_kernel, "log_sum_exp", (self.bound, *parts))
        loss_C, lse_C = torch.empty_like(self.bound), torch.empty_like(self.bound)
        per_tile = config.block_n // 128
        groups = self.positive.groups
        per_program = launch.rows_per_program()
        combine_kernel[(triton.cdiv(self.positive.rows, per_program),)](
            *parts,
            self.positive.counts,
            loss_C,
            lse_C,
            self.positive.rows,
            groups // per_tile,
            groups,
            GROUPS=per_tile,
            ROWS=per_program,
            BLOCK=256,
            **launch.ROW_OPTIONS,
        )
        return loss_C, lse_C

    def weights(self, lse_C: torch.Tensor) -> Planes:
        """d loss / d logits (C, N) of every anchor as operands, 0 in rows without positives."""
        has_C = self.count_C > 0
        share_C = has_C.float() / self.count_C.clamp(min=1)
        lse_C = torch.where(has_C, lse_C, torch.inf)
        shape = (self.positive.counts.shape[0], self.positive.groups * 128)
        high = torch.empty(shape, dtype=self.right.high.dtype, device=self.scale.device)
        low = torch.empty_like(high) if self.right.split else None
        self._run(weights_kernel, "weights", (lse_C, share_C, high, low))
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
                self.occupied,
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
    block = launch.row_block(z_NE.device)
    right = Embeddings.of(z_NE, precision, layout.COLUMN_BLOCK)
    left = Embeddings.of(z_AE, precision, block)
    per_row = 2 * layout.bytes_per_row(num_patches) + bytes_per_anchor(
        num_patches, width, precision, backward
    )
    for chunk in row_chunks(num_anchors, rows_within(memory_budget, per_row, block)):
        index_C = torch.arange(chunk.start, chunk.stop, device=z_NE.device)
        masks = [layout.from_public(words[chunk], num_patches, block) for words in (positive_AW, kept_AW)]
        yield chunk, Logits(left.gather(index_C, block), right, temperature, *masks)


def bytes_per_anchor(num_patches: int, width: int, precision: str, backward: bool) -> int:
    """Bytes of temporaries that one anchor needs besides its bits: partial results or weights, and rows."""
    columns, channels = padded(num_patches, layout.COLUMN_BLOCK), padded(width, 64)
    tiles = 2 * plane_count(precision) * columns if backward else 3 * 4 * columns // 128
    return tiles + columns // 128 + (16 + 4 * plane_count(precision)) * channels + 64
