"""``relation_masks`` in the native CPU library (``csrc/cpu/relation_masks.inc``): bits of some anchors."""

import torch

from .. import native
from ..guards import in_range
from ..precision import operand
from .sets import Queries, Sets

_Arguments = native.structure(
    "queries keys key_scale key_pairs key_norms phi psi self positive kept num_positive num_kept",
    "C N D stride bf16",
)

# Keys as the library reads them.
prepare = native.Keys.of


def chunk_rows(keys: native.Keys, precision: str, memory_budget: int) -> int:
    """Anchors per chunk."""
    return native.chunk_rows(memory_budget, bytes_per_anchor(*keys.values.shape))


def bytes_per_anchor(num_keys: int, width: int) -> int:
    """Bytes of temporaries that one anchor needs: two bits a key, counts per tile, queries in three forms."""
    return 2 * (num_keys // 8 + 1) + native.tile_bytes(num_keys, width) + 16 * width + 64


def chunk(
    keys: native.Keys, precision: str, queries: Queries, self_index_C: torch.Tensor
) -> tuple[Sets[torch.Tensor], torch.Tensor]:
    """Sets of bits (N, stride), and the numbers of kept patches (C,)."""
    rows, patches = queries.positive.shape[0], keys.values.shape[0]
    positive, kept = (native.empty_bits(patches, rows) for _ in range(2))
    query_CD = operand(queries.positive, precision)
    phi_C, psi_C = queries.phi.contiguous(), queries.psi.contiguous()
    self_C = in_range(self_index_C, patches).contiguous()
    if queries.negative is None:
        num_positive, num_kept = similarity(query_CD, keys, positive, kept, phi_C, psi_C, self_C)
    else:
        negative_CD = operand(queries.negative, precision)
        num_positive, _ = similarity(query_CD, keys, positive, phi_C=phi_C, self_C=self_C)
        _, num_kept = similarity(negative_CD, keys, positive, kept, None, psi_C, self_C)
    return Sets(positive, kept, num_positive), num_kept


def similarity(
    queries_CD: torch.Tensor,
    keys: native.Keys,
    positive: torch.Tensor,
    kept: torch.Tensor | None = None,
    phi_C: torch.Tensor | None = None,
    psi_C: torch.Tensor | None = None,
    self_C: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill bits `positive` (read where phi is None) and `kept` (unless None); counts (C,) of both.

    The patches `self_C` (C,) int64 are left out of what is filled.
    """
    (rows, width), patches = queries_CD.shape, keys.values.shape[0]
    counts = torch.zeros((2, rows), dtype=torch.int64)
    native.run(
        "relation_masks",
        _Arguments,
        queries=queries_CD.contiguous(),
        keys=keys.values,
        key_scale=keys.scale,
        key_pairs=keys.pairs,
        key_norms=keys.norms,
        phi=phi_C,
        psi=psi_C,
        self=self_C,
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


def to_words(sets: Sets[torch.Tensor], positive_CW: torch.Tensor, kept_CW: torch.Tensor) -> None:
    """Write the public form of the sets."""
    rows, patches = sets.num_positive.shape[0], sets.positive.shape[0]
    for bits, words in ((sets.positive, positive_CW), (sets.kept, kept_CW)):
        native.call("to_public", bits, native.stride(rows), rows, patches, words)


def from_words(positive_CW: torch.Tensor, kept_CW: torch.Tensor, num_patches: int) -> Sets[torch.Tensor]:
    """The inverse."""
    rows = positive_CW.shape[0]
    bits = [native.empty_bits(num_patches, rows) for _ in range(2)]
    counts = torch.empty((2, rows), dtype=torch.int64)
    for words, out, count in zip((positive_CW, kept_CW), bits, counts, strict=True):
        native.call("from_public", words.contiguous(), rows, num_patches, out, native.stride(rows), count)
    return Sets(bits[0], bits[1], counts[0])
