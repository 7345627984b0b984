"""``ppap_loss`` in Triton: a chunk of anchors is propagated, contrasted and differentiated in one go.

What costs time beside the products is passes over (N, D) and launches: every tensor of that size is read once
per use, and what is known of a whole call (units, bounds, whether all is finite) stays on the device in
``_Call``.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..masked_log_softmax import triton_impl as contrast
from ..masked_log_softmax.triton_kernels import (
    SLACK,
    TIGHT_BOUND,
    Logits,
    add_rows,
    group_means,
    group_weights,
    log_sum_exp,
    weights,
)
from ..precision import FP16_WEIGHT_SCALE
from ..propagate.config import PropagationConfig
from ..proxy_average.triton_impl import bytes_per_query
from ..proxy_average.triton_kernels import Proxies, Thresholds, mask_sum, move
from ..relation_masks.triton_kernels import relation_bits, similarity
from ..tiles import bits, launch, occupancy
from ..tiles import rows as row_kernels
from ..tiles.bits import Bits
from ..tiles.planes import Planes, add_transposed_product, fill, plane_count, raw_product
from ..tiles.rows import SPLIT_SCALE
from ..tiles.sizes import COLUMN_BLOCK, padded_channels
from .chunks import chunked_loss
from .settings import Result, Settings
from .triton_kernels import BOUND, GRADIENT, POISON, SCALE, TIGHT, UNIT, Claims, find_scalars


def guarded_loss(
    features_ND: torch.Tensor, z_NE: torch.Tensor, anchors_A: torch.Tensor, settings: Settings
) -> Result:
    """The whole op, bad numbers included; floating inputs of any type, one anchor at least."""
    per_row = bytes_per_anchor(features_ND, z_NE, settings.precision, settings.with_gradient)
    rows = launch.rows_within(settings.memory_budget, per_row, z_NE.device)
    # Inside a group there are no weights yet that would need room.
    shrink = _shrink(settings.precision, settings.group) if settings.group <= rows else 1.0
    call = _Call.of(features_ND.contiguous(), z_NE.contiguous(), anchors_A, settings, rows, shrink)
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


@dataclass(frozen=True)
class Propagated:
    """Of some anchors.

    Attributes:
        positive: bits of the positives.
        kept: bits of the kept patches.
        proxies: (C, D) float32, after the last move.
        phi: (C,) thresholds that decide the positives.
        psi: (C,) thresholds that decide the negatives.
    """

    positive: Bits
    kept: Bits
    proxies: torch.Tensor
    phi: torch.Tensor
    psi: torch.Tensor


def first_thresholds(cfg: PropagationConfig, rows: int, device: torch.device) -> Thresholds:
    """What a walk of up to `rows` anchors starts with; every chunk of a call reads the same."""
    phi_C, psi_C = (torch.full((rows,), value, device=device) for value in (cfg.phi0, cfg.psi0))
    return Thresholds(phi_C, psi_C, cfg.sigma_pos, cfg.sigma_amb)


def form_sets(
    features_ND: torch.Tensor,
    keys: Planes,
    anchors_C: torch.Tensor,
    cfg: PropagationConfig,
    precision: str,
    first: Thresholds,
) -> Propagated:
    """Walk from the anchors' features, then compare (Eq. 1-7).

    Args:
        features_ND: as given.
        keys: operands of the unit features.
        anchors_C: rows in range.
        cfg: of the walk.
        precision: of the operands.
        first: thresholds of as many anchors at least; only read.
    """
    (rows, width), device = (anchors_C.shape[0], features_ND.shape[1]), anchors_C.device
    block, values = launch.row_block(device), torch.empty((rows, width), device=device)
    operands = fill(features_ND, precision, block, index=anchors_C, normalise=True, out=values)
    start = proxies = Proxies(values, operands)
    thresholds = replace(first, phi=first.phi[:rows], psi=first.psi[:rows])
    for _ in range(cfg.steps):
        proxies, thresholds = _move(proxies, keys, precision, thresholds)
    phi_C, psi_C = thresholds.phi, thresholds.psi
    if not cfg.ambiguity_excluded:
        psi_C = torch.full_like(psi_C, torch.inf)
    pos, negative = proxies, None
    if not cfg.trustworthy_positives:
        phi_C = first.phi[:rows]
        pos, negative = start, proxies.planes
    positive, kept = relation_bits(keys, pos.planes, phi_C, psi_C, anchors_C, negative)
    return Propagated(positive, kept, proxies.values, phi_C, psi_C)


def _move(
    proxies: Proxies, keys: Planes, precision: str, thresholds: Thresholds
) -> tuple[Proxies, Thresholds]:
    """One step (Eq. 2-5); its masks end with it."""
    block = launch.row_block(keys.high.device)
    positive = Bits.empty(proxies.planes.rows, keys.rows, block, proxies.values)
    similarity(proxies.planes, keys, positive, phi_C=thresholds.phi)
    sums = mask_sum(positive, occupancy.occupancy(positive, block), keys)
    return move(sums, proxies, precision, thresholds)


def sets_bytes(num_patches: int, width: int, precision: str, row_block: int) -> tuple[int, int]:
    """Bytes of temporaries that one anchor needs while it walks, and from then on."""
    proxies = 2 * (4 + 2 * plane_count(precision)) * padded_channels(width) + 64
    walking = bytes_per_query(num_patches, width, precision, row_block) + proxies
    return walking, 2 * bits.bytes_per_row(num_patches) + proxies


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
        first: thresholds that every chunk's walk starts with.
        shrink: what rows are multiplied by before their weights could leave the operands' range.
    """

    features_ND: torch.Tensor
    z_NE: torch.Tensor
    anchors_A: torch.Tensor
    keys: Planes
    patches: Planes
    scalars: torch.Tensor
    settings: Settings
    first: Thresholds
    shrink: float

    @classmethod
    def of(
        cls,
        features_ND: torch.Tensor,
        z_NE: torch.Tensor,
        anchors_A: torch.Tensor,
        settings: Settings,
        rows: int,
        shrink: float,
    ) -> "_Call":
        """Look at all inputs once: norms, units, operands, whether they are good.

        A chunk has at most `rows` anchors.
        """
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
            SLACK * factor,
            factor * plane_unit**2,
            gradient,
            TIGHT_BOUND,
            embeddings=True,
            scaled=scaled,
        )
        operands = fill(z_NE, precision, COLUMN_BLOCK, unit=scalars[UNIT] if scaled else None)
        first = first_thresholds(settings.cfg, min(rows, anchors_A.shape[0]), z_NE.device)
        return cls(features_ND, z_NE, claims.clamped_A, keys, operands, scalars, settings, first, shrink)

    def chunk(
        self, anchors_C: torch.Tensor, group: int | None, target_NE: torch.Tensor | None, first: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses and counts of some anchors; their gradient, up to its scale, goes to `target_NE`."""
        cfg, precision = self.settings.cfg, self.settings.precision
        sets = form_sets(self.features_ND, self.keys, anchors_C, cfg, precision, self.first)
        flags = occupancy.flags(sets.positive, launch.row_block(anchors_C.device))
        count_C, negatives_C = bits.sizes(sets.positive, sets.kept)
        bound_C = torch.empty(anchors_C.shape[0], device=anchors_C.device)
        own = self._rows(anchors_C, norm=bound_C, norm_scale=self.scalars[BOUND])
        logits = Logits(
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
        loss_C, lse_C = log_sum_exp(logits)
        if target_NE is not None:
            weight_C = None if group is None else group_weights(count_C, group)
            self._add_gradient(target_NE, anchors_C, weights(logits, lse_C), weight_C, first)
        return loss_C, count_C, negatives_C

    def _rows(self, anchors_C: torch.Tensor, **options: Any) -> Planes:
        """Operands of the anchors' embeddings."""
        unit = None if self.settings.precision == "bf16" else self.scalars[UNIT]
        block = launch.row_block(anchors_C.device)
        return fill(self.z_NE, self.settings.precision, block, index=anchors_C, unit=unit, **options)

    def _add_gradient(
        self,
        target_NE: torch.Tensor,
        anchors_C: torch.Tensor,
        of_logits: Planes,
        weight_C: torch.Tensor | None,
        first: bool,
    ) -> None:
        """Logits are z_i.z_j / tau: every weight reaches row i by z_j and row j by z_i.

        The first product into the target overwrites it.
        """
        other = self._rows(anchors_C, factor=weight_C, scale=self.shrink, twice=True)
        add_transposed_product(of_logits, other, target_NE, overwrite=first)
        add_rows(raw_product(of_logits, self.patches), anchors_C, weight_C, target_NE, self.shrink)

    def result(
        self,
        loss_A: torch.Tensor,
        dz_NE: torch.Tensor,
        num_positives_A: torch.Tensor,
        num_negatives_A: torch.Tensor,
    ) -> Result:
        """Mean of the losses, scales and counts, poisoned where the inputs were bad."""
        group = self.settings.group
        mean = group_means(loss_A, num_positives_A, group)
        scale = self.settings.temperature / self.settings.base_temperature
        loss = mean.mean() * (self.scalars[POISON] * scale)
        bad = self.scalars[POISON].isnan()
        counts = (counts_A.masked_fill_(bad, -1) for counts_A in (num_positives_A, num_negatives_A))
        return Result(loss, dz_NE, self.scalars[GRADIENT].clone(), *counts)


def _shrink(precision: str, group: int) -> float:
    """Power of two that keeps weights of up to `group`, times values of at most 1, in the planes' range."""
    room = {"fp32": 0, "fp16": 15, "bf16": 100}[precision]
    return 2.0 ** -max(math.ceil(math.log2(group)) - room, 0)
