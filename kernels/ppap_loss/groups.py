"""Groups of consecutive anchors that may begin on one rank and end on another."""

from dataclasses import dataclass

import torch

from .messages import Ranks, gather_equal


@dataclass(frozen=True)
class Groups:
    """The groups that this rank's anchors belong to.

    Attributes:
        ranks: of the group of processes.
        length: anchors per group of anchors; the last one of all may have fewer.
    """

    ranks: Ranks
    length: int

    @property
    def offset(self) -> int:
        """Anchors of the ranks before this one."""
        return sum(self.ranks.anchors[: self.ranks.rank])

    @property
    def total(self) -> int:
        """Groups of all ranks, 1 at least."""
        return max(-(-sum(self.ranks.anchors) // self.length), 1)

    def index(self, device: torch.device) -> torch.Tensor:
        """(A,) int64 group of each anchor of this rank, counted from the first that it takes part in."""
        place = torch.arange(self.ranks.anchors[self.ranks.rank], device=device) + self.offset
        return place // self.length - self.offset // self.length

    def parts(self) -> list[tuple[slice, bool]]:
        """This rank's anchors as runs of whole groups (True), and parts of a group (False) around them."""
        count = self.ranks.anchors[self.ranks.rank]
        last = self.offset + count == sum(self.ranks.anchors)
        head = min(-self.offset % self.length, count)
        whole = count if last else head + (count - head) // self.length * self.length
        if head == count:
            whole = head
        runs = [(slice(0, head), False), (slice(head, whole), True), (slice(whole, count), False)]
        return [(run, inside) for run, inside in runs if run.stop > run.start]

    def valid(self, valid_A: torch.Tensor) -> torch.Tensor:
        """(K,) int64: how many anchors of each of this rank's groups have positives, on all ranks together.

        Args:
            valid_A: (A,) bool, of this rank's anchors.
        """
        index_A = self.index(valid_A.device)
        known = self._spans()
        first, last = known[self.ranks.rank]
        own_K = torch.zeros(last - first + 1, dtype=torch.int64, device=valid_A.device)
        own_K.index_add_(0, index_A, valid_A.long())
        ends = torch.stack([own_K[0], own_K[-1] if last > first else own_K.new_zeros(())])
        of_all = gather_equal(ends, self.ranks.group)
        # What other ranks have of this rank's groups is at their ends.
        for rank, (start, stop) in enumerate(known):
            if rank != self.ranks.rank and self.ranks.anchors[rank]:
                for place, group in ((0, start), (1, stop)):
                    if first <= group <= last:
                        own_K[group - first] += of_all[rank, place]
        return own_K

    def _spans(self) -> list[tuple[int, int]]:
        """First and last group of every rank."""
        spans, begin = [], 0
        for count in self.ranks.anchors:
            spans.append((begin // self.length, max(begin + count - 1, begin) // self.length))
            begin += count
        return spans
