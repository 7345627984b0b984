"""``relation_masks`` in plain torch, one chunk of anchors at a time."""

import torch

from ..budget import row_chunks, rows_within
from ..guards import in_range
from ..masks import num_words, pack_masks
from ..precision import operand, product


def relation_masks(
    pos_queries_AD: torch.Tensor,
    phi_A: torch.Tensor,
    keys_ND: torch.Tensor,
    psi_A: torch.Tensor,
    self_index_A: torch.Tensor,
    neg_queries_AD: torch.Tensor | None,
    precision: str,
    memory_budget: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the public function; floating inputs are in the accumulator's dtype."""
    (num_anchors, width), num_keys = pos_queries_AD.shape, keys_ND.shape[0]
    words = [
        torch.empty((num_anchors, num_words(num_keys)), dtype=torch.int32, device=keys_ND.device)
        for _ in range(2)
    ]
    counts = [torch.empty(num_anchors, dtype=torch.int64, device=keys_ND.device) for _ in range(2)]
    keys_op = operand(keys_ND, precision)
    rows = rows_within(memory_budget, bytes_per_anchor(num_keys, width, keys_ND.element_size()))
    for chunk in row_chunks(num_anchors, rows):
        negative_queries = None if neg_queries_AD is None else neg_queries_AD[chunk]
        masks = masks_chunk(
            pos_queries_AD[chunk],
            phi_A[chunk],
            keys_op,
            psi_A[chunk],
            self_index_A[chunk],
            negative_queries,
            precision,
        )
        for i, mask_CN in enumerate(masks):
            words[i][chunk] = pack_masks(mask_CN)
            counts[i][chunk] = mask_CN.sum(dim=1)
    return words[0], words[1], counts[0], counts[1]


def bytes_per_anchor(num_keys: int, width: int, element_size: int) -> int:
    """Bytes of temporaries that one anchor needs: two similarity rows, masks, and the octets of packing."""
    return (2 * element_size + 6) * num_keys + 2 * element_size * width


def masks_chunk(
    pos_queries_CD: torch.Tensor,
    phi_C: torch.Tensor,
    keys_op: torch.Tensor,
    psi_C: torch.Tensor,
    self_index_C: torch.Tensor,
    neg_queries_CD: torch.Tensor | None,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Boolean (C, N) masks of a chunk: positives, and kept; `keys_op` is the operand of the keys."""
    sim_CN = product(operand(pos_queries_CD, precision), keys_op.T)
    positive_CN = sim_CN > phi_C[:, None]
    if neg_queries_CD is not None:
        sim_CN = product(operand(neg_queries_CD, precision), keys_op.T)
    kept_CN = (sim_CN < psi_C[:, None]).logical_or_(positive_CN)
    index_C1 = in_range(self_index_C, keys_op.shape[0])[:, None]
    return positive_CN.scatter_(1, index_C1, False), kept_CN.scatter_(1, index_C1, False)
