"""What decides the sets of some anchors, and the sets themselves in the form of a backend."""

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

Mask = TypeVar("Mask")


@dataclass(frozen=True)
class Queries:
    """What decides the two sets of some anchors: cosine to `positive` above `phi`, to `negative` below `psi`.

    Attributes:
        positive: (A, D) queries of the positives.
        phi: (A,) thresholds of the positives.
        negative: (A, D) queries of the negatives, or None where they are those of the positives.
        psi: (A,) thresholds of the negatives; inf where every non-positive is a negative.
    """

    positive: torch.Tensor
    phi: torch.Tensor
    negative: torch.Tensor | None
    psi: torch.Tensor

    @property
    def proxies(self) -> torch.Tensor:
        """(A, D) the propagated proxies: they decide the negatives."""
        return self.positive if self.negative is None else self.negative

    def take(self, rows: slice) -> "Queries":
        """Those of some anchors."""
        negative = None if self.negative is None else self.negative[rows]
        return Queries(self.positive[rows], self.phi[rows], negative, self.psi[rows])


@dataclass(frozen=True)
class Sets(Generic[Mask]):
    """The sets of a chunk of anchors, without the anchors themselves; each backend has its form of a mask.

    Attributes:
        positive: the positives.
        kept: positives and negatives.
        num_positive: (C,) int64.
    """

    positive: Mask
    kept: Mask
    num_positive: torch.Tensor
