"""``ppap_loss`` in the CUDA library is composed of the ops; what a chunk of anchors needs in all."""

import torch

from ..budget import rows_within
from ..masked_log_softmax import cuda_impl as contrast
from ..proxy_average.cuda_impl import bytes_per_query
from ..relation_masks import cuda_impl as relations
from .settings import Settings


def chunk_rows(features_ND: torch.Tensor, z_NE: torch.Tensor, settings: Settings) -> int:
    """Anchors per chunk."""
    return rows_within(settings.memory_budget, bytes_per_anchor(features_ND, z_NE))


def bytes_per_anchor(features_ND: torch.Tensor, z_NE: torch.Tensor) -> int:
    """Bytes of temporaries that one anchor needs: those of its walk, or of its masks and weights."""
    (num_patches, width), code_width = features_ND.shape, z_NE.shape[1]
    walking = bytes_per_query(num_patches, width) + 24 * width
    masks = relations.bytes_per_anchor(num_patches, width) + 24 * width
    return max(walking, masks + contrast.bytes_per_anchor(num_patches, code_width))
