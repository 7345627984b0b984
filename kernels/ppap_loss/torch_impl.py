"""``ppap_loss`` in plain torch is composed of the ops; what a chunk of anchors needs in all."""

import torch

from ..budget import rows_within
from .settings import Settings


def chunk_rows(features_ND: torch.Tensor, z_NE: torch.Tensor, settings: Settings) -> int:
    """Anchors per chunk; `z_NE` is in the accumulator's dtype."""
    return rows_within(settings.memory_budget, bytes_per_anchor(features_ND, z_NE))


def bytes_per_anchor(features_ND: torch.Tensor, z_NE: torch.Tensor) -> int:
    """Bytes of temporaries that one anchor needs: logits, weights, their operand, masks, rows."""
    size = z_NE.element_size()
    return (3 * size + 4) * z_NE.shape[0] + 6 * size * (features_ND.shape[1] + z_NE.shape[1])
