"""``contrastive_loss``: Eq. 8 for given relations, the sets formed chunk by chunk on any backend."""

from functools import partial
from types import ModuleType
from typing import Any

import torch

from .. import dispatch
from ..budget import DEFAULT_BUDGET
from ..checks import check_anchors, check_budget, check_positive, check_rows, require
from ..guards import guard, in_range, nan_if_any, poison
from ..masked_log_softmax import masked_log_softmax, no_context, refuse_second_derivative
from ..masked_log_softmax.chunks import SetsOf, Settings, gradients, losses
from ..masks import PackedMasks
from ..plain_products import computing_on
from ..precision import accumulator, resolve_precision
from ..propagate import Relations
from ..relation_masks import Queries, Sets


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
    loss: torch.Tensor
    loss, _ = _contrastive_loss(
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
    )
    return loss


def _loss_of_masks(
    z: torch.Tensor,
    masks: PackedMasks | tuple[torch.Tensor, torch.Tensor],
    temperature: float,
    precision: str,
    memory_budget: int,
    impl: str | None,
) -> torch.Tensor:
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
    q, settings = Queries(pos_queries, phi, neg_queries, psi), Settings(temperature, precision, memory_budget)
    with computing_on(z.device):
        impl, settings, rows, sets_of = _parts(keys, anchors, q, mask_precision, z, settings, backend, False)
        loss, lse = losses(impl, z[anchors], z, settings, rows, sets_of)
    poison(factor, loss, lse)
    return loss, lse


@_contrastive_loss.register_fake
def _(
    z: torch.Tensor,
    keys: torch.Tensor,
    anchors: torch.Tensor,
    pos_q: torch.Tensor,
    phi: torch.Tensor,
    neg_q: torch.Tensor | None,
    psi: torch.Tensor,
    temperature: float,
    precision: str,
    mask_precision: str,
    memory_budget: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
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
    q, settings = Queries(pos_queries, phi, neg_queries, psi), Settings(temperature, precision, memory_budget)
    with computing_on(z.device):
        impl, settings, rows, sets_of = _parts(
            keys, anchors, q, mask_precision, values, settings, backend, True
        )
        dz_anchors, dz = gradients(
            impl, dloss.to(dtype), lse, values[anchors], values, settings, rows, sets_of
        )
        dz[anchors] += dz_anchors
    poison(nan_if_any(lse), dz)
    return dz.to(z.dtype)


@_contrastive_loss_backward.register_fake
def _(
    dloss: torch.Tensor,
    lse: torch.Tensor,
    z: torch.Tensor,
    keys: torch.Tensor,
    anchors: torch.Tensor,
    pos_q: torch.Tensor,
    phi: torch.Tensor,
    neg_q: torch.Tensor | None,
    psi: torch.Tensor,
    temperature: float,
    precision: str,
    mask_precision: str,
    budget: int,
    backend: str,
) -> torch.Tensor:
    return z.new_empty(z.shape)


def _parts(
    keys: torch.Tensor,
    anchors_A: torch.Tensor,
    queries: Queries,
    mask_precision: str,
    z_NE: torch.Tensor,
    settings: Settings,
    backend: str,
    with_gradient: bool,
) -> tuple[ModuleType, Settings, int, SetsOf]:
    """What the loop over chunks takes: half of the budget is for sets, half for logits."""
    masking, impl = dispatch.load("relation_masks", backend), dispatch.load("masked_log_softmax", backend)
    half = settings.memory_budget // 2
    settings = settings._replace(memory_budget=half)
    prepared = masking.prepare(keys, mask_precision)
    rows = min(
        impl.chunk_rows(z_NE, settings, with_gradient),
        masking.chunk_rows(prepared, mask_precision, half),
    )
    return impl, settings, rows, partial(_sets, masking, prepared, mask_precision, queries, anchors_A)


def _sets(
    masking: ModuleType, keys: Any, precision: str, queries: Queries, anchors_A: torch.Tensor, part: slice
) -> Sets[Any]:
    """The sets of some anchors."""
    sets: Sets[Any] = masking.chunk(keys, precision, queries.take(part), anchors_A[part])[0]
    return sets


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.temperature, ctx.precision, ctx.mask_precision, ctx.budget, ctx.backend = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dloss: torch.Tensor | None, *_others: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if dloss is None:
        return (None,) * 12
    settings = (ctx.temperature, ctx.precision, ctx.mask_precision, ctx.budget, ctx.backend)
    return (_contrastive_loss_backward(dloss, *ctx.saved_tensors, *settings),) + (None,) * 11


_contrastive_loss.register_autograd(_backward, setup_context=_save)
_contrastive_loss_backward.register_autograd(refuse_second_derivative, setup_context=no_context)
