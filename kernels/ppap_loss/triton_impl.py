"""``ppap_loss`` in Triton: a chunk of anchors is propagated, contrasted and differentiated in one go.

What costs time beside the products is passes over (N, D) and launches: every tensor of that size is read once
per use, and what is known of a whole call (units, bounds, whether all is finite) stays on the device in
``_Call``.
"""

import math
from dataclasses import dataclass

import torch
import triton

from ..budget import rows_within
from ..masked_log_softmax import triton_impl as contrast
from ..masked_log_softmax.triton_kernels import add_rows_kernel, group_kernel
from ..precision import FP16_WEIGHT_SCALE
from ..tiles import launch, occupancy
from ..tiles import rows as row_kernels
from ..tiles.bits import sizes
from ..tiles.planes import Planes, fill, raw_product
from ..tiles.rows import SPLIT_SCALE
from ..tiles.sizes import COLUMN_BLOCK, padded_channels
from .chunks import chunked_loss
from .guarded import Result, Settings, guarded
from .triton_kernels import BOUND, GRADIENT, POISON, SCALE, TIGHT, UNIT
from .triton_sets import Claims, find_scalars, form_sets, guarded_propagate
from .triton_sets import bytes_per_anchor as sets_bytes

__all__ = ["bytes_per_anchor", "guarded_loss", "guarded_propagate"]


def guarded_loss(
    features_ND: torch.Tensor, z_NE: torch.Tensor, anchors_A: torch.Tensor, settings: Settings
) -> Result:
    """The whole op, bad numbers included; floating inputs of any type."""
    if anchors_A.numel() == 0:
        return guarded(_nothing, features_ND, z_NE, anchors_A, settings)
    per_row = bytes_per_anchor(features_ND, z_NE, settings.precision, settings.with_gradient)
    rows = rows_within(settings.memory_budget, per_row, launch.row_block(z_NE.device))
    # Inside a group there are no weights yet that would need room.
    shrink = _shrink(settings.precision, settings.group) if settings.group <= rows else 1.0
    call = _Call.of(features_ND.contiguous(), z_NE.contiguous(), anchors_A, settings, shrink)
    # Gradients are added up in padded rows, as products make them.
    like = torch.empty((), device=z_NE.device).expand(z_NE.shape[0], call.patches.high.shape[1])
    loss_A, dz, *counts = chunked_loss(
        call.chunk, like, call.anchors_A, settings.group, settings.with_gradient, rows, zeroed=False
    )
    return call.result(loss_A, dz[:, : z_NE.shape[1]].contiguous(), *counts)


def bytes_per_anchor(
    features_ND: torch.Tensor, z_NE: torch.Tensor, precision: str, with_gradient: bool
) -> int:
    """Bytes of temporaries that one anchor needs: those of its walk, of its masks and of its weights."""
    (num_patches, width), code_width = features_ND.shape, z_NE.shape[1]
    block = launch.row_block(z_NE.device)
    walking, masks = sets_bytes(num_patches, width, precision, block)
    loss = contrast.bytes_per_anchor(num_patches, code_width, precision, with_gradient, block)
    return max(walking, masks + loss)


def _nothing(features_ND, z_NE, anchors_A, cfg, temperature, group, with_gradient, *_):
    """The result without anchors."""
    return chunked_loss(None, z_NE, anchors_A, group, with_gradient, group)


