"""What labels say of frozen features: purity of neighbours and sets, frozen clusters and linear scores.

Legend: N patches, A anchors, D channels, K clusters = classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppap.analysis import set_quality
from ppap.analysis.backbone import LabelFree, Maps, draw, unit_rows
from ppap.analysis.set_quality import SetsOf, count_sets, quality
from ppap.evaluation.evaluate import pixel_products
from ppap.evaluation.metrics import ConfusionMatrix
from ppap.evaluation.patches import linear_classifier
from ppap.kernels import PropagationConfig
from ppap.methods.choices import as_compared
from ppap.nets.clustering import cosine_kmeans
from ppap.nets.conditioning import Condition
from ppap.nets.model import patch_rows
from ppap.nets.probes import ClusterProbe, LinearProbe
from ppap.settings.config import Config

NEIGHBOURS = (20, 100)
SHARES = (0.02, 0.05)
"""Sizes of the sets by a plain threshold whose purity is measured [share of the patches]."""
_STARTS = 3  # of k-means
_CHUNK = 128  # anchors at a time
_FITTED = 2**14  # patches that k-means and the linear classifier see: hundreds for every cluster


@dataclass(frozen=True)
class Purity:
    """Shares of patches with the anchor's class [%]."""

    neighbours: dict[int, float]
    """k -> of the k nearest other patches."""
    across: float
    """Of the 20 nearest patches of other images."""
    plain: dict[float, tuple[float | None, float | None]]
    """Share of the patches -> micro and macro purity of sets of that mean size by a plain threshold."""
    propagated: tuple[float | None, float | None]
    """Micro and macro purity of PPAP's sets at the thresholds found without labels."""
    size: float
    """Mean size of these sets [share of the patches]."""


@dataclass(frozen=True)
class Frozen:
    """Scores of the features as they are, on validation images, per pixel [%]."""

    cluster_accuracy: list[float]
    """Of k-means, clusters matched to classes; one per seed."""
    cluster_miou: list[float]
    linear_accuracy: float
    linear_miou: float


