"""``proxy_average`` in Triton: selected keys as bits, then their sums over the tiles that hold any.

Bits cost 1/16 of the operands' bytes, so that similarity and sum are two kernels with full-size tiles; the
second skips a tile of 128 keys without a selected one, which most are.
"""

import torch
import triton
import triton.language as tl

from ..common import row_chunks, rows_within
from ..relation_masks.triton_impl import similarity
from ..tiles import bits as layout
from ..tiles import device, launch
from ..tiles.bits import Bits
from ..tiles.planes import Planes, padded, plane_count, planes

# Programs that share the occupied tiles of a row tile, and add up into as many partial sums.
_SPLITS = 4


@triton.jit
def mask_sum_kernel(
    p_words,
    p_key,
    p_key_low,
    p_tiles,
    p_num_tiles,
    p_sums,
    padded_rows,
    groups,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """sums[s] = sum of the selected keys over part s of the occupied groups of a row tile.

    A program owns (BLOCK_M rows, BLOCK_D channels, part s); the list of occupied groups is `p_tiles`
    (row tiles, groups), its length `p_num_tiles`. Parts are stored apart: bitwise repeatable.
    """
    i_m, i_d, i_part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    STEPS: tl.constexpr = 128 // BLOCK_K
    BITS: tl.constexpr = BLOCK_K // 8
    num_tiles = tl.load(p_num_tiles + i_m)
    per_part = tl.cdiv(num_tiles, SPLITS)
    first = i_part * per_part
    last = tl.minimum(first + per_part, num_tiles)
    o_row = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    b_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for i in range(first * STEPS, last * STEPS):
        i_group = tl.load(p_tiles + i_m * groups + i // STEPS)
        i_step = i % STEPS
        o_words = (o_row[:, None] * groups + i_group) * 8 + tl.arange(0, 8)[None, :]
        b_words = tl.load(p_words + o_words).to(tl.int32) >> (i_step * BITS)
        bit = 1 << tl.arange(0, BITS)
        b_bits = tl.reshape(b_words, (BLOCK_M, 1, 8)) & bit[None, :, None]
        i_key = i_group * 128 + i_step * BLOCK_K
        b_key = device.load_tile(p_key, i_key, i_d * BLOCK_D, BLOCK_K, BLOCK_D, WIDTH, TMA)
        b_mask = tl.reshape(tl.where(b_bits != 0, 1.0, 0.0), (BLOCK_M, BLOCK_K)).to(b_key.dtype)
        b_sum = device.dot(b_mask, b_key, b_sum, UPCAST)
        if SPLIT:
            b_key = device.load_tile(p_key_low, i_key, i_d * BLOCK_D, BLOCK_K, BLOCK_D, WIDTH, TMA)
            b_sum = device.dot(b_mask, b_key, b_sum, UPCAST)
    o_channel = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    o_sum = (i_part * padded_rows.to(tl.int64) + o_row)[:, None] * WIDTH + o_channel[None, :]
    tl.store(p_sums + o_sum, b_sum)


@triton.jit
def finish_kernel(
    p_sums,
    p_proxy,
    rows,
    padded_rows,
    width,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """proxy = sum / max(|sum|, 1e-12), parts added in their order; a program owns ROWS whole rows.

    The scale of the keys' planes cancels.
    """
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_channel = tl.arange(0, BLOCK)
    m_out = (o_row < rows)[:, None] & (o_channel < width)[None, :]
    b_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in tl.static_range(SPLITS):
        o_part = (i * padded_rows.to(tl.int64) + o_row)[:, None] * WIDTH + o_channel[None, :]
        b_sum += tl.load(p_sums + o_part, m_out, other=0.0)
    b_norm = tl.maximum(tl.sqrt_rn(tl.sum(b_sum * b_sum, 1)), 1e-12)
    tl.store(p_proxy + o_row[:, None] * width + o_channel[None, :], tl.div_rn(b_sum, b_norm[:, None]), m_out)


def mask_sum(positive: Bits, keys: Planes) -> torch.Tensor:
    """(_SPLITS, padded rows, padded width) float32 partial sums of the selected keys."""
    block = launch.row_block(keys.high.device)
    padded_rows, width = positive.words.shape[0], keys.high.shape[1]
    occupied = positive.occupied(block)
    num_tiles = occupied.sum(dim=1, dtype=torch.int32)
    # A stable sort puts the occupied groups of each row tile first, in their order.
    tiles = occupied.argsort(dim=1, descending=True, stable=True).to(torch.int32)
    sums = torch.empty((_SPLITS, padded_rows, width), device=keys.high.device)
    block_d = 128 if width % 128 == 0 else 64

    def start(config: launch.Launch, options: dict[str, object]) -> None:
        mask_sum_kernel[(padded_rows // config.block_m, width // block_d, _SPLITS)](
            positive.words,
            launch.source(keys.high, config.block_k, block_d, config.tma),
            launch.source(keys.low, config.block_k, block_d, config.tma),
            tiles,
            num_tiles,
            sums,
            padded_rows,
            positive.groups,
            BLOCK_D=block_d,
            BLOCK_K=config.block_k,
            SPLITS=_SPLITS,
            **options,
        )

    launch.run("mask_sum", keys, (positive.rows, keys.rows), start)
    return sums


def average_chunk(
    queries_CD: torch.Tensor, keys: Planes, threshold_C: torch.Tensor, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Proxies (C, D) and counts (C,) of some queries; at least one query and one key."""
    rows, width = queries_CD.shape
    block = launch.row_block(queries_CD.device)
    positive = Bits.empty(rows, keys.rows, block, queries_CD)
    similarity(planes(queries_CD, precision, block, keys.scaled), keys, positive, phi_C=threshold_C)
    sums = mask_sum(positive, keys)
    proxy_CD = torch.empty_like(queries_CD, memory_format=torch.contiguous_format)
    per_program = launch.rows_per_program()
    finish_kernel[(triton.cdiv(rows, per_program),)](
        sums,
        proxy_CD,
        rows,
        positive.words.shape[0],
        width,
        WIDTH=keys.high.shape[1],
        ROWS=per_program,
        BLOCK=triton.next_power_of_2(width),
        SPLITS=_SPLITS,
        **launch.ROW_OPTIONS,
    )
    return proxy_CD, positive.totals()


def bytes_per_query(num_keys: int, width: int, precision: str) -> int:
    """Bytes of temporaries of :func:`average_chunk` for one query: bits, list of tiles, planes, sums."""
    channels = padded(width, 64)
    lists = -(-num_keys // 128) // 2 + 64
    return layout.bytes_per_row(num_keys) + lists + (4 + 4 * plane_count(precision) + 4 * _SPLITS) * channels


def proxy_average(
    queries_AD: torch.Tensor,
    keys_ND: torch.Tensor,
    threshold_A: torch.Tensor,
    precision: str,
    memory_budget: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the public function; inputs are float32."""
    (num_queries, width), num_keys = queries_AD.shape, keys_ND.shape[0]
    proxy_AD = torch.zeros((num_queries, width), device=keys_ND.device)
    count_A = torch.zeros(num_queries, dtype=torch.int64, device=keys_ND.device)
    if 0 in (num_queries, num_keys, width):
        return proxy_AD, count_A
    keys = planes(keys_ND, precision, layout.COLUMN_BLOCK, scaled=True)
    block = launch.row_block(keys_ND.device)
    rows = rows_within(memory_budget, bytes_per_query(num_keys, width, precision), block)
    for chunk in row_chunks(num_queries, rows):
        proxy_AD[chunk], count_A[chunk] = average_chunk(
            queries_AD[chunk], keys, threshold_A[chunk], precision
        )
    return proxy_AD, count_A
