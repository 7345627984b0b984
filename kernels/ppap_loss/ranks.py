"""``ppap_loss`` over the patches of all ranks of a process group: agreement, choice of exchange, gradient."""

import zlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
import torch.nn.functional as F
from torch.distributed import ProcessGroup

from ..checks import require
from ..contrastive_loss import contrastive_loss
from ..guards import NonFiniteError, refuse_on_cpu
from ..propagate import propagate
from .gathered import OneLoss, gathered_bytes, gathered_loss
from .messages import Ranks, gather_numbers, gather_rows
from .ring import ring_loss
from .settings import Result, Settings

EXCHANGES = ("auto", "gather", "ring")
# What a rank says of its numbers: good, or what is bad about them.
_OK, _FEATURES, _Z, _BAD = range(4)
_NON_FINITE = {_FEATURES: "features", _Z: "z"}
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Request(NamedTuple):
    """A call of one rank.

    Attributes:
        settings: checked; whether a gradient is wanted is decided by all ranks.
        grouped: anchors per group, or None: one group.
        reduction: ``mean | none``.
        exchange: ``auto | gather | ring``.
        backend: name.
        one: the registered op of one process.
        backward: its backward op.
    """

    settings: Settings
    grouped: int | None
    reduction: str
    exchange: str
    backend: str
    one: OneLoss
    backward: Any


def agree(
    group: ProcessGroup, features: torch.Tensor, z: torch.Tensor, anchors: torch.Tensor, request: Request
) -> tuple[Ranks, bool]:
    """What every rank brought, and whether any wants a gradient.

    Raises:
        NonFiniteError: on every rank, when one has NaN or infinity (CPUs).
        ValueError: on every rank, when one has other bad numbers or the ranks ask for different things.
    """
    refused: ValueError | None = None
    try:
        refuse_on_cpu({"features": features, "z": z}, anchors, features.shape[0])
    except ValueError as error:
        refused = error
    settings = request.settings._replace(with_gradient=False)
    asked = (settings, request.grouped, request.reduction, request.exchange, request.backend)
    same = [features.shape[1], z.shape[1], _DTYPES.index(features.dtype), _DTYPES.index(z.dtype)]
    same.append(zlib.crc32(repr(asked).encode()))
    numbers = [
        features.shape[0],
        anchors.shape[0],
        int(request.settings.with_gradient),
        _verdict(refused, features),
    ]
    found = gather_numbers(numbers + same, group, z.device)
    if refused is not None and not isinstance(refused, NonFiniteError):
        raise refused
    for rank, row in enumerate(found):
        if row[3] == _BAD:
            raise ValueError(f"rank {rank} of the group has bad numbers: look at its own message")
    # Every rank decides alike, in the same order: all raise the same kind of error, or none does.
    for rank, row in enumerate(found):
        if row[4:] != same:
            raise ValueError(
                f"ppap_loss: rank {rank} of the group has other channels, dtypes or settings than this one: "
                f"widths, dtypes and a checksum of the settings are {row[4:]} there and {same} here; "
                "give every rank the same"
            )
    for rank, row in enumerate(found):
        if row[3] in _NON_FINITE:
            text = f"rank {rank} of the group has NaN or infinity in {_NON_FINITE[row[3]]}"
            shared = refused or NonFiniteError(text)
            shared.everywhere = True
            raise shared
    rows, counts = (tuple(row[k] for row in found) for k in (0, 1))
    return Ranks(group, dist.get_rank(group), rows, counts), any(row[2] for row in found)


def _verdict(refused: ValueError | None, features: torch.Tensor) -> int:
    """What this rank tells the others of its numbers."""
    if not isinstance(refused, NonFiniteError):
        return _OK if refused is None else _BAD
    return _Z if torch.isfinite(features).all() else _FEATURES


def chosen_exchange(features: torch.Tensor, z: torch.Tensor, request: Request, ranks: Ranks) -> str:
    """``auto`` gathers while that fits into the memory budget."""
    if request.exchange != "auto":
        return request.exchange
    size = max(features.element_size(), z.element_size())
    accumulated = request.settings.accumulator.itemsize
    needed = gathered_bytes(sum(ranks.rows), features.shape[1], z.shape[1], size, accumulated)
    return "gather" if needed <= request.settings.memory_budget else "ring"


