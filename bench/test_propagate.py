"""Propagation: reference and backends."""

import pytest

from bench.machine import DEVICE
from bench.shapes import loss_inputs
from ppap.kernels import PropagationConfig, available_backends, propagate
from ppap.kernels.propagate import reference

CFG = PropagationConfig()
IMPLEMENTATIONS = ["reference", *(name for name, reason in available_backends().items() if reason is None)]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_propagate(impl, shape, measure):
    features, _, anchors = (tensor.to(DEVICE) for tensor in loss_inputs(shape))
    if impl == "reference":
        measure(lambda: reference.propagate(features, anchors, CFG), shape)
    else:
        measure(lambda: propagate(features, anchors, CFG, precision="fp32", impl=impl), shape)
