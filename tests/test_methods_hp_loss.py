"""The loss of Hidden Positives: against loops in float64, its gradient, its memory."""

import math

import numpy as np
import pytest
import torch

from bench.shapes import clustered
from ppap.methods import hp_loss as module
from ppap.methods.hidden_positives import hidden_positives
from ppap.methods.hp_loss import HPSettings, Positives, hp_loss
from tests.helpers import peak_bytes

TAU, TAU0, WEIGHT = 0.4, 0.07, 0.3
ALL = torch.arange(22)
RAGGED = 2 * 8 * 22 + 3 * 4 * 7 * 22  # bytes of a chunk's sets and of three rows


def case(count=22, chunk=8, seed=0):
    """Embeddings and random sets in float64; anchors without any and with only task-specific positives."""
    generator = torch.Generator().manual_seed(seed)
    z, z_mix = (clustered(count, 5, seed=k, clusters=4).double() for k in (1, 2))
    a, b = (torch.rand(count, count, generator=generator) < 0.2 for _ in range(2))
    for sets in (a, b):
        sets.fill_diagonal_(False)
    a[3] = False  # only task-specific positives
    a[5] = b[5] = False  # none at all
    kept = torch.rand(chunk, count, generator=generator) < 0.15
    return z, z_mix, a, b, kept


def settings(chunk=8, reweighting=True, budget=2**20):
    return HPSettings(TAU, TAU0, chunk, reweighting, budget)


def given(a, b):
    """Sets of any anchors, out of those of all."""
    return lambda rows: Positives(a[rows], b[rows])


def by_loops(embeddings, anchors, a, b, kept, chunk, reweighting, weight):
    """The formulas of the module's docstring, one pair at a time."""
    count, chunks = len(a), []
    for z in embeddings:
        for start in range(0, len(anchors), chunk):
            rows = []
            for k, i in enumerate(anchors[start : start + chunk]):
                if not a[i].any():
                    continue
                m = [float(a[i, j]) + weight * float(b[i, j]) for j in range(count)]
                inside = [j for j in range(count) if j != i and (a[i, j] or kept[k, j])]
                below = math.log(sum(math.exp(z[i] @ z[j] / TAU) for j in inside))
                rows.append((sum(m), sum(m[j] * (z[i] @ z[j] / TAU - below) for j in range(count))))
            if not rows:
                chunks.append(0.0)
                continue
            mean = np.mean([n for n, _ in rows])
            terms = [(n / mean if reweighting else 1) / n * total for n, total in rows]
            chunks.append(-TAU / TAU0 * np.mean(terms))
    return np.mean(chunks)


@pytest.mark.parametrize("reweighting", [True, False])
@pytest.mark.parametrize("weight", [0.0, WEIGHT])
@pytest.mark.parametrize(
    "budget", [2**20, 1, RAGGED], ids=["one tile", "tiles of a row", "tiles of three rows of eight"]
)
@pytest.mark.parametrize("anchors", [range(22), [0, 3, 4, 5, 9, 10, 14, 15, 16, 20, 21]], ids=["all", "some"])
def test_loss_against_loops(anchors, reweighting, weight, budget):
    z, z_mix, a, b, kept = case()
    index = torch.tensor(anchors)
    got = hp_loss(
        (z, z_mix),
        index,
        given(a, b),
        weight,
        kept,
        settings(reweighting=reweighting, budget=budget),
    )
    arrays = [x.numpy() for x in (z, z_mix)]
    wanted = by_loops(arrays, anchors, a.numpy(), b.numpy(), kept.numpy(), 8, reweighting, weight)
    assert got.loss.item() == pytest.approx(wanted, rel=1e-12)
    a, b = a[index], b[index]
    assert got.positives.item() == pytest.approx(a.sum(1).double().mean().item())
    assert got.specific.item() == pytest.approx(b.sum(1).double().mean().item() if weight else 0)
    tiled = torch.cat([kept, kept, kept])[: len(index)] & ~torch.eye(22, dtype=torch.bool)[index]
    assert got.negatives.item() == pytest.approx((tiled & ~a).sum(1).double().mean().item())


def test_reweighting_is_the_plain_mean_over_pairs():
    """With r_i = n_i / mean n, a chunk's loss is the mean of logp over all its (weighted) pairs."""
    z, _, a, b, kept = case()
    got = hp_loss((z,), ALL, given(a, b), WEIGHT, kept, settings()).loss
    parts = []
    for start in range(0, 22, 8):
        rows = [i for i in range(start, min(start + 8, 22)) if a[i].any()]
        total = pairs = 0.0
        for i in rows:
            inside = a[i] | kept[i - start]
            inside[i] = False
            logits = z[i] @ z.T / TAU
            logp = logits - logits[inside].logsumexp(0)
            m = a[i] + WEIGHT * b[i]
            total, pairs = total + (m * logp).sum(), pairs + m.sum()
        parts.append(-TAU / TAU0 * total / pairs)
    torch.testing.assert_close(got, torch.stack(parts).mean())


@pytest.mark.parametrize("anchors", [range(7), [1, 3, 4, 5, 6, 0]], ids=["all", "some"])
@pytest.mark.parametrize(("reweighting", "budget"), [(True, 1), (False, 2**20)])
def test_gradient(reweighting, budget, anchors):
    z, z_mix, a, b, kept = (x[..., :7] if x.dtype == torch.bool else x[:, :3] for x in case(chunk=4))
    a, b, limits = a[:7], b[:7], settings(4, reweighting, budget)
    pair = tuple(x[:7].clone().requires_grad_() for x in (z, z_mix))
    assert all(a[list(part)].any() for part in (anchors[:4], anchors[4:])) and b[3].any()

    def loss(*embeddings):
        return hp_loss(embeddings, torch.tensor(anchors), given(a, b), WEIGHT, kept, limits).loss

    assert torch.autograd.gradcheck(loss, pair)


def test_without_positives_the_loss_is_zero_and_bad_numbers_show():
    z, _, a, b, kept = case()
    z = z.requires_grad_()
    nothing = torch.zeros_like(a)
    # Published: NaN for a chunk without anchors; here 0, also where the denominator is empty too.
    for k in (kept, torch.zeros_like(kept)):
        loss = hp_loss((z,), ALL, given(nothing, b), WEIGHT, k, settings()).loss
        assert loss == 0 and not torch.autograd.grad(loss, z)[0].any()
    bad = z.detach().clone()
    bad[2, 0] = torch.nan
    assert hp_loss((bad,), ALL, given(a, b), 0.0, kept, settings()).loss.isnan()


def test_memory_is_bounded():
    """The cosines of this batch take 39 MB in fp32; all temporaries together stay within a budget of 12."""
    count, budget = 3136, 12 * 2**20
    features, z = clustered(count, 16, seed=0), clustered(count, 16, seed=1).requires_grad_()
    kept = torch.rand(784, count) < 0.02
    limits = HPSettings(TAU, TAU0, 784, True, budget)
    radius = torch.full((count,), 0.8)

    def run():
        sets = lambda rows: Positives(hidden_positives(features, radius, rows), None)  # noqa: E731
        hp_loss((z,), torch.arange(count), sets, 0.0, kept, limits).loss.backward()

    peak = peak_bytes(run)
    assert 3 * 2**20 < peak < budget + 4 * z.numel() * 4, peak
    assert module._tile_rows(12_544, HPSettings(TAU, TAU0, 784, True, 2**29)) >= 784
