"""What later kernels want to know of masks: totals of rows, tiles that hold anything, and a list of these."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .bits import Bits
from .launch import interpreted


@dataclass(frozen=True)
class Occupancy:
    """Of one mask; tiles are a row block high and a group of 128 columns wide.

    Attributes:
        flags: (row tiles, groups) int8, 1 where a tile holds any one.
        tiles: (row tiles, groups) int32, the occupied groups of each row tile in their order, then anything.
        num_tiles: (row tiles,) int32, how many there are.
        totals: (rows,) int64 ones of each row.
    """

    flags: torch.Tensor
    tiles: torch.Tensor
    num_tiles: torch.Tensor
    totals: torch.Tensor


@triton.jit
def occupancy_kernel(
    p_counts,
    p_flags,
    p_tiles,
    p_num_tiles,
    p_totals,
    rows,
    groups,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """:class:`Occupancy` from the ones of each row and group; a program owns a row tile."""
    i_m = tl.program_id(0).to(tl.int64)
    o_row = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    b_total = tl.zeros((BLOCK_M,), tl.int32)
    num_tiles = 0
    for i_group in range(0, groups, BLOCK_G):
        o_group = i_group + tl.arange(0, BLOCK_G)
        m_group = o_group < groups
        o_count = o_row[:, None] * groups + o_group[None, :]
        b_count = tl.load(p_counts + o_count, m_group[None, :], other=0).to(tl.int32)
        b_total += tl.sum(b_count, 1)
        b_flag = (tl.max(b_count, 0) > 0).to(tl.int32)
        tl.store(p_flags + i_m * groups + o_group, b_flag.to(tl.int8), m_group)
        b_place = num_tiles + tl.cumsum(b_flag, 0) - b_flag
        tl.store(p_tiles + i_m * groups + b_place, o_group, m_group & (b_flag != 0))
        num_tiles += tl.sum(b_flag, 0)
    tl.store(p_num_tiles + i_m, num_tiles)
    tl.store(p_totals + o_row, b_total.to(tl.int64), o_row < rows)


def occupancy(bits: Bits, row_block: int) -> Occupancy:
    """Look at a mask of one row at least."""
    row_tiles, groups, device = bits.counts.shape[0] // row_block, bits.groups, bits.counts.device
    found = Occupancy(
        torch.empty((row_tiles, groups), dtype=torch.int8, device=device),
        torch.empty((row_tiles, groups), dtype=torch.int32, device=device),
        torch.empty(row_tiles, dtype=torch.int32, device=device),
        torch.empty(bits.rows, dtype=torch.int64, device=device),
    )
    occupancy_kernel[(row_tiles,)](
        bits.counts,
        found.flags,
        found.tiles,
        found.num_tiles,
        found.totals,
        bits.rows,
        groups,
        BLOCK_M=row_block,
        BLOCK_G=256 if interpreted() else 64,
        num_warps=8,
    )
    return found


def bytes_per_row(columns: int, row_block: int) -> int:
    """Bytes of one row of an :class:`Occupancy`, at most."""
    return -(-5 * (columns // 128 + 2) // row_block) + 16
