"""Which tiles of a mask hold anything: flags for kernels that look, a list for those that skip."""

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
        tiles: (row tiles, groups) int32, the occupied groups of each row tile in their order, then anything.
        num_tiles: (row tiles,) int32, how many there are.
    """

    tiles: torch.Tensor
    num_tiles: torch.Tensor


@triton.jit
def _occupied(p_counts, i_m, o_group, groups, BLOCK_M: tl.constexpr):
    """1 where a group of row tile `i_m` holds any one, by the ones of each row."""
    o_row = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_group = (o_group < groups)[None, :]
    b_count = tl.load(p_counts + o_row[:, None] * groups + o_group[None, :], m_group, other=0)
    return (tl.max(b_count.to(tl.int32), 0) > 0).to(tl.int32)


@triton.jit
def flags_kernel(p_counts, p_flags, groups, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr):
    """Flags from the ones of each row and group; a program owns a row tile and BLOCK_G groups."""
    i_m = tl.program_id(0).to(tl.int64)
    o_group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    b_flag = _occupied(p_counts, i_m, o_group, groups, BLOCK_M)
    tl.store(p_flags + i_m * groups + o_group, b_flag.to(tl.int8), o_group < groups)


@triton.jit
def list_kernel(p_counts, p_tiles, p_num_tiles, groups, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr):
    """The list of occupied groups of a row tile, which a program owns; from the counts themselves."""
    i_m = tl.program_id(0).to(tl.int64)
    num_tiles = 0
    for i_group in range(0, groups, BLOCK_G):
        o_group = i_group + tl.arange(0, BLOCK_G)
        b_flag = _occupied(p_counts, i_m, o_group, groups, BLOCK_M)
        b_place = num_tiles + tl.cumsum(b_flag, 0) - b_flag
        tl.store(p_tiles + i_m * groups + b_place, o_group, b_flag != 0)
        num_tiles += tl.sum(b_flag, 0)
    tl.store(p_num_tiles + i_m, num_tiles)


def flags(bits: Bits, row_block: int) -> torch.Tensor:
    """(row tiles, groups) int8 of a mask of one row at least: 1 where a tile holds any one."""
    row_tiles, groups = bits.counts.shape[0] // row_block, bits.groups
    found = torch.empty((row_tiles, groups), dtype=torch.int8, device=bits.counts.device)
    grid = (row_tiles, triton.cdiv(groups, _groups_at_once()))
    flags_kernel[grid](bits.counts, found, groups, BLOCK_M=row_block, BLOCK_G=_groups_at_once())
    return found


def occupancy(bits: Bits, row_block: int) -> Occupancy:
    """Lists of a mask of one row at least."""
    row_tiles, groups, device = bits.counts.shape[0] // row_block, bits.groups, bits.counts.device
    tiles = torch.empty((row_tiles, groups), dtype=torch.int32, device=device)
    num_tiles = torch.empty(row_tiles, dtype=torch.int32, device=device)
    sizes = {"BLOCK_M": row_block, "BLOCK_G": _groups_at_once()}
    list_kernel[(row_tiles,)](bits.counts, tiles, num_tiles, groups, **sizes)
    return Occupancy(tiles, num_tiles)


def _groups_at_once() -> int:
    """Groups of a row tile whose counts a program holds at a time."""
    return 256 if interpreted() else 32


def bytes_per_row(columns: int, row_block: int) -> int:
    """Bytes of one row of an :class:`Occupancy` and of :func:`flags`, at most."""
    return -(-5 * (columns // 128 + 2) // row_block) + 16
