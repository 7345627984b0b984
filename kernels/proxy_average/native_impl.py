"""``proxy_average`` in the native CPU library (``csrc/cpu/proxy_average.inc``): sums of selected keys."""

import torch
import torch.nn.functional as F

from .. import native
from ..precision import operand
from ..relation_masks.native_impl import similarity

_Arguments = native.structure("positive keys key_scale key_pairs sums", "C N D stride")

# Keys as the library reads them, and features divided by their norms as such.
prepare, prepare_features = native.Keys.of, native.Keys.normalised


def chunk_rows(keys: native.Keys, precision: str, memory_budget: int) -> int:
    """Queries per chunk."""
    return native.chunk_rows(memory_budget, bytes_per_query(*keys.values.shape))


def bytes_per_query(num_keys: int, width: int) -> int:
    """Bytes of temporaries of :func:`chunk` for one query: a bit a key, queries, sums."""
    return num_keys // 8 + 1 + native.tile_bytes(num_keys, width) + 20 * width + 64


def chunk(
    keys: native.Keys, precision: str, queries_CD: torch.Tensor, threshold_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Proxies (C, D) and counts (C,) of some queries."""
    sum_CD, count_C = sums(keys, precision, queries_CD, threshold_C)
    return F.normalize(sum_CD, dim=1), count_C


def sums(
    keys: native.Keys, precision: str, queries_CD: torch.Tensor, threshold_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums (C, D) of the selected keys and their counts (C,)."""
    (rows, width), patches = queries_CD.shape, keys.values.shape[0]
    bits, sum_CD = native.empty_bits(patches, rows), torch.empty((rows, width))
    count_C, _ = similarity(operand(queries_CD, precision), keys, bits, phi_C=threshold_C.contiguous())
    native.run(
        "proxy_average",
        _Arguments,
        positive=bits,
        keys=keys.values,
        key_scale=keys.scale,
        key_pairs=keys.pairs if keys.bf16 else None,
        sums=sum_CD,
        C=rows,
        N=patches,
        D=width,
        stride=native.stride(rows),
    )
    return sum_CD, count_C
