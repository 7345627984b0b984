"""``ppap_loss`` in plain torch: a chunk of anchors is propagated, contrasted, differentiated in one go."""

from dataclasses import dataclass

import torch

from ..budget import rows_within
from ..masked_log_softmax.torch_impl import add_transposed, gradient_rows, loss_rows
from ..precision import normalise, operand, product, scaled_operand, weight_operand
from ..propagation import PropagationConfig, walk
from ..proxy_average.torch_impl import average_chunk
from ..relation_masks.torch_impl import masks_chunk
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
    work = _Work(unit_ND, z_NE, cfg, temperature, precision)
    rows = rows_within(memory_budget, bytes_per_anchor(unit_ND, z_NE))
    return chunked_loss(work.chunk, z_NE, anchors_A, group, with_gradient, rows)


def bytes_per_anchor(unit_ND: torch.Tensor, z_NE: torch.Tensor) -> int:
    """Bytes of temporaries that one anchor needs: logits, weights, their operand, masks, rows."""
    size = unit_ND.element_size()
    return (3 * size + 4) * unit_ND.shape[0] + 6 * size * (unit_ND.shape[1] + z_NE.shape[1])


@dataclass
class _Work:
    """What every chunk of a call shares."""

    unit_ND: torch.Tensor
    z_NE: torch.Tensor
    cfg: PropagationConfig
    temperature: float
    precision: str

    def __post_init__(self) -> None:
        self.keys_op = operand(self.unit_ND, self.precision)
        self.z_op, self.z_scale = scaled_operand(self.z_NE, self.precision)

    def chunk(
        self, anchors_C: torch.Tensor, group: int | None, target_NE: torch.Tensor | None, _first: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses and counts of some anchors; adds their gradient to `target_NE`.

        `group` = anchors per group weights the gradient, None leaves it unweighted.
        """
        positive_CN, kept_CN = self._masks(anchors_C)
        num_positives_C, num_kept_C = positive_CN.sum(dim=1), kept_CN.sum(dim=1)
        logits_CN = product(self.z_op[anchors_C], self.z_op.T).mul_(self.z_scale**2 / self.temperature)
        loss_C, lse_C, _ = loss_rows(logits_CN, positive_CN, kept_CN, num_positives_C)
        if target_NE is not None:
            weights_CN = gradient_rows(logits_CN, positive_CN, kept_CN, num_positives_C, lse_C)
            row_C = row_weights(num_positives_C, group, loss_C.dtype) / self.temperature
            self._add_gradient(target_NE, anchors_C, weights_CN, row_C)
        return loss_C, num_positives_C, num_kept_C - num_positives_C

    def _masks(self, anchors_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def average(queries_CD: torch.Tensor, phi_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return average_chunk(queries_CD, self.keys_op, phi_C, self.precision)

        q = walk(self.unit_ND[anchors_C], self.cfg, average)
        return masks_chunk(q.positive, q.phi, self.keys_op, q.psi, anchors_C, q.negative, self.precision)

    def _add_gradient(
        self, target_NE: torch.Tensor, anchors_C: torch.Tensor, weights_CN: torch.Tensor, row_C: torch.Tensor
    ) -> None:
        """Logits are z_i.z_j / tau: every weight reaches row i by z_j and row j by z_i."""
        weights_op, weight_scale = weight_operand(weights_CN, self.precision)
        own_CE = product(weights_op, self.z_op) * (row_C[:, None] * (self.z_scale / weight_scale))
        target_NE[anchors_C] += own_CE
        add_transposed(
            target_NE, weights_op, self.z_NE[anchors_C] * row_C[:, None], weight_scale, self.precision
        )
