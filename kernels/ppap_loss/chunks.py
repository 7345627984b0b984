"""The loop over chunks of anchors that every implementation of ``ppap_loss`` runs.

Anchors are averaged in groups, and the weight of an anchor is 1 / (groups x anchors of its group that have
positives). A chunk either covers whole groups, whose weights are then known, or lies inside one group, whose
gradient is summed apart and scaled when the group ends.
"""

from collections.abc import Callable, Iterator

import torch

# (anchors (C,), (anchors per group, number of groups) or None, gradient to add to (N, E) or None) ->
# (losses, number of positives, number of negatives), each (C,). With a grouping the gradient is weighted.
Work = Callable[
    [torch.Tensor, tuple[int, int] | None, torch.Tensor | None],
    tuple[torch.Tensor, torch.Tensor, torch.Tensor],
]


def chunked_loss(
    work: Work, z_NE: torch.Tensor, anchors_A: torch.Tensor, group: int, with_gradient: bool, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unscaled losses (A,), gradient of their group mean (N, E) or (0, E), set sizes (A,) int64 twice.

    Args:
        work: one chunk of an implementation.
        z_NE: embeddings in the accumulator's dtype.
        anchors_A: row of each anchor.
        group: anchors per group.
        with_gradient: whether a gradient is wanted.
        rows: anchors per chunk at most.
    """
    count = anchors_A.shape[0]
    loss_A = z_NE.new_zeros(count)
    num_positives_A, num_negatives_A = torch.zeros_like(anchors_A), torch.zeros_like(anchors_A)
    dz_NE = torch.zeros_like(z_NE) if with_gradient else z_NE.new_zeros((0, z_NE.shape[1]))
    groups = -(-count // group)
    part_NE = torch.zeros_like(z_NE) if with_gradient and groups > 1 and group > rows else dz_NE
    for chunk, start_of_group in _plan(count, group, rows):
        inside = start_of_group is not None
        target_NE = part_NE if inside else dz_NE
        result = work(
            anchors_A[chunk], None if inside else (group, groups), target_NE if with_gradient else None
        )
        loss_A[chunk], num_positives_A[chunk], num_negatives_A[chunk] = result
        if inside and with_gradient and chunk.stop == min(start_of_group + group, count):
            part_NE /= (num_positives_A[start_of_group : chunk.stop] > 0).sum().clamp(min=1) * groups
            if part_NE is not dz_NE:
                dz_NE += part_NE
                part_NE.zero_()
    return loss_A, dz_NE, num_positives_A, num_negatives_A


def row_weights(
    num_positives_C: torch.Tensor, grouping: tuple[int, int] | None, dtype: torch.dtype
) -> torch.Tensor:
    """1 / (groups x anchors of the group that have positives), (C,), of a chunk of whole groups; else 1."""
    if grouping is None:
        return torch.ones_like(num_positives_C, dtype=dtype)
    group, groups = grouping
    valid_C = num_positives_C > 0
    padding = -valid_C.shape[0] % group
    sizes = torch.nn.functional.pad(valid_C, (0, padding)).view(-1, group).sum(dim=1).clamp(min=1)
    return (sizes * groups).to(dtype).reciprocal().repeat_interleave(group)[: valid_C.shape[0]]


def _plan(count: int, group: int, rows: int) -> Iterator[tuple[slice, int | None]]:
    """Chunks of at most `rows` anchors: whole groups and None, or a part and its group's first anchor."""
    if group <= rows:
        step = rows // group * group
        for start in range(0, count, step):
            yield slice(start, min(start + step, count)), None
        return
    for first in range(0, count, group):
        stop = min(first + group, count)
        for start in range(first, stop, rows):
            yield slice(start, min(start + rows, stop)), first
