"""k-means by cosine: finds what is there, the same bits every time, and says what stands empty."""

import pytest
import torch
import torch.nn.functional as F

from ppap.errors import DataError
from ppap.nets.clustering import cosine_kmeans, dense_score, linked_clusters


def blobs(clusters=5, each=40, width=8, spread=0.05):
    generator = torch.Generator().manual_seed(1)
    centres = F.normalize(torch.randn(clusters, width, generator=generator), dim=1)
    noise = spread * torch.randn(clusters * each, width, generator=generator)
    scale = 10 ** torch.rand(clusters * each, 1, generator=generator)
    return (centres.repeat_interleave(each, 0) + noise) * scale, torch.arange(clusters).repeat_interleave(
        each
    )


def test_clusters_that_stand_apart_are_found_whatever_the_length_of_their_rows():
    rows, truth = blobs()
    found = cosine_kmeans(rows, 5)
    labels = (F.normalize(rows, dim=1) @ found.centres.T).argmax(dim=1)
    assert len(set(zip(labels.tolist(), truth.tolist(), strict=True))) == 5
    assert found.sizes.tolist() == [40] * 5 and found.empty == 0
    torch.testing.assert_close(found.centres.norm(dim=1), torch.ones(5))


def test_the_same_seed_gives_the_same_bits_and_touches_no_generator():
    rows = torch.randn(500, 16)
    before = torch.get_rng_state()
    one, two = cosine_kmeans(rows, 7, seed=3), cosine_kmeans(rows, 7, seed=3)
    assert torch.equal(one.centres, two.centres) and torch.equal(before, torch.get_rng_state())
    assert not torch.equal(one.centres, cosine_kmeans(rows, 7, seed=4).centres)


def test_fewer_distinct_rows_than_clusters_leave_some_empty(recwarn):
    found = cosine_kmeans(torch.eye(3).repeat(10, 1), 5)
    assert found.empty == 2 and torch.isfinite(found.centres).all()
    assert not recwarn.list
    with pytest.raises(DataError, match="3 patches cannot form 5 clusters"):
        cosine_kmeans(torch.eye(3), 5)


def uneven():
    """600 rows along an arc of 70 degrees, and twice 60 rows, 53 degrees apart, at right angles to it."""
    generator = torch.Generator().manual_seed(2)
    angle = 1.2 * torch.rand(600, generator=generator)
    arc = torch.stack([angle.cos(), angle.sin(), *torch.zeros(6, 600)], dim=1)
    small = torch.tensor([[0, 0, 1, 0, *[0] * 4], [0, 0, 0.6, 0.8, *[0] * 4]]).repeat_interleave(60, 0)
    rows = torch.cat([arc, small]) + 0.05 * torch.randn(720, 8, generator=generator)
    return rows, torch.tensor([0] * 600 + [1] * 60 + [2] * 60)


def test_linkage_keeps_small_groups_apart_where_kmeans_divides_a_large_one():
    rows, truth = uneven()

    def pairs(centres):
        labels = (F.normalize(rows, dim=1) @ centres.T).argmax(dim=1)
        return torch.bincount(3 * labels + truth, minlength=9).view(3, 3)

    for seed in range(3):
        linked, divided = linked_clusters(rows, 3, seed=seed), cosine_kmeans(rows, 3, seed=seed)
        assert pairs(linked.centres).amax(dim=1).sum() == 720
        assert sorted(linked.sizes.tolist()) == [60, 60, 600] and linked.empty == 0
        assert (pairs(divided.centres)[:, 0] > 0).sum() == 2, "a case that k-means gets wrong"


def test_a_few_rows_apart_are_no_cluster():
    rows, truth = uneven()
    far = torch.zeros(8, 8).index_fill_(1, torch.tensor([7]), 1.0)
    for seed in range(3):
        sizes = linked_clusters(torch.cat([rows, far]), 3, seed=seed).sizes
        assert sizes.min() >= 60 and sizes.sum() == 728


def test_linked_centres_are_the_directions_of_their_rows_means():
    rows, _ = uneven()
    found = linked_clusters(rows, 3, seed=1)
    unit = F.normalize(rows, dim=1)
    own = torch.stack([unit[(unit @ found.centres.T).argmax(dim=1) == k].mean(dim=0) for k in range(3)])
    torch.testing.assert_close(F.normalize(own, dim=1), found.centres, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.centres.norm(dim=1), torch.ones(3))


def test_linkage_repeats_itself_and_takes_odd_rows(recwarn):
    rows = torch.randn(300, 16)
    before = torch.get_rng_state()
    one, two = linked_clusters(rows, 7, seed=3), linked_clusters(rows, 7, seed=3)
    assert torch.equal(one.centres, two.centres) and torch.equal(before, torch.get_rng_state())
    whole = linked_clusters(rows, 1)
    assert whole.sizes.tolist() == [300]
    torch.testing.assert_close(whole.centres[0], F.normalize(F.normalize(rows, dim=1).mean(dim=0), dim=0))
    for few in (torch.eye(3).repeat(10, 1), torch.zeros(30, 4), torch.randn(5, 4)):
        found = linked_clusters(few, 5)
        assert found.sizes.sum() == len(few)
        torch.testing.assert_close(found.centres.norm(dim=1), torch.full((5,), float(few.any())))
    assert not recwarn.list
    with pytest.raises(DataError, match="3 patches cannot form 5 clusters"):
        linked_clusters(torch.eye(3), 5)


def test_the_score_prefers_clusters_that_stand_apart():
    tight, loose = (F.normalize(blobs(spread=spread)[0], dim=1) for spread in (0.05, 0.5))
    assert dense_score(tight, 5)[0] > dense_score(loose, 5)[0]
    assert dense_score(torch.eye(8).repeat(4, 1), 5)[1] == pytest.approx(8)
