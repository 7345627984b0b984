"""What the contract promises of the whole loss, on the Triton backend."""

import functools

import pytest
import torch

from ppap.kernels import PropagationConfig, contrastive_loss, ppap_loss, propagate, use_backend
from ppap.kernels.ppap_loss import group_mean, triton_impl
from ppap.kernels.ppap_loss.settings import Settings
from ppap.kernels.precision import normalise
from tests.helpers import made_case, peak_bytes
from tests.interpreted.test_loss import BLOCK, budget_of_chunks, on_triton
from tests.loss_forms import FORMS, fused, loss_and_gradient


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
    for _ in range(2):
        again = on_triton(fused, case, precision="fp16")
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize(("precision", "group_size"), [("fp32", None), ("fp16", 300)])
def test_temporaries_stay_within_the_budget(precision, group_size):
    rows, patches, width = 2 * BLOCK, 420, 64
    case = made_case(patches, width - 1, 3 * rows, PropagationConfig(), 0.3).to(torch.float32)
    unit, group = normalise(case.features, torch.float32), group_size or 3 * rows
    budget = budget_of_chunks(case, rows, precision)

    def run():
        settings = Settings(case.cfg, 0.3, 0.07, group, True, precision, budget)
        return triton_impl.guarded_loss(unit, case.z, case.anchors, settings)

    # Beyond the budget stands what grows with N alone: the gradient, its part inside a group, two products
    # that are added to it, one being copied (on CPUs only), and operands of features and embeddings.
    per_patch = 5 * 4 * width + 2 * 2 * (2 if precision == "fp32" else 1) * width
    assert peak_bytes(run) <= budget + per_patch * 512


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
