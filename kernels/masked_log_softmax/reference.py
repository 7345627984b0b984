"""The definition of ``masked_log_softmax``, materialised, written for the reader; gradients by autograd."""

import torch


def masked_log_softmax(
    z_AE: torch.Tensor,
    z_NE: torch.Tensor,
    positive_AN: torch.Tensor,
    kept_AN: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Eq. 8 with boolean masks (A, N).

    L_i = -1/|P_i| sum over p in P_i of (l_ip - log sum over q in Q_i of exp l_iq), where l are the logits
    and Q_i is the kept set. An anchor without positives has loss 0.
    """
    logits_AN = z_AE @ z_NE.T / temperature
    lse_A1 = logits_AN.masked_fill(~kept_AN, -torch.inf).logsumexp(dim=1, keepdim=True)
    log_prob_AN = (logits_AN - lse_A1).masked_fill(~positive_AN, 0)
    num_positives_A = positive_AN.sum(dim=1)
    return -log_prob_AN.sum(dim=1) / num_positives_A.clamp(min=1)
