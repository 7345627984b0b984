"""``relation_masks`` in the native CPU library: tiles of similarities are compared, packed and counted."""

import torch

from .. import native
from ..budget import row_chunks
from ..guards import in_range
from ..masks import num_words
from ..precision import operand

_Arguments = native.structure(
    "queries keys key_scale phi psi positive kept num_positive num_kept", "C N D stride bf16"
)


def similarity(
    queries_CD: torch.Tensor,
    keys: native.Keys,
    positive: torch.Tensor,
    kept: torch.Tensor | None = None,
    phi_C: torch.Tensor | None = None,
    psi_C: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill bits `positive` (read where phi is None) and `kept` (unless None); counts (C,) of both."""
    (rows, width), patches = queries_CD.shape, keys.values.shape[0]
    counts = torch.zeros((2, rows), dtype=torch.int64)
    native.run(
        "similarity",
        _Arguments,
        queries=queries_CD.contiguous(),
        keys=keys.values,
        key_scale=keys.scale,
        phi=phi_C,
        psi=psi_C,
        positive=positive,
        kept=kept,
        num_positive=counts[0],
        num_kept=counts[1],
        C=rows,
        N=patches,
        D=width,
        stride=native.stride(rows),
        bf16=keys.bf16,
    )
    return counts[0], counts[1]


def relation_bits(
    keys: native.Keys,
    precision: str,
    pos_queries_CD: torch.Tensor,
    phi_C: torch.Tensor,
    psi_C: torch.Tensor,
    self_index_C: torch.Tensor,
    neg_queries_CD: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positive and kept bits of some anchors without the anchors themselves, and their counts (C,)."""
    rows, patches = pos_queries_CD.shape[0], keys.values.shape[0]
    positive, kept = (native.empty_bits(patches, rows) for _ in range(2))
    queries, phi_C, psi_C = operand(pos_queries_CD, precision), phi_C.contiguous(), psi_C.contiguous()
    if neg_queries_CD is None:
        num_positive, num_kept = similarity(queries, keys, positive, kept, phi_C, psi_C)
    else:
        num_positive, _ = similarity(queries, keys, positive, phi_C=phi_C)
        _, num_kept = similarity(operand(neg_queries_CD, precision), keys, positive, kept, None, psi_C)
    for bits, counts in ((positive, num_positive), (kept, num_kept)):
        clear_own(bits, counts, in_range(self_index_C, patches))
    return positive, kept, num_positive, num_kept


def clear_own(bits: torch.Tensor, counts: torch.Tensor, own_C: torch.Tensor) -> None:
    """Take every anchor out of its own set, in place."""
    column = torch.arange(own_C.shape[0], device=bits.device)
    place, bit = column // 8, (1 << (column % 8)).to(torch.uint8)
    counts -= (bits[own_C, place] & bit).ne(0).long()
    # One anchor after the other in a byte: eight of them share it if their rows are equal.
    for k in range(8):
        one = slice(k, None, 8)
        bits[own_C[one], place[one]] &= ~bit[one]


def bytes_per_anchor(num_keys: int, width: int) -> int:
    """Bytes of temporaries that one anchor needs: two bits a key, counts per tile, queries in three forms."""
    return 2 * (num_keys // 8 + 1) + native.tile_bytes(num_keys, width) + 16 * width + 64


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
    words = [torch.empty((num_anchors, num_words(num_keys)), dtype=torch.int32) for _ in range(2)]
    counts = [torch.zeros(num_anchors, dtype=torch.int64) for _ in range(2)]
    keys = native.Keys.of(keys_ND, precision)
    for chunk in row_chunks(num_anchors, native.chunk_rows(memory_budget, bytes_per_anchor(num_keys, width))):
        negative = None if neg_queries_AD is None else neg_queries_AD[chunk]
        *masks, counts[0][chunk], counts[1][chunk] = relation_bits(
            keys, precision, pos_queries_AD[chunk], phi_A[chunk], psi_A[chunk], self_index_A[chunk], negative
        )
        rows = chunk.stop - chunk.start
        for i, bits in enumerate(masks):
            native.call("to_public", bits, native.stride(rows), rows, num_keys, words[i][chunk])
        del masks, bits  # before the next chunk's are made
    return words[0], words[1], counts[0], counts[1]
