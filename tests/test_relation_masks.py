"""``relation_masks``: hand-computed cases for the definition, then every implementation against it."""

import math

import pytest
import torch

from bench.shapes import clustered
from ppap.kernels import relation_masks, unpack_masks
from ppap.kernels.relation_masks import reference

# Cosines to the first key: 1, 0.8, 0.5, 0, -1.
COSINES = torch.tensor([1.0, 0.8, 0.5, 0.0, -1.0], dtype=torch.float64)
KEYS = torch.stack([COSINES, (1 - COSINES**2).sqrt()], dim=1)


def dense(pos_queries, phi, keys, psi, self_index, neg_queries=None):
    masks, num_positives, num_kept = relation_masks(pos_queries, phi, keys, psi, self_index, neg_queries)
    positive, kept = (unpack_masks(words, keys.shape[0]) for words in masks[:2])
    assert torch.equal(positive.sum(1), num_positives) and torch.equal(kept.sum(1), num_kept)
    assert torch.equal(masks.anchors, self_index)
    return positive, kept


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize("masks", [reference.relation_masks, dense])
def test_by_hand(masks):
    positive, kept = masks(KEYS[:1], values(0.5), KEYS, values(0.0), torch.tensor([0]))
    assert positive.tolist() == [[False, True, False, False, False]], "strictly above phi, without the anchor"
    assert kept.tolist() == [[False, True, False, False, True]], (
        "strictly below psi; both thresholds are ambiguous"
    )


@pytest.mark.parametrize("masks", [reference.relation_masks, dense])
def test_psi_above_phi_leaves_nothing_ambiguous(masks):
    positive, kept = masks(KEYS[:1], values(0.4), KEYS, values(0.9), torch.tensor([1]))
    assert positive.tolist() == [[True, False, True, False, False]]
    assert kept.tolist() == [[True, False, True, True, True]]


@pytest.mark.parametrize("masks", [reference.relation_masks, dense])
def test_other_queries_for_the_negatives(masks):
    positive, kept = masks(KEYS[:1], values(0.7), KEYS, values(-0.5), torch.tensor([3]), -KEYS[:1])
    assert positive.tolist() == [[True, True, False, False, False]]
    assert kept.tolist() == [[True, True, False, False, False]], "cosine to the opposite query below -0.5"


@pytest.mark.parametrize("masks", [reference.relation_masks, dense])
def test_infinite_psi_keeps_everyone_else(masks):
    _, kept = masks(KEYS[:1], values(0.7), KEYS, values(math.inf), torch.tensor([2]))
    assert kept.tolist() == [[True, True, False, True, True]]


@pytest.mark.parametrize(("anchors", "rows"), [(37, 203), (1, 1), (0, 30), (64, 64)])
@pytest.mark.parametrize("negative", [False, True])
def test_equals_the_reference(anchors, rows, negative):
    keys = clustered(rows, 32, seed=1, clusters=5).double()
    index = torch.randperm(rows, generator=torch.Generator().manual_seed(3))[:anchors]
    neg_queries = clustered(anchors, 32, seed=4, clusters=5).double() if negative else None
    phi, psi = torch.linspace(0, 0.9, anchors).double(), torch.linspace(-0.2, 0.5, anchors).double()
    wanted = reference.relation_masks(keys[index], phi, keys, psi, index, neg_queries)
    packed, _, _ = relation_masks(keys[index], phi, keys, psi, index, neg_queries, memory_budget=12_000)
    for words, mask in zip(packed[:2], wanted, strict=True):
        assert torch.equal(unpack_masks(words, rows), mask)


@pytest.mark.parametrize(("precision", "eps"), [("fp32", 2**-24), ("fp16", 2**-11), ("bf16", 2**-8)])
def test_flips_lie_close_to_a_threshold(precision, eps):
    keys = clustered(400, 64, seed=1)
    index = torch.arange(400)
    phi, psi = torch.full((400,), 0.55), torch.full((400,), 0.15)
    wanted = reference.relation_masks(keys.double(), phi.double(), keys.double(), psi.double(), index)
    packed, _, _ = relation_masks(keys, phi, keys, psi, index, precision=precision)
    sim = keys.double() @ keys.double().T
    near = ((sim - 0.55).abs() < 4 * 64**0.5 * eps) | ((sim - 0.15).abs() < 4 * 64**0.5 * eps)
    for words, mask in zip(packed[:2], wanted, strict=True):
        flipped = unpack_masks(words, 400) != mask
        assert not (flipped & ~near).any()
        assert flipped.float().mean() <= {"fp32": 0, "fp16": 5e-4, "bf16": 5e-3}[precision]


@pytest.mark.parametrize(
    ("index", "message"),
    [([0, 9], "range from 0 to 9"), ([-1, 0], "range from -1"), ([1, 1], "each may occur once")],
)
def test_bad_anchors(index, message):
    keys = clustered(9, 8, 1)
    with pytest.raises(ValueError, match=message):
        relation_masks(keys[:2], torch.zeros(2), keys, torch.zeros(2), torch.tensor(index))


def test_opcheck():
    keys = clustered(40, 16, seed=1)
    thresholds = (torch.full((5,), 0.5), torch.full((5,), 0.1))
    for negative in (None, keys[5:10]):
        arguments = (
            keys[:5],
            thresholds[0],
            keys,
            thresholds[1],
            torch.arange(5),
            negative,
            "fp32",
            2**20,
            "torch",
        )
        torch.library.opcheck(torch.ops.ppap.relation_masks.default, arguments)
