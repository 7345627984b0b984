"""``relation_masks`` in the CUDA library: tiles of similarities are compared, packed and counted."""

import torch

from .. import native_cuda as cuda
from ..budget import row_chunks, rows_within
from ..guards import in_range
from ..masks import num_words
from .native_impl import clear_own


def relation_bits(
    keys: cuda.Operand,
    precision: str,
    pos_queries_CD: torch.Tensor,
    phi_C: torch.Tensor,
    psi_C: torch.Tensor,
    self_index_C: torch.Tensor,
    neg_queries_CD: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positive and kept bits of some anchors without the anchors themselves, and their counts (C,)."""
    rows, patches = pos_queries_CD.shape[0], keys.values.shape[0]
    positive, kept = (cuda.empty_bits(patches, rows, pos_queries_CD.device) for _ in range(2))
    queries = cuda.Operand.of(pos_queries_CD, precision)
    if neg_queries_CD is None:
        arguments = (queries, keys, precision, positive, kept, phi_C, psi_C)
        num_positive, num_kept = cuda.similarity(*arguments)
    else:
        negative = cuda.Operand.of(neg_queries_CD, precision)
        num_positive, _ = cuda.similarity(queries, keys, precision, positive, None, phi_C)
        _, num_kept = cuda.similarity(negative, keys, precision, positive, kept, None, psi_C)
    for bits, counts in ((positive, num_positive), (kept, num_kept)):
        clear_own(bits, counts, in_range(self_index_C, patches))
    return positive, kept, num_positive, num_kept


def bytes_per_anchor(num_keys: int, width: int) -> int:
    """Bytes of temporaries that one anchor needs: two bits a key, scaled queries."""
    return 2 * (num_keys // 8 + 1) + 16 * width + 128


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
    """See the public function; floating inputs are float32."""
    (num_anchors, width), num_keys = pos_queries_AD.shape, keys_ND.shape[0]
    shape = (num_anchors, num_words(num_keys))
    words = [torch.empty(shape, dtype=torch.int32, device=keys_ND.device) for _ in range(2)]
    counts = [torch.zeros(num_anchors, dtype=torch.int64, device=keys_ND.device) for _ in range(2)]
    if num_keys == 0:
        return words[0], words[1], counts[0], counts[1]
    keys = cuda.Operand.of(keys_ND, precision)
    for chunk in row_chunks(num_anchors, rows_within(memory_budget, bytes_per_anchor(num_keys, width))):
        negative = None if neg_queries_AD is None else neg_queries_AD[chunk]
        *masks, counts[0][chunk], counts[1][chunk] = relation_bits(
            keys, precision, pos_queries_AD[chunk], phi_A[chunk], psi_A[chunk], self_index_A[chunk], negative
        )
        for i, bits in enumerate(masks):
            cuda.to_public(bits, chunk.stop - chunk.start, words[i][chunk])
        del masks, bits  # before the next chunk's are made
    return words[0], words[1], counts[0], counts[1]
