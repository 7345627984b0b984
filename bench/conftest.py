"""Options and measures of ``pytest bench --benchmark-only``; ``--quick`` only checks that all of them run."""

import ctypes
import platform
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.shapes import SMALL, VITB16_CHUNK, VITS8_CHUNK, VITS16, VITS16_CHUNK, Shape

_MIB = 2**20
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where the inputs are made, timed and measured."""


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="one round on the smallest shape")
    parser.addoption(
        "--photos", metavar="DIR", help="folder of photographs for the dense CRF; without: scenes"
    )


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        quick = metafunc.config.getoption("--quick")
        shapes = [SMALL] if quick else [SMALL, VITS16_CHUNK, VITS16, VITB16_CHUNK, VITS8_CHUNK]
        metafunc.parametrize("shape", shapes, ids=str)


@pytest.fixture
def measure(benchmark, request):
    """Call measure(run, group): times `run`, puts peak memory, machine and versions into ``extra_info``.

    The group is a shape of the ops, or words.
    """

    def run_benchmark(run: Callable[[], object], group: Shape | str) -> None:
        if isinstance(group, Shape):
            group = f"{group.name}: N={group.patches} A={group.anchors} D={group.width}"
        benchmark.group = group
        benchmark.extra_info.update(
            peak_memory_mib=round(peak_memory(run) / _MIB, 1),
            device=device_name(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            python=platform.python_version(),
        )

        def timed() -> None:
            run()
            synchronise()

        rounds = 1 if request.config.getoption("--quick") else 5
        benchmark.pedantic(timed, rounds=rounds, iterations=1, warmup_rounds=1)

    return run_benchmark


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
