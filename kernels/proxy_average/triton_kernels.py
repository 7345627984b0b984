"""The Triton kernels of ``proxy_average`` and their launches."""

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from ..tiles import device, launch
from ..tiles.bits import Bits
from ..tiles.occupancy import Occupancy
from ..tiles.planes import Planes
from ..tiles.rows import rounding, store_planes

# Programs that share the occupied tiles of a row tile, and add up into as many partial sums, at most.
PARTS_MAX = 16


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
    num_parts,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """sums[s] = sum of the selected keys over part s of the occupied groups of a row tile.

    A program owns (BLOCK_M rows, TILES x BLOCK_D channels, part s): making an operand out of bits takes as
    long as one product with it, so that up to three accumulators share it. The list of occupied groups is
    `p_tiles` (row tiles, groups), its length `p_num_tiles`. Parts are stored apart: bitwise repeatable.
    """
    i_m, i_d, i_part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    STEPS: tl.constexpr = 128 // BLOCK_K
    BITS: tl.constexpr = BLOCK_K // 8
    num_tiles = tl.load(p_num_tiles + i_m)
    per_part = tl.cdiv(num_tiles, num_parts)
    first = i_part * per_part
    last = tl.minimum(first + per_part, num_tiles)
    o_row = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    i_channel = i_d * BLOCK_D * TILES
    b_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if TILES > 1:
        b_sum_1 = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if TILES > 2:
        b_sum_2 = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for i in range(first * STEPS, last * STEPS):
        i_group = tl.load(p_tiles + i_m * groups + i // STEPS)
        i_step = i % STEPS
        o_words = (o_row[:, None] * groups + i_group) * 8 + tl.arange(0, 8)[None, :]
        b_words = tl.load(p_words + o_words).to(tl.int32) >> (i_step * BITS)
        bit = 1 << tl.arange(0, BITS)
        b_bits = tl.reshape(b_words, (BLOCK_M, 1, 8)) & bit[None, :, None]
        b_mask = tl.reshape(tl.where(b_bits != 0, 1.0, 0.0), (BLOCK_M, BLOCK_K))
        i_key = i_group * 128 + i_step * BLOCK_K
        b_sum = _add_keys(
            b_sum, b_mask, p_key, p_key_low, i_key, i_channel, WIDTH, BLOCK_D, BLOCK_K, SPLIT, TMA, UPCAST
        )
        if TILES > 1:
            i_next = i_channel + BLOCK_D
            b_sum_1 = _add_keys(
                b_sum_1, b_mask, p_key, p_key_low, i_key, i_next, WIDTH, BLOCK_D, BLOCK_K, SPLIT, TMA, UPCAST
            )
        if TILES > 2:
            i_last = i_channel + 2 * BLOCK_D
            b_sum_2 = _add_keys(
                b_sum_2, b_mask, p_key, p_key_low, i_key, i_last, WIDTH, BLOCK_D, BLOCK_K, SPLIT, TMA, UPCAST
            )
    o_channel = i_channel + tl.arange(0, BLOCK_D)
    p_sum = p_sums + (i_part * padded_rows.to(tl.int64) + o_row)[:, None] * WIDTH + o_channel[None, :]
    tl.store(p_sum, b_sum)
    if TILES > 1:
        tl.store(p_sum + BLOCK_D, b_sum_1)
    if TILES > 2:
        tl.store(p_sum + 2 * BLOCK_D, b_sum_2)


@triton.jit
def _add_keys(
    b_sum,
    b_mask,
    p_key,
    p_key_low,
    i_key,
    i_channel,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """b_sum + b_mask keys, of a tile (BLOCK_K keys, BLOCK_D channels)."""
    b_key = device.load_tile(p_key, i_key, i_channel, BLOCK_K, BLOCK_D, WIDTH, TMA)
    b_mask = b_mask.to(b_key.dtype)
    b_sum = device.dot(b_mask, b_key, b_sum, UPCAST)
    if SPLIT:
        b_key = device.load_tile(p_key_low, i_key, i_channel, BLOCK_K, BLOCK_D, WIDTH, TMA)
        b_sum = device.dot(b_mask, b_key, b_sum, UPCAST)
    return b_sum


@triton.jit
def finish_kernel(
    p_sums,
    p_query,
    p_phi,
    p_psi,
    p_next_phi,
    p_next_psi,
    p_proxy,
    p_high,
    p_low,
    rows,
    padded_rows,
    width,
    num_parts,
    sigma_pos,
    sigma_amb,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    ROUND: tl.constexpr,
):
    """proxy = sum / max(|sum|, 1e-12), parts added in their order; a program owns ROWS whole rows.

    With `p_phi`: movement = 1 - query . proxy, next phi = phi - movement / sigma_pos, next psi = psi +
    movement / sigma_amb (Eq. 3, 5). The planes of the next similarity are made on the way. The unit of the
    keys cancels.
    """
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_channel = tl.arange(0, BLOCK)
    m_row = o_row < rows
    m_sum = (o_row < padded_rows)[:, None] & (o_channel < WIDTH)[None, :]
    b_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in range(num_parts):
        o_part = (i * padded_rows.to(tl.int64) + o_row)[:, None] * WIDTH + o_channel[None, :]
        b_sum += tl.load(p_sums + o_part, m_sum, other=0.0)
    b_norm = tl.maximum(tl.sqrt_rn(tl.sum(b_sum * b_sum, 1)), 1e-12)
    b_proxy = b_sum * tl.div_rn(1.0, b_norm)[:, None]
    m_out = m_row[:, None] & (o_channel < width)[None, :]
    o_out = o_row[:, None] * width + o_channel[None, :]
    tl.store(p_proxy + o_out, b_proxy, m_out)
    o_plane = o_row[:, None] * WIDTH + o_channel[None, :]
    store_planes(p_high, None, p_low, o_plane, b_proxy, m_sum, SPLIT, ROUND)
    if p_phi is not None:
        b_query = tl.load(p_query + o_out, m_out, other=0.0)
        b_movement = 1.0 - tl.sum(b_query * b_proxy, 1)
        b_phi = tl.load(p_phi + o_row, m_row, other=0.0) - tl.div_rn(b_movement, sigma_pos)
        b_psi = tl.load(p_psi + o_row, m_row, other=0.0) + tl.div_rn(b_movement, sigma_amb)
        tl.store(p_next_phi + o_row, b_phi, m_row)
        tl.store(p_next_psi + o_row, b_psi, m_row)


@dataclass(frozen=True)
class Proxies:
    """Queries of a similarity, as values and as operands.

    Attributes:
        values: (C, D) float32, unit norm or zero.
        planes: their operands.
    """

    values: torch.Tensor
    planes: Planes


@dataclass(frozen=True)
class Thresholds:
    """Thresholds that follow the proxies, (C,) float32 each.

    Attributes:
        phi: of the positives.
        psi: of the negatives.
        sigma_pos: divides the movement before it lowers phi (Eq. 3).
        sigma_amb: divides the movement before it raises psi (Eq. 5).
    """

    phi: torch.Tensor
    psi: torch.Tensor
    sigma_pos: float
    sigma_amb: float


def parts(row_tiles: int, programs_per_tile: int, slots: int) -> int:
    """Into how many parts the tiles of a row tile are cut, so that the last programs leave few units idle.

    Args:
        row_tiles: row tiles.
        programs_per_tile: programs that each part of a row tile takes.
        slots: programs that the device runs at a time.
    """

    def idle(count: int) -> float:
        programs = row_tiles * programs_per_tile * count
        waves = -(-programs // slots)
        # A part costs a partial sum: a little more of it must be worth it.
        return 1 - programs / (waves * slots) + 0.01 * count

    return min(range(1, PARTS_MAX + 1), key=idle)


def mask_sum(positive: Bits, found: Occupancy, keys: Planes) -> torch.Tensor:
    """(parts, padded rows, padded width) float32 partial sums of the selected keys, without the unit.

    Args:
        positive: which keys each row sums.
        found: its tiles that hold any, the only ones that are read.
        keys: operands.
    """
    padded_rows, (_, width) = positive.words.shape[0], keys.high.shape
    device = keys.high.device
    block_d, row_tiles = _block_d(width), padded_rows // launch.row_block(device)
    tiles = _accumulators(launch.configuration("mask_sum", device, keys.split), width)
    slots = launch.multiprocessors(device) * (2 if tiles == 1 else 1)
    num_parts = parts(row_tiles, width // (block_d * tiles), slots)
    sums = torch.empty((num_parts, padded_rows, width), device=device)
    add_keys(positive, found, keys, sums)
    return sums


def add_keys(
    positive: Bits, found: Occupancy, keys: Planes, sums: torch.Tensor, config: launch.Launch | None = None
) -> None:
    """Fill the partial sums, see :func:`mask_sum_kernel`."""
    if config is None:
        again = partial(add_keys, positive, found, keys, sums)
        config = launch.choose("mask_sum", keys, (positive.rows, keys.rows), again)
    num_parts, padded_rows, width = sums.shape
    block_d, tiles = _block_d(width), _accumulators(config, width)
    grid = (padded_rows // config.block_m, width // (block_d * tiles), num_parts)
    mask_sum_kernel[grid](
        positive.words,
        launch.source(keys.high, config.block_k, block_d, config.tma),
        launch.source(keys.low, config.block_k, block_d, config.tma),
        found.tiles,
        found.num_tiles,
        sums,
        padded_rows,
        positive.groups,
        num_parts,
        BLOCK_D=block_d,
        TILES=tiles,
        BLOCK_K=config.block_k,
        **config.options(keys),
    )


def _block_d(width: int) -> int:
    """Channels of an accumulator."""
    return 128 if width % 128 == 0 else 64


def _accumulators(config: launch.Launch, width: int) -> int:
    """Accumulators of a program."""
    return config.accumulators if width // _block_d(width) % config.accumulators == 0 else 1


def finish(sums: torch.Tensor, queries: Proxies, precision: str) -> Proxies:
    """Normalised sums (Eq. 2, 4) as proxies and operands, see :func:`finish_kernel`."""
    return _finish(sums, queries, precision, (None,) * 4, (1.0, 1.0))


def move(
    sums: torch.Tensor, queries: Proxies, precision: str, thresholds: Thresholds
) -> tuple[Proxies, Thresholds]:
    """Proxies as of :func:`finish`, and the thresholds that followed them (Eq. 3, 5)."""
    phi_C, psi_C = torch.empty_like(thresholds.phi), torch.empty_like(thresholds.psi)
    sigmas = (thresholds.sigma_pos, thresholds.sigma_amb)
    both = (thresholds.phi, thresholds.psi, phi_C, psi_C)
    return _finish(sums, queries, precision, both, sigmas), Thresholds(phi_C, psi_C, *sigmas)


def _finish(
    sums: torch.Tensor,
    queries: Proxies,
    precision: str,
    thresholds: tuple[torch.Tensor | None, ...],
    sigmas: tuple[float, float],
) -> Proxies:
    (rows, width), (num_parts, padded_rows, padded_width) = queries.values.shape, sums.shape
    device, per_program = sums.device, launch.rows_per_program()
    operands = Planes.empty(rows, width, precision, launch.row_block(device), device)
    moved = Proxies(torch.empty((rows, width), device=device), operands)
    finish_kernel[(triton.cdiv(padded_rows, per_program),)](
        sums,
        queries.values,
        *thresholds,
        moved.values,
        moved.planes.high,
        moved.planes.low,
        rows,
        padded_rows,
        width,
        num_parts,
        *sigmas,
        WIDTH=padded_width,
        ROWS=per_program,
        BLOCK=triton.next_power_of_2(padded_width),
        SPLIT=moved.planes.split,
        ROUND=rounding(moved.planes.high),
        **launch.ROW_OPTIONS,
    )
    return moved
