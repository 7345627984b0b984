"""``propagate``: progressive proxy anchor propagation (paper section 3.2-3.3): walk and result.

A backend that forms all sets in a way of its own has a ``triton_impl.py`` here; the others are composed of
``proxy_average`` and ``relation_masks``, with keys that are prepared once for all steps and the sets.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from .. import dispatch
from ..budget import DEFAULT_BUDGET
from ..checks import check_anchors, check_budget, check_rows, require
from ..guards import guard, in_range, poison, refuse_on_cpu
from ..masks import num_words, unpack_masks
from ..plain_products import computing_on
from ..precision import accumulator, normalise, resolve_precision
from ..proxy_average import move
from ..relation_masks import Queries, count_sets
from .config import PropagationConfig

__all__ = ["PropagationConfig", "Relations", "all_rows", "propagate", "walk"]


# Unit features, proxies, phi, psi, numbers of positives and of negatives.
Propagated = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Average = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def walk(start_AD: torch.Tensor, cfg: PropagationConfig, average: Average) -> Queries:
    """Move the proxies of unit-norm anchors T times, their thresholds with them (Eq. 2-5).

    Args:
        start_AD: anchors' features, unit norm or zero.
        cfg: settings.
        average: (queries, phi) -> (proxies, counts), the bound ``proxy_average`` of a backend.
    """
    proxy_AD = start_AD
    phi_A = start_AD.new_full((start_AD.shape[0],), cfg.phi0)
    psi_A = start_AD.new_full((start_AD.shape[0],), cfg.psi0)
    for _ in range(cfg.steps):
        moved_AD, _ = average(proxy_AD, phi_A)
        # 1 - cos(v_{t-1}, v_t): rows are of unit norm, or zero, whose cosine to anything is 0.
        movement_A = 1 - (proxy_AD * moved_AD).sum(dim=1)
        phi_A = phi_A - movement_A / cfg.sigma_pos
        psi_A = psi_A + movement_A / cfg.sigma_amb
        proxy_AD = moved_AD
    if not cfg.ambiguity_excluded:
        psi_A = torch.full_like(psi_A, torch.inf)
    if cfg.trustworthy_positives:
        return Queries(proxy_AD, phi_A, None, psi_A)
    return Queries(start_AD, torch.full_like(phi_A, cfg.phi0), proxy_AD, psi_A)


@dataclass(frozen=True)
class Relations:
    """Result of :func:`propagate`: what defines the sets of every anchor, never the sets themselves.

    Attributes:
        features: (N, D) L2-normalised features, float32 (float64 for float64 input).
        anchors: (A,) int64 row of each anchor.
        proxies: (A, D) propagated proxies, unit norm, or zero after an empty set.
        phi: (A,) threshold that decides the positives [cosine].
        psi: (A,) threshold that decides the negatives [cosine]; inf with ``ambiguity_excluded=False``.
        num_positives: (A,) int64, without the anchor itself.
        num_negatives: (A,) int64, kept patches minus positives, without the anchor itself (Eq. 7).
        precision: precision the sets were formed in.
    """

    features: torch.Tensor
    anchors: torch.Tensor
    proxies: torch.Tensor
    phi: torch.Tensor
    psi: torch.Tensor
    num_positives: torch.Tensor
    num_negatives: torch.Tensor
    precision: str
    trustworthy_positives: bool = field(default=True, repr=False)
    backend: str = field(default="torch", repr=False)

    def queries(self, rows: slice | torch.Tensor | None = None) -> Queries:
        """The queries and thresholds of some anchors (None = all); `rows` index anchors 0..A-1."""
        if rows is None:
            rows = slice(None)  # as a default, torch 2.11 could not trace it
        proxies, phi, psi = self.proxies[rows], self.phi[rows], self.psi[rows]
        if self.trustworthy_positives:
            return Queries(proxies, phi, None, psi)
        return Queries(self.features[self.anchors[rows]], phi, proxies, psi)

    def positives(self, rows: torch.Tensor) -> torch.Tensor:
        """Dense boolean (len(rows), N) positive sets, without the anchors; for analysis and pictures."""
        return self.sets(rows)[0]

    def negatives(self, rows: torch.Tensor) -> torch.Tensor:
        """Dense boolean (len(rows), N) negative sets (kept minus positives); for analysis and pictures."""
        return self.sets(rows)[1]

    def sets(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both of :meth:`positives` and :meth:`negatives`, for the price of one."""
        rows = torch.as_tensor(rows, device=self.features.device, dtype=torch.int64).reshape(-1)
        count, device = self.features.shape[0], self.features.device
        positive, kept = torch.empty((2, len(rows), num_words(count)), dtype=torch.int32, device=device)
        impl = dispatch.load("relation_masks", self.backend)
        with computing_on(device):
            keys, words = impl.prepare(self.features, self.precision), (positive, kept)
            queries, own = self.queries(rows), self.anchors[rows]
            count_sets(impl, keys, self.precision, queries, own, DEFAULT_BUDGET, words)
        dense = unpack_masks(positive, count)
        return dense, unpack_masks(kept, count) & ~dense