def loss_of_ranks(
    group: ProcessGroup, features: torch.Tensor, z: torch.Tensor, anchors: torch.Tensor, request: Request
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, numbers of positives and of negatives; see :func:`ppap.kernels.ppap_loss`."""
    ranks, with_gradient = agree(group, features, z, anchors, request)
    if request.reduction == "none":
        return _losses_apart(features, z, anchors, request, ranks)
    length = request.grouped or max(sum(ranks.anchors), 1)
    settings = request.settings._replace(group=length, with_gradient=with_gradient)
    exchange = chosen_exchange(features, z, request, ranks)

    def run(z_NE: torch.Tensor) -> Result:
        if exchange == "gather":
            return gathered_loss(request.one, features.detach(), z_NE, anchors, settings, ranks)
        return ring_loss(request.backend, features.detach(), z_NE, anchors, settings, ranks)

    loss, num_positives, num_negatives = _OfRanks.apply(z, run, request.backward)
    return loss, num_positives, num_negatives


class _OfRanks(torch.autograd.Function):
    """The gradient of this rank's rows is formed in the forward pass, as in one process."""

    @staticmethod
    def forward(
        ctx: Any, z: torch.Tensor, run: Any, backward: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See :func:`loss_of_ranks`."""
        result: Result = run(z.detach())
        ctx.save_for_backward(result.dz, result.dz_scale, z)
        ctx.stored = backward
        ctx.mark_non_differentiable(result.num_positives, result.num_negatives)
        return result.loss, result.num_positives, result.num_negatives

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor, *_counts: Any) -> tuple[torch.Tensor, None, None]:
        """The stored gradient times the incoming one; differentiable once."""
        dz, dz_scale, z = ctx.saved_tensors
        return ctx.stored(dloss, dz, dz_scale, z), None, None


def _losses_apart(
    features: torch.Tensor, z: torch.Tensor, anchors: torch.Tensor, request: Request, ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of each of this rank's anchors, over gathered rows; the backward pass is a message too."""
    settings = request.settings
    keys_ND = gather_rows(features.detach(), ranks)
    padded = F.pad(z, (0, 0, 0, max(ranks.rows) - z.shape[0]))
    found = differentiable.all_gather(padded.contiguous(), group=ranks.group)  # type: ignore[no-untyped-call]
    all_NE = torch.cat([block[:count] for block, count in zip(found, ranks.rows, strict=True)])
    precision = "auto" if settings.precision == "fp64" else settings.precision
    if settings.precision == "fp64":
        keys_ND, all_NE = keys_ND.double(), all_NE.double()
    budget, backend, tau = settings.memory_budget, request.backend, settings.temperature
    own_A = anchors + ranks.first_row
    rel = propagate(keys_ND, own_A, settings.cfg, precision=precision, memory_budget=budget, impl=backend)
    loss_A = contrastive_loss(
        all_NE, rel, temperature=tau, precision=precision, memory_budget=budget, impl=backend
    )
    scale = settings.temperature / settings.base_temperature
    return loss_A * scale, rel.num_positives, rel.num_negatives


def check_exchange(exchange: str, reduction: str, group: Any) -> None:
    """Refuse impossible ways of exchange.

    Raises:
        ValueError: an unknown name, or one that does not go with the rest.
    """
    valid = ", ".join(map(repr, EXCHANGES))
    require(exchange in EXCHANGES, f"ppap_loss: exchange is {exchange!r}; valid: {valid}")
    together = exchange != "ring" or reduction == "mean"
    require(together, "ppap_loss: exchange 'ring' goes with reduction='mean'; give 'gather' or 'auto'")
    if group is not None:
        require(
            isinstance(group, ProcessGroup),
            f"ppap_loss: group is a {type(group).__name__}; give a torch.distributed.ProcessGroup, or None",
        )
