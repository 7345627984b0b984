"""``ppap_loss`` of many ranks in a ring: blocks of patches pass by, and every rank keeps its own anchors.

Sums of selected keys, log-sum-exps and numbers of positives add up over blocks, so the ops of one process
serve each block as they are. A step of the walk is one turn of the ring, the losses are another, and the
gradient a third, in which the gradient of a block travels with it and ends where the block came from. What a
rank holds does not grow with the number of ranks: its own rows, two blocks, and three gradients of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .. import dispatch
from ..budget import row_chunks
from ..guards import guard, in_range, poison
from ..masked_log_softmax import chunks as softmax
from ..precision import normalise
from ..propagate import walk
from ..relation_masks.sets import Queries, Sets
from .groups import Groups
from .messages import Homeward, Ranks, add_up, blocks
from .settings import Result, Settings


class _Losses(NamedTuple):
    """Of this rank's anchors over all blocks, (A,) each."""

    loss: torch.Tensor
    lse: torch.Tensor
    num_positive: torch.Tensor
    num_kept: torch.Tensor


class _Block(NamedTuple):
    """Some rank's patches as a backend reads them, and which of them each anchor is."""

    keys: Any
    patches: Any
    self_index: torch.Tensor
    rows: int


@dataclass(frozen=True)
class _Ring:
    """What the turns of one call share."""

    features_ND: torch.Tensor
    z_NE: torch.Tensor
    anchors_A: torch.Tensor
    settings: Settings
    ranks: Ranks
    averaging: ModuleType
    masking: ModuleType
    contrasting: ModuleType

    @property
    def of_softmax(self) -> softmax.Settings:
        """Masks and logits share the budget."""
        return self.settings.of_softmax._replace(memory_budget=self.settings.memory_budget // 2)

    def queries(self) -> Queries:
        """Walk (Eq. 2-5), a turn of the ring for every step."""
        start_AD = normalise(self.features_ND[self.anchors_A], self.settings.accumulator)
        return walk(start_AD, self.settings.cfg, self._average)

    def _average(self, queries_AD: torch.Tensor, phi_A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sum_AD, precision = torch.zeros_like(queries_AD), self.settings.precision
        count_A = torch.zeros_like(self.anchors_A)
        for _, (features_BD,) in blocks(self.ranks, self.features_ND):
            if not (len(features_BD) and len(sum_AD)):
                continue
            keys = self.averaging.prepare(normalise(features_BD, sum_AD.dtype), precision)
            rows = self.averaging.chunk_rows(keys, precision, self.settings.memory_budget)
            for part in row_chunks(len(sum_AD), rows):
                sums = self.averaging.sums(keys, precision, queries_AD[part], phi_A[part])
                sum_AD[part] += sums[0]
                count_A[part] += sums[1]
        return F.normalize(sum_AD, dim=1), count_A

    def blocks(self) -> Iterator[tuple[int, _Block]]:
        """(owner, its patches), as they pass by."""
        dtype, precision = self.settings.accumulator, self.settings.precision
        for owner, (features_BD, z_BE) in blocks(self.ranks, self.features_ND, self.z_NE):
            unit_BD, values_BE, index_A = normalise(features_BD, dtype), z_BE.to(dtype), self.anchors_A
            if owner != self.ranks.rank:
                # No anchor is among these patches. A patch of zeros stands in for all of them: as the
                # anchors' own one it is in no set.
                unit_BD, values_BE = (F.pad(values, (0, 0, 0, 1)) for values in (unit_BD, values_BE))
                index_A = torch.full_like(self.anchors_A, len(features_BD))
            keys = self.averaging.prepare(unit_BD, precision)
            patches = self.contrasting.prepare(values_BE, precision)
            yield owner, _Block(keys, patches, index_A, len(features_BD))

    def _sets(self, block: _Block, queries: Queries, gradient: bool) -> Iterator[tuple[slice, Any, Any]]:
        """(chunk of anchors, their sets in a block, numbers of kept patches)."""
        precision, budget = self.settings.precision, self.settings.memory_budget // 2
        if not (block.rows and len(self.anchors_A)):
            return
        like_BE = self.z_NE.new_empty((), dtype=self.settings.accumulator)
        like_BE = like_BE.expand(block.rows + 1, block.patches.width)
        rows = min(
            self.masking.chunk_rows(block.keys, precision, budget),
            self.contrasting.chunk_rows(like_BE, self.of_softmax, gradient),
        )
        for part in row_chunks(len(self.anchors_A), rows):
            sets, num_kept_C = self.masking.chunk(
                block.keys, precision, queries.take(part), block.self_index[part]
            )
            yield part, sets, num_kept_C
            del sets

    def losses(self, queries: Queries, own: Any) -> _Losses:
        """One turn: log-sum-exps, sums over positives and numbers, merged over blocks."""
        count, dtype = len(self.anchors_A), self.settings.accumulator
        lse_A = self.z_NE.new_full((count,), -torch.inf, dtype=dtype)
        hits_A, unit = torch.zeros_like(lse_A), self.contrasting.UNIT
        num_positive_A, num_kept_A = torch.zeros_like(self.anchors_A), torch.zeros_like(self.anchors_A)
        for _, block in self.blocks():
            for part, sets, num_kept_C in self._sets(block, queries, False):
                rows = own.take(self.anchors_A[part])
                loss_C, lse_C = self.contrasting.chunk(rows, block.patches, sets, self.of_softmax)
                lse_C = torch.where(num_kept_C > 0, lse_C * unit, -torch.inf)
                # The mean logit of this block's positives is what its loss lacks of its log-sum-exp.
                mean_C = torch.where(sets.num_positive > 0, lse_C - loss_C, 0.0)
                hits_A[part] += mean_C * sets.num_positive
                lse_A[part] = torch.logaddexp(lse_A[part], lse_C)
                num_positive_A[part] += sets.num_positive
                num_kept_A[part] += num_kept_C
        loss_A = lse_A - hits_A / num_positive_A.clamp(min=1)
        loss_A = torch.where(num_positive_A > 0, loss_A, 0.0)
        return _Losses(loss_A, lse_A, num_positive_A, num_kept_A)

    def gradient(self, queries: Queries, own: Any, found: _Losses, row_A: torch.Tensor) -> torch.Tensor:
        """One turn: d sum(row x temperature x loss) / dz of this rank's rows (N, E), all anchors."""
        code_width, unit = self.z_NE.shape[1], self.contrasting.UNIT
        dz_own = row_A.new_zeros((len(self.z_NE), own.width))
        # Also of anchors without positives: weights that count for nothing must not overflow.
        lse_A = torch.where(found.num_kept > 0, found.lse / unit, 0.0)
        homeward = Homeward(self.ranks)
        for _, block in self.blocks():
            part_BE = row_A.new_zeros((block.rows + 1, own.width))
            there = part_BE[: block.patches.values.shape[0]]
            for part, sets, _ in self._sets(block, queries, True):
                rows, all_sets = (
                    self.anchors_A[part],
                    Sets(sets.positive, sets.kept, found.num_positive[part]),
                )
                target = softmax.Target(row_A[part].contiguous(), there, dz_own, rows, of_all=False)
                self.contrasting.chunk(
                    own.take(rows), block.patches, all_sets, self.of_softmax, lse_A[part], target
                )
            homeward.add(part_BE[: block.rows, :code_width].contiguous())
        return homeward.home() + dz_own[:, :code_width]


def ring_loss(
    backend: str,
    features_ND: torch.Tensor,
    z_NE: torch.Tensor,
    anchors_A: torch.Tensor,
    settings: Settings,
    ranks: Ranks,
) -> Result:
    """Loss over all ranks' anchors, and the gradient of this rank's rows."""
    factor = guard({"features": features_ND, "z": z_NE}, anchors_A, len(features_ND))
    parts = (dispatch.load(op, backend) for op in ("proxy_average", "relation_masks", "masked_log_softmax"))
    anchors_A = in_range(anchors_A, len(features_ND))
    ring = _Ring(features_ND.contiguous(), z_NE.contiguous(), anchors_A, settings, ranks, *parts)
    queries = ring.queries()
    own = ring.contrasting.prepare(z_NE.to(settings.accumulator), settings.precision)
    found = ring.losses(queries, own)
    groups = Groups(ranks, settings.group)
    valid_A = groups.valid(found.num_positive > 0).clamp(min=1)[groups.index(anchors_A.device)]
    row_A = settings.group / valid_A.to(found.loss.dtype)  # near 1, which 16-bit operands hold well
    scale = settings.temperature / settings.base_temperature / (groups.total * settings.group)
    loss = add_up((found.loss * row_A).sum() * scale, ranks)
    dz_NE = loss.new_zeros((0, z_NE.shape[1]))
    if settings.with_gradient:
        dz_NE = ring.gradient(queries, own, found, row_A / settings.temperature)
    dz_scale, num_negative_A = loss.new_full((), scale), found.num_kept - found.num_positive
    num_positive_A = found.num_positive
    if factor is not None:  # one rank's bad numbers are in every rank's sets
        factor = add_up(factor, ranks) / ranks.size
        poison(factor, loss, dz_scale)
        num_positive_A, num_negative_A = (
            counts_A.masked_fill(factor.isnan(), -1) for counts_A in (num_positive_A, num_negative_A)
        )
    return Result(loss, dz_NE, dz_scale, num_positive_A, num_negative_A)
