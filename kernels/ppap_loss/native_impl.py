"""``ppap_loss`` in the native CPU library is composed of the ops; what a chunk of anchors needs in all."""

import torch

from ..masked_log_softmax.native_impl import split_budget
from ..proxy_average.native_impl import bytes_per_query
from ..relation_masks import native_impl as relations
from .settings import Settings


def chunk_rows(features_ND: torch.Tensor, z_NE: torch.Tensor, settings: Settings) -> int:
    """Anchors per chunk."""
    (num_patches, width), code_width = features_ND.shape, z_NE.shape[1]
    per_anchor = bytes_per_anchor(num_patches, width, code_width)
    return split_budget(settings.memory_budget, num_patches, per_anchor, settings.with_gradient)[0]


def bytes_per_anchor(num_patches: int, width: int, code_width: int) -> int:
    """Bytes of temporaries that one anchor needs besides its exponentials: its walk, its masks, its rows."""
    walking = bytes_per_query(num_patches, width) + 24 * width
    masks = relations.bytes_per_anchor(num_patches, width) + 24 * width
    return max(walking, masks + 24 * (code_width + 32) + 64)
