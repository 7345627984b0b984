"""``ppap_loss`` in Triton: a chunk of anchors is propagated, contrasted and differentiated in one go."""

from dataclasses import dataclass

import torch

from ..common import normalise, rows_within
from ..masked_log_softmax import triton_impl as contrast
from ..propagation import PropagationConfig, walk
from ..proxy_average.triton_impl import average_chunk, bytes_per_query
from ..relation_masks import triton_impl as relations
from ..tiles import launch
from ..tiles.bits import COLUMN_BLOCK
from ..tiles.planes import Planes, planes
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
    """Unscaled losses (A,), gradient of their group mean (N, E) or (0, E), set sizes (A,) int64 twice."""
    if anchors_A.numel() == 0:
        return chunked_loss(_no_work, z_NE, anchors_A, group, with_gradient, group)
    unit_ND = normalise(features_ND, z_NE.dtype)
    per_row = bytes_per_anchor(unit_ND, z_NE, precision, with_gradient)
    rows = rows_within(memory_budget, per_row, launch.row_block(unit_ND.device))
    keys = planes(unit_ND, precision, COLUMN_BLOCK)
    embeddings = contrast.Embeddings.of(z_NE, precision, COLUMN_BLOCK)
    work = _Work(unit_ND, z_NE, keys, embeddings, cfg, temperature, precision)
    return chunked_loss(work.chunk, z_NE, anchors_A, group, with_gradient, rows)


def bytes_per_anchor(unit_ND: torch.Tensor, z_NE: torch.Tensor, precision: str, with_gradient: bool) -> int:
    """Bytes of temporaries that one anchor needs: those of its walk, of its masks and of its weights."""
    (num_patches, width), code_width = unit_ND.shape, z_NE.shape[1]
    walking = bytes_per_query(num_patches, width, precision) + 6 * 4 * width
    masks = relations.bytes_per_anchor(num_patches, width, precision) + 6 * 4 * width
    loss = contrast.bytes_per_anchor(num_patches, code_width, precision, with_gradient)
    return max(walking, masks + loss)


def _no_work(*_):
    raise AssertionError("there are no anchors")


@dataclass(frozen=True)
class _Work:
    """What every chunk of a call shares."""

    unit_ND: torch.Tensor
    z_NE: torch.Tensor
    keys: Planes
    embeddings: contrast.Embeddings
    cfg: PropagationConfig
    temperature: float
    precision: str

    def chunk(
        self, anchors_C: torch.Tensor, grouping: tuple[int, int] | None, target_NE: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses and counts of some anchors; adds their gradient to `target_NE`."""

        def average(queries_CD: torch.Tensor, phi_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return average_chunk(queries_CD, self.keys, phi_C, self.precision)

        q = walk(self.unit_ND[anchors_C], self.cfg, average)
        positive, kept = relations.relation_bits(
            self.keys, self.precision, q.positive, q.phi, q.psi, anchors_C, q.negative
        )
        own = self.embeddings.gather(anchors_C, launch.row_block(anchors_C.device))
        logits = contrast.Logits(own, self.embeddings, self.temperature, positive, kept)
        loss_C, lse_C = logits.log_sum_exp()
        if target_NE is not None:
            row_C1 = row_weights(logits.count_C, grouping, loss_C.dtype)[:, None] / self.temperature
            rows_CE = self.z_NE[anchors_C] * row_C1
            own_CE, other_NE = contrast.gradient(
                logits.weights(lse_C), self.embeddings.planes, rows_CE, self.precision
            )
            target_NE[anchors_C] += own_CE * row_C1
            target_NE += other_NE
        return loss_C, logits.count_C, kept.totals() - logits.count_C
