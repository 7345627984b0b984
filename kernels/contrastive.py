"""``contrastive_loss``: Eq. 8 for given relations, masks rebuilt chunk by chunk on any backend."""

from collections.abc import Iterator

import torch

from . import dispatch
from .budget import DEFAULT_BUDGET, row_chunks, rows_within
from .checks import check_anchors, check_budget, check_positive, check_rows, require
from .guards import guard, in_range, nan_if_any, poison
from .masked_log_softmax import masked_log_softmax, no_context, refuse_second_derivative
from .masks import PackedMasks, num_words
from .plain_products import computing_on
from .precision import accumulator, resolve_precision
from .propagation import Relations


def contrastive_loss(
    z: torch.Tensor,
    rel: Relations | PackedMasks | tuple[torch.Tensor, torch.Tensor],
    *,
    temperature: float,
    precision: str = "auto",
    memory_budget: int = DEFAULT_BUDGET,
    impl: str | None = None,
) -> torch.Tensor:
    """Contrastive loss of every anchor (Eq. 8): -mean over positives of the log-softmax over kept patches.

    Differentiable once in `z`. The backward pass rebuilds masks and logits, so it is slower than that of
    :func:`ppap.kernels.ppap_loss` with a mean, which forms its gradient in the forward pass.

    Args:
        z: (N, E) floating embeddings, used as given (not normalised).
        rel: result of :func:`ppap.kernels.propagate`, or packed masks: :class:`PackedMasks`, or a pair
            (positive, kept) of int32 words when every patch is an anchor.
        temperature: divides the logits, above 0.
        precision: ``auto | fp32 | fp16 | bf16`` of the logits and the gradient (masks: that of `rel`).
        memory_budget: limit of all temporaries together [bytes], apart from O((A + N) E) of rounded operands
            and the gradient.
        impl: backend name; None = context, environment, ``auto``.

    Returns:
        (A,) float32 (float64 for float64 z); 0, with zero gradient, where an anchor has no positive.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on CPUs also non-finite embeddings.
        RuntimeError: the backend asked for is not available, or a second derivative is asked for.
    """
    op = "contrastive_loss"
    check_rows(op, "z", z)
    tau = check_positive(op, "temperature", temperature)
    budget = check_budget(op, memory_budget)
    if not isinstance(rel, Relations):
        return _loss_of_masks(z, rel, tau, precision, budget, impl)
    require(
        rel.features.shape[0] == z.shape[0],
        f"{op}: {z.shape[0]} rows of z for {rel.features.shape[0]} features",
    )
    backend = dispatch.choose(impl, z, rel.features)
    q = rel.queries()
    settings = [resolve_precision(precision, z), rel.precision]
    return _contrastive_loss(
        z,
        rel.features,
        rel.anchors,
        q.positive,
        q.phi,
        q.negative,
        q.psi,
        tau,
        settings[0],
        settings[1],
        budget,
        backend,
    )[0]


def _loss_of_masks(z, masks, temperature, precision, memory_budget, impl):
    anchors = masks[2] if len(masks) > 2 else None
    if anchors is None:
        rows = masks[0].shape[0]
        require(
            rows == z.shape[0],
            f"contrastive_loss: masks of {rows} anchors without their rows, for {z.shape[0]} patches; "
            "give PackedMasks(positive, kept, anchors)",
        )
        return masked_log_softmax(
            z,
            z,
            (masks[0], masks[1]),
            temperature,
            precision=precision,
            memory_budget=memory_budget,
            impl=impl,
        )
    check_anchors("contrastive_loss", anchors)
    guard({"z": z}, anchors, z.shape[0])  # on CPUs: names a bad anchor before it is used as an index
    return masked_log_softmax(
        z[anchors],
        z,
        (masks[0], masks[1]),
        temperature,
        precision=precision,
        memory_budget=memory_budget,
        impl=impl,
    )


