"""The Triton kernel of ``relation_masks`` and its launch: similarities are compared, packed and counted."""

from functools import partial

import torch
import triton
import triton.language as tl

from ..tiles import device, launch
from ..tiles.bits import Bits
from ..tiles.planes import Planes


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
    PERSISTENT: tl.constexpr,
):
    """positive = query . key > phi,  kept = positive or query . key < psi,  without the row's own column.

    A program owns a tile (BLOCK_M, BLOCK_N), or PERSISTENT several. POSITIVE: positives are formed, else they
    are read. KEPT: kept bits are formed too, and the own column leaves both; else it stays, as the
    propagation wants it. Thresholds are brought into the planes' scale, times `per_unit` and by `p_unit`,
    powers of two. Plain stores: bitwise repeatable.
    """
    GROUPS: tl.constexpr = BLOCK_N // 128
    if p_unit is not None:
        per_unit = per_unit / tl.load(p_unit)
    first, last, step = device.own_tiles(rows, groups * 128, BLOCK_M, BLOCK_N, PERSISTENT)
    for i_tile in range(first, last, step):
        i_m, i_n = device.tile_index(i_tile, rows, groups * 128, BLOCK_M, BLOCK_N, BAND)
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


def similarity(
    queries: Planes,
    keys: Planes,
    positive: Bits,
    kept: Bits | None = None,
    phi_C: torch.Tensor | None = None,
    psi_C: torch.Tensor | None = None,
    self_C: torch.Tensor | None = None,
    config: launch.Launch | None = None,
) -> None:
    """Fill `positive` (unless phi is None) and `kept` (unless None), see :func:`similarity_kernel`."""
    if config is None:
        name = "similarity" if kept is None else "relations"
        form = (queries.rows, keys.rows, phi_C is not None, kept is not None)
        again = partial(similarity, queries, keys, positive, kept, phi_C, psi_C, self_C)
        config = launch.choose(name, keys, form, again)
    # The queries' own unit is a constant or the keys': both are powers of two, thresholds are scaled exactly.
    unit = queries.unit * keys.unit
    scalar = isinstance(unit, torch.Tensor)
    phi_C, psi_C = (None if t is None else t.float().contiguous() for t in (phi_C, psi_C))
    grid = launch.tiles(queries.rows, positive.groups * 128, config, positive.words.device)
    similarity_kernel[grid](
        launch.source(queries.high, config.block_m, config.block_k, config.tma),
        launch.source(queries.low, config.block_m, config.block_k, config.tma),
        launch.source(keys.high, config.block_n, config.block_k, config.tma),
        launch.source(keys.low, config.block_n, config.block_k, config.tma),
        phi_C,
        psi_C,
        self_C,
        positive.words,
        positive.counts,
        None if kept is None else kept.words,
        None if kept is None else kept.counts,
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
        PERSISTENT=config.persistent,
        **config.options(keys),
    )


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
