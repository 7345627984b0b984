"""The loss in its forms (fused, in parts, without reduction), and checks of a backend by its definition."""

import torch

from ppap.kernels import contrastive_loss, ppap_loss, propagate
from ppap.kernels.ppap_loss import group_mean, reference
from tests.helpers import LossCase


def in_parts(case: LossCase, z: torch.Tensor, **options) -> torch.Tensor:
    """The grouped mean composed of propagate and contrastive_loss."""
    rel = propagate(case.features, case.anchors, case.cfg, **options)
    loss = contrastive_loss(z, rel, temperature=case.temperature, **options)
    scale = case.temperature / 0.07
    return group_mean(loss, rel.num_positives > 0, case.group_size or max(len(loss), 1)) * scale


def fused(case: LossCase, z: torch.Tensor, **options) -> torch.Tensor:
    return ppap_loss(
        case.features,
        z,
        case.anchors,
        case.cfg,
        temperature=case.temperature,
        group_size=case.group_size,
        **options,
    )


def without_reduction(case: LossCase, z: torch.Tensor, **options) -> torch.Tensor:
    loss, positives, _ = ppap_loss(
        case.features,
        z,
        case.anchors,
        case.cfg,
        temperature=case.temperature,
        reduction="none",
        return_counts=True,
        **options,
    )
    return group_mean(loss, positives > 0, case.group_size or max(len(loss), 1))


def materialised(case: LossCase, z: torch.Tensor) -> torch.Tensor:
    return reference.ppap_loss(
        case.features, z, case.anchors, case.cfg, temperature=case.temperature, group_size=case.group_size
    )


FORMS = [in_parts, fused, without_reduction]


def loss_and_gradient(form, case: LossCase, **options) -> tuple[torch.Tensor, torch.Tensor]:
    z = case.z.detach().requires_grad_()
    loss = form(case, z, **options)
    return loss.detach(), torch.autograd.grad(loss, z)[0]


def check_backend(impl: str, case: LossCase, form=fused, tolerance: float = 2e-5, **options) -> None:
    """Loss and gradient of a backend in fp32 within `tolerance` of the definition in float64.

    A loss near 0 is a difference of logarithms of order 1 and has their rounding.
    """
    wanted = loss_and_gradient(materialised, case)
    got = loss_and_gradient(form, case.to(torch.float32), impl=impl, precision="fp32", **options)
    assert (got[0] - wanted[0]).abs() <= tolerance * wanted[0].abs().clamp(min=0.1)
    assert (got[1] - wanted[1]).abs().max() <= tolerance * wanted[1].abs().max().clamp(min=1e-5)


def check_sixteen_bits(impl: str, case: LossCase, precision: str, flips: float) -> None:
    """Sets flipped in a share of `flips` at most; loss and gradient as good as the torch backend's."""
    wanted_sets = propagate(case.features, case.anchors, case.cfg, impl="torch")
    single = case.to(torch.float32)
    sets = propagate(single.features, single.anchors, single.cfg, precision=precision, impl=impl)
    rows = torch.arange(len(case.anchors))
    for name in ("positives", "negatives"):
        flipped = getattr(sets, name)(rows) != getattr(wanted_sets, name)(rows)
        assert flipped.float().mean() <= flips
    wanted = loss_and_gradient(materialised, case)
    for form in (fused, in_parts):
        got = loss_and_gradient(form, single, precision=precision, impl=impl)
        theirs = loss_and_gradient(form, single, precision=precision, impl="torch")
        for value, other, true in zip(got, theirs, wanted, strict=True):
            assert (value - true).norm() <= 1.5 * (other - true).norm() + 1e-3 * true.norm()
        exact = loss_and_gradient(form, single, precision="fp32", impl=impl)
        assert not torch.equal(got[1], exact[1]), "the precision asked for was used"
