"""One step of the propagation: similarities and thresholded means of the keys."""

import pytest
import torch

from bench.machine import DEVICE
from bench.shapes import loss_inputs
from ppap.kernels import available_backends, proxy_average
from ppap.kernels.proxy_average import reference

BACKENDS = [name for name, reason in available_backends().items() if reason is None]
THRESHOLD = 0.55


@pytest.mark.parametrize("impl", BACKENDS)
def test_proxy_average(impl, shape, measure):
    features, _, anchors = (tensor.to(DEVICE) for tensor in loss_inputs(shape))
    threshold = torch.full((len(anchors),), THRESHOLD, device=DEVICE)
    few = slice(None, None, max(len(anchors) // 64, 1))
    wanted, _ = reference.proxy_average(features[anchors[few]], features, threshold[few])
    got, _ = proxy_average(features[anchors[few]], features, threshold[few], precision="fp32", impl=impl)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    queries = features[anchors]
    measure(
        lambda: proxy_average(queries, features, threshold, precision="fp32", impl=impl), shape, products=1
    )
