"""``--loss.phi0 auto`` and ``--loss.psi0 auto``: thresholds by the sizes of the sets they make, without
labels.

The rule: the paper's settings end, on its own backbones and data, with positive sets of 288 and 1838 of
50,176 patches (Table 6, COCO-Stuff and Cityscapes, 27 clusters each), 0.15 and 0.99 of an average cluster of
N / 27 patches, and with negative sets of 92 % and 86 % of the patches. Take the thresholds whose sets, after
propagation, come nearest to the middles: 0.4 average clusters (``--loss.positives``) and 89 %. Only the
number of clusters enters.

On Potsdam, with 3 clusters, the negative sets are 60 %. A rule in average clusters, which would explain all
three, was tried on photographs and gained nothing (docs/results/what-decides.md).

Legend: N patches of a sample, D channels.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppap.errors import UsageError
from ppap.kernels import PropagationConfig, propagate
from ppap.runs.randomness import drawn_order
from ppap.settings.config import LossConfig

POSITIVE_CLUSTERS = 0.4
"""Aim for the mean positive set [average clusters]: geometric middle of 0.15 and 0.99."""
NEGATIVE_SHARE = 0.89
"""Aim for the mean negative set, as a share of the patches that are no positives: middle of 86 % and 92 %."""
TOLERANCE = 1.6
"""Factor by which a positive set may miss its aim before it is said that no threshold gives it."""
_ROWS = 64  # anchors whose cosines are formed at once
_HALVINGS = 16  # cosines of some backbones lie within a hundredth


class Phi0(NamedTuple):
    """A threshold of the positives, and what was found on the way to it."""

    value: float
    """[cosine]."""
    size: float
    """Mean positive set at ``value`` [share of the patches]."""
    jump: tuple[float, float]
    """Sizes just above and just below the aim: far apart where the sets jump."""


class NegativeSizes:
    """Mean negative sets for any psi0 after one walk, which does not depend on psi0 (Eq. 2-5)."""

    def __init__(self, patches: Tensor, anchors: Tensor, cfg: PropagationConfig, **options: Any) -> None:
        """Args: (N, D) features, (A,) rows of anchors, thresholds and steps; options of ``propagate``."""
        self.relations = propagate(patches, anchors, replace(cfg, psi0=0.0), precision="fp32", **options)
        rel = self.relations
        # A patch is a negative where its cosine to the proxy, less what the walk added to psi, is below psi0.
        self.margins = torch.empty(len(anchors), len(patches), device=patches.device)
        for first in range(0, len(anchors), _ROWS):
            rows = slice(first, first + _ROWS)
            sim = torch.mm(rel.proxies[rows], rel.features.T, out=self.margins[rows])
            positive = sim > rel.phi[rows, None]
            sim.sub_(rel.psi[rows, None]).masked_fill_(positive, torch.inf)
        self.margins[torch.arange(len(anchors), device=patches.device), anchors] = torch.inf

    def share(self, psi0: float) -> float:
        """Mean negative set [share of the patches]."""
        return (self.margins < psi0).count_nonzero().item() / self.margins.numel()


class SetSizes:
    """Mean sizes of the sets of some patches, for any thresholds."""

    def __init__(self, patches: Tensor, loss: LossConfig, seed: int) -> None:
        """Args: (N, D) features as the loss sees them; steps and sigmas; seed of the anchors."""
        self.patches, self.loss = patches, loss
        self.budget = loss.memory_budget_mib * 2**20
        count = len(patches)
        # Fewer anchors where each has more patches to compare itself with, so that it takes the same seconds.
        anchors = min(max(2**22 // count, 128), 512, count)
        order = drawn_order(count, seed, 6)
        self.anchors = torch.from_numpy(np.sort(order[:anchors])).to(patches.device)

    def share(self, phi0: float, steps: int | None = None) -> float:
        """Mean positive set [share of the patches] after ``steps`` (default: the settings')."""
        cfg = self._config(phi0, steps)
        found = propagate(self.patches, self.anchors, cfg, precision="fp32", memory_budget=self.budget)
        return found.num_positives.double().mean().item() / len(self.patches)

    def negatives(self, phi0: float) -> NegativeSizes:
        """The walk from one phi0, and its negative sets."""
        return NegativeSizes(self.patches, self.anchors, self._config(phi0), memory_budget=self.budget)

    def _config(self, phi0: float, steps: int | None = None) -> PropagationConfig:
        loss = self.loss
        steps = loss.steps if steps is None else steps
        return PropagationConfig(phi0, -1.0, steps, loss.sigma_pos, loss.sigma_amb)

    def phi0(self, aim: float, steps: int | None = None) -> Phi0:
        """The threshold whose mean positive set is nearest to ``aim`` [share of the patches]."""
        low, high = (-1.0, 1.0), (1.0, 0.0)  # (threshold, size): sizes fall with the threshold
        for _ in range(_HALVINGS):
            middle = (low[0] + high[0]) / 2
            size = self.share(middle, steps)
            low, high = ((middle, size), high) if size > aim else (low, (middle, size))
        value = round(min((low, high), key=lambda end: ratio(end[1], aim))[0], 5)
        return Phi0(value, self.share(value, steps), (low[1], high[1]))

    def psi0(self, phi0: float) -> float:
        """The threshold whose mean negative set is nearest to ``NEGATIVE_SHARE``, given phi0."""
        aim = NEGATIVE_SHARE * (1 - self.share(phi0))
        sizes = self.negatives(phi0)
        low, high = -1.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if sizes.share(middle) < aim else (low, middle)
        return round((low + high) / 2, 5)


def ratio(share: float, aim: float) -> float:
    """By how much a size misses its aim: the log of the factor between them."""
    return abs(float(np.log(max(share, 1e-9) / aim)))


def check_size(found: Phi0, aim: float, condition: str, remedy: str) -> None:
    """Refuse a threshold whose sets have not nearly the size that was asked for.

    Raises:
        UsageError: naming both sizes between which the sets jump, and ``remedy``.
    """
    if ratio(found.size, aim) > np.log(TOLERANCE):
        large, small = (f"{100 * size:.2g} %" for size in found.jump)
        raise UsageError(
            f"--loss.phi0 auto: no threshold gives positive sets of about {100 * aim:.2g} % of the patches: "
            f"they jump from {large} to {small} with --model.condition {condition}; {remedy}"
        )