@torch.no_grad()
def purity(maps: Maps, condition: Condition, row: LabelFree, config: Config, anchors: int) -> Purity:
    """How pure neighbours and sets are under a condition.

    Args:
        maps: labelled images; of them as many as a batch has, spread evenly, form sets.
        condition: on the CPU.
        row: of the condition, for the thresholds of the propagated sets.
        config: steps, sigmas, batch size, seed of the draws, and channel dropout of the propagated sets.
        anchors: labelled patches, drawn at random, whose neighbours and sets are looked at.
    """
    count, seed, loss = min(config.train.batch_size, len(maps.features)), config.train.seed, config.loss
    few = maps.part([i * len(maps.features) // count for i in range(count)])
    rows, classes = unit_rows(few, condition), few.classes
    chosen = _labelled(classes, anchors, seed)
    plain = {}
    for share, sets_of in zip(SHARES, _by_size(rows, chosen, SHARES), strict=True):
        found = quality(count_sets(sets_of, chosen, classes))
        plain[share] = (found.true_micro, found.true_macro)
    cfg = PropagationConfig(row.phi0, row.psi0, loss.steps, loss.sigma_pos, loss.sigma_amb)
    seen = as_compared(few.features, condition, config)
    own = quality(count_sets(set_quality.propagated(seen, chosen, cfg), chosen, classes))
    near, across = _neighbours(maps, condition, anchors, seed)
    return Purity(near, across, plain, (own.true_micro, own.true_macro), own.positives / len(rows))


def chance(maps: Maps) -> float:
    """Share of the patches that have a random patch's class [%]: what neighbours drawn at random give."""
    classes = maps.classes
    counts = torch.bincount(classes[classes >= 0]).double()
    return 100 * float((counts / counts.sum()).square().sum())


def _labelled(classes: Tensor, wanted: int, seed: int) -> Tensor:
    known = torch.nonzero(classes >= 0)[:, 0]
    return known[draw(len(known), wanted, seed)]


def _by_size(rows: Tensor, anchors: Tensor, shares: Sequence[float]) -> list[SetsOf]:
    """Sets by one threshold for all anchors, of these mean sizes [share of the patches]."""
    cosines = rows[anchors] @ rows.T
    cosines[torch.arange(len(anchors)), anchors] = -2
    flat = cosines.flatten()
    limits = [flat.kthvalue(len(flat) - int(share * len(flat))).values for share in shares]
    return [lambda places, t=limit: (cosines[places] > t, cosines[places] <= t) for limit in limits]


def _neighbours(maps: Maps, condition: Condition, anchors: int, seed: int) -> tuple[dict[int, float], float]:
    """Purity of the nearest patches of all images, and of the 20 nearest of other images [%]."""
    rows, classes, images = unit_rows(maps, condition), maps.classes, maps.images
    same = {k: [] for k in NEIGHBOURS}
    across = []
    for chunk in _labelled(classes, anchors, seed).split(_CHUNK):
        cosines = rows[chunk] @ rows.T
        cosines[:, classes < 0] = -3  # a patch of unknown class is neither right nor wrong
        cosines[torch.arange(len(chunk)), chunk] = -2
        nearest = cosines.topk(min(max(NEIGHBOURS), len(rows) - 1), dim=1).indices
        hit = (classes[nearest] == classes[chunk, None]).float()
        for k in NEIGHBOURS:
            same[k].append(hit[:, :k].mean(dim=1))
        cosines[images[chunk][:, None] == images[None]] = -2
        nearest = cosines.topk(min(20, len(rows) - 1), dim=1).indices
        across.append((classes[nearest] == classes[chunk, None]).float().mean(dim=1))
    mean = {k: 100 * torch.cat(parts).mean().item() for k, parts in same.items()}
    return mean, 100 * torch.cat(across).mean().item()


def centres(rows: Tensor, clusters: int, seed: int) -> Tensor:
    """k-means' unit centres (K, D) of rows (N, D)."""
    return cosine_kmeans(rows, clusters, starts=_STARTS, seed=seed).centres


def frozen_scores(
    train: Maps, val: Maps, condition: Condition, patch: int, *, classes: int, seeds: Sequence[int]
) -> Frozen:
    """k-means and a linear classifier on training patches, scored on the pixels of validation images.

    Pixels are scored as ``ppap.evaluation.evaluate`` does. Both see at most ``_FITTED`` patches, the same for
    all conditions; the linear classifier sees the most frequent class of each.

    Args:
        train, val: labelled images.
        condition: on the CPU.
        patch: side of a patch [pixels].
        classes: K.
        seeds: of k-means, one score each.
    """
    with torch.no_grad():
        rows, labels = patch_rows(condition(train.features)), train.classes
    some, known = draw(len(rows), _FITTED, seeds[0]), _labelled(labels, _FITTED, seeds[0])
    cluster = ClusterProbe(rows.shape[1], classes * len(seeds))  # all seeds' centres, scored at once
    linear = LinearProbe(rows.shape[1], classes)
    weight, bias = linear_classifier(rows[known], labels[known], classes)
    with torch.no_grad():
        cluster.clusters.copy_(torch.cat([centres(rows[some], classes, seed) for seed in seeds]))
        linear.classifier.weight.copy_(weight[:, :, None, None])
        linear.classifier.bias.copy_(bias)
    by_seed, by_line = [ConfusionMatrix(classes) for _ in seeds], ConfusionMatrix(classes)
    for features, label in zip(val.features.split(1), val.labels, strict=True):
        size = (label.shape[0], label.shape[1])
        scores, logits = pixel_products(condition(features), (cluster, linear), patch, size)
        for matrix, own in zip(by_seed, scores[0].split(classes), strict=True):
            matrix.update(own.argmax(dim=0), label.long())
        by_line.update(logits[0].argmax(dim=0), label.long())
    found, line = [matrix.scores(matrix.match()) for matrix in by_seed], by_line.scores()
    return Frozen([s.accuracy for s in found], [s.miou for s in found], line.accuracy, line.miou)
