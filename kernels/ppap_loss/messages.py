"""What ranks of a process group tell each other: rows of all, rows of blocks passed round a ring, small sums.

torch.distributed carries everything. Ranks may have different numbers of rows; each knows those of all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

# Blocks and gradients on their way home are messages of their own; gloo tells them apart by these.
_BLOCK, _HOME = 1, 2


@dataclass(frozen=True)
class Ranks:
    """A group, this process in it, and how much each rank brought.

    Attributes:
        group: of torch.distributed.
        rank: of this process in the group.
        rows: patches of every rank.
        anchors: anchors of every rank.
    """

    group: ProcessGroup
    rank: int
    rows: tuple[int, ...]
    anchors: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.rows)

    @property
    def first_row(self) -> int:
        """Where this rank's patches begin among those of all."""
        return sum(self.rows[: self.rank])

    def owner(self, step: int) -> int:
        """Whose block this rank holds at a step of the ring; at step 0 and again at step `size` its own."""
        return (self.rank - step) % self.size


def gather_numbers(numbers: list[int], group: ProcessGroup, device: torch.device) -> list[list[int]]:
    """The whole numbers of every rank, as many from each; the host waits for them."""
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    found: list[list[int]] = gather_equal(own, group).tolist()
    return found


def gather_equal(own: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """(ranks, *shape) from a tensor of the same shape on every rank."""
    size = dist.get_world_size(group)
    found = own.new_empty((size * own.numel(),))
    _all_gather(found, own.contiguous().view(-1), group)
    return found.view(size, *own.shape)


def gather_rows(own_NC: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Rows of all ranks in their order, (sum of rows, C)."""
    return gather_counted(own_NC, ranks.rows, ranks.group)


def gather_counted(own: torch.Tensor, counts: Sequence[int], group: ProcessGroup) -> torch.Tensor:
    """Rows (sum of counts, ...) of all ranks in their order.

    Args:
        own: (count, ...) of this rank.
        counts: of every rank.
        group: of torch.distributed.
    """
    most = max(counts)
    padded = own.new_zeros((most, *own.shape[1:]))
    padded[: own.shape[0]] = own
    found = own.new_empty((len(counts) * most, *own.shape[1:]))
    # Bytes: not every engine knows every floating type.
    _all_gather(found.view(torch.uint8).view(-1), padded.view(torch.uint8).view(-1), group)
    if min(counts) == most:
        return found
    parts = found.view(len(counts), most, *own.shape[1:])
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _all_gather(found: torch.Tensor, own: torch.Tensor, group: ProcessGroup) -> None:
    """Under its name before torch 2.15, and since."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(found, own, group=group)


def add_up_rows(all_NC: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """This rank's rows of the sum over ranks of (sum of rows, C), added in the order of the ranks."""
    own, width = ranks.rows[ranks.rank], all_NC.shape[1]
    found = all_NC.new_empty((ranks.size * own * width,))
    dist.all_to_all_single(
        found,
        all_NC.contiguous().view(-1),
        [own * width] * ranks.size,
        [count * width for count in ranks.rows],
        group=ranks.group,
    )
    return found.view(ranks.size, own, width).sum(dim=0)


def add_up(own: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The sum over ranks of a tensor of one shape, in place."""
    dist.all_reduce(own, group=ranks.group)
    return own


class _Post:
    """Messages under way to the next and from the previous rank; their tensors live until they are done."""

    def __init__(
        self, ranks: Ranks, send: list[torch.Tensor], receive: list[torch.Tensor], kind: int
    ) -> None:
        after, before = (
            dist.get_global_rank(ranks.group, (ranks.rank + step) % ranks.size) for step in (1, -1)
        )
        ops = [dist.P2POp(dist.isend, t, after, ranks.group, kind) for t in send if t.numel()]
        ops += [dist.P2POp(dist.irecv, t, before, ranks.group, kind) for t in receive if t.numel()]
        self._alive = (send, receive)
        self._requests = dist.batch_isend_irecv(ops) if ops else []

    def wait(self) -> None:
        """Until all have arrived, and what was sent may be overwritten."""
        for request in self._requests:
            request.wait()
        self._alive = ([], [])


def blocks(ranks: Ranks, *own: torch.Tensor) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
    """(owner, its tensors), this rank's own first; the next ones travel while the caller computes.

    Args:
        ranks: of the group.
        own: (rows, C) each, contiguous, of one row count.
    """
    held = own
    for step in range(ranks.size):
        post = None
        if step + 1 < ranks.size:
            count = ranks.rows[ranks.owner(step + 1)]
            coming = tuple(t.new_empty((count, t.shape[1])) for t in own)
            post = _Post(ranks, list(held), list(coming), _BLOCK)
        yield ranks.owner(step), held
        if post is not None:
            post.wait()
            held = coming


class Homeward:
    """Gradients that follow their blocks round the ring, each rank adding its part, one step behind."""

    def __init__(self, ranks: Ranks) -> None:
        """Args: of the group."""
        self._ranks, self._step = ranks, 0
        self._post: _Post | None = None
        self.arrived: torch.Tensor | None = None

    def add(self, part_NC: torch.Tensor) -> None:
        """This rank's part for the block that it holds now; it goes on with what came from the others."""
        if self._post is not None and self.arrived is not None:
            self._post.wait()
            part_NC = part_NC + self.arrived
        self._step += 1
        self.arrived = part_NC
        if self._ranks.size > 1:
            count = self._ranks.rows[self._ranks.owner(self._step)]
            self.arrived = part_NC.new_empty((count, part_NC.shape[1]))
            self._post = _Post(self._ranks, [part_NC.contiguous()], [self.arrived], _HOME)

    def home(self) -> torch.Tensor:
        """The whole gradient of this rank's own block, after `size` calls of :meth:`add`."""
        if self._post is not None:
            self._post.wait()
        assert self.arrived is not None and self._step == self._ranks.size
        return self.arrived
