"""The whole loss on the Triton backend: stored results, the definition, and the promises of the contract."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppap.kernels import PropagationConfig, contrastive_loss, ppap_loss, propagate, use_backend
from ppap.kernels.common import normalise
from ppap.kernels.ppap_loss import group_mean, triton_impl
from ppap.kernels.tiles.launch import row_block
from tests.helpers import CASES, GOLDEN_NAMES, golden_case, made_case, peak_bytes
from tests.test_ppap_loss import FORMS, fused, in_parts, loss_and_gradient, materialised

BLOCK = row_block(torch.device("cpu"))
on_triton = functools.partial(loss_and_gradient, impl="triton")


def budget_of_chunks(case, rows: int, precision: str = "fp32") -> int:
    """A budget in which `rows` anchors fit at a time."""
    return rows * triton_impl.bytes_per_anchor(case.features, case.z, precision, True)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_published_results(name, form):
    case = golden_case(name).to(torch.float32)
    loss, dz = on_triton(form, case, precision="fp32")
    assert loss.item() == pytest.approx(case.loss, rel=2e-5, abs=0)
    assert (dz.double() - golden_case(name).dz).abs().max() <= 2e-5 * case.dz.abs().max()


def check(case, form=fused, tolerance: float = 2e-5, **options) -> None:
    """Loss and gradient within `tolerance` of the definition in float64."""
    wanted = loss_and_gradient(materialised, case)
    got = on_triton(form, case.to(torch.float32), precision="fp32", **options)
    assert abs(got[0].item() - wanted[0].item()) <= tolerance * max(abs(wanted[0].item()), 1e-3)
    assert (got[1] - wanted[1]).abs().max() <= tolerance * max(wanted[1].abs().max().item(), 1e-6)


@pytest.mark.parametrize("make", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_reference(make, form):
    check(make(), form)


@pytest.mark.parametrize("group_size", [None, 4, 100])
def test_several_chunks(group_size):
    case = made_case(300, 48, 3 * BLOCK + 7, PropagationConfig(), 0.3)
    case.group_size = group_size
    check(case, memory_budget=budget_of_chunks(case, BLOCK))


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    rows=st.integers(1, 300),
    width=st.integers(1, 80),
    share=st.floats(0, 1),
    phi0=st.floats(-0.2, 1.0),
    psi0=st.floats(-0.4, 0.9),
    steps=st.integers(0, 2),
    temperature=st.floats(0.05, 2),
)
def test_equals_the_reference_for_any_shape(rows, width, share, phi0, psi0, steps, temperature):
    case = made_case(rows, width, round(share * rows), PropagationConfig(phi0, psi0, steps), temperature)
    if smallest_margin(case) < 1e-6:
        return  # a similarity on a threshold: float32 may fall on either side
    check(case)


def smallest_margin(case) -> float:
    """How near a similarity comes to a threshold at any step."""
    distances = [1.0]
    for steps in range(case.cfg.steps + 1):
        cfg = PropagationConfig(case.cfg.phi0, case.cfg.psi0, steps)
        rel = propagate(case.features, case.anchors, cfg, impl="torch")
        sim = rel.proxies @ rel.features.T
        for threshold in (rel.phi, rel.psi):
            distances += [(sim - threshold[:, None]).abs().min().item()] if sim.numel() else []
    return min(distances)


@pytest.mark.parametrize(("precision", "flips"), [("fp16", 5e-4), ("bf16", 5e-3)])
def test_sixteen_bit_products(precision, flips):
    """Sets as good as rounding allows; loss and gradient as near to float64 as the torch backend's are."""
    case = made_case(260, 64, 70, PropagationConfig(), 0.3)
    wanted_sets = propagate(case.features, case.anchors, case.cfg, impl="torch")
    single = case.to(torch.float32)
    sets = propagate(single.features, single.anchors, single.cfg, precision=precision, impl="triton")
    rows = torch.arange(70)
    for name in ("positives", "negatives"):
        flipped = getattr(sets, name)(rows) != getattr(wanted_sets, name)(rows)
        assert flipped.float().mean() <= flips
    wanted = loss_and_gradient(materialised, case)
    for form in (fused, in_parts):
        got = on_triton(form, single, precision=precision)
        theirs = loss_and_gradient(form, single, precision=precision, impl="torch")
        for value, other, true in zip(got, theirs, wanted, strict=True):
            assert (value - true).norm() <= 1.5 * (other - true).norm() + 1e-3 * true.norm()
        assert not torch.equal(got[1], on_triton(form, single, precision="fp32")[1])


def test_embeddings_of_any_norm():
    case = made_case(100, 32, 70, PropagationConfig(), 0.3)
    case.z = case.z * torch.logspace(-3, 3, 100, dtype=torch.float64)[:, None]
    wanted = loss_and_gradient(materialised, case)
    for form in FORMS:
        got = on_triton(form, case.to(torch.float32), precision="fp32")
        assert (got[0] - wanted[0]).abs() <= 2e-6 * case.z.norm(dim=1).max() ** 2 / 0.3
        assert torch.isfinite(got[1]).all()


@pytest.mark.parametrize("temperature", [0.005, 0.8])
def test_small_temperatures(temperature):
    """The logits' bound is too wide to serve as the shift of the exponentials: the maximum is taken."""
    check(made_case(203, 32, 80, PropagationConfig(), temperature), tolerance=1e-4)


