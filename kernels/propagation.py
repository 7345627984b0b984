"""Progressive proxy anchor propagation (paper section 3.2-3.3): settings, walk, result."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from . import dispatch
from .budget import DEFAULT_BUDGET, row_chunks, rows_within
from .checks import check_anchors, check_budget, check_rows, require
from .guards import guard, in_range, poison, refuse_on_cpu
from .masks import num_words, unpack_masks
from .plain_products import computing_on
from .precision import accumulator, normalise, resolve_precision


@dataclass(frozen=True)
class PropagationConfig:
    """Settings of the propagation; the defaults are those of the paper's text.

    Attributes:
        phi0: initial threshold of the positives [cosine].
        psi0: initial threshold of the negatives [cosine]; it may exceed phi0, then nothing is ambiguous.
        steps: number T of moves of the proxy, 0 or more.
        sigma_pos: divides the movement before it lowers phi (Eq. 3), above 0.
        sigma_amb: divides the movement before it raises psi (Eq. 5), above 0.
        trustworthy_positives: positives around the propagated proxy (TPS); off = above phi0 around the
            anchor.
        ambiguity_excluded: negatives below psi only (ANS); off = every patch that is not a positive.
    """

    phi0: float = 0.55
    psi0: float = 0.15
    steps: int = 2
    sigma_pos: float = 3.0
    sigma_amb: float = 4.0
    trustworthy_positives: bool = True
    ambiguity_excluded: bool = True

    def __post_init__(self) -> None:
        for name in ("phi0", "psi0"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(
                    f"PropagationConfig: {name} is {getattr(self, name)!r}; give a finite cosine"
                )
        for name in ("sigma_pos", "sigma_amb"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"PropagationConfig: {name} is {getattr(self, name)!r}; give a number above 0"
                )
        if not isinstance(self.steps, int) or self.steps < 0:
            raise ValueError(f"PropagationConfig: steps is {self.steps!r}; give a whole number, 0 or more")

    def as_floats(self) -> list[float]:
        """The settings as a list, the form in which they pass through registered ops."""
        switches = [float(self.trustworthy_positives), float(self.ambiguity_excluded)]
        numbers = [self.phi0, self.psi0, self.steps, self.sigma_pos, self.sigma_amb]
        return [float(number) for number in numbers] + switches

    @classmethod
    def from_floats(cls, values: list[float]) -> "PropagationConfig":
        """Inverse of :meth:`as_floats`."""
        phi0, psi0, steps, sigma_pos, sigma_amb, trustworthy, excluded = values
        return cls(phi0, psi0, int(steps), sigma_pos, sigma_amb, bool(trustworthy), bool(excluded))


@dataclass(frozen=True)
class Queries:
    """What decides the two sets of some anchors: cosine to `positive` above `phi`, to `negative` below `psi`.

    Attributes:
        positive: (A, D) queries of the positives.
        phi: (A,) thresholds of the positives.
        negative: (A, D) queries of the negatives, or None where they are those of the positives.
        psi: (A,) thresholds of the negatives; inf where every non-positive is a negative.
        proxies: (A, D) the propagated proxies, whatever the switches.
    """

    positive: torch.Tensor
    phi: torch.Tensor
    negative: torch.Tensor | None
    psi: torch.Tensor
    proxies: torch.Tensor


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
        return Queries(proxy_AD, phi_A, None, psi_A, proxy_AD)
    return Queries(start_AD, torch.full_like(phi_A, cfg.phi0), proxy_AD, psi_A, proxy_AD)


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
            return Queries(proxies, phi, None, psi, proxies)
        return Queries(self.features[self.anchors[rows]], phi, proxies, psi, proxies)

    def positives(self, rows: torch.Tensor) -> torch.Tensor:
        """Dense boolean (len(rows), N) positive sets, without the anchors; for analysis and pictures."""
        return self._dense(rows)[0]

    def negatives(self, rows: torch.Tensor) -> torch.Tensor:
        """Dense boolean (len(rows), N) negative sets (kept minus positives); for analysis and pictures."""
        positive, kept = self._dense(rows)
        return kept & ~positive

    def _dense(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.as_tensor(rows, device=self.features.device, dtype=torch.int64).reshape(-1)
        q, count = self.queries(rows), self.features.shape[0]
        op = dispatch.load("relation_masks", self.backend)
        with computing_on(self.features.device):
            positive, kept, _, _ = op.relation_masks(
                q.positive,
                q.phi,
                self.features,
                q.psi,
                self.anchors[rows],
                q.negative,
                self.precision,
                DEFAULT_BUDGET,
            )
        return unpack_masks(positive, count), unpack_masks(kept, count)


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
    fused = dispatch.load("ppap_loss", backend)
    if anchors.numel() and hasattr(fused, "guarded_propagate"):
        refuse_on_cpu({"features": features}, anchors, features.shape[0])
        with computing_on(features.device):
            return fused.guarded_propagate(features, anchors, cfg, precision, memory_budget)
    factor = guard({"features": features}, anchors, features.shape[0])
    unit_ND = normalise(features, accumulator(precision))
    anchors = in_range(anchors, features.shape[0])
    averaging, masking = dispatch.load("proxy_average", backend), dispatch.load("relation_masks", backend)

    def average(queries_AD: torch.Tensor, phi_A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return averaging.proxy_average(queries_AD, unit_ND, phi_A, precision, memory_budget)

    with computing_on(features.device):
        q = walk(unit_ND[anchors], cfg, average)
        num_positives = torch.empty_like(anchors)
        num_negatives = torch.empty_like(anchors)
        # Counts come from packed masks; half of the budget for the masks, half for what makes them.
        rows = rows_within(memory_budget // 2, 8 * num_words(features.shape[0]))
        for chunk in row_chunks(anchors.shape[0], rows):
            negative = None if q.negative is None else q.negative[chunk]
            _, _, positive_C, kept_C = masking.relation_masks(
                q.positive[chunk],
                q.phi[chunk],
                unit_ND,
                q.psi[chunk],
                anchors[chunk],
                negative,
                precision,
                memory_budget // 2,
            )
            num_positives[chunk], num_negatives[chunk] = positive_C, kept_C - positive_C
    # Without a step the proxies are the anchors' features and the thresholds constants: an op returns no
    # aliases.
    proxies, phi, psi = q.proxies.clone(), q.phi.clone(), q.psi.clone()
    poison(factor, proxies, phi, psi)
    if factor is not None:
        num_positives = num_positives.masked_fill(factor.isnan(), -1)
        num_negatives = num_negatives.masked_fill(factor.isnan(), -1)
    return unit_ND, proxies, phi, psi, num_positives, num_negatives


@_propagate.register_fake
def _(features, anchors, settings, precision, memory_budget, backend):
    dtype, count = accumulator(precision), anchors.shape[0]
    unit = features.new_empty(features.shape, dtype=dtype)
    proxies = features.new_empty((count, features.shape[1]), dtype=dtype)
    phi, psi = features.new_empty(count, dtype=dtype), features.new_empty(count, dtype=dtype)
    return unit, proxies, phi, psi, torch.empty_like(anchors), torch.empty_like(anchors)
