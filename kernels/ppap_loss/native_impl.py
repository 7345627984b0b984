"""``ppap_loss`` in the native CPU library: chunks of anchors are propagated and contrasted."""

from dataclasses import dataclass

import torch

from .. import native
from ..masked_log_softmax import native_impl as contrast
from ..precision import normalise
from ..propagation import PropagationConfig, walk
from ..proxy_average.native_impl import average_chunk, bytes_per_query
from ..relation_masks import native_impl as relations
from .chunks import chunked_loss, row_weights


def ppap_loss(
    features_ND: torch.Tensor,
    z_NE: torch.Tensor,
    anchors_A: torch.Tensor,
    cfg: PropagationConfig,
    temperature: float,
    group: int,
    with_gradient: bool,
    precision: str,
    memory_budget: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses (A,), gradient (N, E) or (0, E), set sizes (A,) int64 twice, see :mod:`.chunks`; not scaled."""
    (num_patches, width), code_width = features_ND.shape, z_NE.shape[1]
    per_anchor = bytes_per_anchor(num_patches, width, code_width)
    rows, exponentials = contrast.split_budget(memory_budget, num_patches, per_anchor, with_gradient)
    keys, patches = native.Keys.normalised(features_ND, precision), contrast.Embeddings.of(z_NE, precision)
    work = _Work(features_ND, keys, patches, cfg, temperature, precision, exponentials)
    loss_A, dz_NE, *counts = chunked_loss(work.chunk, patches.values, anchors_A, group, with_gradient, rows)
    return loss_A, dz_NE[:, :code_width].contiguous(), *counts


def bytes_per_anchor(num_patches: int, width: int, code_width: int) -> int:
    """Bytes of temporaries that one anchor needs besides its exponentials: its walk, its masks, its rows."""
    walking = bytes_per_query(num_patches, width) + 24 * width
    masks = relations.bytes_per_anchor(num_patches, width) + 24 * width
    return max(walking, masks + 24 * (code_width + 32) + 64)


@dataclass(frozen=True)
class _Work:
    """What every chunk of a call shares."""

    features_ND: torch.Tensor
    keys: native.Keys
    patches: contrast.Embeddings
    cfg: PropagationConfig
    temperature: float
    precision: str
    exponentials: int

    def chunk(
        self, anchors_C: torch.Tensor, group: int | None, target_NE: torch.Tensor | None, _first: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses and counts of some anchors; adds their gradient to `target_NE`."""

        def average(queries_CD: torch.Tensor, phi_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return average_chunk(queries_CD, self.keys, phi_C, self.precision)

        q = walk(normalise(self.features_ND[anchors_C], torch.float32), self.cfg, average)
        positive, kept, num_positive, num_kept = relations.relation_bits(
            self.keys, self.precision, q.positive, q.phi, q.psi, anchors_C, q.negative
        )
        weight_C = None
        if target_NE is not None:
            weight_C = row_weights(num_positive, group, torch.float32) / self.temperature
        loss_C, _, own_CE = contrast.contrast_chunk(
            self.patches.values[anchors_C],
            self.patches,
            contrast.Sets(positive, kept, num_positive),
            self.temperature,
            self.exponentials,
            weight_C,
            target_NE,
        )
        if own_CE is not None:
            target_NE[anchors_C] += own_CE
        return loss_C, num_positive, num_kept - num_positive
