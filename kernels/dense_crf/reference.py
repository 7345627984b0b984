"""The definition of ``dense_crf``, step by step, for the reader and the tests; seconds per photograph.

Mean field: Kraehenbuehl and Koltun, Efficient Inference in Fully Connected CRFs with Gaussian Edge
Potentials (2011). Lattice: Adams, Baek and Davis, Fast High-Dimensional Filtering Using the Permutohedral
Lattice (2010).

Legend: ``N`` pixels, ``C`` classes, ``d`` features of a pixel, ``M`` lattice vertices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Both ends as published. They bound the unary energy to [0, 11.5], so that one pixel's scores can still be
# outvoted.
PROBABILITY_MIN, PROBABILITY_MAX = 1e-5, 1.0


def unavailable_reason() -> None:
    """It runs everywhere."""


def dense_crf(
    image: Tensor,
    scores: Sequence[Tensor],
    iterations: int,
    gaussian: tuple[float, float],
    bilateral: tuple[float, float, float],
) -> list[Tensor]:
    """Mean-field inference for several maps of one image; parameters of :func:`ppap.kernels.dense_crf`."""
    (gaussian_sxy, gaussian_weight), (sxy, srgb, bilateral_weight) = gaussian, bilateral
    height, width, _ = image.shape
    y, x = np.divmod(np.arange(height * width), width)
    bgr = image.numpy()[..., ::-1].reshape(-1, 3)
    position = np.stack([x, y], axis=1).astype(np.float32)
    smooth = Filter.of(position / np.float32(gaussian_sxy))
    edges = Filter.of(
        np.concatenate([position / np.float32(sxy), bgr.astype(np.float32) / np.float32(srgb)], axis=1)
    )
    weighted = [(smooth, gaussian_weight), (edges, bilateral_weight)]
    return [_mean_field(part, weighted, iterations) for part in scores]


def _mean_field(scores: Tensor, filters: Sequence[tuple["Filter", float]], iterations: int) -> Tensor:
    """Algorithm 1 of the paper with a Potts model."""
    probability_NC = scores.flatten(1).T.softmax(dim=1).clamp(PROBABILITY_MIN, PROBABILITY_MAX)
    unary_NC = -probability_NC.log()
    q_NC = (-unary_NC).softmax(dim=1)
    for _ in range(iterations):
        # Message passing, compatibility transform (Potts: agreement is rewarded), local update.
        messages_NC = sum(weight * f(q_NC) for f, weight in filters)
        q_NC = (messages_NC - unary_NC).softmax(dim=1)
    return q_NC.T.reshape(scores.shape).contiguous()


@dataclass(frozen=True)
class Filter:
    """A Gaussian filter of standard deviation 1 in feature space, normalised symmetrically."""

    vertex_Nd: Tensor
    """(N, d + 1) int64: the vertices of the simplex that each pixel lies in."""
    weight_Nd: Tensor
    """(N, d + 1): the pixel's barycentric coordinates in it."""
    neighbour_dM: Tensor
    """(d + 1, 2, M) int64: both neighbours of each vertex along each axis; M = there is none."""
    norm_N: Tensor
    """(N,): 1 / sqrt of the unnormalised filter's answer to ones."""

    @classmethod
    def of(cls, feature_Nd: np.ndarray) -> "Filter":
        """The filter of pixels with these features (N, d), float32."""
        coordinates, weights = enclosing_simplices(feature_Nd)
        vertices, vertex = _numbered(coordinates)
        plain = cls(
            torch.from_numpy(vertex),
            torch.from_numpy(weights),
            torch.from_numpy(_neighbours(vertices)),
            torch.ones(len(vertex)),
        )
        norm = 1 / (plain(torch.ones(len(vertex), 1))[:, 0] + 1e-20).sqrt()
        return cls(plain.vertex_Nd, plain.weight_Nd, plain.neighbour_dM, norm)

    def __call__(self, values_NC: Tensor) -> Tensor:
        """Filtered values (N, C): splat, blur, slice."""
        axes, _, count = self.neighbour_dM.shape
        values_NC = values_NC * self.norm_N[:, None]
        lattice_MC = values_NC.new_zeros(count + 1, values_NC.shape[1])  # the last row stays 0
        for corner in range(axes):
            lattice_MC.index_add_(0, self.vertex_Nd[:, corner], values_NC * self.weight_Nd[:, corner, None])
        for before, after in self.neighbour_dM:
            lattice_MC[:-1] += (lattice_MC[before] + lattice_MC[after]) / 2
        alpha = 1 / (1 + 2.0 ** (1 - axes))  # what blurring adds up to, undone
        sliced = sum(self.weight_Nd[:, c, None] * lattice_MC[self.vertex_Nd[:, c]] for c in range(axes))
        return alpha * sliced * self.norm_N[:, None]


