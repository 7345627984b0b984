"""Conditioning of frozen features: one affine map, fitted without labels, that makes cosines discriminate.

Cosines of many backbones' patches hardly differ: a common mean and a few directions of large variance,
often of the patch's position, carry most of every product. The maps here take them back. They are for the
features that form sets or are clustered as they are; what is trained keeps the backbone's own.

Legend: B images, h w patch grid, n patches, D channels. Moments are float64 and add up: parts of a data set
may be measured apart and merged (Chan et al. 1979)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppap.errors import NumberError, UsageError
from ppap.settings.checks import parse_condition

# Directions that `position` removes at most, in pairs (row, column), and the held-out R² that ends it: about
# what RASA (Franca, 2025) removes.
POSITION_DIRECTIONS, POSITION_R2 = 24, 0.1


@dataclass
class Moments:
    """Count, mean and scatter of patch features and their places; merge with ``+``."""

    count: int
    """Patches n."""
    mean: Tensor
    """(D + 2,) float64: of the features, then of row and column, which run from -1 to 1."""
    scatter: Tensor
    """(D + 2, D + 2) float64: sum of products of deviations from the mean."""

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Of feature maps (B, D, h, w), any float type."""
        height, width = features.shape[2:]
        rows = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
        rows = (rows.cpu() if rows.device.type == "mps" else rows).double()  # which mps has not
        row, column = (
            torch.linspace(-1, 1, n, dtype=torch.float64) if n > 1 else torch.zeros(1)
            for n in (height, width)
        )
        place = torch.cartesian_prod(row.double(), column.double()).view(-1, 2).to(rows.device)
        rows = torch.cat([rows, place.repeat(len(features), 1)], dim=1)
        mean = rows.mean(dim=0)
        rows = rows - mean
        return cls(len(rows), mean, rows.T @ rows)

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        scatter = (
            self.scatter + other.scatter + torch.outer(apart, apart) * (self.count * other.count / count)
        )
        return Moments(count, mean, scatter)

    def cpu(self) -> "Moments":
        """On the CPU, where maps are fitted."""
        return Moments(self.count, self.mean.cpu(), self.scatter.cpu())

    @property
    def covariance(self) -> Tensor:
        """(D + 2, D + 2) float64."""
        return self.scatter / self.count

    @property
    def width(self) -> int:
        """Channels D."""
        return len(self.mean) - 2


class Split(NamedTuple):
    """Moments of two halves of the images, so that what is fitted on one can be tested on the other."""

    fitted: Moments
    held_out: Moments

    @property
    def all(self) -> Moments:
        """Of both halves."""
        return self.fitted + self.held_out


class Halves:
    """Moments of images as they come, every second one to the other half."""

    def __init__(self) -> None:
        self._sums: list[Moments | None] = [None, None]
        self._next = 0

    def add(self, features: Tensor) -> None:
        """Maps (B, D, h, w) of the next images, any float type."""
        for part in features.split(1):
            before, found = self._sums[self._next], Moments.of(part)
            self._sums[self._next] = found if before is None else before + found
            self._next = 1 - self._next

    def split(self) -> Split:
        """On the CPU, where maps are fitted; a single image stands for both halves."""
        first, second = self._sums
        return Split(first.cpu(), (second or first).cpu())


class Condition(nn.Module):
    """y = (x - mean) map + shift, for patch features x."""

    def __init__(self, width: int) -> None:
        """The identity on ``width`` = D channels; :func:`fit` fills it, or a checkpoint."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("map", torch.eye(width))
        self.register_buffer("shift", torch.zeros(width))

    def forward(self, features: Tensor) -> Tensor:
        """Conditioned maps (B, D, h, w), fp32; memory order as that of the input, rows per patch."""
        with torch.autocast(features.device.type, enabled=False):
            rows = features.float().permute(0, 2, 3, 1)
            return ((rows - self.mean) @ self.map + self.shift).permute(0, 3, 1, 2)


def spectrum(moments: Moments) -> tuple[Tensor, Tensor]:
    """Eigenvalues (D,), falling, and eigenvectors (D, D) in columns, of the features' covariance.

    Shrunk towards their mean by D / n: the small ones of few patches are noise, which whitening would
    magnify."""
    D = moments.width
    values, vectors = torch.linalg.eigh(moments.covariance[:D, :D])
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    shrink = min(1.0, D / moments.count)
    return values * (1 - shrink) + values.mean() * shrink, vectors


MEAN_KEPT = 0.5
"""Length of the mean that ``clip`` leaves, as a share of the features' root mean square deviation from it.