def test_mixed_and_strided_inputs():
    case = made_case(130, 32, 70, PropagationConfig(), 0.3).to(torch.float32)
    wanted = on_triton(fused, case)
    case.features = case.features.T.contiguous().T
    wide = torch.randn(130, 2 * case.z.shape[1])
    wide[:, ::2] = case.z
    case.z = wide[:, ::2]
    for value, true in zip(on_triton(fused, case), wanted, strict=True):
        torch.testing.assert_close(value, true, atol=1e-6, rtol=1e-5)
    half = made_case(130, 32, 70, PropagationConfig(), 0.3).to(torch.bfloat16)
    loss, dz = on_triton(fused, half)
    assert loss.dtype == torch.float32 and dz.dtype == torch.bfloat16 and dz.abs().sum() > 0


def test_nothing_to_do():
    empty = ppap_loss(
        torch.zeros(0, 8), torch.zeros(0, 4), None, PropagationConfig(), temperature=0.3, impl="triton"
    )
    assert empty == 0
    assert propagate(torch.zeros(0, 8), None, PropagationConfig(), impl="triton").phi.shape == (0,)


@pytest.mark.parametrize("form", FORMS)
def test_compile_without_a_graph_break(form):
    case = made_case(60, 16, 12, PropagationConfig(), 0.5).to(torch.float32)
    run = functools.partial(form, impl="triton")
    got = loss_and_gradient(torch.compile(run, fullgraph=True, backend="aot_eager"), case)
    for value, true in zip(got, loss_and_gradient(run, case), strict=True):
        torch.testing.assert_close(value, true, atol=1e-7, rtol=1e-6)


def test_autocast_decides_the_precision():
    case = made_case(100, 32, 20, PropagationConfig(), 0.3).to(torch.float32)
    wanted = on_triton(fused, case, precision="bf16")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, dz = on_triton(fused, case)
    assert torch.equal(loss, wanted[0]) and torch.equal(dz, wanted[1])


def test_opcheck():
    case = made_case(70, 16, 12, PropagationConfig(), 0.5).to(torch.float32)
    settings = case.cfg.as_floats()
    for gradient in (True, False):
        z = case.z.clone().requires_grad_(gradient)
        arguments = (
            case.features,
            z,
            case.anchors,
            settings,
            [0.5, 0.07],
            0,
            gradient,
            "fp32",
            2**22,
            "triton",
        )
        torch.library.opcheck(torch.ops.ppap.ppap_loss.default, arguments)
    arguments = (case.features, case.anchors, settings, "fp32", 2**22, "triton")
    torch.library.opcheck(torch.ops.ppap.propagate.default, arguments)


def test_backward_outside_the_backend_context():
    case = made_case(60, 16, 12, PropagationConfig(), 0.5).to(torch.float32)
    z = case.z.requires_grad_()
    rel = propagate(case.features, case.anchors, case.cfg, impl="triton")

    def gradient(**options) -> torch.Tensor:
        loss = contrastive_loss(z, rel, temperature=0.5, **options).sum()
        with use_backend("auto"):
            return torch.autograd.grad(loss, z)[0]

    with use_backend("triton"):
        inside = contrastive_loss(z, rel, temperature=0.5).sum()
    (dz,) = torch.autograd.grad(inside, z)
    assert torch.equal(dz, gradient(impl="triton"))
    assert not torch.equal(dz, gradient(impl="torch")), "the other backend rounds otherwise"


def test_repeats_are_bitwise_equal():
    case = made_case(203, 32, 130, PropagationConfig(), 0.3).to(torch.float32)
    first = on_triton(fused, case, precision="fp16")
    for _ in range(3):
        again = on_triton(fused, case, precision="fp16")
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize(("precision", "group_size"), [("fp32", None), ("fp16", 300)])
def test_temporaries_stay_within_the_budget(precision, group_size):
    rows, patches, width = 4 * BLOCK, 1500, 64
    case = made_case(patches, width - 1, 3 * rows, PropagationConfig(), 0.3).to(torch.float32)
    unit, group = normalise(case.features, torch.float32), group_size or 3 * rows
    budget = budget_of_chunks(case, rows, precision)

    def run():
        arguments = (case.anchors, case.cfg, 0.3, group, True, precision, budget)
        return triton_impl.ppap_loss(unit, case.z, *arguments)

    # Beyond the budget stands what grows with N alone: the gradient, its part inside a group, two products
    # that are added to it, one being copied (on CPUs only), and operands of features and embeddings.
    per_patch = 5 * 4 * width + 2 * 2 * (2 if precision == "fp32" else 1) * width
    assert peak_bytes(run) <= budget + per_patch * 1536


def test_group_mean_of_the_unreduced_loss():
    case = made_case(100, 32, 70, PropagationConfig(), 0.3).to(torch.float32)
    loss, positives, _ = ppap_loss(
        case.features,
        case.z,
        case.anchors,
        case.cfg,
        temperature=0.3,
        reduction="none",
        return_counts=True,
        impl="triton",
    )
    whole = ppap_loss(
        case.features, case.z, case.anchors, case.cfg, temperature=0.3, group_size=16, impl="triton"
    )
    torch.testing.assert_close(group_mean(loss, positives > 0, 16), whole, atol=1e-6, rtol=1e-6)
