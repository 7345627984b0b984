"""``proxy_average`` in plain torch: a similarity matrix of a chunk of queries."""

import torch
import torch.nn.functional as F

from ..budget import rows_within
from ..precision import accumulator, normalise, operand, product

# Keys as they enter the products.
prepare = operand


def prepare_features(features_ND: torch.Tensor, precision: str) -> torch.Tensor:
    """Features divided by their norms, as keys."""
    return prepare(normalise(features_ND, accumulator(precision)), precision)


def chunk_rows(keys_op: torch.Tensor, precision: str, memory_budget: int) -> int:
    """Queries per chunk."""
    size = accumulator(precision).itemsize
    return rows_within(memory_budget, bytes_per_query(keys_op.shape[0], keys_op.shape[1], size))


def bytes_per_query(num_keys: int, width: int, element_size: int) -> int:
    """Bytes of temporaries that :func:`chunk` needs for one query."""
    return 2 * element_size * num_keys + 4 * element_size * width


def chunk(
    keys_op: torch.Tensor, precision: str, queries_CD: torch.Tensor, threshold_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Proxies (C, D) and counts (C,) of some queries."""
    sum_CD, count_C = sums(keys_op, precision, queries_CD, threshold_C)
    return F.normalize(sum_CD, dim=1), count_C


def sums(
    keys_op: torch.Tensor, precision: str, queries_CD: torch.Tensor, threshold_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums (C, D) of the selected keys and their counts (C,)."""
    selected_CN = product(operand(queries_CD, precision), keys_op.T).gt_(threshold_C[:, None])
    # A sum of ones is exact in float32 up to 2^24, and many times faster than counting.
    exact = keys_op.shape[0] <= 2**24
    count_C = selected_CN.sum(dim=1).long() if exact else torch.count_nonzero(selected_CN, dim=1)
    # A mask is exact in every operand type.
    return product(selected_CN.to(keys_op.dtype), keys_op), count_C
