"""``propagate`` against the definition, and its settings."""

import math

import pytest
import torch

from ppap.kernels import PropagationConfig, propagate
from ppap.kernels.ppap_loss import reference
from tests.helpers import CASES, GOLDEN_NAMES, golden_case, made_case


@pytest.mark.parametrize("make", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_equals_the_reference(make, dtype, tolerance):
    case = make()
    wanted = reference.propagate(case.features, case.anchors, case.cfg)
    rel = propagate(case.features.to(dtype), case.anchors, case.cfg, memory_budget=60_000)
    for name in ("proxies", "phi", "psi"):
        value = getattr(rel, name)
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), getattr(wanted, name), atol=tolerance, rtol=0)
    assert torch.equal(rel.num_positives, wanted.positive.sum(1))
    assert torch.equal(rel.num_negatives, wanted.kept.sum(1) - wanted.positive.sum(1))
    rows = torch.arange(len(rel.anchors))
    assert torch.equal(rel.positives(rows), wanted.positive)
    assert torch.equal(rel.negatives(rows), wanted.kept & ~wanted.positive)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_set_sizes_of_the_published_code(name):
    case = golden_case(name)
    rel = propagate(case.features, case.anchors, case.cfg)
    assert rel.num_positives.double().mean().item() == pytest.approx(case.mean_positives, abs=1e-9)
    # The published count of negatives is that of similarities below psi, before overlap and anchor are
    # removed.
    below_psi = (rel.proxies @ rel.features.T < rel.psi[:, None]).sum(1)
    assert below_psi.double().mean().item() == pytest.approx(case.mean_below_psi, abs=1e-9)


def test_features_of_any_magnitude_and_type_are_normalised():
    case = made_case(60, 16, 9, PropagationConfig(), 0.3)
    wanted = propagate(case.features, case.anchors, case.cfg)
    for scale in (1e-30, 1e30):
        rel = propagate((case.features * scale).float(), case.anchors, case.cfg)
        torch.testing.assert_close(rel.proxies.double(), wanted.proxies, atol=2e-6, rtol=0)
    half = propagate(case.features.half(), case.anchors, case.cfg)
    assert half.proxies.dtype == torch.float32 and half.precision == "fp16"


def test_a_zero_row_is_similar_to_nothing():
    features = torch.eye(4)
    features[2] = 0
    rel = propagate(features, None, PropagationConfig(phi0=0.5, psi0=0.5, steps=1))
    assert torch.equal(rel.proxies[2], torch.zeros(4))
    assert rel.num_positives.tolist() == [0, 0, 0, 0]
    assert rel.phi[2].item() == pytest.approx(0.5 - 1 / 3), "a proxy that vanished has moved by 1"


def test_rows_of_a_dense_set_may_be_chosen():
    case = made_case(60, 16, 9, PropagationConfig(), 0.3)
    rel = propagate(case.features, case.anchors, case.cfg)
    everything = rel.positives(torch.arange(9))
    assert torch.equal(rel.positives(torch.tensor([4, 1])), everything[[4, 1]])
    assert rel.positives([]).shape == (0, 60)


def test_no_gradient_reaches_the_features():
    features = torch.randn(10, 8, requires_grad=True)
    assert not propagate(features, None, PropagationConfig()).proxies.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"steps": math.inf}, "steps is inf"),
        ({"sigma_pos": 0.0}, "sigma_pos is 0.0"),
        ({"phi0": math.nan}, "phi0 is nan"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PropagationConfig(**settings)


@pytest.mark.parametrize(
    ("features", "anchors", "message"),
    [
        (torch.zeros(4), None, "features has shape"),
        (torch.full((4, 3), math.nan), None, "features .* non-finite"),
        (torch.ones(4, 3), torch.tensor([4]), "range from 4 to 4; valid: 0 to 3"),
        (torch.ones(4, 3), torch.tensor([1.0]), "anchors is torch.float32"),
    ],
)
def test_bad_input(features, anchors, message):
    with pytest.raises(ValueError, match=message):
        propagate(features, anchors, PropagationConfig())


def test_settings_pass_through_floats():
    cfg = PropagationConfig(0.3, 0.4, 5, 1.5, 2.5, False, True)
    assert PropagationConfig.from_floats(cfg.as_floats()) == cfg


def test_opcheck():
    case = made_case(40, 16, 5, PropagationConfig(), 0.3)
    arguments = (case.features.float(), case.anchors, case.cfg.as_floats(), "fp32", 2**20, "torch")
    torch.library.opcheck(torch.ops.ppap.propagate.default, arguments)
