"""Functions inlined into the Triton kernels: tiles, products of operand planes, packed words.

A mask over N patches is kept in groups of 128 columns, eight 16-bit words a row and group:

    column c of a row = bit (c % 128) // 8 of word c % 8 of group c // 128.

In the register layout of a matrix accumulator a thread owns neighbouring columns of every eight, so in this
order a thread packs and expands its own bits without talking to its neighbours.

Prefixes: ``i_`` index, ``o_`` offsets, ``p_`` pointer or tensor descriptor, ``b_`` tile, ``m_`` mask.
"""

import triton
import triton.language as tl

# Columns per group of words; tiles are whole groups wide.
GROUP = tl.constexpr(128)


@triton.jit
def own_tiles(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PERSISTENT: tl.constexpr):
    """(first, end, step) of the tiles that this program goes through: its own one, or PERSISTENT every n-th.

    The compiler sees that a single tile needs no loop.
    """
    first = tl.program_id(0)
    if PERSISTENT:
        return first, tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N), tl.num_programs(0)
    else:
        return first, first + 1, 1


@triton.jit
def tile_index(i_tile, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr):
    """(row tile, column tile) of the i-th tile; BAND row tiles run over all columns before the next band.

    Programs in flight then share their row operand in the cache and read every column tile once a band.
    """
    num_m, num_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    i_band = i_tile // (BAND * num_n)
    height = tl.minimum(num_m - i_band * BAND, BAND)
    i_inside = i_tile - i_band * BAND * num_n
    return i_band * BAND + i_inside % height, i_inside // height


@triton.jit
def entry_offsets(i_row, i_column, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """int64 offsets (ROWS, COLUMNS) of a tile's entries in a row-major tensor of `width` columns."""
    o_row = (i_row + tl.arange(0, ROWS)).to(tl.int64)
    return o_row[:, None] * width + (i_column + tl.arange(0, COLUMNS))[None, :]


@triton.jit
def load_tile(
    p_plane,
    i_row,
    i_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """Tile (ROWS, COLUMNS) of a row-major plane whose sizes are padded to whole tiles."""
    if TMA:
        return p_plane.load([i_row, i_column])
    else:
        return tl.load(p_plane + entry_offsets(i_row, i_column, WIDTH, ROWS, COLUMNS))


@triton.jit
def dot(b_left, b_right, b_sum, UPCAST: tl.constexpr):
    """b_sum + b_left b_right in fp32; UPCAST serves the interpreter, which has no bf16 product."""
    if UPCAST:
        b_left, b_right = b_left.to(tl.float32), b_right.to(tl.float32)
    return tl.dot(b_left, b_right, b_sum, input_precision="ieee")


@triton.jit
def tile_product(
    p_left,
    p_left_low,
    p_right,
    p_right_low,
    i_row,
    i_column,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) fp32 inner products of rows of two planes.

    SPLIT: values are sums of a high and a low plane; the product of the two low planes is below fp32's
    rounding and left out.
    """
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_k in range(0, WIDTH, BLOCK_K):
        b_left = load_tile(p_left, i_row, i_k, BLOCK_M, BLOCK_K, WIDTH, TMA)
        b_right = load_tile(p_right, i_column, i_k, BLOCK_N, BLOCK_K, WIDTH, TMA)
        b_sum = dot(b_left, tl.trans(b_right), b_sum, UPCAST)
        if SPLIT:
            b_right_low = load_tile(p_right_low, i_column, i_k, BLOCK_N, BLOCK_K, WIDTH, TMA)
            b_sum = dot(b_left, tl.trans(b_right_low), b_sum, UPCAST)
            b_left_low = load_tile(p_left_low, i_row, i_k, BLOCK_M, BLOCK_K, WIDTH, TMA)
            b_sum = dot(b_left_low, tl.trans(b_right), b_sum, UPCAST)
    return b_sum


@triton.jit
def grouped(b_tile, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr):
    """A tile (BLOCK_M, 128 GROUPS) as (BLOCK_M, GROUPS, bit 16, word 8)."""
    return tl.reshape(b_tile, (BLOCK_M, GROUPS, 16, 8))


@triton.jit
def pack(m_grouped):
    """int32 words (BLOCK_M, GROUPS, 8) of a :func:`grouped` mask."""
    bit = (1 << tl.arange(0, 16))[None, None, :, None]
    return tl.sum(tl.where(m_grouped, bit, 0), 2)


@triton.jit
def expand(b_words):
    """:func:`grouped` mask of words (BLOCK_M, GROUPS, 8)."""
    bit = (1 << tl.arange(0, 16))[None, None, :, None]
    return (b_words[:, :, None, :] & bit) != 0


@triton.jit
def row_sum(b_grouped):
    """(BLOCK_M,) sums of a :func:`grouped` tile."""
    return tl.sum(tl.sum(tl.sum(b_grouped, 3), 2), 1)


@triton.jit
def word_offsets(i_row, i_group, groups, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr):
    """Offsets (BLOCK_M, GROUPS, 8) of a tile's words in a (rows, groups, 8) tensor."""
    o_row = (i_row + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_group = i_group + tl.arange(0, GROUPS)
    o_word = tl.arange(0, 8)
    return (o_row[:, None, None] * groups + o_group[None, :, None]) * 8 + o_word[None, None, :]


@triton.jit
def valid_words(i_row, i_column, rows, columns, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr):
    """Words (BLOCK_M, GROUPS, 8) with a bit for every entry inside (rows, columns)."""
    o_row = i_row + tl.arange(0, BLOCK_M)
    o_column = i_column + tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, 8)[None, :]
    bits = tl.minimum(tl.maximum((columns - o_column + 7) // 8, 0), 16)
    words = (1 << bits) - 1
    return tl.where((o_row < rows)[:, None, None], words[None, :, :], 0)


@triton.jit
def self_words(o_self, i_column, GROUPS: tl.constexpr):
    """Words (BLOCK_M, GROUPS, 8) with the bit of column `o_self` (BLOCK_M,) of each row."""
    o_local = o_self[:, None, None] - i_column - (tl.arange(0, GROUPS) * GROUP)[None, :, None]
    inside = (o_local >= 0) & (o_local < GROUP) & (o_local % 8 == tl.arange(0, 8)[None, None, :])
    return tl.where(inside, 1 << (tl.maximum(o_local, 0) % GROUP // 8), 0)


@triton.jit
def count_bits(b_words):
    """Number of ones in the words of a group: (BLOCK_M, GROUPS, 8) -> (BLOCK_M, GROUPS) int32."""
    x = b_words & 0xFFFF
    x = x - ((x >> 1) & 0x5555)
    x = (x & 0x3333) + ((x >> 2) & 0x3333)
    x = (x + (x >> 4)) & 0x0F0F
    return tl.sum((x + (x >> 8)) & 0x1F, 2)


@triton.jit
def any_occupied(p_occupied, GROUPS: tl.constexpr):
    """Whether any of GROUPS flags from `p_occupied` on is set."""
    flag = tl.load(p_occupied)
    for i in tl.static_range(1, GROUPS):
        flag |= tl.load(p_occupied + i)
    return flag != 0
