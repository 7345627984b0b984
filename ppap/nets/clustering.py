"""k-means of patches by cosine, average linkage of its centres, both scikit-learn's, and what they say of
features without labels.

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
    however many rows that makes.

    Args:
        rows: (n, D) of any norm; more than ``ROWS`` are thinned out at random.
        clusters: K.
        seed: of all that is drawn.

    Returns:
        Of each cluster the direction of its unit rows' mean; rows belong to the nearest of them, which moves
        few of them.

    Raises:
        DataError: fewer rows than clusters.
    """
    from sklearn.cluster import AgglomerativeClustering

    unit = _thinned(rows, clusters, seed)
    fine = min(FINE * clusters, len(unit))
    means, labels = _kmeans(unit, fine, 1, seed)
    parts = torch.bincount(labels, minlength=fine)
    if clusters > 1:
        centres = F.normalize(means.double(), dim=1)
        # Distances are given, since a centre of rows that are 0 has no direction.
        linked = AgglomerativeClustering(clusters, metric="precomputed", linkage="average")
        owner = torch.from_numpy(linked.fit_predict((1 - centres @ centres.T).clamp(min=0).numpy()))
    else:
        owner = torch.zeros(fine, dtype=torch.int64)
    sums = torch.zeros(clusters, means.shape[1]).index_add_(0, owner, means * parts[:, None])
    sizes = torch.zeros(clusters, dtype=torch.int64).index_add_(0, owner, parts)
    return Clusters(F.normalize(sums, dim=1), sizes)


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
