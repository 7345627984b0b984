"""Sizes and precision of positive and negative sets (the paper's Table 6 and Fig. 1b).

Legend: N patches, A anchors, C a chunk of anchors, D channels. Labels serve to measure alone. A set never
holds its anchor. The paper leaves open how a patch gets its class, what happens to ignored patches, and
whether the mean is one over pairs (micro) or over anchors (macro); here the first two are arguments, and both
means are reported.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ppap.kernels import PropagationConfig, propagate
from ppap.methods.hidden_positives import hidden_positives, pool_radius, unit_rows
from ppap.stopping import each

SetsOf = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Places among the anchors, (C,) int64 in 0..A-1 -> positive and negative sets, (C, N) bool each."""

IgnoredRule = Literal["exclude", "wrong"]
_BYTES = 24  # temporaries per pair of anchor and patch: cosines, thresholds and a few masks


class SetCounts(NamedTuple):
    """Per anchor, (A,) int64 each but for the first."""

    labelled: np.ndarray
    """(A,) bool: the anchor's class is known."""
    positives: np.ndarray
    """Patches in the positive set."""
    positives_labelled: np.ndarray
    """Those of them whose class is known."""
    positives_same: np.ndarray
    """Those of them that have the anchor's class; 0 where that is not known."""
    negatives: np.ndarray
    negatives_labelled: np.ndarray
    negatives_same: np.ndarray


@dataclass(frozen=True)
class Quality:
    """A row of Table 6. Shares are over labelled anchors; None where there is no pair to count."""

    positives: float
    """Mean |P| [patches]."""
    negatives: float
    """Mean |N| [patches]."""
    without_positives: float
    """Anchors whose positive set is empty [%]."""
    true_micro: float | None
    """Positives of the anchor's class, of all positives of all anchors [%]."""
    true_macro: float | None
    """Mean over anchors with positives of the share of the anchor's class in P [%]."""
    false_micro: float | None
    """Negatives of the anchor's class, of all negatives of all anchors [%]."""
    false_macro: float | None
    """Mean over anchors with negatives of the share of the anchor's class in N [%]."""


@dataclass(frozen=True)
class Decile:
    """A point of Fig. 1b: the labelled anchors with the smallest positive sets."""

    share: int
    """Of the labelled anchors [%]."""
    positives: float
    """Their mean |P| [patches]."""
    precision_micro: float | None
    """Positives of the anchor's class [%], as :attr:`Quality.true_micro`."""
    precision_macro: float | None


@torch.no_grad()
def propagated(features: Tensor, anchors: Tensor, cfg: PropagationConfig) -> SetsOf:
    """PPAP's sets: {s_T > phi_T} and {s_T < psi_T}; with both switches of `cfg` off a fixed threshold's.

    Args:
        features: (N, D), any norm.
        anchors: (A,) int64, unique.
        cfg: thresholds, steps, sigmas and the switches of Table 5.
    """
    relations = propagate(features, anchors, cfg, precision="fp32")
    return relations.sets


@torch.no_grad()
def hidden(features: Tensor, anchors: Tensor, pool: Tensor) -> SetsOf:
    """HP's task-agnostic sets: its positives for a pool (M, D), and all other patches as negatives."""
    unit, radius = unit_rows(features), pool_radius(features, pool)

    def sets_of(places: Tensor) -> tuple[Tensor, Tensor]:
        positive = hidden_positives(unit, radius, anchors[places], normalised=True)
        return positive, _others(positive, anchors[places])

    return sets_of


def clustered(clusters: Tensor, anchors: Tensor) -> SetsOf:
    """Sets of a clustering (N,) int64: all other members of the anchor's cluster, and the other clusters."""

    def sets_of(places: Tensor) -> tuple[Tensor, Tensor]:
        own = anchors[places]
        positive = clusters[None, :] == clusters[own, None]
        positive[torch.arange(len(own), device=own.device), own] = False
        return positive, _others(positive, own)

    return sets_of


def _others(positive: Tensor, anchors: Tensor) -> Tensor:
    """The complement of positive sets (C, N), without the anchors themselves."""
    negative = ~positive
    negative[torch.arange(len(anchors), device=anchors.device), anchors] = False
    return negative


@torch.no_grad()
def count_sets(
    sets_of: SetsOf, anchors: Tensor, labels: Tensor, *, memory_budget: int = 256 * 2**20, title: str = "sets"
) -> SetCounts:
    """Size of every anchor's sets, and how many of their patches have its class.

    Args:
        sets_of: the sets of some anchors.
        anchors: (A,) int64 rows of the patches.
        labels: (N,) int64 class of each patch, below 0 = not known.
        memory_budget: limit of the dense masks of a chunk of anchors [bytes].
        title: of the progress bar.
    """
    rows = max(memory_budget // (_BYTES * len(labels)), 1)
    known, parts = labels >= 0, []
    places = torch.arange(len(anchors), device=anchors.device)
    for chunk in each(tqdm(places.split(rows), desc=title, unit="chunk", leave=False, disable=None)):
        own = labels[anchors[chunk]]
        same = (labels[None, :] == own[:, None]) & (own >= 0)[:, None]
        columns = [own >= 0]
        for mask in sets_of(chunk):
            columns += [mask.sum(dim=1), (mask & known).sum(dim=1), (mask & same).sum(dim=1)]
        parts.append(torch.stack([column.long() for column in columns]).cpu())
    if not parts:
        raise ValueError("no anchors")
    values = torch.cat(parts, dim=1).numpy()
    return SetCounts(values[0].astype(bool), *values[1:])


def quality(counts: SetCounts, ignored: IgnoredRule = "exclude") -> Quality:
    """Means over all anchors (sizes) and over the labelled ones (shares).

    Args:
        counts: of :func:`count_sets`.
        ignored: patches of unknown class are left out of the shares, or count as of another class.
    """
    true = _shares(counts, "positives", ignored, counts.labelled)
    false = _shares(counts, "negatives", ignored, counts.labelled)
    return Quality(
        float(counts.positives.mean()),
        float(counts.negatives.mean()),
        100 * float((counts.positives == 0).mean()),
        *true,
        *false,
    )


def deciles(counts: SetCounts, ignored: IgnoredRule = "exclude") -> list[Decile]:
    """Fig. 1b: the first 10, 20, ... 100 % of the labelled anchors, sorted by the size of P, smallest first.

    The number of anchors is rounded up; of anchors with equal sets the first come first. Empty without
    labelled anchors.
    """
    order = np.flatnonzero(counts.labelled)
    order = order[np.argsort(counts.positives[order], kind="stable")]
    points = []
    for share in range(10, 101, 10) if len(order) else ():
        first = order[: -(-len(order) * share // 100)]
        size = float(counts.positives[first].mean())
        points.append(Decile(share, size, *_shares(counts, "positives", ignored, first)))
    return points


def _shares(
    counts: SetCounts, kind: str, ignored: IgnoredRule, chosen: np.ndarray
) -> tuple[float | None, float | None]:
    """Micro and macro share of the anchor's class in the sets of the `chosen` anchors [%]."""
    same = getattr(counts, f"{kind}_same")[chosen]
    all_of_them = getattr(counts, kind if ignored == "wrong" else f"{kind}_labelled")[chosen]
    filled = all_of_them > 0
    if not filled.any():
        return None, None
    micro = 100 * same.sum() / all_of_them.sum()
    return float(micro), float(100 * (same[filled] / all_of_them[filled]).mean())
