"""How alike two networks see patches: neighbours that are kept, and k-means; with labels also their purity.

Neighbours are sought in other images alone: within an image near patches are alike whatever a network knows,
more so where a map was resampled. Legend: M images, P patches of each, N = M P, E channels, K clusters.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ppap.evaluation.metrics import ConfusionMatrix
from ppap.methods.drift import neighbours_kept
from ppap.nets.clustering import cosine_kmeans
from ppap.runs.randomness import drawn_order

PATCHES = 2**14
"""Patches N at most that are compared."""
_QUERIES = 2**11
_SEEDS = 3


@dataclass(frozen=True)
class Scores:
    """Of one kind of features; shares are 0..1."""

    kept: float
    """Share of the reference's k nearest patches of other images that are among the k nearest here."""
    alike: float
    """Adjusted Rand index of k-means' clusters and those of the reference, mean over seeds (0 = chance); of
    the reference itself that of its clusters under other seeds."""
    purity: float | None
    """Share of the k nearest patches of other images that have the patch's class; None = no labels."""
    miou: float | None
    """Of k-means' clusters, each matched to a class, over patches; mean over seeds."""
    miou_deviation: float | None
    """Sample standard deviation of it over seeds."""


def compare(
    features: Mapping[str, Tensor],
    reference: str,
    labels: Tensor | None,
    clusters: int,
    neighbours: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Scores]:
    """Scores of several networks' features of the same patches.

    Args:
        features: name -> (M, P, E) rows of any norm, any E, on the CPU.
        reference: the name among them that the others are compared with.
        labels: (M, P) int64, -1 = ignored, or None.
        clusters: K, also where labels have another number of classes.
        neighbours: k; all patches of other images where there are fewer.
        should_stop: asked between the parts.

    Raises:
        InterruptedError: `should_stop` said so.
    """
    images, patches = features[reference].shape[:2]
    owner = torch.arange(images).repeat_interleave(patches)
    classes = None if labels is None else labels.flatten()
    queries = _drawn(len(owner), _QUERIES)
    k = min(neighbours, len(owner) - patches)
    near, groups = {}, {}
    for name, rows in features.items():
        rows = F.normalize(rows.float().flatten(0, 1), dim=1)
        near[name] = _nearest(rows, queries, owner, k)
        groups[name] = []
        for seed in range(_SEEDS):
            if should_stop():
                raise InterruptedError
            groups[name].append((rows @ cosine_kmeans(rows, clusters, seed=seed).centres.T).argmax(dim=1))
    return {
        name: Scores(
            kept=neighbours_kept(near[name], near[reference]),
            alike=_alike(groups[name], groups[reference], name == reference),
            purity=None if classes is None else _purity(near[name], queries, classes),
            **_mious(groups[name], classes, clusters),
        )
        for name in features
    }


def _drawn(count: int, wanted: int) -> Tensor:
    """(wanted,) int64 of 0..count-1, rising, the same in every run; all where there are no more."""
    return torch.from_numpy(np.sort(drawn_order(count, 0, 8)[:wanted]))


def drawn_patches(images: int, patches: int) -> Tensor:
    """Which patches of every image are compared: (P,) int64."""
    return _drawn(patches, max(PATCHES // images, 1))


def _nearest(rows: Tensor, queries: Tensor, owner: Tensor, k: int) -> Tensor:
    """(Q, k) int64: nearest rows of other images of each query."""
    found = []
    for part in queries.split(256):
        cosine = rows[part] @ rows.T
        cosine[owner[part][:, None] == owner] = -2
        found.append(cosine.topk(k, dim=1).indices)
    return torch.cat(found)


def _purity(near: Tensor, queries: Tensor, classes: Tensor) -> float | None:
    """Over labelled patches and their labelled neighbours; None where there are none."""
    here, there = classes[queries][:, None], classes[near]
    counted = (here >= 0) & (there >= 0)
    return float((here == there)[counted].float().mean()) if counted.any() else None


def _alike(groups: list[Tensor], others: list[Tensor], same: bool) -> float:
    from sklearn.metrics import adjusted_rand_score  # takes a second, which most commands can spare

    pairs = [(a, b) for i, a in enumerate(groups) for j, b in enumerate(others) if not (same and i >= j)]
    return float(np.mean([adjusted_rand_score(b.numpy(), a.numpy()) for a, b in pairs]))


def _mious(groups: list[Tensor], classes: Tensor | None, clusters: int) -> dict[str, float | None]:
    if classes is None or not (classes >= 0).any():
        return {"miou": None, "miou_deviation": None}
    count = int(classes.max()) + 1
    values = []
    for group in groups:
        matrix = ConfusionMatrix(count, max(clusters, count))
        matrix.update(group, classes)
        values.append(matrix.scores(matrix.match()).miou / 100)
    return {"miou": float(np.mean(values)), "miou_deviation": float(np.std(values, ddof=1))}


@torch.no_grad()
def speeds(networks: Mapping[str, Callable[[Tensor], Tensor]], images: Tensor) -> dict[str, float]:
    """Images per second of each network, the best of several turns: others may use the machine as well.

    Args:
        networks: name -> function of `images`.
        images: a batch, on the device.
    """
    best = {name: float("inf") for name in networks}
    for turn in range(4):
        for name, network in networks.items():
            _wait(images)
            start = time.perf_counter()
            network(images)
            _wait(images)
            if turn:  # the first one warms up
                best[name] = min(best[name], time.perf_counter() - start)
    return {name: len(images) / seconds for name, seconds in best.items()}


def _wait(images: Tensor) -> None:
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
