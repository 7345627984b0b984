"""``relation_masks`` in Triton: tiles of similarities are compared, packed and counted in registers."""

import torch
import triton
import triton.language as tl

from ..common import in_range, row_chunks, rows_within
from ..tiles import bits as layout
from ..tiles import device, launch
from ..tiles.bits import Bits
from ..tiles.planes import Planes, padded, plane_count, planes


@triton.jit
def similarity_kernel(
    p_query,
    p_query_low,
    p_key,
    p_key_low,
    p_phi,
    p_psi,
    p_self,
    p_positive,
    p_num_positive,
    p_kept,
    p_num_kept,
    rows,
    columns,
    groups,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    POSITIVE: tl.constexpr,
    KEPT: tl.constexpr,
):
    """positive = query . key > phi,  kept = positive or query . key < psi,  without the row's own column.

    A program owns a tile (BLOCK_M, BLOCK_N). POSITIVE: positives are formed, else they are read. KEPT: kept
    bits are formed too, and the own column leaves both; else it stays, as the propagation wants it. Plain
    stores: bitwise repeatable.
    """
    GROUPS: tl.constexpr = BLOCK_N // 128
    i_m, i_n = device.tile_index(rows, groups * 128, BLOCK_M, BLOCK_N, BAND)
    i_row, i_column = i_m * BLOCK_M, i_n * BLOCK_N
    b_sim = device.tile_product(
        p_query,
        p_query_low,
        p_key,
        p_key_low,
        i_row,
        i_column,
        WIDTH,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        SPLIT,
        TMA,
        UPCAST,
    )
    b_sim = device.grouped(b_sim, BLOCK_M, GROUPS)
    o_row = i_row + tl.arange(0, BLOCK_M)
    o_words = device.word_offsets(i_row, i_n * GROUPS, groups, BLOCK_M, GROUPS)
    o_counts = device.entry_offsets(i_row, i_n * GROUPS, groups, BLOCK_M, GROUPS)
    b_valid = device.valid_words(i_row, i_column, rows, columns, BLOCK_M, GROUPS)
    if KEPT:
        b_self = tl.load(p_self + o_row, o_row < rows, other=-1).to(tl.int32)
        b_valid &= ~device.self_words(b_self, i_column, GROUPS)
    if POSITIVE:
        b_phi = tl.load(p_phi + o_row, o_row < rows, other=float("inf"))
        b_positive = device.pack(b_sim > b_phi[:, None, None, None]) & b_valid
        tl.store(p_positive + o_words, b_positive.to(tl.int16))
        tl.store(p_num_positive + o_counts, device.count_bits(b_positive).to(tl.int16))
    else:
        b_positive = tl.load(p_positive + o_words).to(tl.int32)
    if KEPT:
        b_psi = tl.load(p_psi + o_row, o_row < rows, other=float("-inf"))
        b_kept = (device.pack(b_sim < b_psi[:, None, None, None]) & b_valid) | b_positive
        tl.store(p_kept + o_words, b_kept.to(tl.int16))
        tl.store(p_num_kept + o_counts, device.count_bits(b_kept).to(tl.int16))


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
    unit = queries.unit * keys.unit  # a power of two: thresholds move into the planes' scale exactly
    phi_C, psi_C = (None if t is None else t.float() / unit for t in (phi_C, psi_C))
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
            queries.rows,
            keys.rows,
            positive.groups,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            BAND=launch.BAND,
            POSITIVE=phi_C is not None,
            KEPT=kept is not None,
            **options,
        )

    form = (queries.rows, keys.rows, phi_C is not None, kept is not None)
    launch.run("similarity", keys, form, start)


def relation_bits(
    keys: Planes,
    precision: str,
    pos_queries_CD: torch.Tensor,
    phi_C: torch.Tensor,
    psi_C: torch.Tensor,
    self_index_C: torch.Tensor,
    neg_queries_CD: torch.Tensor | None,
) -> tuple[Bits, Bits]:
    """Positive and kept bits of some anchors."""
    rows, block = pos_queries_CD.shape[0], launch.row_block(pos_queries_CD.device)
    positive, kept = (Bits.empty(rows, keys.rows, block, pos_queries_CD) for _ in range(2))
    queries = planes(pos_queries_CD, precision, block, keys.scaled)
    # Clamped: the wrapper poisons the counts of an anchor out of range.
    own_C = in_range(self_index_C, keys.rows)
    if neg_queries_CD is not None:
        negative = planes(neg_queries_CD, precision, block, keys.scaled)
        similarity(queries, keys, positive, kept, phi_C, torch.full_like(psi_C, -torch.inf), own_C)
        similarity(negative, keys, positive, kept, None, psi_C, own_C)
    else:
        similarity(queries, keys, positive, kept, phi_C, psi_C, own_C)
    return positive, kept


def bytes_per_anchor(num_keys: int, width: int, precision: str) -> int:
    """Bytes of temporaries that one anchor needs: two rows of bits, planes of two queries."""
    return 2 * layout.bytes_per_row(num_keys) + (4 + 4 * plane_count(precision)) * padded(width, 64) + 64


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
    shape = (num_anchors, layout.num_words(num_keys))
    words = [torch.empty(shape, dtype=torch.int32, device=keys_ND.device) for _ in range(2)]
    counts = [torch.zeros(num_anchors, dtype=torch.int64, device=keys_ND.device) for _ in range(2)]
    if num_anchors == 0 or num_keys == 0:
        return words[0], words[1], counts[0], counts[1]
    keys = planes(keys_ND, precision, layout.COLUMN_BLOCK, scaled=True)
    block = launch.row_block(keys_ND.device)
    rows = rows_within(memory_budget, bytes_per_anchor(num_keys, width, precision), block)
    for chunk in row_chunks(num_anchors, rows):
        negative = None if neg_queries_AD is None else neg_queries_AD[chunk]
        masks = relation_bits(
            keys, precision, pos_queries_AD[chunk], phi_A[chunk], psi_A[chunk], self_index_A[chunk], negative
        )
        for i, mask in enumerate(masks):
            layout.to_public(mask, words[i][chunk])
            counts[i][chunk] = mask.totals()
        del masks, mask  # before the next chunk's are made
    return words[0], words[1], counts[0], counts[1]
