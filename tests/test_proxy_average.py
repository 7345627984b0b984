"""``proxy_average``: hand-computed cases for the definition, then every implementation against it."""

import math

import pytest
import torch

from bench.shapes import clustered
from ppap.kernels import proxy_average
from ppap.kernels.proxy_average import reference

AXES = torch.eye(3, dtype=torch.float64)


@pytest.mark.parametrize("average", [reference.proxy_average, proxy_average])
def test_by_hand(average):
    keys = torch.stack([AXES[0], AXES[1], (AXES[0] + AXES[1]) / math.sqrt(2)])
    queries = torch.stack([AXES[0], AXES[2], AXES[1]])
    proxy, count = average(queries, keys, torch.tensor([0.5, 0.5, -1.0], dtype=torch.float64))
    first = AXES[0] * (1 + 1 / math.sqrt(2)) + AXES[1] / math.sqrt(2)
    assert count.tolist() == [2, 0, 3]
    assert torch.allclose(proxy[0], first / first.norm(), atol=1e-15)
    assert torch.equal(proxy[1], torch.zeros(3, dtype=torch.float64)), "no key: the zero vector"
    assert torch.allclose(proxy[2], (AXES[0] + AXES[1]) / math.sqrt(2), atol=1e-15)


@pytest.mark.parametrize("average", [reference.proxy_average, proxy_average])
def test_a_key_on_the_threshold_is_not_selected(average):
    _, count = average(AXES[:1], AXES, torch.tensor([0.0], dtype=torch.float64))
    assert count.tolist() == [1]


SIZES = [(37, 203, 32), (1, 1, 16), (0, 30, 16), (5, 0, 16), (20, 20, 7)]


@pytest.mark.parametrize(("anchors", "rows", "width"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_reference(anchors, rows, width, dtype, tolerance):
    keys = clustered(rows, width, seed=1, clusters=5).to(dtype)
    queries = clustered(anchors, width, seed=2, clusters=5).to(dtype)
    threshold = torch.linspace(-0.5, 0.9, anchors, dtype=dtype)
    wanted, wanted_count = reference.proxy_average(queries, keys, threshold)
    proxy, count = proxy_average(queries, keys, threshold, memory_budget=40_000)
    assert proxy.dtype == dtype and count.dtype == torch.int64
    assert torch.equal(count, wanted_count)
    torch.testing.assert_close(proxy, wanted, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 1e-3), ("bf16", 1e-2)])
def test_sixteen_bit_products(precision, tolerance):
    keys = clustered(300, 64, seed=1)
    wanted, wanted_count = reference.proxy_average(keys, keys, torch.full((300,), 0.55))
    proxy, count = proxy_average(keys, keys, torch.full((300,), 0.55), precision=precision)
    flips = (count - wanted_count).abs().sum() / wanted_count.sum()
    assert flips <= 5 * tolerance
    agreed = count == wanted_count
    assert agreed.float().mean() > 0.8
    torch.testing.assert_close(proxy[agreed], wanted[agreed], atol=tolerance, rtol=0)


def test_non_contiguous_inputs():
    keys = clustered(60, 32, seed=1)
    threshold = torch.full((20,), 0.5)
    wanted = proxy_average(keys[:40:2].contiguous(), keys[:, ::2].contiguous().repeat(1, 2), threshold)
    strided_keys = torch.cat([keys[:, ::2]] * 2, dim=1).T.contiguous().T
    got = proxy_average(keys[:40:2], strided_keys, threshold)
    assert torch.equal(got[1], wanted[1])
    torch.testing.assert_close(got[0], wanted[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, t: (q[:, :3], k, t), r"queries has shape \(4, 3\)"),
        (lambda q, k, t: (q, k, t[:2]), r"threshold has shape \(2,\)"),
        (lambda q, k, t: (q.long(), k, t), "queries is torch.int64"),
        (lambda q, k, t: (q, k.index_fill(0, torch.tensor([1]), math.nan), t), "keys of shape .* non-finite"),
        (lambda q, k, t: (q, k, t.fill_(math.nan)), "threshold of shape .* non-finite"),
    ],
)
def test_bad_input(change, message):
    arguments = change(clustered(4, 8, 0), clustered(9, 8, 1), torch.zeros(4))
    with pytest.raises(ValueError, match=message):
        proxy_average(*arguments)


def test_opcheck():
    keys = clustered(20, 16, seed=1)
    arguments = (keys[:5], keys, torch.full((5,), 0.5), "fp32", 2**20, "torch")
    torch.library.opcheck(torch.ops.ppap.proxy_average.default, arguments)
