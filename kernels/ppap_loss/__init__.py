"""``ppap_loss``: propagation and contrastive loss in one pass, the form for training (Eq. 1-8).

From here it is one step to what calls the kernels. Most backends run :class:`Composition`, whose chunks call
``<op>/<backend>_impl.py`` of ``proxy_average``, ``relation_masks`` and ``masked_log_softmax``. Triton has a
form of its own, ``triton_impl.py``, whose chunks call ``<op>/triton_kernels.py``.
"""

from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from .. import dispatch
from ..budget import DEFAULT_BUDGET
from ..checks import check_anchors, check_budget, check_positive, check_rows, require
from ..contrastive_loss import contrastive_loss
from ..guards import guard, in_range, poison, refuse_on_cpu
from ..masked_log_softmax import chunks as softmax_chunks
from ..masked_log_softmax import no_context, refuse_second_derivative
from ..plain_products import computing_on
from ..precision import accumulator, normalise, resolve_precision
from ..propagate import PropagationConfig, all_rows, propagate, walk
from .chunks import chunked_loss, row_weights
from .settings import Result, Settings, group_mean

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Composition", "Result", "Settings", "composed_loss", "group_mean", "ppap_loss"]


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
    group: "ProcessGroup | None" = None,
    exchange: str = "auto",
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
        group: processes that each hold some of the patches, all of them calling at the same time; None = all
            patches are here. See below.
        exchange: how ranks see each other's patches: ``gather`` them all on every rank; ``ring``, in which
            they pass by a block at a time and no rank's memory grows with their number (``mean`` alone);
            ``auto``: gather while what is gathered fits into `memory_budget`.

    With a group the sets of every anchor range over the patches of all ranks, whose order is that of the
    ranks, and so do groups of anchors. `anchors` are rows of this rank's `features`; ranks may have different
    numbers of patches and anchors, or none. With ``mean`` every rank has the same loss, and the gradient of
    its own rows of it, remote anchors included: gradients of shared weights are *summed* over ranks, not
    averaged, and every rank must scale the loss alike before ``backward``. With ``none``, and for counts, a
    rank has those of its own anchors, and ``backward`` is a call that all ranks make.

    Returns:
        The loss, float32 (float64 for float64 inputs): a scalar, or (A,) with ``none``. It is 0 if no anchor
        has a positive. With `return_counts`: (loss, num_positives, num_negatives), the counts (A,) int64.

    Raises:
        ValueError: shapes, dtypes, devices or settings do not fit; on CPUs also non-finite values and bad
            anchors, on every rank of a group if one has them.
        RuntimeError: the backend asked for is not available, or a second derivative is asked for.
    """
    op = "ppap_loss"
    anchors = _check_inputs(op, features, z, anchors)
    _check_reduction(op, reduction, group_size)
    tau = check_positive(op, "temperature", temperature)
    base = check_positive(op, "base_temperature", base_temperature)
    budget = check_budget(op, memory_budget)
    backend = dispatch.choose(impl, features, z, anchors)
    if group is not None or exchange != "auto":
        from . import ranks  # torch.distributed, which is not in every build of torch

        ranks.check_exchange(exchange, reduction, group)
    if group is not None:
        wanted = torch.is_grad_enabled() and z.requires_grad
        settings = Settings(cfg, tau, base, 1, wanted, resolve_precision(precision, features, z), budget)
        one = partial(_one_process, backend)
        request = ranks.Request(settings, group_size, reduction, exchange, backend, one, _ppap_loss_backward)
        of_ranks = ranks.loss_of_ranks(group, features, z, anchors, request)
        return of_ranks if return_counts else of_ranks[0]
    if reduction == "none":
        settings = Settings(cfg, tau, base, 1, False, precision, budget)
        loss, positives, negatives = _of_anchors(features, z, anchors, settings, backend)
    else:
        loss, _, _, positives, negatives = _ppap_loss(
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
    return (loss, positives, negatives) if return_counts else loss


def _of_anchors(
    features: torch.Tensor, z: torch.Tensor, anchors: torch.Tensor, settings: Settings, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and sizes of the sets of every anchor, (A,) each."""
    cfg, precision, budget = settings.cfg, settings.precision, settings.memory_budget
    # One precision for both parts, decided by both inputs.
    resolved = resolve_precision(precision, features, z)
    if resolved == "fp64":
        features, z = features.double(), z.double()
    else:
        precision = resolved
    rel = propagate(features, anchors, cfg, precision=precision, memory_budget=budget, impl=backend)
    tau = settings.temperature
    loss = contrastive_loss(z, rel, temperature=tau, precision=precision, memory_budget=budget, impl=backend)
    return loss * (tau / settings.base_temperature), rel.num_positives, rel.num_negatives


