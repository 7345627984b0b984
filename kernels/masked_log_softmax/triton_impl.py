"""``masked_log_softmax`` in Triton: logits live in registers, a tile at a time; masks arrive as bits.

With x the logits in powers of two, l their log-sum-exp over the kept set and P the positives of a row:
    loss = (l - mean of x over P) ln 2,    weight = 2^(x - l) [kept] - [P] / |P|,
and d loss / d z follows from the weights by two library products. The launches are beside the kernels.
"""

import functools
import math
from dataclasses import dataclass

import torch

from ..precision import power_of_two_above
from ..relation_masks.sets import Sets
from ..relation_masks.triton_impl import from_words
from ..tiles import bits as layout
from ..tiles import launch, occupancy
from ..tiles.bits import Bits
from ..tiles.planes import Planes, add_transposed_product, fill, plane_count, planes, raw_product
from ..tiles.sizes import COLUMN_BLOCK, padded, padded_channels
from .chunks import Settings, Target
from .triton_kernels import SLACK, TIGHT_BOUND, Logits, log_sum_exp, weights

__all__ = ["UNIT", "Embeddings", "bytes_per_anchor", "chunk", "chunk_rows", "from_words", "prepare"]

# Of log-sum-exps [nats].
UNIT = math.log(2)


@dataclass(frozen=True)
class Embeddings:
    """Rows of z.

    Attributes:
        values: (rows, E) float32.
        unit: scalar that operands are divided by, a power of two, or None: 1.
        precision: of the operands.
    """

    values: torch.Tensor
    unit: torch.Tensor | None
    precision: str

    @property
    def width(self) -> int:
        """Channels."""
        return self.values.shape[1]

    def take(self, rows: torch.Tensor | slice) -> "Embeddings":
        """Some rows."""
        return Embeddings(self.values[rows], self.unit, self.precision)

    @functools.cached_property
    def as_patches(self) -> tuple[Planes, torch.Tensor]:
        """Operands, and the largest norm of a row (scalar); made on first use."""
        norm = torch.empty(self.values.shape[0], device=self.values.device)
        operands = fill(self.values, self.precision, COLUMN_BLOCK, unit=self.unit, norm=norm)
        return operands, norm.amax()


def prepare(z: torch.Tensor, precision: str) -> Embeddings:
    """Embeddings and what their operands are divided by."""
    return Embeddings(z, None if precision == "bf16" else power_of_two_above(z), precision)


def chunk_rows(z_NE: torch.Tensor, settings: Settings, with_gradient: bool) -> int:
    """Anchors per chunk: whole row tiles."""
    (num_patches, width), block = z_NE.shape, launch.row_block(z_NE.device)
    per_anchor = bytes_per_anchor(num_patches, width, settings.precision, with_gradient, block)
    per_anchor += 2 * layout.bytes_per_row(num_patches)
    return launch.rows_within(settings.memory_budget, per_anchor, z_NE.device)


def bytes_per_anchor(num_patches: int, width: int, precision: str, backward: bool, row_block: int) -> int:
    """Bytes of temporaries that one anchor needs besides its bits: partial results or weights, and rows."""
    columns, channels = padded(num_patches, COLUMN_BLOCK), padded_channels(width)
    tiles = 2 * plane_count(precision) * columns if backward else 3 * 4 * columns // 128
    lists = occupancy.bytes_per_row(num_patches, row_block)
    return tiles + lists + (16 + 4 * plane_count(precision)) * channels + 64


def chunk(
    own: Embeddings,
    patches: Embeddings,
    sets: Sets[Bits],
    settings: Settings,
    lse_C: torch.Tensor | None = None,
    target: Target | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Losses [nats] and log-sum-exp [powers of two], (C,) each.

    A log-sum-exp that is given is not formed again.
    """
    block, factor = launch.row_block(own.values.device), math.log2(math.e) / settings.temperature
    right, longest = patches.as_patches
    bound_C = torch.empty(own.values.shape[0], device=own.values.device)
    norm_scale = longest * (SLACK * factor)
    left = fill(own.values, own.precision, block, unit=own.unit, norm=bound_C, norm_scale=norm_scale)
    scale = torch.as_tensor(left.unit * right.unit * factor, device=bound_C.device)
    tight = (bound_C.amax() < TIGHT_BOUND).to(torch.int32)
    found = occupancy.flags(sets.positive, block)
    logits = Logits(left, right, scale, bound_C, tight, sets.positive, sets.kept, found, sets.num_positive)
    loss_C = None
    if lse_C is None:
        loss_C, lse_C = log_sum_exp(logits)
    if target is not None:
        _add_gradient(weights(logits, lse_C), right, own, target)
    return loss_C, lse_C


def _add_gradient(of_logits: Planes, right: Planes, own: Embeddings, target: Target) -> None:
    """Logits are z_i . z_j, every weight reaches both rows."""
    row_C1, block = target.row_C[:, None], launch.row_block(own.values.device)
    other = planes(own.values * row_C1, own.precision, block, scaled=True, twice=True)
    rows, width = own.values.shape
    product = raw_product(of_logits, right).sum(dim=0)[:rows, :width]
    target.own[target.rows] += product * (row_C1 * (of_logits.unit * right.unit))
    product = add_transposed_product(of_logits, other)[:, :width]
    target.dz_NE.add_(product.mul_(of_logits.unit * other.unit))
