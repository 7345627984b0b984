"""What of a run is one rank's: its records, its lock, what is said of a resumed run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ppap.errors import UsageError
from ppap.parallel import any_rank, from_first, leave, world
from ppap.runs.lock import FolderLock
from ppap.runs.rundir import RunDir
from ppap.stopping import StopRequest


class SilentRunDir(RunDir):
    """The run directory as ranks other than the first see it: they read, and write nothing."""

    def create(self, config: Any, lock: FolderLock) -> None:
        """The first rank does it."""

    def reopen(self, config: Any, step: int) -> None:
        """The first rank does it."""

    def write_config(self, config: Any, *, finished: bool = False) -> None:
        """The first rank does it."""

    def write_text(self, name: str, text: str) -> None:
        """The first rank does it."""

    def follow(self, config: Any, step: int, offline: bool) -> None:
        """The first rank's alone."""

    def append(self, row: dict[str, Any]) -> None:
        """The first rank does it."""


class NoLock(FolderLock):
    """A lock that the first rank holds for all."""

    def take(self) -> "NoLock":
        """Nothing."""
        return self


def records_of(path: Path) -> tuple[RunDir, FolderLock]:
    """Run directory and lock of this rank."""
    option = f"--resume {path}"
    if world().first:
        return RunDir(path), FolderLock(path, option)
    return SilentRunDir(path), NoLock(path, option)


def by_first(module: nn.Module, work: Callable[[], None]) -> None:
    """Let the first rank change a module; the others take over its weights.

    Raises:
        What `work` raises, on every rank.
    """
    if not world().several:
        return work()

    def changed() -> dict[str, Tensor]:
        work()
        return {name: value.cpu() for name, value in module.state_dict().items()}

    module.load_state_dict(from_first(changed))
    return None


def anywhere(stop: StopRequest) -> bool:
    """Whether any rank was asked to stop; all ranks ask together."""
    return any_rank(stop.asked)


def goes_on() -> bool:
    """After the last step: comparison and report are the first rank's, which needs no other."""
    first = world().first
    leave()
    return first


def other_ranks(state: dict[str, Any]) -> str | None:
    """What to say where a run goes on with another number of ranks than saved it."""
    before, now = state.get("ranks", 1), world().size
    if before == now:
        return None
    return (
        f"saved by {before} process{'es' * (before > 1)}, continued by {now}: the same batches, anchors and "
        "dropout; sums are added in another order, so that losses agree within rounding, not bit for bit"
    )


def check_ranks(batch_size: int) -> None:
    """Refuse more ranks than there are images in a batch.

    Raises:
        UsageError: naming both.
    """
    if batch_size < world().size:
        raise UsageError(
            f"--train.batch-size is {batch_size}, fewer images than the {world().size} processes that "
            "torchrun started; give more, or a smaller --nproc-per-node"
        )
