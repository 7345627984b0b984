"""Pixel counts, assignment of clusters to classes, accuracy and mIoU over a whole validation set.

Legend: ``C`` classes, ``K`` clusters, ``M`` the (K, C) confusion matrix, M[prediction, truth].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ppap.errors import DataError


@dataclass(frozen=True)
class Scores:
    """Segmentation scores over all counted pixels; percentages are 0 to 100."""

    accuracy: float
    """Correct pixels in all counted pixels [%]."""
    miou: float
    """Mean of `iou` over the classes that have one [%]."""
    iou: tuple[float | None, ...]
    """Intersection over union per class [%]; None = in neither truth nor prediction; in one of them: 0."""
    assignment: tuple[int | None, ...]
    """Class of each cluster; None = the cluster has no class, and its pixels are wrong predictions."""
    absent: tuple[str, ...]
    """Names of the classes without a pixel in the truth."""
    pixels: int
    """Number of counted pixels."""


class ConfusionMatrix:
    """Counts of (prediction, truth) pairs; its sums do not depend on batches, order or processes.

    Args:
        classes: C >= 1, ids 0..C-1 in the truth; every other id is ignored.
        clusters: K >= C, ids 0..K-1 in the predictions; None = C.

    Attributes:
        counts: (K, C) int64 on the CPU. Sum it over processes, or add matrices with ``+``.
    """

    def __init__(self, classes: int, clusters: int | None = None) -> None:
        clusters = classes if clusters is None else clusters
        if classes < 1 or clusters < classes:
            raise ValueError(
                f"{classes} classes and {clusters} clusters; give at least 1 class and as many clusters"
            )
        self.classes = classes
        self.clusters = clusters
        self.counts = torch.zeros(clusters, classes, dtype=torch.int64)

    def update(self, pred: Tensor | np.ndarray, truth: Tensor | np.ndarray) -> None:
        """Count the pixels whose truth is in 0..C-1.

        Args:
            pred: predicted ids, any shape, integer; 0..K-1 wherever the truth counts.
            truth: true ids, the same shape, integer; ids outside 0..C-1 are ignored (-1, 255, ...).

        Raises:
            ValueError: shapes differ, a dtype is no integer, or a counted prediction is outside 0..K-1.
        """
        pred, truth = _as_labels("pred", pred), _as_labels("truth", truth)
        if pred.shape != truth.shape:
            raise ValueError(
                f"pred has shape {tuple(pred.shape)}, truth {tuple(truth.shape)}; give equal shapes"
            )
        if pred.numel() == 0:
            return
        kept = (truth >= 0) & (truth < self.classes)
        pred = torch.where(kept, pred.to(truth.device), 0)
        low, high = torch.stack(pred.aminmax()).tolist()
        if low < 0 or high >= self.clusters:
            raise ValueError(f"predictions run from {low} to {high}; give ids 0..{self.clusters - 1}")
        # What is ignored is counted too, in a place of its own: picking out the rest would wait for a GPU.
        cells = self.clusters * self.classes
        pairs = torch.where(kept, pred * self.classes + truth, cells).flatten()
        found = torch.bincount(pairs, minlength=cells + 1)[:cells]
        self.counts += found.reshape(self.clusters, self.classes).cpu()

    def __add__(self, other: "ConfusionMatrix") -> "ConfusionMatrix":
        if not isinstance(other, ConfusionMatrix):
            return NotImplemented
        if self.counts.shape != other.counts.shape:
            raise ValueError(
                f"cannot add counts of {self.clusters} clusters x {self.classes} classes and of "
                f"{other.clusters} x {other.classes}"
            )
        total = ConfusionMatrix(self.classes, self.clusters)
        total.counts = self.counts + other.counts
        return total

    def without(self, clusters: Sequence[int]) -> "ConfusionMatrix":
        """The same counts but for the pixels of some clusters."""
        rest = ConfusionMatrix(self.classes, self.clusters)
        rest.counts = self.counts.clone()
        rest.counts[list(clusters)] = 0
        return rest

    def match(self, *, drop_unmatched: bool = False) -> tuple[int | None, ...]:
        """One-to-one assignment of clusters to classes with the most correct pixels (Hungarian algorithm).

        Args:
            drop_unmatched: match the first C clusters only, see :meth:`scores`.

        Returns:
            K entries: the class of each cluster, None for the K - C clusters left over.
        """
        counts = self.counts[: self.classes] if drop_unmatched else self.counts
        assignment: list[int | None] = [None] * self.clusters
        for cluster, label in zip(*linear_sum_assignment(counts.numpy(), maximize=True), strict=True):
            assignment[int(cluster)] = int(label)
        return tuple(assignment)

    def majority_vote(self) -> tuple[int | None, ...]:
        """Each cluster's most frequent class (the lowest id of equals); None for a cluster without a pixel.

        Several clusters may share a class, so scores under it are an optimistic extra, not comparable to
        :meth:`match`.
        """
        filled = self.counts.sum(dim=1) > 0
        best = self.counts.numpy().argmax(axis=1)  # numpy promises the first of equals, torch does not
        return tuple(int(label) if some else None for label, some in zip(best, filled, strict=True))

    def scores(
        self,
        assignment: Sequence[int | None] | None = None,
        *,
        names: Sequence[str] = (),
        drop_unmatched: bool = False,
    ) -> Scores:
        """Accuracy and IoU under an assignment of clusters to classes.

        Args:
            assignment: K entries from :meth:`match` or :meth:`majority_vote`; None = prediction k is class k
                (linear probe).
            names: C class names; empty = class 0, class 1, ...
            drop_unmatched: leave out every pixel predicted as an id >= C, as the published evaluation does.
                Off, pixels of clusters without a class count as wrong predictions.

        Raises:
            DataError: no pixel was counted.
            ValueError: `assignment` or `names` has the wrong length or holds an id outside 0..C-1.
        """
        if assignment is None:
            if self.clusters != self.classes:
                raise ValueError(
                    f"{self.clusters} clusters, {self.classes} classes: give an assignment, as by match()"
                )
            assignment = range(self.classes)
        names = tuple(names) or tuple(f"class {c}" for c in range(self.classes))
        self._check(assignment, names)

        counts = self.counts.clone()
        if drop_unmatched:
            counts[self.classes :] = 0
        by_class = torch.zeros(self.classes, self.classes, dtype=torch.int64)
        for cluster, label in enumerate(assignment):
            if label is not None:
                by_class[label] += counts[cluster]

        truth = counts.sum(dim=0)
        pixels = int(truth.sum())
        if pixels == 0:
            raise DataError(
                f"no labelled pixel to evaluate: no label is in 0..{self.classes - 1} (or, "
                "with drop_unmatched, no prediction is); check the label files, --data.classes "
                "and --data.ignore-ids"
            )
        correct = by_class.diagonal()
        union = by_class.sum(dim=1) + truth - correct
        iou = tuple(100 * c / u if u else None for c, u in zip(correct.tolist(), union.tolist(), strict=True))
        found = [value for value in iou if value is not None]
        return Scores(
            accuracy=100 * int(correct.sum()) / pixels,
            miou=sum(found) / len(found),
            iou=iou,
            assignment=tuple(assignment),
            absent=tuple(name for name, n in zip(names, truth.tolist(), strict=True) if n == 0),
            pixels=pixels,
        )

    def _check(self, assignment: Sequence[int | None], names: Sequence[str]) -> None:
        if len(assignment) != self.clusters:
            raise ValueError(
                f"the assignment has {len(assignment)} entries; give one for each of {self.clusters} clusters"
            )
        wrong = [label for label in assignment if label is not None and not 0 <= label < self.classes]
        if wrong:
            raise ValueError(f"the assignment holds {wrong}; give classes 0..{self.classes - 1} or None")
        if len(names) != self.classes:
            raise ValueError(f"{len(names)} class names; give {self.classes}")


def apply_assignment(labels: Tensor, assignment: Sequence[int | None], unmatched: int = -1) -> Tensor:
    """Map cluster ids to classes, for pictures and saved masks.

    Args:
        labels: integer cluster ids in 0..K-1, any shape.
        assignment: K entries as in :class:`Scores`.
        unmatched: id given to clusters without a class.

    Returns:
        int64 class ids of the same shape and device.
    """
    table = torch.tensor([unmatched if c is None else c for c in assignment], device=labels.device)
    return table[labels.long()]


def _as_labels(name: str, labels: Tensor | np.ndarray) -> Tensor:
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu":
        labels = torch.from_numpy(labels.astype(np.int64))  # a copy: torch warns of read-only memory
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {labels.dtype}; give integer ids")
    return labels.long()
