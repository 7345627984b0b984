"""The whole loss: stored results of the published code, the definition, and the promises of the contract."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppap.kernels import (
    PropagationConfig,
    guards,
    ppap_loss,
    propagate,
    use_backend,
)
from ppap.kernels.ppap_loss import Settings, composed_chunks, group_mean, torch_impl
from ppap.kernels.precision import normalise
from tests.helpers import CASES, GOLDEN_NAMES, golden_case, made_case, peak_bytes
from tests.loss_forms import FORMS, fused, in_parts, loss_and_gradient, materialised, without_reduction

TINY_BUDGET = 60_000


@pytest.mark.parametrize("name", GOLDEN_NAMES)
@pytest.mark.parametrize("form", [*FORMS, materialised])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_published_results(name, form, dtype, tolerance):
    case = golden_case(name).to(dtype)
    loss, dz = loss_and_gradient(form, case)
    assert loss.item() == pytest.approx(case.loss, rel=tolerance, abs=0)
    # dz is golden in float64; float32 is judged by the largest entry.
    assert (dz.double() - case.dz).abs().max() <= tolerance * case.dz.abs().max()


@pytest.mark.parametrize("make", CASES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group_size", [None, 4])
def test_equals_the_reference_in_several_chunks(make, form, group_size):
    case = make()
    case.group_size = group_size
    wanted = loss_and_gradient(materialised, case)
    for budget in (TINY_BUDGET, 2**29):
        got = loss_and_gradient(form, case, memory_budget=budget)
        for value, true in zip(got, wanted, strict=True):
            torch.testing.assert_close(value, true, atol=1e-11, rtol=1e-11)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    rows=st.integers(1, 90),
    width=st.integers(1, 40),
    share=st.floats(0, 1),
    group=st.one_of(st.none(), st.integers(1, 50)),
    phi0=st.floats(-0.2, 1.0),
    psi0=st.floats(-0.4, 0.9),
    steps=st.integers(0, 3),
    temperature=st.floats(0.05, 2),
)
def test_equals_the_reference_for_any_shape(rows, width, share, group, phi0, psi0, steps, temperature):
    cfg = PropagationConfig(phi0, psi0, steps)
    case = made_case(rows, width, round(share * rows), cfg, temperature)
    case.group_size = group
    wanted = loss_and_gradient(materialised, case)
    budget = 3 * torch_impl.bytes_per_anchor(case.features, case.z)
    for value, true in zip(loss_and_gradient(fused, case, memory_budget=budget), wanted, strict=True):
        torch.testing.assert_close(value, true, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_sixteen_bit_products(form, precision, tolerance):
    """Error of loss and gradient relative to float64, threshold flips included."""
    case = made_case(400, 64, 100, PropagationConfig(), 0.3)
    wanted = loss_and_gradient(materialised, case)
    got = loss_and_gradient(form, case.to(torch.float32), precision=precision)
    assert (got[0] - wanted[0]).abs() <= tolerance * wanted[0].abs()
    assert (got[1] - wanted[1]).norm() <= 5 * tolerance * wanted[1].norm()
    exact = loss_and_gradient(form, case.to(torch.float32), precision="fp32")
    assert not torch.equal(exact[1], got[1]), "the precision asked for was used"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_sixteen_bit_embeddings(form, dtype):
    case = made_case(100, 32, 20, PropagationConfig(), 0.3).to(dtype)
    loss, dz = loss_and_gradient(form, case)
    assert loss.dtype == torch.float32 and dz.dtype == dtype
    assert torch.isfinite(dz).all() and dz.abs().sum() > 0


@pytest.mark.parametrize(
    ("features", "z", "wanted"),
    [
        (torch.float64, torch.float32, torch.float64),
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
    ],
)
def test_reductions_agree_on_mixed_types(features, z, wanted):
    case = made_case(100, 32, 20, PropagationConfig(), 0.3)
    case.features, case.z = case.features.to(features), case.z.to(z)
    values = [form(case, case.z) for form in (fused, without_reduction)]
    assert values[0].dtype == values[1].dtype == wanted
    torch.testing.assert_close(*values, atol=1e-5, rtol=1e-5)


def test_no_patches_and_no_channels():
    rel = propagate(torch.zeros(0, 8), None, PropagationConfig())
    assert rel.proxies.shape == (0, 8) and rel.num_positives.shape == (0,)
    assert ppap_loss(torch.zeros(0, 8), torch.zeros(0, 4), None, PropagationConfig(), temperature=0.3) == 0
    with pytest.raises(ValueError, match="no channels"):
        propagate(torch.zeros(3, 0), None, PropagationConfig())


def test_autocast_decides_the_precision_and_spoils_nothing():
    case = made_case(100, 32, 20, PropagationConfig(), 0.3).to(torch.float32)
    wanted = loss_and_gradient(fused, case, precision="bf16")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, dz = loss_and_gradient(fused, case)
        exact = loss_and_gradient(fused, case, precision="fp32")
    assert torch.equal(loss, wanted[0]) and torch.equal(dz, wanted[1])
    assert torch.equal(exact[1], loss_and_gradient(fused, case, precision="fp32")[1])


def test_unnormalised_embeddings_of_any_norm():
    case = made_case(100, 32, 20, PropagationConfig(), 0.3)
    case.z = case.z * torch.logspace(-3, 3, 100, dtype=torch.float64)[:, None]
    wanted = loss_and_gradient(materialised, case)
    for form in FORMS:
        got = loss_and_gradient(form, case.to(torch.float32), precision="fp32")
        assert (got[0] - wanted[0]).abs() <= 2e-6 * case.z.norm(dim=1).max() ** 2 / 0.3
        assert torch.isfinite(got[1]).all()


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    case = made_case(14, 6, 6, PropagationConfig(phi0=0.4, psi0=0.1), 0.5)
    case.group_size = 4
    z = case.z.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: form(case, z), (z,))


@pytest.mark.parametrize("form", FORMS)
def test_second_derivative_raises(form):
    case = made_case(20, 8, 5, PropagationConfig(), 0.5)
    z = case.z.requires_grad_()
    (dz,) = torch.autograd.grad(form(case, z), z, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dz.square().sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_backward_outside_the_backend_context(form, monkeypatch):
    case = made_case(20, 8, 5, PropagationConfig(), 0.5)
    z = case.z.requires_grad_()
    with use_backend("torch"):
        loss = form(case, z)
    monkeypatch.setenv("PPAP_BACKEND", "triton")
    (dz,) = torch.autograd.grad(loss, z)
    monkeypatch.delenv("PPAP_BACKEND")
    assert torch.equal(dz, loss_and_gradient(form, case)[1])


@pytest.mark.parametrize("form", FORMS)
def test_compile_without_a_graph_break(form):
    case = made_case(60, 16, 12, PropagationConfig(), 0.5).to(torch.float32)
    compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
    wanted = loss_and_gradient(form, case)
    got = loss_and_gradient(compiled, case)
    for value, true in zip(got, wanted, strict=True):
        torch.testing.assert_close(value, true, atol=1e-7, rtol=1e-6)


def test_without_a_gradient_none_is_formed():
    case = made_case(60, 16, 12, PropagationConfig(), 0.5)
    assert not fused(case, case.z).requires_grad
    with torch.no_grad():
        assert not fused(case, case.z.requires_grad_()).requires_grad
    empty = torch.ops.ppap.ppap_loss(
        case.features,
        case.z.detach(),
        case.anchors,
        case.cfg.as_floats(),
        [0.5, 0.07],
        0,
        False,
        "fp64",
        2**20,
        "torch",
    )[1]
    assert empty.shape == (0, 17)


def test_repeats_are_bitwise_equal():
    case = made_case(203, 32, 37, PropagationConfig(), 0.3).to(torch.float32)
    first = loss_and_gradient(fused, case)
    for _ in range(5):
        again = loss_and_gradient(fused, case)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("group_size", [None, 8, 100])
def test_temporaries_stay_within_the_budget(group_size):
    case = made_case(1500, 32, 300, PropagationConfig(), 0.3).to(torch.float32)
    unit, cfg = normalise(case.features, torch.float32), case.cfg
    budget = 2**20
    assert budget < 300 * torch_impl.bytes_per_anchor(unit, case.z) / 3, "at least three chunks"
    group = group_size or 300

    def run():
        settings = Settings(cfg, 0.3, 0.07, group, True, "fp32", budget)
        return composed_chunks("torch", unit, case.z, case.anchors, settings)

    # Beyond the budget: the gradient, its part inside a group, and the operands of z.
    assert peak_bytes(run) <= budget + 4 * case.z.nbytes + 8 * 300 * 8


@pytest.mark.parametrize("bad", ["features", "z", "anchors"])
def test_bad_numbers_raise_on_cpus(bad):
    case = made_case(30, 8, 6, PropagationConfig(), 0.3)
    if bad == "anchors":
        case.anchors[2] = 30
    else:
        getattr(case, bad)[3, 2] = math.nan
    with pytest.raises(ValueError, match="range from|non-finite"):
        fused(case, case.z)


@pytest.mark.parametrize("bad", ["features", "z", "anchors"])
def test_bad_numbers_never_look_like_zero_where_the_host_does_not_wait(bad, monkeypatch):
    """What runs on a GPU, run here: the guard gives a NaN factor in place of an exception."""
    monkeypatch.setattr(guards, "_host_waits_for", lambda device: False)
    case = made_case(30, 8, 6, PropagationConfig(), 0.3)
    if bad == "anchors":
        case.anchors[2] = 30
    else:
        getattr(case, bad)[2, 1] = math.nan
    for form in (in_parts, fused):
        loss, dz = loss_and_gradient(form, case)
        assert loss.isnan() and dz.isnan().any()
    good = made_case(30, 8, 6, PropagationConfig(), 0.3)
    assert torch.isfinite(loss_and_gradient(fused, good)[1]).all(), "the guard lets good numbers pass"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 0.3, "reduction": "sum"}, "reduction is 'sum'"),
        ({"temperature": 0.3, "group_size": 0}, "group_size is 0"),
        ({"temperature": 0.3, "group_size": 2, "reduction": "none"}, "group_size goes with"),
        ({"temperature": 0.3, "group_size": 2.5}, "group_size is 2.5"),
        ({"temperature": 0.3, "memory_budget": 1}, "memory_budget is 1 bytes"),
        ({"temperature": 0.3, "memory_budget": 1.5}, "memory_budget is 1.5"),
        ({"temperature": 0.3, "base_temperature": 0}, "base_temperature is 0"),
        ({"temperature": 0.3, "precision": "fp16"}, "float64 tensors"),
    ],
)
def test_bad_settings(options, message):
    case = made_case(30, 8, 6, PropagationConfig(), 0.3)
    with pytest.raises(ValueError, match=message):
        ppap_loss(case.features, case.z, case.anchors, case.cfg, **options)


def test_rows_that_do_not_match():
    with pytest.raises(ValueError, match=r"z has shape \(4, 3\); give \(5, any\)"):
        ppap_loss(torch.ones(5, 3), torch.ones(4, 3), None, PropagationConfig(), temperature=0.3)


def test_opcheck():
    case = made_case(40, 16, 8, PropagationConfig(), 0.3).to(torch.float32)
    z = case.z.requires_grad_()
    arguments = (
        case.features,
        z,
        case.anchors,
        case.cfg.as_floats(),
        [0.3, 0.07],
        4,
        True,
        "fp32",
        2**20,
        "torch",
    )
    torch.library.opcheck(torch.ops.ppap.ppap_loss.default, arguments)
    arguments = (torch.ones(()), case.z.detach(), torch.ones(()), z.detach())
    torch.library.opcheck(torch.ops.ppap.ppap_loss_backward.default, arguments)


@pytest.mark.parametrize(
    ("values", "valid", "group", "wanted"),
    [
        ([1.0, 3.0, 0.0, 0.0], [1, 1, 0, 0], 2, 1.0),
        ([1.0, 3.0, 5.0], [1, 1, 1], 2, 3.5),
        ([2.0, 0.0], [1, 0], 5, 2.0),
        ([], [], 3, 0.0),
        ([0.0, 0.0], [0, 0], 1, 0.0),
    ],
)
def test_group_mean_by_hand(values, valid, group, wanted):
    mean = group_mean(torch.tensor(values), torch.tensor(valid, dtype=torch.bool), group)
    assert mean.item() == wanted