@dataclass(frozen=True)
class _Call:
    """What every chunk of a call shares.

    Attributes:
        features_ND: as given.
        z_NE: as given.
        anchors_A: int64 rows in range.
        keys: operands of the unit features.
        patches: operands of z.
        scalars: (SCALARS,) float32, see :func:`scalars_kernel`.
        settings: of the call.
        shrink: what rows are multiplied by before their weights could leave the operands' range.
    """

    features_ND: torch.Tensor
    z_NE: torch.Tensor
    anchors_A: torch.Tensor
    keys: Planes
    patches: Planes
    scalars: torch.Tensor
    settings: Settings
    shrink: float

    @classmethod
    def of(
        cls,
        features_ND: torch.Tensor,
        z_NE: torch.Tensor,
        anchors_A: torch.Tensor,
        settings: Settings,
        shrink: float,
    ) -> "_Call":
        """Look at all inputs once: norms, units, operands, whether they are good."""
        precision, (patches, code_width) = settings.precision, z_NE.shape
        norms = torch.empty((3, patches), device=z_NE.device)
        keys = fill(features_ND, precision, COLUMN_BLOCK, normalise=True, norm=norms[0])
        row_kernels.run(
            z_NE,
            rows=patches,
            padded_rows=patches,
            padded_width=padded_channels(code_width),
            norm=norms[1],
            largest=norms[2],
        )
        claims, scaled = Claims.of(anchors_A, patches), precision != "bf16"
        plane_unit = 1.0 / SPLIT_SCALE.value if precision == "fp32" else 1.0
        factor = math.log2(math.e) / settings.temperature
        gradient = settings.gradient_scale(anchors_A.shape[0]) / settings.temperature
        gradient *= plane_unit / FP16_WEIGHT_SCALE / shrink
        scalars = find_scalars(
            norms,
            claims,
            contrast.SLACK * factor,
            factor * plane_unit**2,
            gradient,
            contrast.TIGHT_BOUND,
            embeddings=True,
            scaled=scaled,
        )
        operands = fill(z_NE, precision, COLUMN_BLOCK, unit=scalars[UNIT] if scaled else None)
        return cls(features_ND, z_NE, claims.clamped_A, keys, operands, scalars, settings, shrink)

    def chunk(
        self, anchors_C: torch.Tensor, group: int | None, target_NE: torch.Tensor | None, first: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses and counts of some anchors; their gradient, up to its scale, goes to `target_NE`."""
        cfg, precision = self.settings.cfg, self.settings.precision
        sets = form_sets(self.features_ND, self.keys, anchors_C, cfg, precision)
        flags = occupancy.flags(sets.positive, launch.row_block(anchors_C.device))
        count_C, negatives_C = sizes(sets.positive, sets.kept)
        bound_C = torch.empty(anchors_C.shape[0], device=anchors_C.device)
        own = self._rows(anchors_C, norm=bound_C, norm_scale=self.scalars[BOUND])
        logits = contrast.Logits(
            own,
            self.patches,
            self.scalars[SCALE],
            bound_C,
            self.scalars[TIGHT],
            sets.positive,
            sets.kept,
            flags,
            count_C,
        )
        loss_C, lse_C = logits.log_sum_exp()
        if target_NE is not None:
            weight_C = None if group is None else self._weights(count_C, group)
            self._add_gradient(target_NE, anchors_C, logits.weights(lse_C), weight_C, first)
        return loss_C, count_C, negatives_C

    def _rows(self, anchors_C: torch.Tensor, **options: object) -> Planes:
        """Operands of the anchors' embeddings."""
        unit = None if self.settings.precision == "bf16" else self.scalars[UNIT]
        block = launch.row_block(anchors_C.device)
        return fill(self.z_NE, self.settings.precision, block, index=anchors_C, unit=unit, **options)

    def _weights(self, count_C: torch.Tensor, group: int) -> torch.Tensor:
        """See :func:`.chunks.row_weights`."""
        rows = count_C.shape[0]
        weight_C = torch.empty(rows, device=count_C.device)
        group_kernel[(triton.cdiv(rows, group),)](count_C, None, weight_C, None, rows, group, BLOCK=1024)
        return weight_C

    def _add_gradient(
        self,
        target_NE: torch.Tensor,
        anchors_C: torch.Tensor,
        weights: Planes,
        weight_C: torch.Tensor | None,
        first: bool,
    ) -> None:
        """Logits are z_i.z_j / tau: every weight reaches row i by z_j and row j by z_i.

        The first product into the target overwrites it.
        """
        rows, width = anchors_C.shape[0], target_NE.shape[1]
        other = self._rows(anchors_C, factor=weight_C, scale=self.shrink)
        raw_product(weights, other, transposed=True, target=target_NE, overwrite=first)
        own_CE = raw_product(weights, self.patches)
        per_program = launch.rows_per_program()
        add_rows_kernel[(triton.cdiv(rows, per_program),)](
            own_CE,
            anchors_C,
            weight_C,
            target_NE,
            rows,
            width,
            self.shrink,
            ROWS=per_program,
            BLOCK=triton.next_power_of_2(width),
            **launch.ROW_OPTIONS,
        )

    def result(self, loss_A, dz_NE, num_positives_A, num_negatives_A) -> Result:
        """Mean of the losses, scales and counts, poisoned where the inputs were bad."""
        group = self.settings.group
        mean = torch.empty(triton.cdiv(loss_A.shape[0], group), device=loss_A.device)
        group_kernel[mean.shape](num_positives_A, loss_A, None, mean, loss_A.shape[0], group, BLOCK=1024)
        scale = self.settings.temperature / self.settings.base_temperature
        loss = mean.mean() * (self.scalars[POISON] * scale)
        bad = self.scalars[POISON].isnan()
        counts = (counts_A.masked_fill_(bad, -1) for counts_A in (num_positives_A, num_negatives_A))
        return Result(loss, dz_NE, self.scalars[GRADIENT].clone(), *counts)


def _shrink(precision: str, group: int) -> float:
    """Power of two that keeps weights of up to `group`, times values of at most 1, in the planes' range."""
    room = {"fp32": 0, "fp16": 15, "bf16": 100}[precision]
    return 2.0 ** -max(math.ceil(math.log2(group)) - room, 0)
