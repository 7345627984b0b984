"""Confusion counts, Hungarian matching and scores, against brute force and cases worked out by hand."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppap.errors import DataError
from ppap.evaluation.metrics import ConfusionMatrix, apply_assignment


def counted(counts: list[list[int]]) -> ConfusionMatrix:
    """A matrix with the given (K, C) counts."""
    counts = torch.tensor(counts)
    matrix = ConfusionMatrix(classes=counts.shape[1], clusters=counts.shape[0])
    matrix.counts = counts
    return matrix


def random_labels(
    classes: int, clusters: int, size: tuple[int, ...], seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions that follow a shuffled truth half of the time; a tenth of the truth is ignored."""
    g = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, classes, size, generator=g)
    renamed = torch.randperm(clusters, generator=g)[truth]
    pred = torch.where(
        torch.rand(size, generator=g) < 0.5, renamed, torch.randint(0, clusters, size, generator=g)
    )
    truth[torch.rand(size, generator=g) < 0.1] = -1
    return pred, truth


def test_counts_by_hand():
    matrix = ConfusionMatrix(classes=2, clusters=3)
    matrix.update(torch.tensor([[0, 1, 2], [0, 0, 1]]), torch.tensor([[0, 1, 1], [1, -1, 255]]))
    assert matrix.counts.tolist() == [[1, 1], [0, 1], [0, 1]]
    assert matrix.counts.dtype == torch.int64


@pytest.mark.parametrize(("classes", "clusters"), [(c, c) for c in range(1, 8)] + [(3, 6), (5, 7)])
def test_matching_equals_brute_force(classes, clusters):
    pred, truth = random_labels(classes, clusters, (4000,), seed=classes)
    matrix = ConfusionMatrix(classes, clusters)
    matrix.update(pred, truth)
    kept = truth >= 0
    pred, truth = pred[kept], truth[kept]
    # Every choice of one cluster per class; the rest of the clusters is always wrong.
    best = max(
        sum(int(((pred == k) & (truth == c)).sum()) for c, k in enumerate(choice))
        for choice in itertools.permutations(range(clusters), classes)
    )
    assignment = matrix.match()
    scores = matrix.scores(assignment)
    assert sorted(c for c in assignment if c is not None) == list(range(classes))
    assert scores.accuracy == pytest.approx(100 * best / len(truth), abs=1e-9)
    assert scores.pixels == len(truth)

    mapped = apply_assignment(pred, assignment)
    iou = [
        100 * int(((mapped == c) & (truth == c)).sum()) / int(((mapped == c) | (truth == c)).sum())
        for c in range(classes)
    ]
    assert scores.iou == pytest.approx(iou, abs=1e-9)
    assert scores.miou == pytest.approx(np.mean(iou), abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 600), max_size=5), seed=st.integers(0, 1000))
def test_counts_do_not_depend_on_the_split(cuts, seed):
    pred, truth = random_labels(4, 5, (600,), seed)
    whole = ConfusionMatrix(4, 5)
    whole.update(pred.reshape(2, 10, 30), truth.reshape(2, 10, 30))
    total = ConfusionMatrix(4, 5)
    for start, end in itertools.pairwise([0, *sorted(cuts), 600]):
        part = ConfusionMatrix(4, 5)
        part.update(pred[start:end], truth[start:end])
        total = part + total
    assert torch.equal(total.counts, whole.counts)


def test_scores_by_hand():
    # Prediction 0: 6 right, 2 of class 1. Prediction 1: 3 of class 0, 4 right. Class 2 is in neither.
    scores = counted([[6, 2, 0], [3, 4, 0], [0, 0, 0]]).scores(names=("road", "car", "sky"))
    assert scores.accuracy == pytest.approx(100 * 10 / 15)
    assert scores.iou == (pytest.approx(100 * 6 / 11), pytest.approx(100 * 4 / 9), None)
    assert scores.miou == pytest.approx((100 * 6 / 11 + 100 * 4 / 9) / 2)
    assert scores.absent == ("sky",)
    assert scores.assignment == (0, 1, 2)
    assert scores.pixels == 15


def test_a_class_predicted_but_absent_counts_as_0():
    scores = counted([[6, 0, 0], [0, 4, 0], [2, 0, 0]]).scores()
    assert scores.iou == (75.0, 100.0, 0.0)
    assert scores.miou == pytest.approx(175 / 3)
    assert scores.absent == ("class 2",)


