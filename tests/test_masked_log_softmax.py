"""``masked_log_softmax``: hand-computed cases for the definition, then loss and both gradients against it."""

import math

import pytest
import torch

from ppap.kernels import masked_log_softmax, pack_masks
from ppap.kernels.masked_log_softmax import reference


def packed(z_anchors, z, positive, kept, temperature, **options):
    return masked_log_softmax(z_anchors, z, (pack_masks(positive), pack_masks(kept)), temperature, **options)


def inputs(anchors, rows, width, dtype=torch.float64, scale=1.0):
    g = torch.Generator().manual_seed(anchors + rows)
    z_anchors, z = (scale * torch.randn(n, width, generator=g, dtype=torch.float64) for n in (anchors, rows))
    positive = torch.rand(anchors, rows, generator=g) < 0.1
    kept = positive | (torch.rand(anchors, rows, generator=g) < 0.5)
    if anchors > 2:
        positive[1], kept[2], positive[2] = False, False, False
    return z_anchors.to(dtype), z.to(dtype), positive, kept


def loss_and_gradients(function, z_anchors, z, positive, kept, weights, **options):
    z_anchors, z = z_anchors.detach().requires_grad_(), z.detach().requires_grad_()
    loss = function(z_anchors, z, positive, kept, 0.3, **options)
    (loss * weights).sum().backward()
    return loss.detach(), z_anchors.grad, z.grad


@pytest.mark.parametrize("function", [reference.masked_log_softmax, packed])
def test_by_hand(function):
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    positive = torch.tensor([[False, False, True]])
    kept = torch.tensor([[False, True, True]])
    loss = function(z[:1], z, positive, kept, 0.5)
    # Logits 2, 0, 2; the denominator holds the second and the third.
    assert loss.item() == pytest.approx(math.log(1 + math.exp(2)) - 2, abs=1e-15)
    assert function(z[:1], z, positive & False, kept, 0.5).item() == 0


SIZES = [(37, 203, 33), (1, 1, 16), (0, 30, 16), (64, 64, 16)]


@pytest.mark.parametrize(("anchors", "rows", "width"), SIZES)
@pytest.mark.parametrize(
    ("dtype", "forward", "backward"), [(torch.float64, 1e-12, 1e-12), (torch.float32, 1e-5, 5e-4)]
)
def test_equals_the_reference(anchors, rows, width, dtype, forward, backward):
    arguments = inputs(anchors, rows, width)
    weights = torch.linspace(0.5, 2, anchors).double()
    wanted = loss_and_gradients(reference.masked_log_softmax, *arguments, weights)
    z_anchors, z, positive, kept = arguments
    got = loss_and_gradients(
        packed, z_anchors.to(dtype), z.to(dtype), positive, kept, weights.to(dtype), memory_budget=40_000
    )
    for value, true, tolerance in zip(got, wanted, (forward, backward, backward), strict=True):
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), true, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 1e-3), ("bf16", 1e-2)])
def test_sixteen_bit_products(precision, tolerance):
    z_anchors, z, positive, kept = inputs(40, 300, 64)
    z_anchors, z = (torch.nn.functional.normalize(t, dim=1) for t in (z_anchors, z))
    weights = torch.ones(40).double()
    wanted = loss_and_gradients(reference.masked_log_softmax, z_anchors, z, positive, kept, weights)
    got = loss_and_gradients(
        packed, z_anchors.float(), z.float(), positive, kept, weights.float(), precision=precision
    )
    for value, true in zip(got, wanted, strict=True):
        assert (value - true).norm() <= tolerance * true.norm()


@pytest.mark.parametrize("scale", [1e-6, 1e3, 1e6])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_any_finite_norm(scale, precision):
    """Judged as a share of the largest logit, which is the unit in which products round."""
    z_anchors, z, positive, kept = inputs(20, 100, 32, scale=scale)
    weights = torch.ones(20).double()
    wanted = loss_and_gradients(reference.masked_log_softmax, z_anchors, z, positive, kept, weights)
    got = loss_and_gradients(
        packed, z_anchors.float(), z.float(), positive, kept, weights.float(), precision=precision
    )
    unit = max(1.0, float((z_anchors @ z.T).abs().max()) / 0.3)
    assert ((got[0] - wanted[0]).abs() <= {"fp32": 2e-6, "fp16": 2e-3}[precision] * unit).all()
    assert all(torch.isfinite(value).all() for value in got)


def test_gradcheck():
    z_anchors, z, positive, kept = inputs(5, 12, 4)
    z_anchors.requires_grad_(), z.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: packed(a, b, positive, kept, 0.5), (z_anchors, z))


def test_gradient_of_an_expanded_upstream_gradient():
    z_anchors, z, positive, kept = inputs(5, 12, 4)
    z.requires_grad_()
    loss = packed(z_anchors, z, positive, kept, 0.5)
    loss.sum().backward()
    wanted = torch.autograd.grad(reference.masked_log_softmax(z_anchors, z, positive, kept, 0.5).sum(), z)[0]
    torch.testing.assert_close(z.grad, wanted, atol=1e-12, rtol=0)


def test_second_derivative_raises():
    z_anchors, z, positive, kept = inputs(5, 12, 4)
    z.requires_grad_()
    (dz,) = torch.autograd.grad(packed(z_anchors, z, positive, kept, 0.5).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dz.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"kept": torch.zeros(5, 2, dtype=torch.int32)}, r"give int32 \(5, 1\)"),
        ({"z": torch.full((12, 4), math.inf)}, "non-finite"),
        ({"memory_budget": 10}, "memory_budget is 10 bytes; one anchor needs"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
    ],
)
def test_bad_input(change, message):
    z_anchors, z, positive, kept = inputs(5, 12, 4, dtype=torch.float32)
    given = {"z": z, "kept": pack_masks(kept), "temperature": 0.5, **change}
    options = {key: given.pop(key) for key in ("memory_budget", "precision") if key in given}
    with pytest.raises(ValueError, match=message):
        masked_log_softmax(
            z_anchors, given["z"], (pack_masks(positive), given["kept"]), given["temperature"], **options
        )


def test_opcheck():
    z_anchors, z, positive, kept = inputs(5, 40, 8, dtype=torch.float32)
    z_anchors.requires_grad_(), z.requires_grad_()
    arguments = (z_anchors, z, pack_masks(positive), pack_masks(kept), 0.5, "fp32", 2**20, "torch")
    torch.library.opcheck(torch.ops.ppap.masked_log_softmax.default, arguments)
    lse = torch.ops.ppap.masked_log_softmax(*arguments)[1].detach()
    tensors = [t.detach() for t in arguments[:4]]
    backward = (torch.ones(5), *tensors, lse, *arguments[4:])
    torch.library.opcheck(torch.ops.ppap.masked_log_softmax_backward.default, backward)