def enclosing_simplices(feature_Nd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (N, d + 1, d) int64 and weights (N, d + 1) float32 of the simplices that features lie in.

    A vertex has d + 1 coordinates that sum to 0 and leave the same remainder r on division by d + 1; a
    simplex has one vertex for each r, in this order; the last coordinate is left out. In float32 throughout:
    for a feature on a face the last bit decides, and the order of operations is the published code's.
    """
    count, d = feature_Nd.shape
    deviation = np.float32(math.sqrt(2 / 3) * (d + 1))  # makes the filter's standard deviation 1
    elevated = np.zeros((count, d + 1), np.float32)
    total = np.zeros(count, np.float32)
    for j in range(d, 0, -1):
        scaled = feature_Nd[:, j - 1] * np.float32(1 / math.sqrt((j + 1) * j) * float(deviation))
        elevated[:, j] = total - np.float32(j) * scaled
        total = total + scaled
    elevated[:, 0] = total
    # The nearest vertex with remainder 0: round every coordinate, then bring the sum back to 0.
    inverse = np.float32(1) / np.float32(d + 1)
    nearest = np.rint(elevated * inverse)
    excess = nearest.sum(axis=1).astype(np.int64)
    rest = elevated - nearest * np.float32(d + 1)
    rank = np.zeros((count, d + 1), np.int64)  # 0 = the largest rest; ties by index
    for i in range(d + 1):
        for j in range(i + 1, d + 1):
            less = rest[:, i] < rest[:, j]
            rank[:, i] += less
            rank[:, j] += ~less
    rank += excess[:, None]
    shift = (rank < 0).astype(np.int64) - (rank > d)
    rank += shift * (d + 1)
    origin = (nearest.astype(np.int64) + shift) * (d + 1)
    rest = (elevated - origin.astype(np.float32)) * inverse
    ordered = np.take_along_axis(rest, np.argsort(rank, axis=1), axis=1)  # by rank, descending
    weights = np.empty_like(rest)
    weights[:, 0] = ordered[:, d] + (1 - ordered[:, 0])
    for r in range(1, d + 1):
        weights[:, r] = ordered[:, d - r] - ordered[:, d - r + 1]
    remainder = np.arange(d + 1)[None, :, None]
    moved = np.where(rank[:, None, :d] <= d - remainder, remainder, remainder - (d + 1))
    coordinates = origin[:, None, :d] + moved
    return coordinates, weights


def _numbered(coordinates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct vertices (M, d), and the number (N, d + 1) of each one given."""
    distinct, number = np.unique(coordinates.reshape(-1, coordinates.shape[2]), axis=0, return_inverse=True)
    return distinct, number.reshape(coordinates.shape[:2])


def _neighbours(vertices: np.ndarray) -> np.ndarray:
    """(d + 1, 2, M): a step along axis j is -1 on every coordinate and +d on coordinate j, or the reverse."""
    count, d = vertices.shape
    numbers = {row.tobytes(): i for i, row in enumerate(vertices)}
    steps = np.full((d + 1, d), -1) + (d + 1) * np.eye(d + 1, d, dtype=np.int64)
    found = np.empty((d + 1, 2, count), np.int64)
    for axis, step in enumerate(steps):
        for side, moved in enumerate((vertices + step, vertices - step)):
            found[axis, side] = [numbers.get(row.tobytes(), count) for row in moved]
    return found