def propagate(
    features: torch.Tensor,
    anchors: torch.Tensor | None,
    cfg: PropagationConfig,
    *,
    precision: str = "auto",
    memory_budget: int = DEFAULT_BUDGET,
    impl: str | None = None,
) -> Relations:
    """Propagate the proxies of the anchors and count their sets (paper Eq. 1-7).

    The semantics are those of the published code: strict comparisons, cosine similarity, both thresholds
    moved by the same 1 - cos before the new set is formed, the anchor part of its own propagation and removed
    at the end.

    Args:
        features: (N, D) floating, normalised inside; never receives a gradient.
        anchors: (A,) int64 rows, unique and in range; None = every row.
        cfg: settings.
        precision: ``auto | fp32 | fp16 | bf16``.
        memory_budget: limit of all temporaries together [bytes]; no anchors x patches matrix is larger.
        impl: backend name; None = context, environment, ``auto``.

    Returns:
        :class:`Relations`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on CPUs also non-finite features and bad anchors.
        RuntimeError: the backend asked for is not available.
    """
    check_rows("propagate", "features", features)
    require(features.shape[1] >= 1, "propagate: features have no channels; give (N, D) with D >= 1")
    check_budget("propagate", memory_budget)
    anchors = all_rows(features) if anchors is None else anchors
    check_anchors("propagate", anchors, features.shape[0])
    backend = dispatch.choose(impl, features, anchors)
    precision = resolve_precision(precision, features)
    unit, proxies, phi, psi, num_positives, num_negatives = _propagate(
        features.detach(), anchors, cfg.as_floats(), precision, memory_budget, backend
    )
    return Relations(
        unit,
        anchors,
        proxies,
        phi,
        psi,
        num_positives,
        num_negatives,
        precision,
        cfg.trustworthy_positives,
        backend,
    )


def all_rows(features: torch.Tensor) -> torch.Tensor:
    """Every row of (N, D) features as an anchor."""
    return torch.arange(features.shape[0], device=features.device)


@torch.library.custom_op("ppap::propagate", mutates_args=())
def _propagate(
    features: torch.Tensor,
    anchors: torch.Tensor,
    settings: list[float],
    precision: str,
    memory_budget: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    cfg = PropagationConfig.from_floats(settings)
    own_form = dispatch.load_if_any("propagate", backend)
    if anchors.numel() and own_form is not None:
        refuse_on_cpu({"features": features}, anchors, features.shape[0])
        with computing_on(features.device):
            found: Propagated = own_form.guarded_propagate(features, anchors, cfg, precision, memory_budget)
            return found
    factor = guard({"features": features}, anchors, features.shape[0])
    unit_ND = normalise(features, accumulator(precision))
    anchors = in_range(anchors, features.shape[0])
    averaging, masking = dispatch.load("proxy_average", backend), dispatch.load("relation_masks", backend)
    with computing_on(features.device):
        keys = averaging.prepare(unit_ND, precision)
        q = walk(unit_ND[anchors], cfg, partial(move, averaging, keys, precision, memory_budget))
        num_positives, num_kept = count_sets(masking, keys, precision, q, anchors, memory_budget)
    # Without a step the proxies are the anchors' features and the thresholds constants: an op returns no
    # aliases.
    proxies, phi, psi = q.proxies.clone(), q.phi.clone(), q.psi.clone()
    num_negatives = num_kept - num_positives
    poison(factor, proxies, phi, psi)
    if factor is not None:
        num_positives = num_positives.masked_fill(factor.isnan(), -1)
        num_negatives = num_negatives.masked_fill(factor.isnan(), -1)
    return unit_ND, proxies, phi, psi, num_positives, num_negatives


@_propagate.register_fake
def _(
    features: torch.Tensor,
    anchors: torch.Tensor,
    settings: list[float],
    precision: str,
    memory_budget: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype, count = accumulator(precision), anchors.shape[0]
    unit = features.new_empty(features.shape, dtype=dtype)
    proxies = features.new_empty((count, features.shape[1]), dtype=dtype)
    phi, psi = features.new_empty(count, dtype=dtype), features.new_empty(count, dtype=dtype)
    return unit, proxies, phi, psi, torch.empty_like(anchors), torch.empty_like(anchors)
