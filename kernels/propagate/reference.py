"""The definition of ``propagate``, materialised and written for the reader.

Symbols as in the paper: v proxies, f features, phi and psi thresholds, m the cosine between successive
proxies.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..proxy_average.reference import proxy_average
from ..relation_masks.reference import relation_masks
from .config import PropagationConfig


class ReferenceRelations(NamedTuple):
    """Propagated proxies, the thresholds that decide the sets, and the sets themselves."""

    proxies: torch.Tensor  # (A, D)
    phi: torch.Tensor  # (A,)
    psi: torch.Tensor  # (A,)
    positive: torch.Tensor  # (A, N) bool
    kept: torch.Tensor  # (A, N) bool


def propagate(
    features: torch.Tensor, anchors: torch.Tensor | None, cfg: PropagationConfig
) -> ReferenceRelations:
    """Eq. 1-7 for the anchors (A,) among the features (N, D)."""
    f_ND = F.normalize(features.detach(), dim=1)
    anchors = torch.arange(len(f_ND), device=f_ND.device) if anchors is None else anchors
    v_AD = f_ND[anchors]
    phi_A = f_ND.new_full((len(anchors),), cfg.phi0)
    psi_A = f_ND.new_full((len(anchors),), cfg.psi0)
    for _ in range(cfg.steps):
        moved_AD, _ = proxy_average(v_AD, f_ND, phi_A)  # Eq. 2, 4
        m_A = F.cosine_similarity(v_AD, moved_AD, dim=1)
        phi_A = phi_A - (1 - m_A) / cfg.sigma_pos  # Eq. 3
        psi_A = psi_A + (1 - m_A) / cfg.sigma_amb  # Eq. 5
        v_AD = moved_AD
    positive_query_AD, neg_phi_A = (v_AD, phi_A) if cfg.trustworthy_positives else (f_ND[anchors], None)
    if neg_phi_A is None:
        phi_A = torch.full_like(phi_A, cfg.phi0)
    if not cfg.ambiguity_excluded:
        psi_A = torch.full_like(psi_A, torch.inf)
    positive_AN, kept_AN = relation_masks(positive_query_AD, phi_A, f_ND, psi_A, anchors, v_AD)
    return ReferenceRelations(v_AD, phi_A, psi_A, positive_AN, kept_AN)
