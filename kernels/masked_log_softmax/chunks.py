"""The loop over chunks of anchors of Eq. 8, for losses and for gradients.

A backend is a module ``*_impl.py`` with

- ``prepare(z, precision)``, whose result has ``take(rows)`` and a ``width``,
- ``chunk_rows(z, settings, with_gradient)``,
- ``from_words``, that of ``relation_masks``,
- ``chunk(own, patches, sets, settings, lse, target)``: losses and log-sum-exps; adds a gradient to a target,
- ``UNIT``, that of its log-sum-exps [nats],
- ``OVERWRITES`` = True where a chunk can write a gradient instead of adding to it.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ..budget import row_chunks
from ..relation_masks.sets import Sets


class Settings(NamedTuple):
    """Settings of one call, checked.

    Attributes:
        temperature: divides the logits.
        precision: ``fp64 | fp32 | fp16 | bf16``.
        memory_budget: [bytes].
    """

    temperature: float
    precision: str
    memory_budget: int


class Target(NamedTuple):
    """Where a chunk adds its gradient, that of the sum of row_C x temperature x loss.

    Attributes:
        row_C: (C,) factor of each anchor, divided by the temperature.
        dz_NE: gradient of the patches, as wide as prepared embeddings.
        own: tensor with the gradients of the anchors, as wide.
        rows: which rows of it are this chunk's.
        of_all: the patches are all there are; otherwise some of them, and the log-sum-exp that is given, and
            the numbers of positives, are those over all.
        fresh: `dz_NE` holds nothing yet and is written, all of it. Only for backends that say ``OVERWRITES``.
    """

    row_C: torch.Tensor
    dz_NE: torch.Tensor
    own: torch.Tensor
    rows: torch.Tensor | slice
    of_all: bool = True
    fresh: bool = False


SetsOf = Callable[[slice], Sets[Any]]


def losses(
    impl: ModuleType, z_AE: torch.Tensor, z_NE: torch.Tensor, settings: Settings, rows: int, sets_of: SetsOf
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss [nats] and log-sum-exp [of the backend] of every anchor, (A,) each.

    Args:
        impl: implementation of ``masked_log_softmax``.
        z_AE: embeddings of the anchors in the accumulator's dtype.
        z_NE: embeddings of the patches, likewise.
        settings: of the call.
        rows: anchors per chunk at most.
        sets_of: makes the sets of some of the anchors.
    """
    loss_A, lse_A = z_AE.new_zeros(z_AE.shape[0]), z_AE.new_full((z_AE.shape[0],), -torch.inf)
    if 0 in (z_AE.shape[0], z_NE.shape[0]):
        return loss_A, lse_A
    own, patches = impl.prepare(z_AE, settings.precision), impl.prepare(z_NE, settings.precision)
    for part in row_chunks(z_AE.shape[0], rows):
        loss_A[part], lse_A[part] = impl.chunk(own.take(part), patches, sets_of(part), settings)
    return loss_A, lse_A


def gradients(
    impl: ModuleType,
    dloss_A: torch.Tensor,
    lse_A: torch.Tensor,
    z_AE: torch.Tensor,
    z_NE: torch.Tensor,
    settings: Settings,
    rows: int,
    sets_of: SetsOf,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients (A, E) and (N, E) in the accumulator's dtype; logits are formed again. See :func:`losses`."""
    if 0 in (z_AE.shape[0], z_NE.shape[0]):
        return torch.zeros_like(z_AE), torch.zeros_like(z_NE)
    own, patches = impl.prepare(z_AE, settings.precision), impl.prepare(z_NE, settings.precision)
    dz_AE, dz_NE = (z_NE.new_zeros(z.shape[0], patches.width) for z in (z_AE, z_NE))
    for part in row_chunks(z_AE.shape[0], rows):
        row_C = (dloss_A[part] / settings.temperature).contiguous()
        target = Target(row_C, dz_NE, dz_AE, part)
        impl.chunk(own.take(part), patches, sets_of(part), settings, lse_A[part], target)
    width = z_NE.shape[1]
    return dz_AE[:, :width].contiguous(), dz_NE[:, :width].contiguous()
