"""The definition of ``relation_masks``, materialised and written for the reader (masks are not packed)."""

import torch


def relation_masks(
    pos_queries_AD: torch.Tensor,
    phi_A: torch.Tensor,
    keys_ND: torch.Tensor,
    psi_A: torch.Tensor,
    self_index_A: torch.Tensor,
    neg_queries_AD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Boolean masks (A, N): positives P, and kept = P and negatives; both without the anchor itself.

    Eq. 1: P = {j : sim > phi}. Eq. 6: ambiguous = {j : psi <= sim <= phi}. Eq. 7: negatives = everything
    else. Written as in the published code, negatives are {j : sim < psi}; where psi exceeds phi nothing is
    ambiguous and a patch in both sets counts once.
    """
    if neg_queries_AD is None:
        neg_queries_AD = pos_queries_AD
    positive_AN = pos_queries_AD @ keys_ND.T > phi_A[:, None]
    kept_AN = positive_AN | (neg_queries_AD @ keys_ND.T < psi_A[:, None])
    rows_A = torch.arange(len(self_index_A), device=keys_ND.device)
    positive_AN[rows_A, self_index_A] = False
    kept_AN[rows_A, self_index_A] = False
    return positive_AN, kept_AN
