"""``relation_masks`` in the CUDA library (``csrc/cuda/relation_masks.cu``): bits of a chunk of anchors."""

import torch

from .. import native_cuda as cuda
from ..budget import rows_within
from ..guards import in_range
from .sets import Queries, Sets

# Keys as the library reads them.
prepare = cuda.Operand.of


def chunk_rows(keys: cuda.Operand, precision: str, memory_budget: int) -> int:
    """Anchors per chunk."""
    return rows_within(memory_budget, bytes_per_anchor(*keys.values.shape))


def bytes_per_anchor(num_keys: int, width: int) -> int:
    """Bytes of temporaries that one anchor needs: two bits a key, scaled queries."""
    return 2 * (num_keys // 8 + 1) + 16 * width + 128


def chunk(
    keys: cuda.Operand, precision: str, queries: Queries, self_index_C: torch.Tensor
) -> tuple[Sets[torch.Tensor], torch.Tensor]:
    """Sets of bits (N, stride), and the numbers of kept patches (C,)."""
    rows, patches = queries.positive.shape[0], keys.values.shape[0]
    positive, kept = (cuda.empty_bits(patches, rows, queries.positive.device) for _ in range(2))
    query = cuda.Operand.of(queries.positive, precision)
    if queries.negative is None:
        num_positive, num_kept = similarity(query, keys, precision, positive, kept, queries.phi, queries.psi)
    else:
        negative = cuda.Operand.of(queries.negative, precision)
        num_positive, _ = similarity(query, keys, precision, positive, None, queries.phi)
        _, num_kept = similarity(negative, keys, precision, positive, kept, None, queries.psi)
    for bits, counts in ((positive, num_positive), (kept, num_kept)):
        _clear_own(bits, counts, in_range(self_index_C, patches))
    return Sets(positive, kept, num_positive), num_kept


def similarity(
    queries: cuda.Operand,
    keys: cuda.Operand,
    precision: str,
    positive: torch.Tensor,
    kept: torch.Tensor | None = None,
    phi_C: torch.Tensor | None = None,
    psi_C: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill bits `positive` (read where phi is None) and `kept` (unless None); counts (C,) of both."""
    (rows, width), patches = queries.values.shape, keys.values.shape[0]
    counts = torch.zeros((2, rows), dtype=torch.int64, device=positive.device)
    thresholds = [None if t is None else t.float().contiguous() for t in (phi_C, psi_C)]
    operands = (queries.values, rows, keys.values, patches, width, queries.unit * keys.unit)
    out = (positive, kept, positive.shape[1], counts[0], counts[1])
    cuda.call("relation_masks", *operands, *thresholds, *out, precision=precision)
    return counts[0], counts[1]


def to_words(sets: Sets[torch.Tensor], positive_CW: torch.Tensor, kept_CW: torch.Tensor) -> None:
    """Write the public form of the sets."""
    for bits, words in ((sets.positive, positive_CW), (sets.kept, kept_CW)):
        cuda.call("to_public", bits, bits.shape[1], words.shape[0], bits.shape[0], words)


def from_words(positive_CW: torch.Tensor, kept_CW: torch.Tensor, num_patches: int) -> Sets[torch.Tensor]:
    """The inverse."""
    rows = positive_CW.shape[0]
    bits = [cuda.empty_bits(num_patches, rows, positive_CW.device) for _ in range(2)]
    counts = torch.empty((2, rows), dtype=torch.int64, device=positive_CW.device)
    for words, out, count in zip((positive_CW, kept_CW), bits, counts, strict=True):
        cuda.call("from_public", words.contiguous(), rows, num_patches, out, out.shape[1], count)
    return Sets(bits[0], bits[1], counts[0])


def _clear_own(bits: torch.Tensor, counts: torch.Tensor, own_C: torch.Tensor) -> None:
    """Take every anchor out of its own set, in place."""
    column = torch.arange(own_C.shape[0], device=bits.device)
    place, bit = column // 8, (1 << (column % 8)).to(torch.uint8)
    counts -= (bits[own_C, place] & bit).ne(0).long()
    # One anchor after the other in a byte: eight of them share it if their rows are equal.
    for k in range(8):
        one = slice(k, None, 8)
        bits[own_C[one], place[one]] &= ~bit[one]
