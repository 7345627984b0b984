"""The whole loss on the Triton backend against the published results and the definition."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppap.kernels import PropagationConfig, propagate
from ppap.kernels.ppap_loss import triton_impl
from ppap.kernels.tiles.launch import row_block
from tests.helpers import CASES, GOLDEN_NAMES, golden_case, made_case
from tests.loss_forms import (
    FORMS,
    check_backend,
    check_sixteen_bits,
    fused,
    loss_and_gradient,
    materialised,
)

BLOCK = row_block(torch.device("cpu"))
on_triton = functools.partial(loss_and_gradient, impl="triton")


def budget_of_chunks(case, rows: int, precision: str = "fp32") -> int:
    """A budget in which `rows` anchors fit at a time."""
    return rows * triton_impl.bytes_per_anchor(case.features, case.z, precision, True)


# The interpreter takes a second for what a compiled kernel does at once, and the forms share their kernels:
# the fused one meets every case, the others those in which they differ from it.
OTHER_FORMS = [form for form in FORMS if form is not fused]
OTHERS_TOO = ("ragged", "no positives", "fixed threshold")


@pytest.mark.parametrize(
    ("form", "name"),
    [*((fused, name) for name in GOLDEN_NAMES), *((form, "t3_sparse") for form in OTHER_FORMS)],
)
def test_published_results(name, form):
    case = golden_case(name).to(torch.float32)
    loss, dz = on_triton(form, case, precision="fp32")
    assert loss.item() == pytest.approx(case.loss, rel=2e-5, abs=0)
    assert (dz.double() - golden_case(name).dz).abs().max() <= 2e-5 * case.dz.abs().max()


check = functools.partial(check_backend, "triton")


@pytest.mark.parametrize("make", CASES)
def test_equals_the_reference(make):
    check(make())


@pytest.mark.parametrize("make", [case for case in CASES if case.id in OTHERS_TOO])
@pytest.mark.parametrize("form", OTHER_FORMS)
def test_other_forms_equal_the_reference(make, form):
    check(make(), form)


@pytest.mark.parametrize("group_size", [None, 4])
def test_several_chunks(group_size):
    case = made_case(300, 48, 3 * BLOCK + 7, PropagationConfig(), 0.3)
    case.group_size = group_size
    check(case, memory_budget=budget_of_chunks(case, BLOCK))


@settings(deadline=None, max_examples=6, derandomize=True)
@given(
    rows=st.integers(1, 200),
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
    case = made_case(200, 48, 40, PropagationConfig(), 0.3)
    check_sixteen_bits("triton", case, precision, flips)


def test_embeddings_of_any_norm():
    case = made_case(100, 32, 70, PropagationConfig(), 0.3)
    case.z = case.z * torch.logspace(-3, 3, 100, dtype=torch.float64)[:, None]
    wanted = loss_and_gradient(materialised, case)
    for form in FORMS:
        got = on_triton(form, case.to(torch.float32), precision="fp32")
        assert (got[0] - wanted[0]).abs() <= 2e-6 * wanted[0].abs()
        assert (got[1] - wanted[1]).norm() <= 2e-5 * wanted[1].norm()


@pytest.mark.parametrize("temperature", [0.005, 0.8])
def test_small_temperatures(temperature):
    """The logits' bound is too wide to serve as the shift of the exponentials: the maximum is taken."""
    check(made_case(203, 32, 80, PropagationConfig(), temperature), tolerance=1e-4)
