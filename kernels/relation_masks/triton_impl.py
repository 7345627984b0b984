"""``relation_masks`` in Triton: bits of a chunk of anchors; the launch is beside its kernel."""

import torch

from ..guards import in_range
from ..tiles import bits as layout
from ..tiles import launch
from ..tiles.bits import Bits
from ..tiles.planes import Planes, plane_count, planes
from ..tiles.sizes import COLUMN_BLOCK, padded_channels
from .sets import Queries, Sets
from .triton_kernels import relation_bits


def prepare(keys_ND: torch.Tensor, precision: str) -> Planes:
    """Keys as operands of products."""
    return planes(keys_ND, precision, COLUMN_BLOCK, scaled=True)


def chunk_rows(keys: Planes, precision: str, memory_budget: int) -> int:
    """Anchors per chunk: whole row tiles."""
    per_anchor = bytes_per_anchor(keys.rows, keys.width, precision)
    return launch.rows_within(memory_budget, per_anchor, keys.high.device)


def bytes_per_anchor(num_keys: int, width: int, precision: str) -> int:
    """Bytes of temporaries that one anchor needs: two rows of bits, planes of two queries."""
    return 2 * layout.bytes_per_row(num_keys) + (4 + 4 * plane_count(precision)) * padded_channels(width) + 64


def chunk(
    keys: Planes, precision: str, queries: Queries, self_index_C: torch.Tensor
) -> tuple[Sets[Bits], torch.Tensor]:
    """Sets of bits, and the numbers of kept patches (C,)."""
    block = launch.row_block(keys.high.device)
    query, negative = planes(queries.positive, precision, block, keys.scaled), None
    if queries.negative is not None:
        negative = planes(queries.negative, precision, block, keys.scaled)
    # Clamped: the wrapper poisons the counts of an anchor out of range.
    own_C = in_range(self_index_C, keys.rows)
    positive, kept = relation_bits(keys, query, queries.phi, queries.psi, own_C, negative)
    return Sets(positive, kept, positive.totals()), kept.totals()


def to_words(sets: Sets[Bits], positive_CW: torch.Tensor, kept_CW: torch.Tensor) -> None:
    """Write the public form of the sets."""
    layout.to_public(sets.positive, positive_CW)
    layout.to_public(sets.kept, kept_CW)


def from_words(positive_CW: torch.Tensor, kept_CW: torch.Tensor, num_patches: int) -> Sets[Bits]:
    """The inverse."""
    block = launch.row_block(positive_CW.device)
    positive, kept = (layout.from_public(words, num_patches, block) for words in (positive_CW, kept_CW))
    return Sets(positive, kept, positive.totals())
