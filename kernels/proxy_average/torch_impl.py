"""``proxy_average`` in plain torch, one chunk of queries at a time."""

import torch
import torch.nn.functional as F

from ..budget import row_chunks, rows_within
from ..precision import operand, product


def proxy_average(
    queries_AD: torch.Tensor,
    keys_ND: torch.Tensor,
    threshold_A: torch.Tensor,
    precision: str,
    memory_budget: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the public function; inputs are in the accumulator's dtype."""
    num_queries, width = queries_AD.shape
    proxy_AD = torch.empty_like(queries_AD)
    count_A = torch.empty(num_queries, dtype=torch.int64, device=keys_ND.device)
    keys_op = operand(keys_ND, precision)
    rows = rows_within(memory_budget, bytes_per_query(keys_ND.shape[0], width, keys_ND.element_size()))
    for chunk in row_chunks(num_queries, rows):
        proxy_AD[chunk], count_A[chunk] = average_chunk(
            queries_AD[chunk], keys_op, threshold_A[chunk], precision
        )
    return proxy_AD, count_A


def bytes_per_query(num_keys: int, width: int, element_size: int) -> int:
    """Bytes of temporaries that :func:`average_chunk` needs for one query."""
    return 2 * element_size * num_keys + 4 * element_size * width


def average_chunk(
    queries_CD: torch.Tensor, keys_op: torch.Tensor, threshold_C: torch.Tensor, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Proxies and counts of a chunk; `keys_op` is the :func:`operand` of the keys."""
    selected_CN = product(operand(queries_CD, precision), keys_op.T).gt_(threshold_C[:, None])
    # A sum of ones is exact in float32 up to 2^24, and many times faster than counting.
    exact = keys_op.shape[0] <= 2**24
    count_C = selected_CN.sum(dim=1).long() if exact else torch.count_nonzero(selected_CN, dim=1)
    # A mask is exact in every operand type.
    sum_CD = product(selected_CN.to(keys_op.dtype), keys_op)
    return F.normalize(sum_CD, dim=1), count_C
