"""``proxy_average`` in Triton: selected keys as bits, then their sums over the tiles that hold any.

Bits cost 1/16 of the operands' bytes, so that similarity and sum are two kernels with full-size tiles; the
second skips a tile of 128 keys without a selected one.
"""

from dataclasses import dataclass

import torch
import triton

from ..budget import row_chunks, rows_within
from ..relation_masks.triton_impl import similarity
from ..tiles import bits as layout
from ..tiles import launch, occupancy
from ..tiles.bits import Bits
from ..tiles.occupancy import Occupancy
from ..tiles.planes import Planes, plane_count, planes
from ..tiles.rows import rounding
from ..tiles.sizes import COLUMN_BLOCK, padded_channels
from .triton_kernels import finish_kernel, mask_sum_kernel

# Programs that share the occupied tiles of a row tile, and add up into as many partial sums, at most.
_PARTS_MAX = 16


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
    """Thresholds that follow the proxies, (C,) float32 each, moved in place.

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

    return min(range(1, _PARTS_MAX + 1), key=idle)


def mask_sum(positive: Bits, found: Occupancy, keys: Planes) -> torch.Tensor:
    """(parts, padded rows, padded width) float32 partial sums of the selected keys, without the unit."""
    padded_rows, width = positive.words.shape[0], keys.high.shape[1]
    device = keys.high.device
    block_d = 128 if width % 128 == 0 else 64
    row_tiles = padded_rows // launch.row_block(device)

    def per_tile(config: launch.Launch) -> tuple[int, int]:
        """Accumulators of a program, programs that a part of a row tile takes."""
        tiles = config.accumulators if width // block_d % config.accumulators == 0 else 1
        return tiles, width // (block_d * tiles)

    tiles, programs = per_tile(launch.configuration("mask_sum", device, keys.split))
    num_parts = parts(row_tiles, programs, launch.multiprocessors(device) * (2 if tiles == 1 else 1))
    sums = torch.empty((num_parts, padded_rows, width), device=device)

    def start(config: launch.Launch, options: dict[str, object]) -> None:
        tiles, programs = per_tile(config)
        mask_sum_kernel[(row_tiles, programs, num_parts)](
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
            **options,
        )

    launch.run("mask_sum", keys, (positive.rows, keys.rows), start)
    return sums


def move(
    queries: Proxies, keys: Planes, phi_C: torch.Tensor, precision: str, thresholds: Thresholds | None = None
) -> tuple[Proxies, Bits]:
    """Means of the keys above `phi_C`, normalised (Eq. 2, 4), and these as bits; one query and key at least.

    With `thresholds` these are moved too (Eq. 3, 5).
    """
    (rows, width), device = queries.values.shape, queries.values.device
    block = launch.row_block(device)
    positive = Bits.empty(rows, keys.rows, block, queries.values)
    similarity(queries.planes, keys, positive, phi_C=phi_C)
    found = occupancy.occupancy(positive, block)
    sums = mask_sum(positive, found, keys)
    moved = Proxies(
        torch.empty((rows, width), device=device), Planes.empty(rows, width, precision, block, device)
    )
    finish(sums, queries.values, moved, thresholds)
    return moved, positive


def finish(sums: torch.Tensor, query_CD: torch.Tensor, moved: Proxies, thresholds: Thresholds | None) -> None:
    """Fill `moved` with the normalised sums, see :func:`finish_kernel`."""
    num_parts, padded_rows, padded_width = sums.shape
    rows, width = query_CD.shape
    per_program = launch.rows_per_program()
    both = (None, None) if thresholds is None else (thresholds.phi, thresholds.psi)
    sigmas = (1.0, 1.0) if thresholds is None else (thresholds.sigma_pos, thresholds.sigma_amb)
    finish_kernel[(triton.cdiv(padded_rows, per_program),)](
        sums,
        query_CD,
        *both,
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


def bytes_per_query(num_keys: int, width: int, precision: str, row_block: int) -> int:
    """Bytes of temporaries of :func:`move` for one query: bits, list of tiles, sums, two sets of proxies."""
    channels = padded_channels(width)
    lists = occupancy.bytes_per_row(num_keys, row_block)
    proxies = 2 * (4 + 2 * plane_count(precision)) * channels
    return layout.bytes_per_row(num_keys) + lists + 4 * _PARTS_MAX * channels + proxies + 16


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
    keys = planes(keys_ND, precision, COLUMN_BLOCK, scaled=True)
    block = launch.row_block(keys_ND.device)
    rows = rows_within(memory_budget, bytes_per_query(num_keys, width, precision, block), block)
    for chunk in row_chunks(num_queries, rows):
        queries = Proxies(queries_AD[chunk], planes(queries_AD[chunk], precision, block, keys.scaled))
        moved, positive = move(queries, keys, threshold_A[chunk], precision)
        proxy_AD[chunk], count_A[chunk] = moved.values, positive.totals()
        del queries, moved, positive
    return proxy_AD, count_A
