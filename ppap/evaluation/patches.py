"""Quick measures of patch features: k-means and a linear classifier on patches, scored against their labels.

They compare features (a backbone while it is pretrained, plain colour) with each other in seconds. They are
not the evaluation of a segmentation: ``ppap.evaluation.evaluate`` is, and scores pixels. Labels serve to
measure alone.

Legend: B images, H W pixels, N = B h w patches, D channels, K clusters, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ppap.data.patch_labels import blocks_of
from ppap.evaluation.metrics import ConfusionMatrix, Scores


def colour_features(pixels: Tensor, patch_size: int, *, bins: int = 0) -> Tensor:
    """What colour alone says about a patch.

    Args:
        pixels: (B, H, W, 3) uint8 RGB; H and W are multiples of the patch.
        patch_size: side of a patch [pixels].
        bins: 0 = mean and deviation of each channel, every column scaled to deviation 1 over all patches;
            otherwise the square roots of a histogram with this many bins per channel (a divisor of 256).

    Returns:
        (N, 6) or (N, bins ** 3) float32.

    Raises:
        ValueError: a size is no multiple of the patch, or `bins` no divisor of 256.
    """
    if bins < 0 or (bins and 256 % bins):
        raise ValueError(f"bins is {bins}; give 0 or a divisor of 256")
    blocks = blocks_of(pixels, patch_size)
    if bins:
        cell = (blocks.long() // (256 // bins) * torch.tensor([bins * bins, bins, 1])).sum(dim=2)
        histogram = torch.zeros(len(cell), bins**3).scatter_add_(1, cell, torch.ones(cell.shape))
        return (histogram / cell.shape[1]).sqrt()
    blocks = blocks.float()
    rows = torch.cat([blocks.mean(dim=1), blocks.std(dim=1, correction=0)], dim=1)
    return rows / rows.std(dim=0, correction=0).clamp(min=1e-6)


def kmeans(rows: Tensor, clusters: int, *, seed: int = 0, tries: int = 5, iterations: int = 40) -> Tensor:
    """Cluster of each row: Lloyd's algorithm from k-means++ starts, the tightest of several.

    Args:
        rows: (N, D) float, N >= K; compared by Euclidean distance as they are.
        clusters: K.
        seed: of the starts.
        tries: number of starts; the one with the smallest sum of squared distances is returned.
        iterations: Lloyd steps per start.

    Returns:
        (N,) int64 in 0..K-1.

    Raises:
        ValueError: fewer rows than clusters.
    """
    if len(rows) < clusters:
        raise ValueError(f"{len(rows)} rows for {clusters} clusters")
    generator = torch.Generator().manual_seed(seed)
    best, tightest = None, float("inf")
    for _ in range(tries):
        centres = _spread_centres(rows, clusters, generator)
        for _ in range(iterations):
            nearest = _distances(rows, centres).argmin(dim=1)
            sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
            sizes = torch.bincount(nearest, minlength=clusters).to(rows.dtype)[:, None]
            moved = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
            if torch.equal(moved, centres):
                break
            centres = moved
        distance, nearest = _distances(rows, centres).min(dim=1)
        if distance.sum() < tightest:
            best, tightest = nearest, distance.sum()
    return best


def _spread_centres(rows: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre is a row drawn in proportion to its squared distance to the nearest one."""
    chosen = [int(torch.randint(len(rows), (), generator=generator))]
    distance = _distances(rows, rows[chosen])[:, 0]
    while len(chosen) < clusters:
        cumulated = distance.clamp(min=0).double().cumsum(0)
        draw = torch.rand((), generator=generator, dtype=torch.float64) * cumulated[-1]
        chosen.append(min(int(torch.searchsorted(cumulated, draw)), len(rows) - 1))
        distance = torch.minimum(distance, _distances(rows, rows[chosen[-1:]])[:, 0])
    return rows[chosen]


def _distances(rows: Tensor, centres: Tensor) -> Tensor:
    """(N, K) squared Euclidean distances."""
    return rows.square().sum(dim=1, keepdim=True) - 2 * rows @ centres.T + centres.square().sum(dim=1)


def cluster_scores(rows: Tensor, labels: Tensor, classes: int, *, seed: int = 0, tries: int = 5) -> Scores:
    """k-means with one cluster per class, each matched to a class (Hungarian algorithm); counts patches.

    Args:
        rows: (N, D) features, clustered as they are.
        labels: (N,) int64 of ``ppap.data.patch_labels``, for the matching and the score alone.
        classes: C = K.
        seed, tries: as for :func:`kmeans`.
    """
    matrix = ConfusionMatrix(classes)
    matrix.update(kmeans(rows, classes, seed=seed, tries=tries), labels)
    return matrix.scores(matrix.match())


def linear_scores(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], classes: int, *, iterations: int = 60
) -> Scores:
    """Score on `val` of a linear classifier fitted on `train`; counts patches.

    Args:
        train, val: features (N, D) and labels (N,) int64; rows with a label below 0 are left out.
        classes: C.
        iterations: see :func:`linear_classifier`.
    """
    weight, bias = linear_classifier(*train, classes, iterations=iterations)
    matrix = ConfusionMatrix(classes)
    matrix.update((val[0] @ weight.T + bias).argmax(dim=1), val[1])
    return matrix.scores()


def linear_classifier(
    rows: Tensor, labels: Tensor, classes: int, *, iterations: int = 60
) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,) of a multinomial logistic regression.

    It is fitted to columns that are centred and scaled by their deviation; weight and bias are for the rows
    as they are.

    Args:
        rows: (N, D) float.
        labels: (N,) int64; rows with a label below 0 are left out.
        classes: C.
        iterations: L-BFGS steps on the cross-entropy, with weight decay 1e-4.
    """
    known = labels >= 0
    rows, target = rows[known], labels[known]
    mean, spread = rows.mean(dim=0), rows.std(dim=0).clamp(min=1e-6)
    rows = (rows - mean) / spread
    weight = torch.zeros(classes, rows.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(rows @ weight.T + bias, target) + 1e-4 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    with torch.no_grad():
        own = weight / spread
        return own, bias - own @ mean
