"""Quick measures of patch features: hand-made patches, clusters that anyone would find, error paths."""

import pytest
import torch

from ppap.data.patch_labels import patch_labels
from ppap.evaluation.patches import cluster_scores, colour_features, kmeans, linear_scores


def blobs(generator, spread=0.1):
    """Three far-apart groups of 40 rows and their numbers, shuffled."""
    centres = torch.tensor([[5.0, 0.0], [0.0, 5.0], [-5.0, -5.0]])
    labels = torch.arange(120) % 3
    return centres[labels] + spread * torch.randn(120, 2, generator=generator), labels


def test_patch_labels_are_majorities():
    label = torch.tensor([[0, 0, 1, 2], [0, 3, 2, 1], [-1, -1, -1, 2], [-1, -1, -1, -1]])
    assert patch_labels(label[None], 2).tolist() == [0, 1, -1, 2]
    assert patch_labels(torch.full((1, 4, 4), -1), 2).tolist() == [-1] * 4, "unlabelled images"
    with pytest.raises(ValueError, match="multiple"):
        patch_labels(label[None, :3], 2)


def test_colour_features_of_flat_and_striped_patches():
    pixels = torch.zeros(1, 4, 8, 3, dtype=torch.uint8)
    pixels[:, :, 0] = 200
    pixels[:, :, 4:, 1] = 128
    rows = colour_features(pixels, 4)
    assert rows.shape == (2, 6)
    assert rows[0, 3] > 0 and rows[1, 3] == 0  # only the first patch has a stripe
    histogram = colour_features(pixels, 4, bins=2)
    assert histogram.shape == (2, 8)
    assert torch.allclose(histogram.square().sum(1), torch.ones(2))
    assert histogram[1, 2] == 1 and torch.isclose(histogram[0, 7], torch.tensor(0.5))
    with pytest.raises(ValueError, match="divisor"):
        colour_features(pixels, 4, bins=3)


def test_kmeans_finds_groups_and_repeats_itself(generator):
    rows, labels = blobs(generator)
    found = kmeans(rows, 3, seed=1)
    assert len({(int(a), int(b)) for a, b in zip(found, labels, strict=True)}) == 3
    assert torch.equal(found, kmeans(rows, 3, seed=1))
    with pytest.raises(ValueError, match="2 rows for 3 clusters"):
        kmeans(rows[:2], 3)


def test_equal_rows_make_no_trouble():
    assert kmeans(torch.ones(8, 2), 3).shape == (8,)


def test_scores_of_separable_features_are_perfect(generator):
    rows, labels = blobs(generator)
    assert cluster_scores(rows, labels, 3).miou == 100
    assert linear_scores((rows, labels), blobs(generator), 3).miou == 100


def test_scores_of_noise_are_near_chance(generator):
    rows, labels = torch.randn(600, 4, generator=generator), torch.arange(600) % 3
    assert cluster_scores(rows, labels, 3).accuracy < 45
    assert linear_scores((rows[:300], labels[:300]), (rows[300:], labels[300:]), 3).accuracy < 50
