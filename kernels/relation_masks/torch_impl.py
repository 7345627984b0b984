"""``relation_masks`` in plain torch: boolean masks of a chunk of anchors."""

import torch

from ..budget import rows_within
from ..guards import in_range
from ..masks import pack_masks, unpack_masks
from ..precision import accumulator, operand, product
from .sets import Queries, Sets

# Keys as they enter the products.
prepare = operand


def chunk_rows(keys_op: torch.Tensor, precision: str, memory_budget: int) -> int:
    """Anchors per chunk."""
    size = accumulator(precision).itemsize
    return rows_within(memory_budget, bytes_per_anchor(keys_op.shape[0], keys_op.shape[1], size))


def bytes_per_anchor(num_keys: int, width: int, element_size: int) -> int:
    """Bytes of temporaries that one anchor needs: two similarity rows, masks, and the octets of packing."""
    return (2 * element_size + 6) * num_keys + 2 * element_size * width


def chunk(
    keys_op: torch.Tensor, precision: str, queries: Queries, self_index_C: torch.Tensor
) -> tuple[Sets[torch.Tensor], torch.Tensor]:
    """Sets of boolean masks (C, N), and the numbers of kept patches (C,)."""
    sim_CN = product(operand(queries.positive, precision), keys_op.T)
    positive_CN = sim_CN > queries.phi[:, None]
    if queries.negative is not None:
        sim_CN = product(operand(queries.negative, precision), keys_op.T)
    kept_CN = (sim_CN < queries.psi[:, None]).logical_or_(positive_CN)
    index_C1 = in_range(self_index_C, keys_op.shape[0])[:, None]
    positive_CN, kept_CN = positive_CN.scatter_(1, index_C1, False), kept_CN.scatter_(1, index_C1, False)
    return Sets(positive_CN, kept_CN, positive_CN.sum(dim=1)), kept_CN.sum(dim=1)


def to_words(sets: Sets[torch.Tensor], positive_CW: torch.Tensor, kept_CW: torch.Tensor) -> None:
    """Write the public form of the sets."""
    positive_CW.copy_(pack_masks(sets.positive))
    kept_CW.copy_(pack_masks(sets.kept))


def from_words(positive_CW: torch.Tensor, kept_CW: torch.Tensor, num_patches: int) -> Sets[torch.Tensor]:
    """The inverse."""
    positive_CN, kept_CN = unpack_masks(positive_CW, num_patches), unpack_masks(kept_CW, num_patches)
    return Sets(positive_CN, kept_CN, positive_CN.sum(dim=1))
