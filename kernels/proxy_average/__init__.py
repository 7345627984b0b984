"""``proxy_average``: move queries to the mean of the keys above their thresholds (Eq. 2 and 4).

A backend is a module ``*_impl.py`` with

- ``prepare(keys, precision)``, whose result serves ``relation_masks`` too,
- ``prepare_features(features, precision)``, which normalises first,
- ``chunk_rows(keys, precision, memory_budget)``,
- ``chunk(keys, precision, queries, thresholds)``,
- ``sums``, the same before the normalisation: sums over parts of the keys add up.

The loop over chunks is :func:`move`.
"""

from types import ModuleType
from typing import Any

import torch

from .. import dispatch
from ..budget import DEFAULT_BUDGET, row_chunks
from ..checks import check_budget, check_rows, check_vector
from ..guards import guard, poison
from ..plain_products import computing_on
from ..precision import accumulator, resolve_precision


def proxy_average(
    queries: torch.Tensor,
    keys: torch.Tensor,
    threshold: torch.Tensor,
    *,
    precision: str = "auto",
    memory_budget: int = DEFAULT_BUDGET,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of the keys whose similarity to the query is above its threshold, L2-normalised (paper Eq. 2, 4).

    Not differentiable: proxies come from frozen features.

    Args:
        queries: (A, D) floating, rows of unit norm (or zero).
        keys: (N, D) floating, rows of unit norm (or zero).
        threshold: (A,) floating; a key on its threshold is not selected.
        precision: ``auto | fp32 | fp16 | bf16``, see the README.
        memory_budget: limit of all temporaries together [bytes], apart from O((A + N) D) of rounded operands.
        impl: backend name; None = context, environment, ``auto``.

    Returns:
        proxy: (A, D) float32 (float64 for float64 inputs); the zero vector where no key is selected.
        count: (A,) int64, number of selected keys.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on CPUs also non-finite values.
        RuntimeError: the backend asked for is not available.
    """
    check_rows("proxy_average", "keys", keys)
    check_rows("proxy_average", "queries", queries, columns=keys.shape[1])
    check_vector("proxy_average", "threshold", threshold, queries.shape[0])
    backend = dispatch.choose(impl, queries, keys, threshold)
    precision = resolve_precision(precision, queries, keys)
    budget = check_budget("proxy_average", memory_budget)
    tensors = (queries.detach(), keys.detach(), threshold.detach())
    proxy, count = _proxy_average(*tensors, precision, budget, backend)
    return proxy, count


def move(
    impl: ModuleType,
    keys: Any,
    precision: str,
    memory_budget: int,
    queries_AD: torch.Tensor,
    threshold_A: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Proxies (A, D) and counts (A,) int64 of all queries, chunk by chunk.

    Args:
        impl: implementation of ``proxy_average``.
        keys: what its ``prepare`` made of the keys (N, D), one at least.
        precision: ``fp64 | fp32 | fp16 | bf16``.
        memory_budget: [bytes].
        queries_AD: in the accumulator's dtype.
        threshold_A: in the accumulator's dtype.
    """
    proxy_AD, count = torch.empty_like(queries_AD), queries_AD.shape[0]
    count_A = torch.empty(count, dtype=torch.int64, device=queries_AD.device)
    for part in row_chunks(count, impl.chunk_rows(keys, precision, memory_budget) if count else 1):
        proxy_AD[part], count_A[part] = impl.chunk(keys, precision, queries_AD[part], threshold_A[part])
    return proxy_AD, count_A


@torch.library.custom_op("ppap::proxy_average", mutates_args=())
def _proxy_average(
    queries: torch.Tensor,
    keys: torch.Tensor,
    threshold: torch.Tensor,
    precision: str,
    memory_budget: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    # A threshold may be infinite (every key, no key) but not NaN: then no comparison would ever hold.
    factor = guard(
        {"queries": queries, "keys": keys, "threshold": threshold.nan_to_num(float("nan"))}, None, 0
    )
    dtype = accumulator(precision)
    impl = dispatch.load("proxy_average", backend)
    proxy = queries.new_zeros(queries.shape, dtype=dtype)
    count = queries.new_zeros(queries.shape[0], dtype=torch.int64)
    with computing_on(keys.device):
        if keys.shape[0]:
            prepared = impl.prepare(keys.to(dtype), precision)
            proxy, count = move(
                impl, prepared, precision, memory_budget, queries.to(dtype), threshold.to(dtype)
            )
    poison(factor, proxy)
    return proxy, count


@_proxy_average.register_fake
def _(
    queries: torch.Tensor,
    keys: torch.Tensor,
    threshold: torch.Tensor,
    precision: str,
    memory_budget: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    proxy = queries.new_empty(queries.shape, dtype=accumulator(precision))
    return proxy, queries.new_empty(queries.shape[0], dtype=torch.int64)
