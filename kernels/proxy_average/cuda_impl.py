"""``proxy_average`` in the CUDA library: selected keys as bits, then their sums."""

import torch
import torch.nn.functional as F

from .. import native_cuda as cuda
from ..budget import row_chunks, rows_within


def average_chunk(
    queries_CD: torch.Tensor, keys: cuda.Operand, threshold_C: torch.Tensor, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Proxies (C, D) and counts (C,) of some queries; at least one query and one key."""
    rows = queries_CD.shape[0]
    bits = cuda.empty_bits(keys.values.shape[0], rows, queries_CD.device)
    queries = cuda.Operand.of(queries_CD, precision)
    count_C, _ = cuda.similarity(queries, keys, precision, bits, phi_C=threshold_C)
    return F.normalize(cuda.mask_sum(bits, keys, rows), dim=1), count_C


def bytes_per_query(num_keys: int, width: int) -> int:
    """Bytes of temporaries of :func:`average_chunk` for one query: a bit a key, queries, parts of sums."""
    return num_keys // 8 + 1 + 64 * width + 128


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
    if num_keys == 0:
        return proxy_AD, count_A
    keys = cuda.Operand.of(keys_ND, precision)
    for chunk in row_chunks(num_queries, rows_within(memory_budget, bytes_per_query(num_keys, width))):
        proxy_AD[chunk], count_A[chunk] = average_chunk(
            queries_AD[chunk], keys, threshold_A[chunk], precision
        )
    return proxy_AD, count_A
