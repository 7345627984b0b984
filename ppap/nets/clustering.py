"""k-means of patches by cosine (scikit-learn's), average linkage of its centres (SciPy's), and what clusters
say of features without labels.

Legend: n rows, D channels, K clusters.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ppap.errors import DataError
from ppap.runs.randomness import drawn_order

ROWS = 2**15
"""Rows at most that centres are fitted to, drawn with the seed; thousands for every cluster."""

FINE = 4
"""Centres of k-means for each cluster, which average linkage merges."""

LEAST = 0.2
"""Rows that make a group a cluster [average clusters]."""

_SCORED = 2**12  # rows that are scored: seconds for the widest backbones


class Clusters(NamedTuple):
    """Result of :func:`cosine_kmeans` and :func:`linked_clusters`."""

    centres: Tensor
    """(K, D) float32, unit norm, on the CPU."""
    sizes: Tensor
    """(K,) int64 rows of each cluster, of those that were fitted."""

    @property
    def empty(self) -> int:
        """Clusters that no row belongs to."""
        return int((self.sizes == 0).sum())


def cosine_kmeans(rows: Tensor, clusters: int, *, starts: int = 3, seed: int = 0) -> Clusters:
    """k-means++ and Lloyd's steps on unit rows, the best of several starts by the sum of squared distances.

    On unit rows the squared distance to a unit centre is 2 - 2 cos. The same bits in every run: one thread.

    Args:
        rows: (n, D) of any norm; more than ``ROWS`` are thinned out at random.
        clusters: K.
        starts: number of starts.
        seed: of all that is drawn.

    Raises:
        DataError: fewer rows than clusters.
    """
    unit = _thinned(rows, clusters, seed)
    means, labels = _kmeans(unit, clusters, starts, seed)
    return Clusters(F.normalize(means, dim=1), torch.bincount(labels, minlength=clusters))


def linked_clusters(rows: Tensor, clusters: int, *, seed: int = 0) -> Clusters:
    """k-means with ``FINE`` centres per cluster, merged by average linkage of their cosines (UPGMA).

    k-means divides the rows into parts of much the same size, so that a large class takes several clusters
    and small ones share theirs. Here the parts are small to begin with, and those join that are alike,
    however many rows that makes. The tree of joints is cut where K groups have ``LEAST`` of an average
    cluster's rows; what lies apart in smaller groups makes no cluster of its own.

    Args:
        rows: (n, D) of any norm; more than ``ROWS`` are thinned out at random.
        clusters: K.
        seed: of all that is drawn.

    Returns:
        Of each cluster the direction of its unit rows' mean, and the rows that are nearest to it.

    Raises:
        DataError: fewer rows than clusters.
    """
    unit = _thinned(rows, clusters, seed)
    fine = min(FINE * clusters, len(unit))
    means, labels = _kmeans(unit, fine, 1, seed)
    sizes = torch.bincount(labels, minlength=fine)
    owner = _grouped(F.normalize(means.double(), dim=1), sizes, clusters)
    kept = owner >= 0
    # Where there are fewer distinct rows than parts, one without rows has a direction, but no weight.
    weighted = means[kept] * sizes[kept, None].clamp(min=1e-6)
    centres = F.normalize(torch.zeros(clusters, means.shape[1]).index_add_(0, owner[kept], weighted), dim=1)
    nearest = (torch.from_numpy(unit) @ centres.T).argmax(dim=1)
    return Clusters(centres, torch.bincount(nearest, minlength=clusters))


def _grouped(centres: Tensor, sizes: Tensor, clusters: int) -> Tensor:
    """Group 0 .. K - 1 of each part, or -1 where it belongs to none: see :func:`linked_clusters`.

    Args:
        centres: (M, D) float64, unit or 0, M >= K.
        sizes: (M,) int64 rows of each part.
        clusters: K.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.spatial.distance import squareform

    if clusters == 1 or len(centres) == clusters:
        return torch.arange(len(centres)).clamp(max=clusters - 1)
    distances = (1 - centres @ centres.T).clamp(min=0).fill_diagonal_(0).numpy()
    tree = linkage(squareform(distances, checks=False), "average")
    counts = range(clusters, min(2 * clusters, len(centres)) + 1)
    cuts = [torch.from_numpy(cut).long() for cut in cut_tree(tree, counts).T]
    rows = [torch.zeros(int(cut.max()) + 1, dtype=torch.int64).index_add_(0, cut, sizes) for cut in cuts]
    enough = [int((own >= LEAST * sizes.sum() / clusters).sum()) >= clusters for own in rows]
    chosen = enough.index(True) if any(enough) else 0
    largest = rows[chosen].argsort(descending=True, stable=True)[:clusters]
    group = torch.full((counts[chosen],), -1).index_copy_(0, largest, torch.arange(clusters))
    return group[cuts[chosen]]


def _thinned(rows: Tensor, clusters: int, seed: int) -> np.ndarray:
    """At most ``ROWS`` unit rows, fp32.

    Raises:
        DataError: fewer rows than clusters.
    """
    if len(rows) < clusters:
        raise DataError(
            f"{len(rows)} patches cannot form {clusters} clusters; give more images, or fewer clusters"
        )
    if len(rows) > ROWS:
        order = drawn_order(len(rows), seed, 7)
        rows = rows[torch.from_numpy(np.sort(order[:ROWS]))]
    unit: np.ndarray = F.normalize(rows.float(), dim=1).cpu().numpy()
    return unit


def _kmeans(unit: np.ndarray, clusters: int, starts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Means (K, D) fp32 and the cluster of each row (n,) int64; one thread."""
    from sklearn.cluster import KMeans  # takes a second, which most commands can spare
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters: see `empty`
        fitted = KMeans(clusters, n_init=starts, random_state=seed % 2**32).fit(unit)
    return torch.from_numpy(fitted.cluster_centers_).float(), torch.from_numpy(fitted.labels_).long()


def dense_score(rows: Tensor, clusters: int, *, seed: int = 0) -> tuple[float, float]:
    """How far clusters stand apart, and how many directions the rows use: figures that need no label.

    After the dense-representation structure estimator (DSE, arXiv 2510.17299), on k-means' clusters: the mean
    over rows of the distance to the nearest other centre minus that to their own, for unit rows, and its rank
    term, the effective rank (the exponential of the entropy of the singular values' shares), apart.

    Args:
        rows: (n, D) unit rows, n >= 2; of many every so-manyth serves.
        clusters: K, at least 2, and at most n.
        seed: of k-means.
    """
    rows = rows[:: -(-len(rows) // _SCORED)]
    centres = cosine_kmeans(rows, min(clusters, len(rows)), starts=1, seed=seed).centres.to(rows.device)
    nearest = (2 - 2 * (rows @ centres.T)).clamp(min=0).sqrt().topk(2, dim=1, largest=False).values
    gram = rows.double()
    shares = torch.linalg.eigvalsh(gram.T @ gram).clamp(min=0).sqrt()  # the singular values
    shares = shares / shares.sum()
    rank = torch.exp(-(shares * shares.clamp(min=1e-300).log()).sum())
    return float((nearest[:, 1] - nearest[:, 0]).mean()), float(rank)
