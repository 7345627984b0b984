"""The ranks of one run: processes that ``torchrun`` started, each with some images of every batch.

torch.distributed is the engine: NCCL between GPUs, gloo between CPUs, and gloo for what the hosts tell each
other. Without torchrun there is one rank, and nothing here costs anything. A run of n ranks is the run of
one: the same batches, the same random draws (made for the whole batch on every rank, of which each takes its
images' own), losses and gradients over all patches, added up.
"""

import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ppap import stopping
from ppap.errors import PpapError, Stopped, UsageError

Value = TypeVar("Value")

_PATIENCE = datetime.timedelta(hours=2)
"""How long a rank waits for another that lives: rank 0 may be writing, or fitting clusters."""
_SAME_SIGNAL = 5.0
"""Seconds in which a second signal is the same request: torchrun passes on what a terminal sent already."""
_FIRST_SAYS_IT = 5.0
"""Seconds by which other ranks let the first one say an error that all of them have."""


@dataclass(frozen=True)
class World:
    """The ranks of this run, and which of them this process is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank on this machine: the number of its GPU."""
    group: Any = None
    """ProcessGroup of all ranks; None = one process."""
    joined: bool = True
    """Whether :func:`join` made the group."""

    @property
    def several(self) -> bool:
        """Whether there is more than one rank."""
        return self.size > 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0


_world, _batch = World(), None


def world() -> World:
    """The ranks of this run."""
    return _world


