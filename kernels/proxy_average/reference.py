"""The definition of ``proxy_average``, materialised and written for the reader."""

import torch
import torch.nn.functional as F


def proxy_average(
    queries_AD: torch.Tensor, keys_ND: torch.Tensor, threshold_A: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of the keys above the threshold, L2-normalised (Eq. 2, 4); same meaning as the public function.

    The paper's mean is not normalised; the published code normalises it before it measures similarity again,
    so the divisor of the mean cancels. A query without any key above its threshold gets the zero vector.
    """
    sim_AN = queries_AD @ keys_ND.T
    selected_AN = sim_AN > threshold_A[:, None]
    count_A = selected_AN.sum(dim=1)
    mean_AD = selected_AN.to(keys_ND.dtype) @ keys_ND / count_A.clamp(min=1)[:, None]
    return F.normalize(mean_AD, dim=1), count_A
