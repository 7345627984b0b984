"""How alike two networks see patches: neighbours, clusters, and maps that are sampled along crops."""

import pytest
import torch

from ppap.pretraining.agreement import compare, drawn_patches, speeds
from ppap.pretraining.views import sample_map


def groups(generator, images=6, patches=20, classes=3, noise=0.05):
    """Features of patches of some classes, and the classes: (M, P, 8), (M, P)."""
    centres = torch.eye(8)[:classes]
    labels = torch.arange(images * patches).view(images, patches) % classes
    return centres[labels] + noise * torch.randn(images, patches, 8, generator=generator), labels


def test_equal_features_agree_and_others_do_not(generator):
    rows, labels = groups(generator)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    other = torch.randn(6, 20, 5, generator=generator)
    scores = compare({"a": rows, "turned": 3 * rows @ turn, "other": other}, "a", labels, 3, 4)
    assert scores["a"].kept == 1 and scores["turned"].kept > 0.99
    assert scores["turned"].alike == pytest.approx(1) and scores["a"].alike == pytest.approx(1)
    assert scores["turned"].purity == 1 and scores["turned"].miou == pytest.approx(1)
    assert scores["other"].kept < 0.2 and abs(scores["other"].alike) < 0.1
    assert scores["other"].purity < 0.6 and scores["other"].miou < 0.6


def test_neighbours_lie_in_other_images():
    # Two images of one patch pair each: the nearest of all is in the same image, and must not count.
    rows = torch.tensor([[[1.0, 0.0], [1.0, 0.1]], [[0.0, 1.0], [0.5, 0.5]]])
    labels = torch.tensor([[0, 0], [1, 0]])
    scores = compare({"a": rows}, "a", labels, 2, 1)
    assert scores["a"].purity == pytest.approx(3 / 4)  # the patch of class 1 has none of its own elsewhere
    none = compare({"a": rows}, "a", torch.full_like(labels, -1), 2, 1)["a"]
    assert none.purity is None and none.miou is None
    assert compare({"a": rows}, "a", None, 2, 50)["a"].miou is None


def test_more_classes_than_clusters_and_the_reverse(generator):
    rows, labels = groups(generator)
    assert compare({"a": rows}, "a", labels, 2, 4)["a"].miou < 0.9
    assert 0 < compare({"a": rows}, "a", labels, 5, 4)["a"].miou < 1


def test_stops_where_it_is_asked(generator):
    rows, labels = groups(generator)
    with pytest.raises(InterruptedError):
        compare({"a": rows}, "a", labels, 3, 4, lambda: True)


def test_patches_are_thinned_out_where_they_are_many():
    assert torch.equal(drawn_patches(4, 10), torch.arange(10))
    assert len(drawn_patches(64, 1000)) == 256 and torch.equal(
        drawn_patches(64, 1000), drawn_patches(64, 1000)
    )


def test_speeds_are_positive():
    found = speeds({"a": torch.sin, "b": torch.cos}, torch.rand(4, 3))
    assert set(found) == {"a", "b"} and min(found.values()) > 0


def test_maps_are_sampled_along_boxes(generator):
    maps = torch.randn(2, 5, 4, 4, generator=generator)
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(2, 4)
    rows = maps.flatten(2).transpose(1, 2)
    assert torch.allclose(sample_map(maps, whole, (4, 4)), rows, atol=1e-5)
    mirrored = torch.tensor([0.0, 0.0, -1.0, 1.0]).expand(2, 4)
    assert torch.allclose(
        sample_map(maps, mirrored, (4, 4)), maps.flip(3).flatten(2).transpose(1, 2), atol=1e-5
    )
    corner = torch.tensor([0.5, -0.5, 0.5, 0.5]).expand(2, 4)  # the right upper quarter
    wanted = maps[:, :, :2, 2:].flatten(2).transpose(1, 2)
    assert torch.allclose(sample_map(maps, corner, (2, 2)), wanted, atol=1e-5)
