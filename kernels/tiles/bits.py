"""Masks between kernels: how they are laid out (see ``device.py``), counted, and turned into public words."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..masks import num_words
from . import device
from .launch import ROW_OPTIONS, rows_per_program
from .sizes import COLUMN_BLOCK, padded


@dataclass(frozen=True)
class Bits:
    """One mask over N columns for some rows, both padded to whole tiles; padding is 0.

    Attributes:
        words: (rows, groups, 8) int16.
        counts: (rows, groups) int16 ones of each group.
        rows: rows without padding.
        columns: columns without padding.
    """

    words: torch.Tensor
    counts: torch.Tensor
    rows: int
    columns: int

    @classmethod
    def empty(cls, rows: int, columns: int, row_block: int, like: torch.Tensor) -> "Bits":
        """Unwritten masks on the device of `like`."""
        shape = (padded(rows, row_block), padded(columns, COLUMN_BLOCK) // 128)
        words = torch.empty((*shape, 8), dtype=torch.int16, device=like.device)
        return cls(words, torch.empty(shape, dtype=torch.int16, device=like.device), rows, columns)

    @property
    def groups(self) -> int:
        """Groups of 128 columns, padding included."""
        return self.counts.shape[1]

    def totals(self) -> torch.Tensor:
        """(rows,) int64 ones of each row."""
        return self.counts[: self.rows].sum(dim=1, dtype=torch.int64)


def bytes_per_row(columns: int) -> int:
    """Bytes of one row of :class:`Bits`."""
    return padded(columns, COLUMN_BLOCK) // 128 * (16 + 2)


@triton.jit
def sizes_kernel(
    p_positive, p_kept, p_num_positive, p_num_negative, rows, groups, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sizes of the sets of ROWS anchors from the ones of each group; negatives = kept minus positives."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    b_positive = tl.zeros((ROWS, BLOCK), tl.int32)
    b_kept = tl.zeros((ROWS, BLOCK), tl.int32)
    for i in range(0, groups, BLOCK):
        o_group = i + tl.arange(0, BLOCK)
        o_count = o_row[:, None] * groups + o_group[None, :]
        m_count = m_row[:, None] & (o_group < groups)[None, :]
        b_positive += tl.load(p_positive + o_count, m_count, other=0).to(tl.int32)
        b_kept += tl.load(p_kept + o_count, m_count, other=0).to(tl.int32)
    b_total = tl.sum(b_positive, 1)
    tl.store(p_num_positive + o_row, b_total.to(tl.int64), m_row)
    tl.store(p_num_negative + o_row, (tl.sum(b_kept, 1) - b_total).to(tl.int64), m_row)


def sizes(positive: Bits, kept: Bits) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of positives and of negatives, kept minus positives, (rows,) int64 each; one row at least."""
    found = [torch.empty(positive.rows, dtype=torch.int64, device=positive.counts.device) for _ in range(2)]
    block = rows_per_program()
    grid = (triton.cdiv(positive.rows, block),)
    args = (positive.counts, kept.counts, *found, positive.rows, positive.groups)
    sizes_kernel[grid](*args, ROWS=block, BLOCK=256, **ROW_OPTIONS)
    return found[0], found[1]


@triton.jit
def to_public_kernel(p_words, p_public, rows, groups, num_words, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """int32 words of bit k = column 32 w + k; a program owns a tile (ROWS, BLOCK) of them.

    Bit k of word w of a group is bit 4 w + k // 8 of the 16-bit word k % 8: each of the eight gives a nibble
    whose bits go 8 apart.
    """
    o_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    o_word = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    m_word = (o_row < rows) & (o_word < num_words)
    b_out = tl.zeros((ROWS, BLOCK), tl.int32)
    for j in tl.static_range(8):
        b_word = tl.load(p_words + (o_row * groups + o_word // 4) * 8 + j, m_word, other=0).to(tl.int32)
        b_nibble = b_word >> (4 * (o_word % 4))
        for i in tl.static_range(4):
            b_out |= ((b_nibble >> i) & 1) << (8 * i + j)
    tl.store(p_public + o_row * num_words + o_word, b_out, m_word)


@triton.jit
def from_public_kernel(
    p_public, p_words, p_counts, rows, columns, groups, num_words, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """The inverse, with the ones of each group; a program owns a tile (ROWS, BLOCK groups), padding too.

    Bits past the last column are dropped, as everywhere.
    """
    o_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    o_group = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    o_out = tl.arange(0, 8)[None, None, :]
    b_out = tl.zeros((ROWS, BLOCK, 8), tl.int32)
    for w in tl.static_range(4):
        o_word = o_group * 4 + w
        b_word = tl.load(
            p_public + o_row * num_words + o_word, (o_row < rows) & (o_word < num_words), other=0
        )
        for i in tl.static_range(4):
            b_out |= ((b_word[:, :, None] >> (8 * i + o_out)) & 1) << (4 * w + i)
    i_row, i_column = tl.program_id(0) * ROWS, tl.program_id(1) * BLOCK * 128
    b_out &= device.valid_words(i_row, i_column, rows, columns, ROWS, BLOCK)
    m_group = (o_group < groups) & (o_row >= 0)
    o_store = o_row * groups + o_group
    tl.store(p_counts + o_store, device.count_bits(b_out).to(tl.int16), m_group)
    tl.store(p_words + o_store[:, :, None] * 8 + o_out, b_out.to(tl.int16), m_group[:, :, None])


def to_public(bits: Bits, out: torch.Tensor) -> None:
    """Write int32 words (rows, ceil(N / 32)) into `out`, contiguous."""
    words, block = num_words(bits.columns), rows_per_program()
    if out.numel():
        grid = (triton.cdiv(bits.rows, block), triton.cdiv(words, 128))
        args = (bits.words, out, bits.rows, bits.groups, words)
        to_public_kernel[grid](*args, ROWS=block, BLOCK=128, **ROW_OPTIONS)


def from_public(public: torch.Tensor, columns: int, row_block: int) -> Bits:
    """Masks of int32 words (rows, ceil(N / 32))."""
    rows, words = public.shape
    bits, block = Bits.empty(rows, columns, row_block, public), rows_per_program()
    if bits.words.numel():
        # Row tiles are multiples of what a program owns.
        grid = (bits.words.shape[0] // block, triton.cdiv(bits.groups, 32))
        args = (public.contiguous(), bits.words, bits.counts, rows, columns, bits.groups, words)
        from_public_kernel[grid](*args, ROWS=block, BLOCK=32, **ROW_OPTIONS)
    return bits
