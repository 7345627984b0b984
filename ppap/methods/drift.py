"""Whether training keeps what the frozen features know, without labels: the share of their neighbours kept.

Legend: n patches of a few training images, D channels of the backbone, E of the code.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ppap.data import val_loader
from ppap.methods.engine import Engine
from ppap.nets.model import patch_rows
from ppap.runs.randomness import drawn_order, own_randomness

IMAGES, NEIGHBOURS = 8, 20
PATCHES = 1024
"""Patches at most that are compared with each other."""


def neighbours(rows: Tensor, count: int) -> Tensor:
    """Indices of the nearest other rows by cosine: (n, count) int64."""
    unit = F.normalize(rows.float(), dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(-2)
    return cosines.topk(count, dim=1).indices


def neighbours_kept(before: Tensor, after: Tensor) -> float:
    """Mean share of a row's neighbours, (n, k) of :func:`neighbours`, that it still has."""
    same = (before[:, :, None] == after[:, None, :]).any(dim=2)
    return same.float().mean().item()


class Watch:
    """The same few training images, looked at again and again; no random state is touched."""

    def __init__(self, engine: Engine, source: Dataset[dict[str, Any]]) -> None:
        """Args: the network, whose frozen features are the measure; training images, or their cache."""
        config = engine.config
        order = drawn_order(len(source), config.train.seed, 8)
        with own_randomness():
            batches = list(val_loader(Subset(source, np.sort(order[:IMAGES]).tolist()), IMAGES, 0))
        self.engine, self.batches = engine, batches
        frozen = self._rows(engine.frozen_code_of)
        self.count = min(NEIGHBOURS, len(frozen) - 1)
        self.before = neighbours(frozen, self.count) if self.count > 0 else None

    def kept(self) -> float:
        """Share of the frozen neighbours that the code keeps, 0 to 1; 1 where there is nothing to compare."""
        if self.before is None:
            return 1.0
        return neighbours_kept(self.before, neighbours(self._rows(self.engine.code_of), self.count))

    def _rows(self, code_of: Any) -> Tensor:
        rows = torch.cat([patch_rows(code_of(batch)) for batch in self.batches])
        return rows[:: -(-len(rows) // PATCHES)]
