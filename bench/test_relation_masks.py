"""Positive and kept sets of every anchor, packed to bits."""

import pytest
import torch

from bench.machine import DEVICE
from bench.shapes import loss_inputs
from ppap.kernels import available_backends, relation_masks
from ppap.kernels.relation_masks import reference

BACKENDS = [name for name, reason in available_backends().items() if reason is None]
PHI, PSI = 0.55, 0.1


@pytest.mark.parametrize("impl", BACKENDS)
def test_relation_masks(impl, shape, measure):
    features, _, anchors = (tensor.to(DEVICE) for tensor in loss_inputs(shape))
    phi, psi = (torch.full((len(anchors),), value, device=DEVICE) for value in (PHI, PSI))
    few = slice(None, None, max(len(anchors) // 64, 1))

    chosen = anchors[few]
    wanted = [
        sets.sum(dim=1)
        for sets in reference.relation_masks(features[chosen], phi[few], features, psi[few], chosen)[:2]
    ]
    got = relation_masks(features[chosen], phi[few], features, psi[few], chosen, precision="fp32", impl=impl)[
        1:
    ]
    for number, right in zip(got, wanted, strict=True):
        # Similarities within rounding of a threshold may fall on either side.
        assert (number - right).abs().sum() <= 1e-4 * right.sum()
    queries = features[anchors]
    measure(
        lambda: relation_masks(queries, phi, features, psi, anchors, precision="fp32", impl=impl),
        shape,
        products=1,
    )
