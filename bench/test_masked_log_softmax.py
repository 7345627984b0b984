"""The contrastive loss over packed sets, forward and with gradients."""

import pytest
import torch

from bench.machine import DEVICE
from bench.shapes import Shape, loss_inputs
from ppap.kernels import available_backends, masked_log_softmax, relation_masks, unpack_masks
from ppap.kernels.masked_log_softmax import reference

BACKENDS = [name for name, reason in available_backends().items() if reason is None]
PHI, PSI, TAU = 0.55, 0.1, 0.8


@pytest.fixture
def inputs(shape: Shape):
    """Embeddings of the anchors and of all patches, and the masks."""
    features, z, anchors = (tensor.to(DEVICE) for tensor in loss_inputs(shape))
    phi, psi = (torch.full((len(anchors),), value, device=DEVICE) for value in (PHI, PSI))
    masks, _, _ = relation_masks(features[anchors], phi, features, psi, anchors, precision="fp32")
    return z[anchors].requires_grad_(), z.requires_grad_(), masks


@pytest.mark.parametrize("impl", BACKENDS)
def test_masked_log_softmax(impl, shape, inputs, measure):
    z_anchors, z, masks = inputs

    def forward():
        with torch.no_grad():
            return masked_log_softmax(z_anchors, z, masks, TAU, precision="fp32", impl=impl)

    few = slice(None, None, max(len(z_anchors) // 64, 1))
    sets = [unpack_masks(words[few], len(z)) for words in (masks.positive, masks.kept)]
    wanted = reference.masked_log_softmax(z_anchors[few], z, *sets, TAU)
    torch.testing.assert_close(forward()[few], wanted.detach(), atol=1e-4, rtol=1e-4)
    measure(forward, shape, products=1)


@pytest.mark.parametrize("impl", BACKENDS)
def test_masked_log_softmax_backward(impl, shape, inputs, measure):
    z_anchors, z, masks = inputs

    def forward_backward():
        z.grad = z_anchors.grad = None
        masked_log_softmax(z_anchors, z, masks, TAU, precision="fp32", impl=impl).sum().backward()

    # Logits, and the products of their gradient with either side; logits made twice are not necessary work.
    measure(forward_backward, shape, products=3)