def launched() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def own_cores() -> int:
    """Cores for this process: those it may run on, shared among the ranks that torchrun started here.

    ``OMP_NUM_THREADS`` says less, as it does to the cells of a study that run side by side.
    """
    may = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() > 1 else 1
    told = os.environ.get("OMP_NUM_THREADS", "") if ranks == 1 else ""
    return max(min(may // ranks, int(told)) if told.isdigit() and int(told) else may // ranks, 1)


def by_ranks(command: Callable[[Sequence[str]], Any]) -> Callable[[Sequence[str]], Any]:
    """Mark a command as one that torchrun may start: its processes join for the time of the call."""

    @wraps(command)
    def joined(argv: Sequence[str]) -> Any:
        if launched() == 1:
            return command(argv)
        join()
        try:
            return command(argv)
        finally:
            if sys.exc_info()[0] is None:
                leave()

    joined.by_ranks = True  # type: ignore[attr-defined]
    return joined


def join() -> None:
    """Become a rank of the processes that torchrun started.

    Raises:
        UsageError: this build of torch has no torch.distributed.
    """
    import torch.distributed as dist

    global _world
    if not dist.is_available():
        raise UsageError("this build of torch has no torch.distributed: start the run without torchrun")
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank:
        sys.stdout = open(os.devnull, "w")  # what all ranks would say, the first one says
    engine = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
        if dist.is_nccl_available():
            engine = "cpu:gloo,cuda:nccl"
    dist.init_process_group(engine, timeout=_PATIENCE)
    stopping.same_request(_SAME_SIGNAL)
    _world = World(rank, size, local, dist.group.WORLD)


def leave() -> None:
    """Be a process of one's own from here on; what waits for this rank ends."""
    import torch.distributed as dist

    global _world
    if _world.several:
        joined, _world = _world.joined, World()
        if joined:
            dist.destroy_process_group()


@contextmanager
def rank_of(group: Any, rank: int, size: int) -> Iterator[None]:
    """Be a rank of a group that someone else made, and keeps."""
    global _world
    _world = World(rank, size, 0, group if size > 1 else None, joined=False)
    try:
        yield
    finally:
        _world = World()


def explain(error: PpapError) -> str | None:
    """In front of an error of this rank; the first one says at once what all would say, a stop for all."""
    rank = int(os.environ.get("RANK", "0")) if launched() > 1 else 0
    if not rank:
        return ""
    if isinstance(error, Stopped):
        return None
    time.sleep(_FIRST_SAYS_IT)
    return f"rank {rank}: "


def share(count: int) -> slice:
    """This rank's part of `count` things in order; parts differ by one at most."""
    return shares(count)[_world.rank]


def shares(count: int) -> list[slice]:
    """The parts of all ranks."""
    ends = [count * k // _world.size for k in range(_world.size + 1)]
    return [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]


@contextmanager
def step_of(images: int) -> Iterator[None]:
    """While a step of a batch of that many images, of all ranks together, is computed."""
    global _batch
    _batch = images if _world.several else None
    try:
        yield
    finally:
        _batch = None


def in_step() -> bool:
    """Whether several ranks compute a step together."""
    return _batch is not None


def dropout2d(features: Tensor, p: float, training: bool) -> Tensor:
    """Dropout of whole channels per image, (B, D, h, w), drawn for the images of all ranks."""
    if _batch is None or features.shape[0] == _batch or not training or p == 0:
        return F.dropout2d(features, p, training=training)
    noise = features.new_empty((_batch, features.shape[1], 1, 1)).bernoulli_(1 - p).div_(1 - p)
    return features * noise[share(_batch)]


def any_rank(asked: bool) -> bool:
    """Whether it is so on any rank; all ranks ask together."""
    return add_numbers([float(asked)])[0] > 0


def add_numbers(numbers: Sequence[float]) -> list[float]:
    """Sums over ranks of a few numbers of the hosts, in float64."""
    if not _world.several:
        return list(numbers)
    found = torch.tensor(numbers, dtype=torch.float64)
    _dist().all_reduce(found, group=_world.group)
    return found.tolist()


def counts_of(count: int) -> list[int]:
    """A whole number of every rank."""
    from ppap.kernels.ppap_loss.messages import gather_numbers

    return [row[0] for row in gather_numbers([count], _world.group, torch.device("cpu"))]


def add_(*values: Tensor) -> None:
    """Sums over ranks, in place and in one message, of tensors of one type and device."""
    flat = torch.cat([value.detach().reshape(-1) for value in values])
    _dist().all_reduce(flat, group=_world.group)
    for value, part in zip(values, flat.split([value.numel() for value in values]), strict=True):
        value.copy_(part.view_as(value))


def add_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Sum the gradients over ranks: one message, the same bits on every rank.

    Not DistributedDataParallel: it averages, wants every parameter used in one forward pass of one module,
    and here gradients of three modules are parts of a sum that the loss has formed already. A parameter that
    has no gradient on any rank keeps none.
    """
    missing = [p.grad is None for p in parameters]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    there = gradients[0].new_tensor([float(not one) for one in missing])
    add_(*gradients, there)
    if any(missing):
        for p, gradient, found in zip(parameters, gradients, there.tolist(), strict=True):
            p.grad = gradient if found else None


def gather(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Rows (count, ...) of all ranks in their order."""
    from ppap.kernels.ppap_loss.messages import gather_counted

    return gather_counted(values, counts, _world.group)


def from_first(make: Callable[[], Value]) -> Value:
    """What rank 0 makes, on every rank; an error of rank 0 is one of all."""
    if not _world.several:
        return make()
    message: list[Any] = [None, None]
    if _world.first:
        try:
            message[0] = make()
        except (PpapError, InterruptedError) as error:
            message[1] = error
    _dist().broadcast_object_list(message, src=0, group=_world.group, device=torch.device("cpu"))
    if message[1] is not None:
        raise message[1]
    return message[0]  # type: ignore[no-any-return]


def of_all(value: Value) -> list[Value]:
    """What every rank has, in their order; anything that can be pickled."""
    if not _world.several:
        return [value]
    found: list[Any] = [None] * _world.size
    _dist().all_gather_object(found, value, group=_world.group)
    return found


def together(work: Callable[[], Value]) -> Value:
    """Do this rank's part of something; where one rank fails or is stopped, all are.

    Raises:
        InterruptedError: `work` raised it on any rank.
        Stopped: any rank was stopped.
        PpapError: of this rank, or that another one had one.
    """
    if not _world.several:
        return work()
    found, error = None, None
    try:
        found = work()
    except (PpapError, InterruptedError) as raised:
        error = raised
    failure = isinstance(error, PpapError) and not isinstance(error, Stopped)
    kinds = [failure, isinstance(error, Stopped), isinstance(error, InterruptedError)]
    failed, ended, stopped = add_numbers([float(kind) for kind in kinds])
    if failed:
        raise error if failure else PpapError("another rank failed: its own message says why")
    if ended:
        raise error if isinstance(error, Stopped) else Stopped("stopped; give the same command again")
    if stopped:
        raise InterruptedError
    return found  # type: ignore[return-value]


def _dist() -> Any:
    import torch.distributed as dist

    return dist
