"""The loss: reference, published form and backends, forward and forward with gradient."""

import pytest
import torch

from bench import baselines
from bench.machine import DEVICE
from bench.shapes import Shape, loss_inputs
from ppap.kernels import PropagationConfig, available_backends, ppap_loss
from ppap.kernels.ppap_loss import reference

CFG = PropagationConfig()
TAU = 0.8
IMPLEMENTATIONS = ["reference", *(name for name, reason in available_backends().items() if reason is None)]


def loss_of(impl: str, features, z, anchors) -> torch.Tensor:
    """The training form of the loss."""
    if impl == "reference":
        return reference.ppap_loss(features, z, anchors, CFG, temperature=TAU)
    if impl == "published":
        return baselines.published(features, z, anchors, CFG, TAU)
    return ppap_loss(features, z, anchors, CFG, temperature=TAU, precision="fp32", impl=impl)


@pytest.fixture
def inputs(shape: Shape):
    """Features, embeddings that want a gradient, anchors; memory permitting."""
    features, z, anchors = (tensor.to(DEVICE) for tensor in loss_inputs(shape))
    return features, z.requires_grad_(), anchors


def check_against_reference(impl, features, z, anchors) -> None:
    """No time is reported for a wrong result: loss and gradient on a part of the anchors."""
    part = anchors[:: max(len(anchors) // 64, 1)]
    wanted = loss_of("reference", features, z, part)
    got = loss_of(impl, features, z, part)
    assert abs(got.item() - wanted.item()) <= 2e-5 * abs(wanted.item())
    pair = [torch.autograd.grad(loss, z)[0] for loss in (got, wanted)]
    assert (pair[0] - pair[1]).norm() <= 1e-4 * pair[1].norm()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_loss_forward(impl, shape, inputs, measure):
    features, z, anchors = inputs
    check_against_reference(impl, features, z, anchors)

    def forward():
        with torch.no_grad():
            loss_of(impl, features, z, anchors)

    measure(forward, shape)


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "published"])
def test_loss_forward_backward(impl, shape, inputs, measure):
    features, z, anchors = inputs
    if impl == "published" and shape.patches * shape.anchors * shape.width > 4e9:
        pytest.skip("takes minutes a step")

    def forward_backward():
        z.grad = None
        loss_of(impl, features, z, anchors).backward()

    measure(forward_backward, shape, products=6)