Without it a patch near the mean has a direction of noise; with all of it patches are alike. Which share makes
the purest sets differs with the data: on four sets of photographs a half was never the worst of 0, 1/2 and 1.
"""


def fit(condition: str, split: Split) -> Condition:
    """The map that ``condition`` names; see ``--model.condition`` for the names.

    Args:
        condition: none, centre, whiten:P, clip:S, drop:K or position.
        split: of the training images.

    Raises:
        NumberError: features that are not finite, or all the same.
        UsageError: more components are dropped than there are.

    Returns:
        On the CPU. Maps are symmetric, and keep the mean square of the features' deviations, so that settings
        that depend on their size keep their meaning.
    """
    kind, value = parse_condition(condition)
    moments = split.all
    D = moments.width
    result = Condition(D)
    if kind == "none":
        return result
    if not torch.isfinite(moments.scatter).all():
        raise NumberError("the frozen features are not finite; check images and weights")
    if not moments.scatter[:D, :D].trace() > 0:
        raise NumberError(
            f"--model.condition {condition}: the frozen features are the same for every patch; give none, or "
            "check images and weights"
        )
    if kind == "drop" and value >= D:
        raise UsageError(f"--model.condition {condition}: the backbone has {D} channels; drop fewer")
    result.mean.copy_(moments.mean[:D])
    if kind == "centre":
        return result
    values, vectors = spectrum(moments)
    if kind == "position":
        directions = position_directions(split)
        matrix = torch.eye(D, dtype=torch.float64) - directions @ directions.T
    else:
        matrix = vectors @ torch.diag(_gains(kind, value, values)) @ vectors.T
    whole = moments.covariance[:D, :D].trace()
    kept = torch.trace(matrix @ moments.covariance[:D, :D] @ matrix)
    # What is left of few patches may be rounding, or less than nothing by it.
    matrix = matrix * (whole / kept.clamp(min=1e-12 * whole)).sqrt()
    result.map.copy_(matrix)
    if kind == "clip":
        mean, size = moments.mean[:D], moments.covariance[:D, :D].trace().sqrt()
        kept = min(float(mean.norm()), MEAN_KEPT * float(size))
        result.shift.copy_(F.normalize(mean, dim=0) * kept)
    return result


def _gains(kind: str, value: float, values: Tensor) -> Tensor:
    """Factor of each principal component."""
    if kind == "whiten":
        return values.clamp(min=1e-12 * float(values[0])).pow(-value / 2)
    if kind == "clip":
        return (value * values.sum() / values).clamp(max=1).sqrt()
    gains = torch.ones_like(values)
    gains[: int(value)] = 0
    return gains


def position_r2(split: Split, basis: Tensor | None = None) -> tuple[float, float]:
    """Held-out R² of a linear prediction of a patch's row and column from its features.

    Args:
        split: of the training images.
        basis: (D, d) orthonormal directions that the prediction may use; None = all.
    """
    weights = _position_weights(split.fitted, basis)
    return tuple(_r2(weights, split.held_out).tolist())


def position_directions(split: Split) -> Tensor:
    """Orthonormal directions (D, k) along which row and column can be predicted on held-out images.

    Regress, remove the two directions of the prediction, and again, until held-out R² is below
    ``POSITION_R2`` (Franca's RASA, arXiv 2507.14137, fits by gradient what is solved here).
    """
    D = split.fitted.width
    found = torch.zeros(D, 0, dtype=torch.float64)
    while found.shape[1] < min(POSITION_DIRECTIONS, D - 2):
        rest = torch.linalg.qr(torch.cat([found, torch.eye(D, dtype=torch.float64)], dim=1)).Q[
            :, found.shape[1] :
        ]
        weights = _position_weights(split.fitted, rest)
        keep = _r2(weights, split.held_out) > POSITION_R2
        if not keep.any():
            break
        found = torch.linalg.qr(torch.cat([found, weights[:, keep]], dim=1)).Q
    return found


def _position_weights(moments: Moments, basis: Tensor | None) -> Tensor:
    """(D, 2) least-squares weights, ridge of a thousandth of the mean eigenvalue."""
    D, cov = moments.width, moments.covariance
    basis = torch.eye(D, dtype=cov.dtype) if basis is None else basis
    own = basis.T @ cov[:D, :D] @ basis
    ridge = 1e-3 * own.trace() / len(own) * torch.eye(len(own), dtype=cov.dtype)
    return basis @ torch.linalg.solve(own + ridge, basis.T @ cov[:D, D:])


def _r2(weights: Tensor, moments: Moments) -> Tensor:
    """(2,) share of the variance of row and column that the prediction by ``weights`` (D, 2) explains."""
    D, cov = moments.width, moments.covariance
    explained = 2 * (weights * cov[:D, D:]).sum(dim=0) - ((cov[:D, :D] @ weights) * weights).sum(dim=0)
    return explained / cov[D:, D:].diagonal().clamp(min=1e-300)