@torch.library.custom_op("ppap::contrastive_loss", mutates_args=())
def _contrastive_loss(
    z: torch.Tensor,
    keys: torch.Tensor,
    anchors: torch.Tensor,
    pos_queries: torch.Tensor,
    phi: torch.Tensor,
    neg_queries: torch.Tensor | None,
    psi: torch.Tensor,
    temperature: float,
    precision: str,
    mask_precision: str,
    memory_budget: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and log-sum-exp of the kept logits, both (A,)."""
    # NaN proxies mean that the relations were already found bad on a device that raises nothing.
    factor = guard({"z": z, "pos_queries": pos_queries}, None, 0)
    dtype = accumulator(precision)
    z, anchors = z.to(dtype), in_range(anchors, z.shape[0])
    loss, lse = z.new_empty(anchors.shape[0]), z.new_empty(anchors.shape[0])
    impl = dispatch.load("masked_log_softmax", backend)
    relations = (keys, anchors, pos_queries, phi, neg_queries, psi, mask_precision)
    with computing_on(z.device):
        for chunk, positive, kept in _mask_chunks(relations, memory_budget, backend):
            loss[chunk], lse[chunk] = impl.masked_log_softmax(
                z[anchors[chunk]], z, positive, kept, temperature, precision, memory_budget // 2
            )
    poison(factor, loss, lse)
    return loss, lse


@_contrastive_loss.register_fake
def _(
    z, keys, anchors, pos_q, phi, neg_q, psi, temperature, precision, mask_precision, memory_budget, backend
):
    rows, dtype = anchors.shape[0], accumulator(precision)
    return z.new_empty(rows, dtype=dtype), z.new_empty(rows, dtype=dtype)


@torch.library.custom_op("ppap::contrastive_loss_backward", mutates_args=())
def _contrastive_loss_backward(
    dloss: torch.Tensor,
    lse: torch.Tensor,
    z: torch.Tensor,
    keys: torch.Tensor,
    anchors: torch.Tensor,
    pos_queries: torch.Tensor,
    phi: torch.Tensor,
    neg_queries: torch.Tensor | None,
    psi: torch.Tensor,
    temperature: float,
    precision: str,
    mask_precision: str,
    memory_budget: int,
    backend: str,
) -> torch.Tensor:
    dtype = accumulator(precision)
    values, anchors = z.to(dtype), in_range(anchors, z.shape[0])
    dz, dloss = torch.zeros_like(values), dloss.to(dtype)
    impl = dispatch.load("masked_log_softmax", backend)
    relations = (keys, anchors, pos_queries, phi, neg_queries, psi, mask_precision)
    with computing_on(z.device):
        for chunk, positive, kept in _mask_chunks(relations, memory_budget, backend):
            rows = anchors[chunk]
            dz_anchors, dz_all = impl.masked_log_softmax_backward(
                dloss[chunk],
                values[rows],
                values,
                positive,
                kept,
                lse[chunk],
                temperature,
                precision,
                memory_budget // 2,
            )
            dz += dz_all
            dz[rows] += dz_anchors
    poison(nan_if_any(lse), dz)
    return dz.to(z.dtype)


@_contrastive_loss_backward.register_fake
def _(
    dloss,
    lse,
    z,
    keys,
    anchors,
    pos_q,
    phi,
    neg_q,
    psi,
    temperature,
    precision,
    mask_precision,
    budget,
    backend,
):
    return z.new_empty(z.shape)


def _mask_chunks(relations: tuple, memory_budget: int, backend: str) -> Iterator[tuple]:
    """(slice of anchors, positive words, kept words) of all anchors; masks take half of the budget."""
    keys, anchors, pos_queries, phi, neg_queries, psi, mask_precision = relations
    impl = dispatch.load("relation_masks", backend)
    rows = rows_within(memory_budget // 2, 8 * num_words(keys.shape[0]))
    for chunk in row_chunks(anchors.shape[0], rows):
        negative = None if neg_queries is None else neg_queries[chunk]
        positive, kept, _, _ = impl.relation_masks(
            pos_queries[chunk],
            phi[chunk],
            keys,
            psi[chunk],
            anchors[chunk],
            negative,
            mask_precision,
            memory_budget // 2,
        )
        yield chunk, positive, kept


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.temperature, ctx.precision, ctx.mask_precision, ctx.budget, ctx.backend = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, _dlse):
    if dloss is None:
        return (None,) * 12
    settings = (ctx.temperature, ctx.precision, ctx.mask_precision, ctx.budget, ctx.backend)
    return (_contrastive_loss_backward(dloss, *ctx.saved_tensors, *settings),) + (None,) * 11


_contrastive_loss.register_autograd(_backward, setup_context=_save)
_contrastive_loss_backward.register_autograd(refuse_second_derivative, setup_context=no_context)
