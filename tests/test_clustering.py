"""k-means by cosine: finds what is there, the same bits every time, and says what stands empty."""

import pytest
import torch
import torch.nn.functional as F

from ppap.errors import DataError
from ppap.nets.clustering import cosine_kmeans, dense_score


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


def test_the_score_prefers_clusters_that_stand_apart():
    tight, loose = (F.normalize(blobs(spread=spread)[0], dim=1) for spread in (0.05, 0.5))
    assert dense_score(tight, 5)[0] > dense_score(loose, 5)[0]
    assert dense_score(torch.eye(8).repeat(4, 1), 5)[1] == pytest.approx(8)
