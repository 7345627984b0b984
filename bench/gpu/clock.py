"""Times of calls on the device and on the host, and the memory that they take."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

# A measurement ends after this long, whatever the rounds [s].
LONGEST_S = 2.0


class Timing(NamedTuple):
    """Medians of a call: device [ms], host [ms]; memory above what was there [MiB] on a GPU; calls timed."""

    ms: float
    host_ms: float
    peak_mib: float | None
    rounds: int


def synchronise() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median(values: list[float]) -> float:
    """The middle value."""
    return sorted(values)[len(values) // 2]


def time_calls(run: Callable[[], object], rounds: int) -> Timing:
    """Time `rounds` calls one after the other, as a training loop makes them; others go before, unmeasured.

    On a GPU the device's time is that between events around each call. Where the host is slower than the
    device, that is the host's time.
    """
    start = time.perf_counter()
    run()
    synchronise()
    if rounds > 1 and time.perf_counter() - start < LONGEST_S:
        run()
    peak = _peak_mib(run)
    marks, host, start = [_mark()], [], time.perf_counter()
    for _ in range(rounds):
        before = time.perf_counter()
        run()
        host.append((time.perf_counter() - before) * 1e3)
        marks.append(_mark())
        if time.perf_counter() - start > LONGEST_S:
            break
    synchronise()
    device = [_between(a, b) for a, b in zip(marks, marks[1:], strict=False)]
    return Timing(median(device), median(host), peak, len(host))


def _peak_mib(run: Callable[[], object]) -> float | None:
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    synchronise()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _mark() -> object:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: object, second: object) -> float:
    if isinstance(first, float):
        return (second - first) * 1e3
    return first.elapsed_time(second)


def matrix_rate(device: torch.device) -> float:
    """The machine's own bf16 matrix rate [FLOP/s], of products of 8192 x 8192 random values."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192.0**3 / (time_calls(lambda: a @ b, 20).ms / 1e3)
