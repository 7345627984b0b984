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
    """Three groups of 600, 20 and 20 rows about orthogonal directions, the large one spread wide."""
    generator = torch.Generator().manual_seed(2)
    truth = torch.tensor([0] * 600 + [1] * 20 + [2] * 20)
    spread = torch.where(truth == 0, 0.3, 0.05)[:, None]
    return F.one_hot(truth, 12).float() + spread * torch.randn(640, 12, generator=generator), truth


def test_linkage_keeps_a_small_group_apart_from_a_large_one_which_kmeans_divides():
    rows, truth = uneven()
    unit = F.normalize(rows, dim=1)

    def right(centres):
        labels = (unit @ centres.T).argmax(dim=1)
        pairs = torch.bincount(3 * labels + truth, minlength=9).view(3, 3)
        return pairs.amax(dim=1).sum().item()

    linked = [linked_clusters(rows, 3, seed=seed) for seed in range(3)]
    assert all(right(found.centres) >= 625 for found in linked)
    assert all(found.sizes.sum() == 640 and found.empty == 0 for found in linked)
    assert all(right(cosine_kmeans(rows, 3, seed=seed).centres) < 615 for seed in range(3))


def test_linked_centres_are_the_directions_of_their_rows_means():
    rows, _ = uneven()
    found = linked_clusters(rows, 3, seed=1)
    unit = F.normalize(rows, dim=1)
    own = torch.stack([unit[(unit @ found.centres.T).argmax(dim=1) == k].mean(dim=0) for k in range(3)])
    assert (F.cosine_similarity(own, found.centres) > 0.99).all()
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
        assert torch.isfinite(found.centres).all() and found.sizes.sum() == len(few)
    assert not recwarn.list
    with pytest.raises(DataError, match="3 patches cannot form 5 clusters"):
        linked_clusters(torch.eye(3), 5)


def test_the_score_prefers_clusters_that_stand_apart():
    tight, loose = (F.normalize(blobs(spread=spread)[0], dim=1) for spread in (0.05, 0.5))
    assert dense_score(tight, 5)[0] > dense_score(loose, 5)[0]
    assert dense_score(torch.eye(8).repeat(4, 1), 5)[1] == pytest.approx(8)