def _check_inputs(
    op: str, features: torch.Tensor, z: torch.Tensor, anchors: torch.Tensor | None
) -> torch.Tensor:
    """Refuse tensors that do not fit; the anchors, all rows if none are given."""
    check_rows(op, "features", features)
    require(features.shape[1] >= 1, f"{op}: features have no channels; give (N, D) with D >= 1")
    check_rows(op, "z", z, rows=features.shape[0])
    anchors = all_rows(features) if anchors is None else anchors
    check_anchors(op, anchors, features.shape[0])
    return anchors


def _check_reduction(op: str, reduction: str, group_size: int | None) -> None:
    """Refuse an unknown reduction, and groups that do not go with it."""
    require(reduction in ("mean", "none"), f"{op}: reduction is {reduction!r}; valid: 'mean', 'none'")
    grouped = group_size is not None
    whole = not grouped or (isinstance(group_size, int) and group_size >= 1)
    require(whole, f"{op}: group_size is {group_size!r}; give a whole number, 1 or more, or None")
    require(
        not grouped or reduction == "mean", f"{op}: group_size goes with reduction='mean', not {reduction!r}"
    )


def _one_process(
    backend: str,
    features: torch.Tensor,
    z: torch.Tensor,
    anchors: torch.Tensor,
    group_size: int,
    settings: Settings,
) -> Result:
    """The registered op, as :mod:`.gathered` calls it."""
    found = _ppap_loss(
        features,
        z,
        anchors,
        settings.cfg.as_floats(),
        [settings.temperature, settings.base_temperature],
        group_size,
        settings.with_gradient,
        settings.precision,
        settings.memory_budget,
        backend,
    )
    return Result(*found)


