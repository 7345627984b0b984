"""``proxy_average``: move queries to the mean of the keys above their thresholds (Eq. 2 and 4)."""

import torch

from .. import dispatch
from ..budget import DEFAULT_BUDGET
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
    return _proxy_average(queries.detach(), keys.detach(), threshold.detach(), precision, budget, backend)


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
    with computing_on(keys.device):
        proxy, count = dispatch.load("proxy_average", backend).proxy_average(
            queries.to(dtype), keys.to(dtype), threshold.to(dtype), precision, memory_budget
        )
    poison(factor, proxy)
    return proxy, count


@_proxy_average.register_fake
def _(queries, keys, threshold, precision, memory_budget, backend):
    proxy = queries.new_empty(queries.shape, dtype=accumulator(precision))
    return proxy, queries.new_empty(queries.shape[0], dtype=torch.int64)
