"""``relation_masks``: positive and kept sets of every anchor, packed to bits (Eq. 1, 6, 7).

A backend is a module ``*_impl.py`` with

- ``prepare(keys, precision)``, whose result serves ``proxy_average`` too,
- ``chunk_rows(keys, precision, memory_budget)``,
- ``chunk(keys, precision, queries, self_index)``: :class:`Sets` in its own form, and numbers of kept patches,
- ``to_words`` and ``from_words``, from that form to the public one and back.

The loop over chunks is :func:`count_sets`.
"""

from types import ModuleType
from typing import Any

import torch

from .. import dispatch
from ..budget import DEFAULT_BUDGET, row_chunks
from ..checks import check_anchors, check_budget, check_rows, check_vector, require
from ..guards import guard
from ..masks import PackedMasks, num_words
from ..plain_products import computing_on
from ..precision import accumulator, resolve_precision
from .sets import Queries, Sets

__all__ = ["Queries", "Sets", "count_sets", "relation_masks"]


def relation_masks(
    pos_queries: torch.Tensor,
    phi: torch.Tensor,
    keys: torch.Tensor,
    psi: torch.Tensor,
    self_index: torch.Tensor,
    neg_queries: torch.Tensor | None = None,
    *,
    precision: str = "auto",
    memory_budget: int = DEFAULT_BUDGET,
    impl: str | None = None,
) -> tuple[PackedMasks, torch.Tensor, torch.Tensor]:
    """Positives (similarity above phi) and kept patches (positive, or similarity below psi) of every anchor.

    Both comparisons are strict: a patch on a threshold is ambiguous and in neither set (Eq. 6, 7 as
    published). The anchor itself is in neither. Not differentiable.

    Args:
        pos_queries: (A, D) floating, rows of unit norm or zero; decide the positives.
        phi: (A,) floating, threshold of the positives [cosine].
        keys: (N, D) floating, rows of unit norm or zero.
        psi: (A,) floating, threshold of the negatives [cosine]; inf keeps every patch. It may exceed phi.
        self_index: (A,) int64, row of each anchor among the keys.
        neg_queries: (A, D), decide the negatives; None = pos_queries.
        precision, memory_budget, impl: as in :func:`ppap.kernels.proxy_average`. The packed result is not a
            temporary.

    Returns:
        masks: :class:`PackedMasks`, 2 bits per anchor and key.
        num_positives: (A,) int64.
        num_kept: (A,) int64, positives included.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on CPUs also non-finite values and anchors out of
            range.
        RuntimeError: the backend asked for is not available.
    """
    op = "relation_masks"
    check_rows(op, "keys", keys)
    check_rows(op, "pos_queries", pos_queries, columns=keys.shape[1])
    check_vector(op, "phi", phi, pos_queries.shape[0])
    check_vector(op, "psi", psi, pos_queries.shape[0])
    check_anchors(op, self_index)
    require(
        self_index.shape[0] == pos_queries.shape[0],
        f"{op}: {self_index.shape[0]} self_index for {pos_queries.shape[0]} queries; give one each",
    )
    if neg_queries is not None:
        check_rows(op, "neg_queries", neg_queries, columns=keys.shape[1], rows=pos_queries.shape[0])
        neg_queries = neg_queries.detach()
    tensors = [pos_queries, phi, keys, psi, self_index] + ([] if neg_queries is None else [neg_queries])
    backend = dispatch.choose(impl, *tensors)
    precision = resolve_precision(precision, pos_queries, keys)
    budget = check_budget(op, memory_budget)
    positive, kept, num_positives, num_kept = _relation_masks(
        pos_queries.detach(),
        phi.detach(),
        keys.detach(),
        psi.detach(),
        self_index,
        neg_queries,
        precision,
        budget,
        backend,
    )
    return PackedMasks(positive, kept, self_index), num_positives, num_kept


def count_sets(
    impl: ModuleType,
    keys: Any,
    precision: str,
    queries: Queries,
    self_index_A: torch.Tensor,
    memory_budget: int,
    words: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of positives and of kept patches (A,) int64 of all anchors, formed chunk by chunk.

    Args:
        impl: implementation of ``relation_masks``.
        keys: what its ``prepare`` made of the keys (N, D).
        precision: ``fp64 | fp32 | fp16 | bf16``.
        queries: of the anchors, in the accumulator's dtype.
        self_index_A: int64, row of each anchor among the keys.
        memory_budget: [bytes].
        words: (A, W) int32 twice, where the sets are written, or None: they are only counted.
    """
    num_positive_A, num_kept_A = torch.zeros_like(self_index_A), torch.zeros_like(self_index_A)
    count = self_index_A.shape[0]
    for part in row_chunks(count, impl.chunk_rows(keys, precision, memory_budget) if count else 1):
        sets, num_kept_A[part] = impl.chunk(keys, precision, queries.take(part), self_index_A[part])
        num_positive_A[part] = sets.num_positive
        if words is not None:
            impl.to_words(sets, words[0][part], words[1][part])
        del sets  # before the next chunk's are made
    return num_positive_A, num_kept_A


@torch.library.custom_op("ppap::relation_masks", mutates_args=())
def _relation_masks(
    pos_queries: torch.Tensor,
    phi: torch.Tensor,
    keys: torch.Tensor,
    psi: torch.Tensor,
    self_index: torch.Tensor,
    neg_queries: torch.Tensor | None,
    precision: str,
    memory_budget: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    values = {"pos_queries": pos_queries, "keys": keys, "phi": phi.nan_to_num(float("nan"))}
    values |= {"psi": psi.nan_to_num(float("nan"))} | (
        {} if neg_queries is None else {"neg_queries": neg_queries}
    )
    factor = guard(values, self_index, keys.shape[0])
    dtype, shape = accumulator(precision), (pos_queries.shape[0], num_words(keys.shape[0]))
    negative = None if neg_queries is None else neg_queries.to(dtype)
    positive, kept = (torch.empty(shape, dtype=torch.int32, device=keys.device) for _ in range(2))
    impl = dispatch.load("relation_masks", backend)
    num_positives, num_kept = torch.zeros_like(self_index), torch.zeros_like(self_index)
    with computing_on(keys.device):
        if keys.shape[0]:
            queries = Queries(pos_queries.to(dtype), phi.to(dtype), negative, psi.to(dtype))
            prepared, words = impl.prepare(keys.to(dtype), precision), (positive, kept)
            num_positives, num_kept = count_sets(
                impl, prepared, precision, queries, self_index, memory_budget, words
            )
    if factor is not None:
        # Integers cannot be NaN; a count of -1 is as impossible and as visible.
        bad = factor.isnan()
        num_positives, num_kept = num_positives.masked_fill(bad, -1), num_kept.masked_fill(bad, -1)
    return positive, kept, num_positives, num_kept


@_relation_masks.register_fake
def _(
    pos_queries: torch.Tensor,
    phi: torch.Tensor,
    keys: torch.Tensor,
    psi: torch.Tensor,
    self_index: torch.Tensor,
    neg_queries: torch.Tensor | None,
    precision: str,
    memory_budget: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, words = pos_queries.shape[0], num_words(keys.shape[0])
    packed = [pos_queries.new_empty((rows, words), dtype=torch.int32) for _ in range(2)]
    counts = [pos_queries.new_empty(rows, dtype=torch.int64) for _ in range(2)]
    return packed[0], packed[1], counts[0], counts[1]
