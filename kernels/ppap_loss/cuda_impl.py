"""``ppap_loss`` in the CUDA library: chunks of anchors are propagated, contrasted and differentiated."""

from dataclasses import dataclass

import torch

from .. import native_cuda as cuda
from ..budget import rows_within
from ..masked_log_softmax import cuda_impl as contrast
from ..masked_log_softmax.native_impl import Sets
from ..precision import normalise
from ..propagation import PropagationConfig, walk
from ..proxy_average.cuda_impl import average_chunk, bytes_per_query
from ..relation_masks import cuda_impl as relations
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
    unit_ND = normalise(features_ND, z_NE.dtype)
    rows = rows_within(memory_budget, bytes_per_anchor(unit_ND, z_NE))
    keys, patches = cuda.Operand.of(unit_ND, precision), cuda.Operand.of(z_NE, precision)
    work = _Work(unit_ND, z_NE, keys, patches, cfg, temperature, precision)
    return chunked_loss(work.chunk, z_NE, anchors_A, group, with_gradient, rows)


def bytes_per_anchor(unit_ND: torch.Tensor, z_NE: torch.Tensor) -> int:
    """Bytes of temporaries that one anchor needs: those of its walk, or of its masks and weights."""
    (num_patches, width), code_width = unit_ND.shape, z_NE.shape[1]
    walking = bytes_per_query(num_patches, width) + 24 * width
    masks = relations.bytes_per_anchor(num_patches, width) + 24 * width
    return max(walking, masks + contrast.bytes_per_anchor(num_patches, code_width))


@dataclass(frozen=True)
class _Work:
    """What every chunk of a call shares."""

    unit_ND: torch.Tensor
    z_NE: torch.Tensor
    keys: cuda.Operand
    patches: cuda.Operand
    cfg: PropagationConfig
    temperature: float
    precision: str

    def chunk(
        self, anchors_C: torch.Tensor, group: int | None, target_NE: torch.Tensor | None, _first: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses and counts of some anchors; adds their gradient to `target_NE`."""

        def average(queries_CD: torch.Tensor, phi_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return average_chunk(queries_CD, self.keys, phi_C, self.precision)

        q = walk(self.unit_ND[anchors_C], self.cfg, average)
        positive, kept, num_positive, num_kept = relations.relation_bits(
            self.keys, self.precision, q.positive, q.phi, q.psi, anchors_C, q.negative
        )
        sets = Sets(positive, kept, num_positive)
        own = self.patches.take(anchors_C)
        logits = contrast.Logits(own, self.patches, sets, self.temperature, self.precision)
        loss_C, lse_C = logits.log_sum_exp()
        if target_NE is not None:
            row_C1 = row_weights(num_positive, group, loss_C.dtype)[:, None] / self.temperature
            rows_CE = self.z_NE[anchors_C] * row_C1
            own_CE, other_NE = contrast.gradient(logits.weights(lse_C), self.patches, rows_CE, self.precision)
            target_NE[anchors_C] += own_CE * row_C1
            target_NE += other_NE
        return loss_C, num_positive, num_kept - num_positive
