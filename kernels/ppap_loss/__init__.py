"""``ppap_loss``: propagation and contrastive loss in one pass, the form for training (Eq. 1-8)."""

import torch

from .. import dispatch
from ..budget import DEFAULT_BUDGET
from ..checks import check_anchors, check_budget, check_positive, check_rows, require
from ..contrastive import contrastive_loss
from ..guards import refuse_on_cpu
from ..masked_log_softmax import no_context, refuse_second_derivative
from ..plain_products import computing_on
from ..precision import accumulator, resolve_precision
from ..propagation import PropagationConfig, all_rows, propagate
from .guarded import Result, Settings, group_mean, guarded

__all__ = ["Result", "group_mean", "ppap_loss"]


def ppap_loss(
    features: torch.Tensor,
    z: torch.Tensor,
    anchors: torch.Tensor | None,
    cfg: PropagationConfig,
    *,
    temperature: float,
    base_temperature: float = 0.07,
    reduction: str = "mean",
    group_size: int | None = None,
    precision: str = "auto",
    memory_budget: int = DEFAULT_BUDGET,
    impl: str | None = None,
    return_counts: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """PPAP loss of a batch of patches: propagate (Eq. 1-7), contrast (Eq. 8), chunk by chunk.

    With ``mean`` the gradient is formed in the forward pass, where the masks and logits are at hand, and only
    scaled in the backward pass; ``none`` recomputes them. Every reduction is multiplied by temperature /
    base_temperature.

    Args:
        features: (N, D) floating guidance, normalised inside; never receives a gradient.
        z: (N, E) floating embeddings, used as given (not normalised); differentiable once.
        anchors: (A,) int64 rows, unique and in range; None = every row.
        cfg: settings of the propagation.
        temperature: divides the logits, above 0.
        base_temperature: see above, above 0.
        reduction: ``mean`` over the anchors that have positives, or ``none``: (A,) with 0 for those that have
            none.
        group_size: with ``mean``: the mean over groups of this many consecutive anchors of the mean in each
            group; a group without any positive counts as 0, the last group may be smaller. None = one group.
        precision: ``auto | fp32 | fp16 | bf16``.
        memory_budget: limit of all temporaries together [bytes], apart from O((N + A) (D + E)) of normalised
            inputs and gradient.
        impl: backend name; None = context, environment, ``auto``.
        return_counts: also return the sizes of the sets.

    Returns:
        The loss, float32 (float64 for float64 inputs): a scalar, or (A,) with ``none``. It is 0 if no anchor
        has a positive. With `return_counts`: (loss, num_positives, num_negatives), the counts (A,) int64.

    Raises:
        ValueError: shapes, dtypes, devices or settings do not fit; on CPUs also non-finite values and bad
            anchors.
        RuntimeError: the backend asked for is not available, or a second derivative is asked for.
    """
    op = "ppap_loss"
    check_rows(op, "features", features)
    require(features.shape[1] >= 1, f"{op}: features have no channels; give (N, D) with D >= 1")
    check_rows(op, "z", z, rows=features.shape[0])
    anchors = all_rows(features) if anchors is None else anchors
    check_anchors(op, anchors, features.shape[0])
    require(reduction in ("mean", "none"), f"{op}: reduction is {reduction!r}; valid: 'mean', 'none'")
    grouped = group_size is not None
    whole = not grouped or (isinstance(group_size, int) and group_size >= 1)
    require(whole, f"{op}: group_size is {group_size!r}; give a whole number, 1 or more, or None")
    require(
        not grouped or reduction == "mean", f"{op}: group_size goes with reduction='mean', not {reduction!r}"
    )
    tau = check_positive(op, "temperature", temperature)
    base = check_positive(op, "base_temperature", base_temperature)
    budget = check_budget(op, memory_budget)
    backend = dispatch.choose(impl, features, z, anchors)
    if reduction == "none":
        # One precision for both parts, decided by both inputs.
        resolved = resolve_precision(precision, features, z)
        if resolved == "fp64":
            features, z = features.double(), z.double()
        else:
            precision = resolved
        rel = propagate(features, anchors, cfg, precision=precision, memory_budget=budget, impl=backend)
        loss = contrastive_loss(
            z, rel, temperature=tau, precision=precision, memory_budget=budget, impl=backend
        )
        loss, counts = loss * (tau / base), (rel.num_positives, rel.num_negatives)
    else:
        loss, _, _, *counts = _ppap_loss(
            features.detach(),
            z,
            anchors,
            cfg.as_floats(),
            [tau, base],
            group_size or 0,
            torch.is_grad_enabled() and z.requires_grad,
            resolve_precision(precision, features, z),
            budget,
            backend,
        )
    return (loss, *counts) if return_counts else loss


@torch.library.custom_op("ppap::ppap_loss", mutates_args=())
def _ppap_loss(
    features: torch.Tensor,
    z: torch.Tensor,
    anchors: torch.Tensor,
    propagation: list[float],
    temperatures: list[float],
    group_size: int,
    with_gradient: bool,
    precision: str,
    memory_budget: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """:class:`Result`: dloss/dz = dz dz_scale; group_size 0 = one group."""
    count = max(anchors.shape[0], 1)
    group = min(group_size or count, count)
    cfg = PropagationConfig.from_floats(propagation)
    settings = Settings(cfg, *temperatures, group, with_gradient, precision, memory_budget)
    impl = dispatch.load("ppap_loss", backend)
    with computing_on(z.device):
        if hasattr(impl, "guarded_loss"):
            refuse_on_cpu({"features": features, "z": z}, anchors, features.shape[0])
            return impl.guarded_loss(features, z, anchors, settings)
        return guarded(impl.ppap_loss, features, z, anchors, settings)


@_ppap_loss.register_fake
def _(
    features,
    z,
    anchors,
    propagation,
    temperatures,
    group_size,
    with_gradient,
    precision,
    memory_budget,
    backend,
):
    dtype = accumulator(precision)
    dz = z.new_empty((z.shape[0] if with_gradient else 0, z.shape[1]), dtype=dtype)
    loss, scale = z.new_empty((), dtype=dtype), z.new_empty((), dtype=dtype)
    return loss, dz, scale, torch.empty_like(anchors), torch.empty_like(anchors)


@torch.library.custom_op("ppap::ppap_loss_backward", mutates_args=())
def _ppap_loss_backward(
    dloss: torch.Tensor, dz: torch.Tensor, dz_scale: torch.Tensor, z: torch.Tensor
) -> torch.Tensor:
    """The stored gradient times the incoming one, in z's dtype; z only marks whose gradient this is."""
    return (dz * (dz_scale * dloss)).to(z.dtype)


@_ppap_loss_backward.register_fake
def _(dloss, dz, dz_scale, z):
    return z.new_empty(z.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1], output[2], inputs[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, *_others):
    if dloss is None:
        return (None,) * 10
    return (None, _ppap_loss_backward(dloss, *ctx.saved_tensors)) + (None,) * 8


_ppap_loss.register_autograd(_backward, setup_context=_save)
_ppap_loss_backward.register_autograd(refuse_second_derivative, setup_context=no_context)
