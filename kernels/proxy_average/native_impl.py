"""``proxy_average`` in the native CPU library: selected keys as bits, then sums from a list per anchor."""

import torch
import torch.nn.functional as F

from .. import native
from ..budget import row_chunks
from ..precision import operand
from ..relation_masks.native_impl import similarity

_Arguments = native.structure("positive keys key_scale sums", "C N D stride")


def average_chunk(
    queries_CD: torch.Tensor, keys: native.Keys, threshold_C: torch.Tensor, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Proxies (C, D) and counts (C,) of some queries."""
    (rows, width), patches = queries_CD.shape, keys.values.shape[0]
    bits = native.empty_bits(patches, rows)
    queries_CD = operand(queries_CD, precision)
    count_C, _ = similarity(queries_CD, keys, bits, phi_C=threshold_C.contiguous())
    sum_CD = torch.empty((rows, width))
    sizes = {"C": rows, "N": patches, "D": width, "stride": native.stride(rows)}
    tensors = {"positive": bits, "keys": keys.values, "key_scale": keys.scale, "sums": sum_CD}
    native.run("mask_sum", _Arguments, **tensors, **sizes)
    return F.normalize(sum_CD, dim=1), count_C


def bytes_per_query(num_keys: int, width: int) -> int:
    """Bytes of temporaries of :func:`average_chunk` for one query: a bit a key, queries, sums."""
    return num_keys // 8 + 1 + native.tile_bytes(num_keys, width) + 20 * width + 64


def proxy_average(
    queries_AD: torch.Tensor,
    keys_ND: torch.Tensor,
    threshold_A: torch.Tensor,
    precision: str,
    memory_budget: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the public function; inputs are float32."""
    (num_queries, width), num_keys = queries_AD.shape, keys_ND.shape[0]
    proxy_AD, count_A = torch.empty((num_queries, width)), torch.empty(num_queries, dtype=torch.int64)
    keys = native.Keys.of(keys_ND, precision)
    for chunk in row_chunks(num_queries, native.chunk_rows(memory_budget, bytes_per_query(num_keys, width))):
        proxy_AD[chunk], count_A[chunk] = average_chunk(
            queries_AD[chunk], keys, threshold_A[chunk], precision
        )
    return proxy_AD, count_A
