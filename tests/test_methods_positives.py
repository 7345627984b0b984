"""Hidden positives: the rule by hand, against loops in float64, and the draw of a pool."""

import math

import numpy as np
import pytest
import torch

from bench.shapes import clustered
from ppap.methods import hidden_positives as hidden
from ppap.methods.hidden_positives import draw_pool, hidden_positives, pool_radius, unit_rows


def angles(*degrees, length=1.0):
    return torch.tensor(
        [[length * math.cos(math.radians(a)), length * math.sin(math.radians(a))] for a in degrees]
    )


def test_radius_and_positives_by_hand():
    """On a circle: a patch reaches as far as its nearest entry of the pool; either may reach the other."""
    features = angles(0, 25, 60, 100, length=3.0)  # the norm does not matter
    pool = angles(30, 170, length=0.5)
    radius = pool_radius(features, pool)
    wanted = [math.cos(math.radians(a)) for a in (30, 5, 30, 70)]
    torch.testing.assert_close(radius, torch.tensor(wanted))
    # Patch 0 reaches 30 degrees (to patch 1), patch 1 reaches 5, patch 2 30, patch 3 70 (to patch 2, not 1).
    wanted = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)
    assert torch.equal(hidden_positives(features, radius, slice(None)), wanted)
    assert torch.equal(hidden_positives(features, radius, torch.tensor([3, 0])), wanted[[3, 0]])
    unit = unit_rows(features)
    assert torch.equal(hidden_positives(unit, radius, slice(1, 3), normalised=True), wanted[1:3])


def test_the_rule_is_strict_and_leaves_the_patch_itself_out():
    same = torch.tensor([[1.0, 0.0]] * 3)
    assert not hidden_positives(same, torch.ones(3), slice(None)).any(), "a cosine of 1 does not exceed 1"
    found = hidden_positives(same, torch.zeros(3), slice(None))
    assert torch.equal(found, ~torch.eye(3, dtype=torch.bool))


def test_against_loops_in_float64(monkeypatch):
    monkeypatch.setattr(hidden, "_TILE", 40)  # tiles of a few rows
    features, pool = (
        clustered(37, 12, seed=0, clusters=4).double(),
        clustered(9, 12, seed=1, clusters=4).double(),
    )
    f = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    r = pool.numpy() / np.linalg.norm(pool.numpy(), axis=1, keepdims=True)
    radius = np.array([max(float(x @ y) for y in r) for x in f])
    wanted = np.array(
        [
            [i != j and (f[i] @ f[j] > radius[i] or f[i] @ f[j] > radius[j]) for j in range(37)]
            for i in range(37)
        ]
    )
    got = pool_radius(features, pool)
    np.testing.assert_allclose(got.numpy(), radius, rtol=0, atol=1e-14)
    positive = hidden_positives(features, got, slice(None))
    assert 0.01 < wanted.mean() < 0.9 and np.array_equal(positive.numpy(), wanted)
    assert torch.equal(positive, positive.T)


def test_a_pool_takes_one_patch_of_every_image():
    maps = [torch.arange(2 * 6.0).view(2, 1, 2, 3), 12 + torch.arange(3 * 6.0).view(3, 1, 2, 3)]
    maps = [
        torch.cat([m, torch.ones_like(m)], dim=1) for m in maps
    ]  # (value, 1), so that a norm tells the value
    pool = draw_pool(iter(maps), 4, seed=0)
    value = pool[:, 0] / pool[:, 1]
    torch.testing.assert_close(pool.norm(dim=1), torch.ones(4))
    assert ((value + 0.5) // 6).tolist() == [0, 1, 2, 3], "image m gives entry m"
    again = draw_pool(iter(maps), 4, seed=0)
    others = [draw_pool(iter(maps), 4, *key) for key in ((1, 0), (0, 1), (0, 2), (2, 3))]
    assert torch.equal(pool, again) and not all(torch.equal(pool, other) for other in others)


def test_positions_are_uniform():
    ramp = torch.stack([torch.arange(10.0), torch.ones(10)]).view(1, 2, 2, 5).expand(4000, -1, -1, -1)
    pool = draw_pool([ramp], 4000, seed=3)
    counts = torch.bincount((pool[:, 0] / pool[:, 1]).round().long(), minlength=10)
    assert len(counts) == 10 and counts.min() > 320 and counts.max() < 480  # 400, standard deviation 19


def test_bad_pools_are_refused():
    with pytest.raises(ValueError, match="3 images for a reference pool of 4; give a pool of at most 3"):
        draw_pool([torch.ones(3, 2, 1, 1)], 4, seed=0)
    with pytest.raises(ValueError, match="pool is empty"):
        pool_radius(torch.ones(3, 2), torch.ones(0, 2))
    with pytest.raises(ValueError, match="do not fit"):
        pool_radius(torch.ones(3, 2), torch.ones(2, 3))
