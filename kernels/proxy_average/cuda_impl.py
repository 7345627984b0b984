"""``proxy_average`` in the CUDA library (``csrc/cuda/proxy_average.cu``): sums of selected keys."""

import torch
import torch.nn.functional as F

from .. import native_cuda as cuda
from ..budget import rows_within
from ..precision import accumulator, normalise
from ..relation_masks.cuda_impl import similarity

# Parts of the patches that are summed apart and added in order.
_PARTS = 8

# Keys as the library reads them.
prepare = cuda.Operand.of


def prepare_features(features_ND: torch.Tensor, precision: str) -> cuda.Operand:
    """Features divided by their norms, as keys."""
    return prepare(normalise(features_ND, accumulator(precision)), precision)


def chunk_rows(keys: cuda.Operand, precision: str, memory_budget: int) -> int:
    """Queries per chunk."""
    return rows_within(memory_budget, bytes_per_query(*keys.values.shape))


def bytes_per_query(num_keys: int, width: int) -> int:
    """Bytes of temporaries of :func:`chunk` for one query: a bit a key, queries, parts of sums."""
    return num_keys // 8 + 1 + 64 * width + 128


def chunk(
    keys: cuda.Operand, precision: str, queries_CD: torch.Tensor, threshold_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Proxies (C, D) and counts (C,) of some queries."""
    sum_CD, count_C = sums(keys, precision, queries_CD, threshold_C)
    return F.normalize(sum_CD, dim=1), count_C


def sums(
    keys: cuda.Operand, precision: str, queries_CD: torch.Tensor, threshold_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums (C, D) of the selected keys and their counts (C,)."""
    rows, (patches, width) = queries_CD.shape[0], keys.values.shape
    bits = cuda.empty_bits(patches, rows, queries_CD.device)
    count_C, _ = similarity(cuda.Operand.of(queries_CD, precision), keys, precision, bits, phi_C=threshold_C)
    parts = torch.empty((_PARTS, rows, width), device=bits.device)
    cuda.call("proxy_average", bits, bits.shape[1], rows, keys.values, patches, width, _PARTS, parts)
    return parts.sum(dim=0) * keys.unit, count_C
