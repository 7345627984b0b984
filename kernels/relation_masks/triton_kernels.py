"""The Triton kernel of ``relation_masks``; ``triton_impl.py`` launches it."""

import triton
import triton.language as tl

from ..tiles import device


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
    p_unit,
    rows,
    columns,
    groups,
    per_unit,
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
    bits are formed too, and the own column leaves both; else it stays, as the propagation wants it.
    Thresholds are brought into the planes' scale, times `per_unit` and by `p_unit`, powers of two. Plain
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
    if p_unit is not None:
        per_unit = per_unit / tl.load(p_unit)
    if KEPT:
        b_self = tl.load(p_self + o_row, o_row < rows, other=-1).to(tl.int32)
        b_valid &= ~device.self_words(b_self, i_column, GROUPS)
    if POSITIVE:
        b_phi = tl.load(p_phi + o_row, o_row < rows, other=float("inf")) * per_unit
        b_positive = device.pack(b_sim > b_phi[:, None, None, None]) & b_valid
        tl.store(p_positive + o_words, b_positive.to(tl.int16))
        tl.store(p_num_positive + o_counts, device.count_bits(b_positive).to(tl.int16))
    else:
        b_positive = tl.load(p_positive + o_words).to(tl.int32)
    if KEPT:
        b_psi = tl.load(p_psi + o_row, o_row < rows, other=float("-inf")) * per_unit
        b_kept = (device.pack(b_sim < b_psi[:, None, None, None]) & b_valid) | b_positive
        tl.store(p_kept + o_words, b_kept.to(tl.int16))
        tl.store(p_num_kept + o_counts, device.count_bits(b_kept).to(tl.int16))
