"""What the kernels are compared with must itself be right."""

import pytest
import torch

from bench import baselines
from bench.gpu.cells import Inputs, dense_flops, wrong
from bench.shapes import Shape, loss_inputs
from ppap.kernels import PropagationConfig
from ppap.kernels.ppap_loss import reference

CFG = PropagationConfig()


@pytest.fixture
def data():
    features, z, anchors = loss_inputs(Shape("little", 260, 70, 48, 32))
    return features, z.requires_grad_(), anchors


def test_the_published_form_is_the_definition(data):
    features, z, anchors = data
    wanted = reference.ppap_loss(features, z, anchors, CFG, temperature=0.3)
    got = baselines.published(features, z, anchors, CFG, 0.3, chunks=5)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)
    pair = [torch.autograd.grad(loss, z)[0] for loss in (got, wanted)]
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-7)


def test_compiled_chunks_are_the_definition(data):
    features, z, anchors = data
    wanted = reference.ppap_loss(features, z, anchors, CFG, temperature=0.3)
    loss, dz = baselines.compiled_chunks(0.3, CFG, "fp32", 2**29)(features, z.detach(), anchors)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(dz, torch.autograd.grad(wanted, z)[0], rtol=1e-4, atol=1e-7)


def test_dense_flops_are_those_of_the_floors():
    """N = A = 50,176, D = 384: 13.5, 17.4 and 21.3 TFLOP for one to three steps."""
    whole = Shape("whole", 50_176, 50_176, 384, 384)
    assert [round(dense_flops(whole, steps) / 1e12, 1) for steps in (1, 2, 3)] == [13.5, 17.4, 21.3]


@pytest.mark.parametrize("form", ["torch fp16", "compiled fp32"])
def test_a_wrong_form_is_found(form):
    inputs = Inputs.of(Shape("little", 260, 70, 48, 32), torch.device("cpu"))
    assert wrong(form, inputs) is None
    inputs.loss *= 1.03
    assert wrong(form, inputs).startswith("WRONG, not timed: loss off by 2.9e-02")
    inputs.loss /= 1.03
    inputs.dz *= torch.nan
    assert "gradient by nan" in wrong(form, inputs)
