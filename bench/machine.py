"""The device that benchmarks run on: its name, waiting for it, memory."""

import ctypes
import math
import platform
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where the inputs are made, timed and measured."""


def synchronise() -> None:
    """Wait for the device, so that a time is that of the work and not of its launch."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def device_name() -> str:
    """Processor or GPU in words."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def matrix_rate(rows: int, columns: int, width: int, dtype: torch.dtype = torch.float32) -> float:
    """What ``torch.mm`` makes of (rows, width) x (width, columns) here and now [flop/s], the best of five."""
    left = torch.ones(rows, width, dtype=dtype, device=DEVICE)
    right = torch.ones(width, columns, dtype=dtype, device=DEVICE)
    out = left @ right
    times = []
    for _ in range(5):
        synchronise()
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        synchronise()
        times.append(time.perf_counter() - start)
    return 2 * rows * columns * width / min(times)


def best_times(timed: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest of `rounds` rounds, and of one that warms up; each goes through all in turn."""
    found = dict.fromkeys(timed, math.inf)
    for _ in range(rounds + 1):
        for name, run in timed.items():
            synchronise()
            start = time.perf_counter()
            run()
            synchronise()
            found[name] = min(found[name], time.perf_counter() - start)
    return found


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes of memory that one call of `run` adds at its peak; a first call goes unmeasured."""
    run()
    if DEVICE.type == "cuda":
        synchronise()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronise()
        return torch.cuda.max_memory_allocated() - before
    # glibc keeps freed memory: give it back first, so that what the call needs is what it adds.
    ctypes.CDLL(None).malloc_trim(0)
    before, peak, done = _resident(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], _resident())
            done.wait(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return max(peak[0] - before, 0)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
