"""Processes of a group for tests, of gloo or NCCL: started once, they serve many cases."""

import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any


def _serve(rank: int, size: int, engine: str, store: str, calls: Any, results: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if engine == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        engine,
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    groups = {n: dist.new_group(list(range(n))) for n in range(1, size + 1)}
    while (call := calls.get()) is not None:
        work, members, arguments = call
        try:
            value = work(groups[members], rank, *arguments) if rank < members else None
            results.put((rank, value, None))
        except Exception:
            results.put((rank, None, traceback.format_exc()))
    os._exit(0)  # the group goes with its processes; taking it apart takes seconds


class Pool:
    """`size` processes; :meth:`run` calls a module's function on the first n of them."""

    def __init__(self, size: int, engine: str = "gloo") -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._calls = [context.Queue() for _ in range(size)]
        self._results = context.Queue()
        store = os.path.join(self._folder.name, "store")
        self._processes = [
            context.Process(
                target=_serve, args=(r, size, engine, store, self._calls[r], self._results), daemon=True
            )
            for r in range(size)
        ]
        for process in self._processes:
            process.start()

    def run(self, work: Callable[..., Any], members: int, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """`work(group, rank, *arguments[rank])` on every member; their results in order, or their errors."""
        for rank, calls in enumerate(self._calls):
            calls.put((work, members, arguments[rank] if rank < members else ()))
        found = [None] * len(self._calls)
        for _ in self._calls:
            rank, value, error = self._results.get(timeout=120)
            found[rank] = value if error is None else RuntimeError(error)
        return found[:members]

    def close(self) -> None:
        """End the processes."""
        for calls in self._calls:
            calls.put(None)
        for process in self._processes:
            process.join(3)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()