def test_an_unmatched_cluster_is_a_wrong_prediction():
    matrix = counted([[10, 0], [0, 10], [5, 5]])
    assignment = matrix.match()
    assert assignment == (0, 1, None)
    scores = matrix.scores(assignment)
    assert scores.pixels == 30
    assert scores.accuracy == pytest.approx(100 * 20 / 30)
    assert scores.iou == (pytest.approx(100 * 10 / 15),) * 2


def test_the_published_evaluation_drops_ids_beyond_the_classes():
    # Cluster 2 is the better match for class 1, but its pixels are gone before matching.
    matrix = counted([[10, 0], [1, 3], [0, 16]])
    assert matrix.match() == (0, None, 1)
    dropped = matrix.match(drop_unmatched=True)
    assert dropped == (0, 1, None)
    scores = matrix.scores(dropped, drop_unmatched=True)
    assert scores.pixels == 14
    assert scores.accuracy == pytest.approx(100 * 13 / 14)
    assert scores.iou == (pytest.approx(100 * 10 / 11), 75.0)
    with pytest.raises(DataError, match="no labelled pixel"):
        counted([[0], [3]]).scores((0, None), drop_unmatched=True)


def test_majority_vote_may_share_a_class():
    matrix = counted([[9, 1], [8, 2], [0, 0]])
    assert matrix.majority_vote() == (0, 0, None)
    assert counted([[2, 2], [0, 1]]).majority_vote() == (0, 1)  # equal: the lower id
    scores = matrix.scores(matrix.majority_vote())
    assert scores.accuracy == pytest.approx(85.0)
    assert scores.iou == (pytest.approx(85.0), 0.0)


@pytest.mark.parametrize("truth", [[], [-1, -1, 255]])
def test_nothing_labelled_is_a_data_error(truth):
    matrix = ConfusionMatrix(3)
    truth = torch.tensor(truth, dtype=torch.int64)
    matrix.update(torch.zeros_like(truth), truth)
    with pytest.raises(DataError, match="no labelled pixel"):
        matrix.scores(matrix.match())


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint16, np.int64])
@pytest.mark.filterwarnings("error")
def test_reads_integer_arrays(dtype):
    labels = np.array([[0, 1], [2, 1]], dtype=dtype)
    labels.setflags(write=False)
    matrix = ConfusionMatrix(3)
    matrix.update(labels, torch.from_numpy(labels.astype(np.int64)))
    assert matrix.counts.diagonal().tolist() == [1, 2, 1]


def test_many_clusters_do_not_overflow_small_types():
    matrix = ConfusionMatrix(200)
    labels = torch.full((5,), 199, dtype=torch.uint8)
    matrix.update(labels, labels)
    assert matrix.counts[199, 199] == 5


def test_ignored_pixels_may_hold_any_prediction():
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([-5, 99, 1]), torch.tensor([-1, 255, 1]))
    assert matrix.counts.tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        pytest.param(lambda: ConfusionMatrix(0), "at least 1 class", id="no class"),
        pytest.param(lambda: ConfusionMatrix(3, 2), "as many clusters", id="fewer clusters than classes"),
        pytest.param(lambda: ConfusionMatrix(3) + ConfusionMatrix(4), "cannot add", id="unequal sizes"),
        pytest.param(
            lambda: ConfusionMatrix(2).update(torch.tensor([2]), torch.tensor([0])),
            "ids 0..1",
            id="id too large",
        ),
        pytest.param(
            lambda: ConfusionMatrix(2).update(torch.tensor([-1]), torch.tensor([0])),
            "ids 0..1",
            id="negative id",
        ),
        pytest.param(
            lambda: ConfusionMatrix(2).update(torch.tensor([0, 1]), torch.tensor([0])),
            "equal shapes",
            id="shapes",
        ),
        pytest.param(
            lambda: ConfusionMatrix(2).update(torch.tensor([0.5]), torch.tensor([0])),
            "integer ids",
            id="floats",
        ),
        pytest.param(lambda: counted([[1], [1]]).scores(), "give an assignment", id="no assignment"),
        pytest.param(lambda: counted([[1]]).scores((0, 0)), "give one for each of 1", id="long assignment"),
        pytest.param(lambda: counted([[1]]).scores((1,)), r"holds \[1\]", id="unknown class"),
        pytest.param(lambda: counted([[1]]).scores(names=("a", "b")), "2 class names; give 1", id="names"),
    ],
)
def test_refuses_wrong_arguments(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_apply_assignment_keeps_shape_and_marks_unmatched():
    labels = torch.tensor([[0, 2], [1, 0]], dtype=torch.uint8)
    assert apply_assignment(labels, (1, None, 0)).tolist() == [[1, 0], [-1, 1]]
    assert apply_assignment(labels, (1, None, 0), unmatched=7).tolist() == [[1, 0], [7, 1]]
