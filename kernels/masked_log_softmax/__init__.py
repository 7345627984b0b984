"""``masked_log_softmax``: the contrastive loss of every anchor over its packed sets (Eq. 8)."""

from functools import partial
from types import ModuleType
from typing import Any, NoReturn

import torch

from .. import dispatch
from ..budget import DEFAULT_BUDGET
from ..checks import check_budget, check_positive, check_rows, require
from ..guards import guard, nan_if_any, poison
from ..masks import PackedMasks, num_words
from ..plain_products import computing_on
from ..precision import accumulator, resolve_precision
from ..relation_masks.sets import Sets
from .chunks import Settings, gradients, losses


def masked_log_softmax(
    z_anchors: torch.Tensor,
    z: torch.Tensor,
    masks: PackedMasks | tuple[torch.Tensor, torch.Tensor],
    temperature: float,
    *,
    precision: str = "auto",
    memory_budget: int = DEFAULT_BUDGET,
    impl: str | None = None,
) -> torch.Tensor:
    """Loss of every anchor: minus the mean over its positives of the log-softmax over kept patches (Eq. 8).

    Differentiable once in both embeddings; the backward pass recomputes the logits.

    Args:
        z_anchors: (A, E) floating, used as given (not normalised).
        z: (N, E) floating, used as given.
        masks: positives and kept patches, packed as in :func:`ppap.kernels.pack_masks`; kept contains the
            positives.
        temperature: divides the logits, above 0.
        precision, memory_budget, impl: as in :func:`ppap.kernels.proxy_average`; the backward pass uses them
            too.

    Returns:
        (A,) float32 (float64 for float64 inputs); 0, with zero gradient, where an anchor has no positive.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on CPUs also non-finite values.
        RuntimeError: the backend asked for is not available, or a second derivative is asked for.
    """
    op = "masked_log_softmax"
    check_rows(op, "z", z)
    check_rows(op, "z_anchors", z_anchors, columns=z.shape[1])
    positive, kept = masks[0], masks[1]
    for name, words in (("positive", positive), ("kept", kept)):
        shape = (z_anchors.shape[0], num_words(z.shape[0]))
        fits = words.dtype == torch.int32 and tuple(words.shape) == shape
        require(
            fits, f"{op}: {name} masks are {words.dtype} of shape {tuple(words.shape)}; give int32 {shape}"
        )
    backend = dispatch.choose(impl, z_anchors, z, positive, kept)
    precision = resolve_precision(precision, z_anchors, z)
    budget = check_budget(op, memory_budget)
    tau = check_positive(op, "temperature", temperature)
    loss: torch.Tensor
    loss, _ = _masked_log_softmax(z_anchors, z, positive, kept, tau, precision, budget, backend)
    return loss


def _sets(
    impl: ModuleType, positive_AW: torch.Tensor, kept_AW: torch.Tensor, z_NE: torch.Tensor, part: slice
) -> Sets[Any]:
    """The sets of some anchors in the form of a backend."""
    sets: Sets[Any] = impl.from_words(positive_AW[part], kept_AW[part], z_NE.shape[0])
    return sets


@torch.library.custom_op("ppap::masked_log_softmax", mutates_args=())
def _masked_log_softmax(
    z_anchors: torch.Tensor,
    z: torch.Tensor,
    positive: torch.Tensor,
    kept: torch.Tensor,
    temperature: float,
    precision: str,
    memory_budget: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and log-sum-exp of the kept logits, both (A,); the latter is for the backend's own backward."""
    factor = guard({"z_anchors": z_anchors, "z": z}, None, 0)
    dtype, settings = accumulator(precision), Settings(temperature, precision, memory_budget)
    impl, z_NE = dispatch.load("masked_log_softmax", backend), z.to(dtype)

    with computing_on(z.device):
        rows = impl.chunk_rows(z_NE, settings, with_gradient=False)
        loss, lse = losses(
            impl, z_anchors.to(dtype), z_NE, settings, rows, partial(_sets, impl, positive, kept, z)
        )
    poison(factor, loss, lse)
    return loss, lse


@_masked_log_softmax.register_fake
def _(
    z_anchors: torch.Tensor,
    z: torch.Tensor,
    positive: torch.Tensor,
    kept: torch.Tensor,
    temperature: float,
    precision: str,
    memory_budget: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, dtype = z_anchors.shape[0], accumulator(precision)
    return z.new_empty(rows, dtype=dtype), z.new_empty(rows, dtype=dtype)


@torch.library.custom_op("ppap::masked_log_softmax_backward", mutates_args=())
def _masked_log_softmax_backward(
    dloss: torch.Tensor,
    z_anchors: torch.Tensor,
    z: torch.Tensor,
    positive: torch.Tensor,
    kept: torch.Tensor,
    lse: torch.Tensor,
    temperature: float,
    precision: str,
    memory_budget: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype, settings = accumulator(precision), Settings(temperature, precision, memory_budget)
    impl, z_NE = dispatch.load("masked_log_softmax", backend), z.to(dtype)

    with computing_on(z.device):
        rows = impl.chunk_rows(z_NE, settings, with_gradient=True)
        dz_anchors, dz = gradients(
            impl,
            dloss.to(dtype),
            lse,
            z_anchors.to(dtype),
            z_NE,
            settings,
            rows,
            partial(_sets, impl, positive, kept, z),
        )
    poison(nan_if_any(lse), dz_anchors, dz)
    return dz_anchors.to(z_anchors.dtype), dz.to(z.dtype)


@_masked_log_softmax_backward.register_fake
def _(
    dloss: torch.Tensor,
    z_anchors: torch.Tensor,
    z: torch.Tensor,
    positive: torch.Tensor,
    kept: torch.Tensor,
    lse: torch.Tensor,
    temperature: float,
    precision: str,
    memory_budget: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return z_anchors.new_empty(z_anchors.shape), z.new_empty(z.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    z_anchors, z, positive, kept, *ctx.settings = inputs
    ctx.save_for_backward(z_anchors, z, positive, kept, output[1])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dloss: torch.Tensor | None, *_others: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if dloss is None:
        return (None,) * 8
    dz_anchors, dz = _masked_log_softmax_backward(dloss, *ctx.saved_tensors, *ctx.settings)
    return (dz_anchors, dz) + (None,) * 6


def refuse_second_derivative(ctx: Any, *grads: torch.Tensor | None) -> NoReturn:
    """Backward of a backward op: there is none."""
    raise RuntimeError(
        "ppap losses are differentiable once; a second derivative (create_graph) is not supported"
    )


def no_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Nothing is saved for a derivative that does not exist."""


_masked_log_softmax.register_autograd(_backward, setup_context=_save)
_masked_log_softmax_backward.register_autograd(refuse_second_derivative, setup_context=no_context)