@dataclass(frozen=True)
class Composition:
    """One call of the loss, composed of the three ops of a backend: what every chunk of anchors shares.

    Attributes:
        features_ND: as given.
        averaging: implementation of ``proxy_average``.
        masking: implementation of ``relation_masks``.
        contrasting: implementation of ``masked_log_softmax``.
        keys: the features as the first two read them.
        patches: the embeddings as the third reads them.
        settings: of the call.
    """

    features_ND: torch.Tensor
    averaging: ModuleType
    masking: ModuleType
    contrasting: ModuleType
    keys: Any
    patches: Any
    settings: Settings

    @classmethod
    def of(
        cls, backend: str, features_ND: torch.Tensor, z_NE: torch.Tensor, settings: Settings
    ) -> "Composition":
        """Prepare features and embeddings (in the accumulator's dtype) once for all chunks."""
        averaging, masking, contrasting = (
            dispatch.load(op, backend) for op in ("proxy_average", "relation_masks", "masked_log_softmax")
        )
        keys = averaging.prepare_features(features_ND, settings.precision)
        patches = contrasting.prepare(z_NE, settings.precision)
        return cls(features_ND, averaging, masking, contrasting, keys, patches, settings)

    @property
    def overwrites(self) -> bool:
        """Whether the first chunk's gradient is written: what it is written to needs no zeros."""
        return getattr(self.contrasting, "OVERWRITES", False)

    def chunk(
        self, anchors_C: torch.Tensor, group: int | None, target_NE: torch.Tensor | None, first: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses and counts of some anchors; adds their gradient to `target_NE`, or writes it as the `first`.

        `group` = anchors per group weights the gradient, None leaves it unweighted.
        """
        cfg, precision = self.settings.cfg, self.settings.precision
        start_CD = normalise(self.features_ND[anchors_C], accumulator(precision))
        queries = walk(start_CD, cfg, partial(self.averaging.chunk, self.keys, precision))
        sets, num_kept_C = self.masking.chunk(self.keys, precision, queries, anchors_C)
        target = None
        if target_NE is not None:
            row_C = row_weights(sets.num_positive, group, start_CD.dtype) / self.settings.temperature
            fresh = first and self.overwrites
            target = softmax_chunks.Target(row_C, target_NE, target_NE, anchors_C, fresh=fresh)
        own, of_softmax = self.patches.take(anchors_C), self.settings.of_softmax
        loss_C, _ = self.contrasting.chunk(own, self.patches, sets, of_softmax, target=target)
        return loss_C, sets.num_positive, num_kept_C - sets.num_positive


def composed_loss(
    backend: str, features: torch.Tensor, z: torch.Tensor, anchors: torch.Tensor, settings: Settings
) -> Result:
    """The loss in chunks of a :class:`Composition`; NaN and counts of -1 say that numbers were bad."""
    factor = guard({"features": features, "z": z}, anchors, features.shape[0])
    z_NE, width = z.to(accumulator(settings.precision)), z.shape[1]
    loss_A, dz, num_positives, num_negatives = composed_chunks(
        backend, features, z_NE, in_range(anchors, z.shape[0]), settings
    )
    loss = group_mean(loss_A, num_positives > 0, settings.group)
    loss *= settings.temperature / settings.base_temperature
    dz_scale = loss.new_full((), settings.gradient_scale(len(anchors)))
    poison(factor, loss, dz_scale)
    if factor is not None:
        num_positives = num_positives.masked_fill(factor.isnan(), -1)
        num_negatives = num_negatives.masked_fill(factor.isnan(), -1)
    return Result(loss, dz[:, :width].contiguous(), dz_scale, num_positives, num_negatives)


def composed_chunks(
    backend: str, features_ND: torch.Tensor, z_NE: torch.Tensor, anchors_A: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses (A,), gradient (N, E or more) or (0, ...), set sizes (A,) int64 twice: see :mod:`.chunks`."""
    group, with_gradient = settings.group, settings.with_gradient
    if not anchors_A.numel():
        return chunked_loss(None, z_NE, anchors_A, group, with_gradient, group)
    rows = dispatch.load("ppap_loss", backend).chunk_rows(features_ND, z_NE, settings)
    composition = Composition.of(backend, features_ND, z_NE, settings)
    # Gradients are as wide as prepared embeddings.
    like = z_NE.new_empty(()).expand(z_NE.shape[0], composition.patches.width)
    return chunked_loss(
        composition.chunk, like, anchors_A, group, with_gradient, rows, zeroed=not composition.overwrites
    )


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
    tau, base = temperatures
    settings = Settings(cfg, tau, base, group, with_gradient, precision, memory_budget)
    impl = dispatch.load("ppap_loss", backend)
    with computing_on(z.device):
        if anchors.numel() and hasattr(impl, "guarded_loss"):
            refuse_on_cpu({"features": features, "z": z}, anchors, features.shape[0])
            result: Result = impl.guarded_loss(features, z, anchors, settings)
            return result
        return composed_loss(backend, features, z, anchors, settings)


@_ppap_loss.register_fake
def _(
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
def _(
    dloss: torch.Tensor,
    dz: torch.Tensor,
    dz_scale: torch.Tensor,
    z: torch.Tensor,
) -> torch.Tensor:
    return z.new_empty(z.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], output[2], inputs[1])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dloss: torch.Tensor | None, *_others: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if dloss is None:
        return (None,) * 10
    return (None, _ppap_loss_backward(dloss, *ctx.saved_tensors)) + (None,) * 8


_ppap_loss.register_autograd(_backward, setup_context=_save)
_ppap_loss_backward.register_autograd(refuse_second_derivative, setup_context=no_context)
