"""The loop over chunks of anchors that every implementation of ``ppap_loss`` runs.

Anchors are averaged in groups, and the gradient is that of the group mean times (groups x anchors per group):
then the weight of an anchor is (anchors per group) / (those of its group that have positives), near 1, which
16-bit operands hold well. A chunk either covers whole groups, whose weights are then known, or lies inside
one group, whose gradient is summed apart and weighted when the group ends.
"""

from collections.abc import Callable, Iterator

import torch

# (anchors (C,), anchors per group or None, gradient to add to (N, E) or None, whether it holds nothing yet)
# -> (losses, number of positives, number of negatives), each (C,). With a group the gradient is weighted.
Work = Callable[
    [torch.Tensor, int | None, torch.Tensor | None, bool],
    tuple[torch.Tensor, torch.Tensor, torch.Tensor],
]


def chunked_loss(
    work: Work | None,
    z_NE: torch.Tensor,
    anchors_A: torch.Tensor,
    group: int,
    with_gradient: bool,
    rows: int,
    zeroed: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses (A,), gradient (see above) (N, E) or (0, E), set sizes (A,) int64 twice; none of them scaled.

    Args:
        work: one chunk of an implementation; None without anchors.
        z_NE: embeddings in the accumulator's dtype.
        anchors_A: row of each anchor.
        group: anchors per group.
        with_gradient: whether a gradient is wanted.
        rows: anchors per chunk at most.
        zeroed: whether the gradient is 0 before the first chunk; else that chunk must write all of it.
    """
    make = z_NE.new_zeros if zeroed else z_NE.new_empty
    count = anchors_A.shape[0]
    dz_NE = make(z_NE.shape if with_gradient else (0, z_NE.shape[1]))
    apart = with_gradient and rows < group < count
    part_NE = make(z_NE.shape) if apart else dz_NE
    results = []
    for chunk, start_of_group in _plan(count, group, rows):
        inside = start_of_group is not None
        target_NE = (part_NE if inside else dz_NE) if with_gradient else None
        first = chunk.start == (start_of_group if inside else 0)
        assert work is not None, "anchors need an implementation"
        results.append(work(anchors_A[chunk], None if inside else group, target_NE, first))
        if start_of_group is not None and with_gradient and chunk.stop == min(start_of_group + group, count):
            own = -(-(chunk.stop - start_of_group) // rows)
            counts = [(num_positives_C > 0).sum() for _, num_positives_C, _ in results[-own:]]
            valid = sum(counts[1:], counts[0])
            part_NE *= group / valid.clamp(min=1).to(part_NE.dtype)
            if apart:
                dz_NE = dz_NE.add_(part_NE) if zeroed or start_of_group else dz_NE.copy_(part_NE)
                if zeroed:
                    part_NE.zero_()
    if len(results) == 1:
        loss_A, num_positives_A, num_negatives_A = results[0]
    else:
        empty = (z_NE.new_zeros(0), anchors_A.new_zeros(0), anchors_A.new_zeros(0))
        loss_A, num_positives_A, num_negatives_A = (
            torch.cat(parts) for parts in zip(empty, *results, strict=True)
        )
    return loss_A, dz_NE, num_positives_A, num_negatives_A


def row_weights(num_positives_C: torch.Tensor, group: int | None, dtype: torch.dtype) -> torch.Tensor:
    """group / (anchors of the group that have positives), (C,), of a chunk of whole groups; 1 where None."""
    if group is None:
        return torch.ones_like(num_positives_C, dtype=dtype)
    valid_C = num_positives_C > 0
    padding = -valid_C.shape[0] % group
    sizes = torch.nn.functional.pad(valid_C, (0, padding)).view(-1, group).sum(dim=1).clamp(min=1)
    return (group / sizes.to(dtype)).repeat_interleave(group)[: valid_C.shape[0]]


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
