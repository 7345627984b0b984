"""``proxy_average`` in Triton: selected keys as bits, then their sums over the tiles that hold any.

Bits cost 1/16 of the operands' bytes, so that similarity and sum are two kernels with full-size tiles; the
second skips a tile of 128 keys without a selected one. The launches are beside the kernels.
"""

import torch

from ..relation_masks.triton_kernels import similarity
from ..tiles import bits as layout
from ..tiles import launch, occupancy
from ..tiles.bits import Bits
from ..tiles.planes import Planes, plane_count, planes
from ..tiles.sizes import COLUMN_BLOCK, padded_channels
from .triton_kernels import PARTS_MAX, Proxies, finish, mask_sum


def prepare(keys_ND: torch.Tensor, precision: str) -> Planes:
    """Keys as operands of products."""
    return planes(keys_ND, precision, COLUMN_BLOCK, scaled=True)


def chunk_rows(keys: Planes, precision: str, memory_budget: int) -> int:
    """Queries per chunk: whole row tiles."""
    device = keys.high.device
    per_query = bytes_per_query(keys.rows, keys.width, precision, launch.row_block(device))
    return launch.rows_within(memory_budget, per_query, device)


def bytes_per_query(num_keys: int, width: int, precision: str, row_block: int) -> int:
    """Bytes of temporaries of one query: bits, list of tiles, sums, two sets of proxies."""
    channels = padded_channels(width)
    lists = occupancy.bytes_per_row(num_keys, row_block)
    proxies = 2 * (4 + 2 * plane_count(precision)) * channels
    return layout.bytes_per_row(num_keys) + lists + 4 * PARTS_MAX * channels + proxies + 16


def chunk(
    keys: Planes, precision: str, queries_CD: torch.Tensor, threshold_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Proxies (C, D) and counts (C,) of some queries; one query and one key at least."""
    if keys.width == 0:
        return torch.zeros_like(queries_CD), threshold_C.new_zeros(threshold_C.shape, dtype=torch.int64)
    queries, parts, count_C = _select(keys, precision, queries_CD, threshold_C)
    return finish(parts, queries, precision).values, count_C


def sums(
    keys: Planes, precision: str, queries_CD: torch.Tensor, threshold_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums (C, D) of the selected keys and their counts (C,); one query, key and channel at least."""
    rows, width = queries_CD.shape
    _, parts, count_C = _select(keys, precision, queries_CD, threshold_C)
    return parts.sum(dim=0)[:rows, :width] * keys.unit, count_C


def _select(
    keys: Planes, precision: str, queries_CD: torch.Tensor, threshold_C: torch.Tensor
) -> tuple[Proxies, torch.Tensor, torch.Tensor]:
    """Queries with their operands, partial sums of the selected keys without their unit, counts (C,)."""
    block = launch.row_block(keys.high.device)
    queries = Proxies(queries_CD, planes(queries_CD, precision, block, keys.scaled))
    positive = Bits.empty(queries_CD.shape[0], keys.rows, block, queries_CD)
    similarity(queries.planes, keys, positive, phi_C=threshold_C)
    parts = mask_sum(positive, occupancy.occupancy(positive, block), keys)
    return queries, parts, positive.totals()
