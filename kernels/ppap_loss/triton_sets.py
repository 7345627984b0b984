"""The sets of a chunk of anchors in Triton (Eq. 1-7), from features to bits, for loss and ``propagate``."""

from dataclasses import dataclass

import torch
import triton

from ..budget import row_chunks, rows_within
from ..propagation import PropagationConfig
from ..proxy_average.triton_impl import Proxies, Thresholds, bytes_per_query, move
from ..relation_masks import triton_impl as relations
from ..tiles import bits, launch
from ..tiles.bits import Bits
from ..tiles.planes import Planes, fill, plane_count
from ..tiles.sizes import COLUMN_BLOCK, padded_channels
from .triton_kernels import POISON, SCALARS, claim_kernel, scalars_kernel


@dataclass(frozen=True)
class Sets:
    """Of some anchors.

    Attributes:
        positive: bits of the positives.
        kept: bits of the kept patches.
        proxies: (C, D) float32, after the last move.
        phi: (C,) thresholds that decide the positives.
        psi: (C,) thresholds that decide the negatives.
    """

    positive: Bits
    kept: Bits
    proxies: torch.Tensor
    phi: torch.Tensor
    psi: torch.Tensor


def form_sets(
    features_ND: torch.Tensor,
    keys: Planes,
    anchors_C: torch.Tensor,
    cfg: PropagationConfig,
    precision: str,
) -> Sets:
    """Walk from the anchors' features, then compare (Eq. 1-7); `keys` are operands of the unit features."""
    (rows, width), device = (anchors_C.shape[0], features_ND.shape[1]), anchors_C.device
    block, values = launch.row_block(device), torch.empty((rows, width), device=device)
    operands = fill(features_ND, precision, block, index=anchors_C, normalise=True, out=values)
    start = proxies = Proxies(values, operands)
    phi_C, psi_C = (torch.full((rows,), value, device=device) for value in (cfg.phi0, cfg.psi0))
    thresholds = Thresholds(phi_C, psi_C, cfg.sigma_pos, cfg.sigma_amb)
    for _ in range(cfg.steps):
        # No name keeps the masks of a step while those of the next are made.
        proxies = move(proxies, keys, phi_C, precision, thresholds)[0]
    if not cfg.ambiguity_excluded:
        psi_C.fill_(torch.inf)
    pos, negative = proxies, None
    if not cfg.trustworthy_positives:
        phi_C.fill_(cfg.phi0)
        pos, negative = start, proxies.planes
    positive, kept = relations.relation_bits(keys, pos.planes, phi_C, psi_C, anchors_C, negative)
    return Sets(positive, kept, proxies.values, phi_C, psi_C)


def bytes_per_anchor(num_patches: int, width: int, precision: str, row_block: int) -> tuple[int, int]:
    """Bytes of temporaries that one anchor needs while it walks, and from then on."""
    proxies = 2 * (4 + 2 * plane_count(precision)) * padded_channels(width) + 64
    walking = bytes_per_query(num_patches, width, precision, row_block) + proxies
    return walking, 2 * bits.bytes_per_row(num_patches) + proxies


@dataclass(frozen=True)
class Claims:
    """Anchors as they came, and what shows whether they are good.

    Attributes:
        given_A: int64, contiguous.
        clamped_A: int64, in range.
        claims_N: int32, see :func:`claim_kernel`.
    """

    given_A: torch.Tensor
    clamped_A: torch.Tensor
    claims_N: torch.Tensor

    @classmethod
    def of(cls, anchors_A: torch.Tensor, patches: int) -> "Claims":
        """Let every anchor claim its patch."""
        given_A, count = anchors_A.contiguous(), anchors_A.shape[0]
        claims_N = torch.empty(patches, dtype=torch.int32, device=anchors_A.device)
        clamped_A = torch.empty_like(given_A)
        claim_kernel[(triton.cdiv(count, 1024),)](given_A, claims_N, clamped_A, count, patches, BLOCK=1024)
        return cls(given_A, clamped_A, claims_N)


def find_scalars(
    norms_3N: torch.Tensor,
    claims: Claims,
    bound_factor: float = 1.0,
    logit_factor: float = 1.0,
    gradient_factor: float = 1.0,
    tight_bound: float = 1.0,
    embeddings: bool = False,
    scaled: bool = False,
) -> torch.Tensor:
    """(SCALARS,) float32, see :func:`scalars_kernel`."""
    scalars = torch.empty(SCALARS, device=norms_3N.device)
    scalars_kernel[(1,)](
        norms_3N,
        claims.given_A,
        claims.claims_N,
        scalars,
        norms_3N.shape[1],
        claims.given_A.shape[0],
        bound_factor,
        logit_factor,
        gradient_factor,
        tight_bound,
        EMBEDDINGS=embeddings,
        SCALED=scaled,
        BLOCK=1024 if launch.interpreted() else 8192,
        num_warps=16,
    )
    return scalars


def guarded_propagate(
    features_ND: torch.Tensor,
    anchors_A: torch.Tensor,
    cfg: PropagationConfig,
    precision: str,
    memory_budget: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit features (N, D), proxies (A, D), phi, psi, numbers of positives and negatives (A,).

    NaN, and counts of -1, where features or anchors were bad; one anchor at least.
    """
    (patches, width), device, count = features_ND.shape, anchors_A.device, anchors_A.shape[0]
    block, features_ND = launch.row_block(device), features_ND.contiguous()
    unit_ND, norms = torch.empty((patches, width), device=device), torch.empty((3, patches), device=device)
    keys = fill(features_ND, precision, COLUMN_BLOCK, normalise=True, norm=norms[0], out=unit_ND)
    claims = Claims.of(anchors_A, patches)
    poison = find_scalars(norms, claims)[POISON]
    proxies_AD, thresholds = (
        torch.empty((count, width), device=device),
        torch.empty((2, count), device=device),
    )
    counts = torch.empty((2, count), dtype=torch.int64, device=device)
    rows = rows_within(memory_budget, max(bytes_per_anchor(patches, width, precision, block)), block)
    for chunk in row_chunks(count, rows):
        sets = form_sets(features_ND, keys, claims.clamped_A[chunk], cfg, precision)
        proxies_AD[chunk], thresholds[0, chunk], thresholds[1, chunk] = sets.proxies, sets.phi, sets.psi
        counts[0, chunk], counts[1, chunk] = bits.sizes(sets.positive, sets.kept)
        del sets
    proxies_AD *= poison
    thresholds *= poison
    counts.masked_fill_(poison.isnan(), -1)
    return (
        unit_ND,
        proxies_AD,
        thresholds[0].clone(),
        thresholds[1].clone(),
        counts[0].clone(),
        counts[1].clone(),
    )
