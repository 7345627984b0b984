"""The definition of the whole loss, materialised and written for the reader; gradients by autograd."""

import torch

from ..masked_log_softmax.reference import masked_log_softmax
from ..propagate.config import PropagationConfig
from ..propagate.reference import propagate

__all__ = ["ppap_loss", "propagate"]


def ppap_loss(
    features: torch.Tensor,
    z: torch.Tensor,
    anchors: torch.Tensor | None,
    cfg: PropagationConfig,
    *,
    temperature: float,
    base_temperature: float = 0.07,
    reduction: str = "mean",
    group_size: int | None = None,
) -> torch.Tensor:
    """Eq. 8 for the sets of :func:`propagate`; same parameters as the public function."""
    anchors = torch.arange(len(features), device=features.device) if anchors is None else anchors
    rel = propagate(features, anchors, cfg)
    loss_A = masked_log_softmax(z[anchors], z, rel.positive, rel.kept, temperature) * (
        temperature / base_temperature
    )
    if reduction == "none":
        return loss_A
    has_positive_A = rel.positive.any(dim=1)
    size = group_size or max(len(anchors), 1)
    means = [
        loss.sum() / has.sum().clamp(min=1)
        for loss, has in zip(torch.split(loss_A, size), torch.split(has_positive_A, size), strict=True)
    ]
    return torch.stack(means).mean()
