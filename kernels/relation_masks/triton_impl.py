"""``relation_masks`` in Triton: tiles of similarities are compared, packed and counted in registers."""

import torch

from ..budget import row_chunks, rows_within
from ..guards import in_range
from ..masks import num_words
from ..tiles import bits as layout
from ..tiles import launch
from ..tiles.bits import Bits
from ..tiles.planes import Planes, plane_count, planes
from ..tiles.sizes import COLUMN_BLOCK, padded_channels
from .triton_kernels import similarity_kernel


def similarity(
    queries: Planes,
    keys: Planes,
    positive: Bits,
    kept: Bits | None = None,
    phi_C: torch.Tensor | None = None,
    psi_C: torch.Tensor | None = None,
    self_C: torch.Tensor | None = None,
) -> None:
    """Fill `positive` (unless phi is None) and `kept` (unless None), see :func:`similarity_kernel`."""
    # The queries' own unit is a constant or the keys': both are powers of two, thresholds are scaled exactly.
    unit = queries.unit * keys.unit
    scalar = isinstance(unit, torch.Tensor)
    phi_C, psi_C = (None if t is None else t.float().contiguous() for t in (phi_C, psi_C))
    out = (positive.words, positive.counts) + ((None, None) if kept is None else (kept.words, kept.counts))

    def start(config: launch.Launch, options: dict[str, object]) -> None:
        width = positive.groups * 128
        grid = launch.tiles(queries.rows, width, config.block_m, config.block_n)
        operands = (
            launch.source(queries.high, config.block_m, config.block_k, config.tma),
            launch.source(queries.low, config.block_m, config.block_k, config.tma),
            launch.source(keys.high, config.block_n, config.block_k, config.tma),
            launch.source(keys.low, config.block_n, config.block_k, config.tma),
        )
        similarity_kernel[grid](
            *operands,
            phi_C,
            psi_C,
            self_C,
            *out,
            unit if scalar else None,
            queries.rows,
            keys.rows,
            positive.groups,
            1.0 if scalar else 1.0 / unit,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            BAND=launch.BAND,
            POSITIVE=phi_C is not None,
            KEPT=kept is not None,
            **options,
        )

    form = (queries.rows, keys.rows, phi_C is not None, kept is not None)
    launch.run("similarity" if kept is None else "relations", keys, form, start)


def relation_bits(
    keys: Planes,
    queries: Planes,
    phi_C: torch.Tensor,
    psi_C: torch.Tensor,
    own_C: torch.Tensor,
    negative: Planes | None,
) -> tuple[Bits, Bits]:
    """Positive and kept bits of some anchors, rows `own_C` of the keys; `negative`: queries of those."""
    block = launch.row_block(phi_C.device)
    positive, kept = (Bits.empty(queries.rows, keys.rows, block, phi_C) for _ in range(2))
    if negative is not None:
        similarity(queries, keys, positive, kept, phi_C, torch.full_like(psi_C, -torch.inf), own_C)
        similarity(negative, keys, positive, kept, None, psi_C, own_C)
    else:
        similarity(queries, keys, positive, kept, phi_C, psi_C, own_C)
    return positive, kept


def bytes_per_anchor(num_keys: int, width: int, precision: str) -> int:
    """Bytes of temporaries that one anchor needs: two rows of bits, planes of two queries."""
    return 2 * layout.bytes_per_row(num_keys) + (4 + 4 * plane_count(precision)) * padded_channels(width) + 64


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
    if num_anchors == 0 or num_keys == 0:
        return words[0], words[1], counts[0], counts[1]
    keys = planes(keys_ND, precision, COLUMN_BLOCK, scaled=True)
    block = launch.row_block(keys_ND.device)
    rows = rows_within(memory_budget, bytes_per_anchor(num_keys, width, precision), block)
    for chunk in row_chunks(num_anchors, rows):
        queries, negative = (
            None if rows_AD is None else planes(rows_AD[chunk], precision, block, keys.scaled)
            for rows_AD in (pos_queries_AD, neg_queries_AD)
        )
        # Clamped: the wrapper poisons the counts of an anchor out of range.
        own_C = in_range(self_index_A[chunk], num_keys)
        masks = relation_bits(keys, queries, phi_A[chunk], psi_A[chunk], own_C, negative)
        for i, mask in enumerate(masks):
            layout.to_public(mask, words[i][chunk])
            counts[i][chunk] = mask.totals()
        del queries, negative, masks, mask  # before the next chunk's are made
    return words[0], words[1], counts[0], counts[1]
