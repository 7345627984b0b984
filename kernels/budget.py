"""The memory budget of an op, and the chunks of anchors that fit into it."""

from collections.abc import Iterator

DEFAULT_BUDGET = 512 * 2**20


class MemoryBudgetError(ValueError):
    """The memory budget is too small for a single anchor."""


def rows_within(memory_budget: int, bytes_per_row: int, multiple: int = 1) -> int:
    """How many anchor rows fit in the budget: a multiple of the rows that a backend computes at once.

    Raises:
        MemoryBudgetError: not even that many do.
    """
    bytes_per_block = max(bytes_per_row, 1) * multiple
    blocks = memory_budget // bytes_per_block
    if blocks < 1:
        needs = "one anchor needs" if multiple == 1 else f"a tile of {multiple} anchors needs"
        raise MemoryBudgetError(
            f"memory_budget is {memory_budget} bytes; {needs} {bytes_per_block}: give more"
        )
    return blocks * multiple


def row_chunks(total: int, rows: int) -> Iterator[slice]:
    """Consecutive slices of at most `rows` rows that cover 0..total-1."""
    for start in range(0, total, rows):
        yield slice(start, min(start + rows, total))
